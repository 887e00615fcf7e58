"""The files of a run that are pushed to the hub, each of them checked against the manifest of its stage."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fintune.config import Config
from fintune.data.licences import NOT_STATED, is_non_commercial, licence_of
from fintune.errors import ArtifactError, ModelError
from fintune.manifest import MANIFEST, Manifest
from fintune.models import adapter as adapters
from fintune.models import builtin
from fintune.models import load as model_ref
from fintune.publish.push import Upload
from fintune.util.console import track
from fintune.util.files import read_json, sha256_file

CARD = "README.md"
_STEPS = {"adapter": "train", "merged": "merge", "gguf": "export"}
_LEGAL = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")


@dataclass(frozen=True)
class CardOrigin:
    """The base model or a source of the training data.

    Attributes:
        name: Name for people.
        hub_id: ``OWNER/NAME``; empty if it is not on the hub.
        licence: Its licence, or ``not stated``.
        non_commercial: Whether its licence forbids commercial use.
        note: A remark to print after the name.
    """

    name: str
    hub_id: str
    licence: str
    non_commercial: bool = False
    note: str = ""


@dataclass(frozen=True)
class Publication:
    """The files of a push, without the card, and the facts for the card: manifests by step name, and the base model."""

    uploads: list[Upload]
    manifests: Mapping[str, Manifest]
    base: CardOrigin


def gather_files(config: Config, inputs: Mapping[str, Path], folder: Path) -> Publication:
    """Collect and check the files of a push from the finished folders by step name.

    The adapter's configuration is written into ``folder`` with the base model's name on the hub.

    Raises:
        ArtifactError: A requested result or that of ``prepare`` is missing, is older than its inputs, or was changed.
        ModelError: The base model's folder is damaged.
    """
    manifests = {step: _manifest(path) for step, path in inputs.items()}
    for what in config.publish.artifacts:
        if _STEPS[what] not in inputs:
            raise ArtifactError(
                f"publish.artifacts names {what}, but {_STEPS[what]} has no result in {config.folder}",
                hint="run it first: fintune run CONFIG --skip publish",
            )
    if "prepare" not in manifests:
        raise ArtifactError(
            f"{config.folder} has no result of prepare, without which the card cannot name the data and their licences",
            hint="restore it, or rerun it: fintune prepare CONFIG",
        )
    _refuse_stale(manifests)
    base, base_folder = base_of(config)
    uploads = dict(_stage_files(config, inputs, manifests))
    if "adapter" in config.publish.artifacts:
        name = _below(config.publish.adapter_folder, "adapter_config.json")
        path = folder / "adapter_config.json"
        adapter = read_json(inputs["train"] / "adapter" / "adapter_config.json", ModelError)
        adapter["base_model_name_or_path"] = base.hub_id or base.name
        path.write_text(json.dumps(adapter, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        uploads[name] = Upload(name, path)
    for legal in sorted(base_folder.iterdir()) if base_folder is not None else []:
        if legal.is_file() and legal.name.upper().startswith(_LEGAL):
            uploads.setdefault(legal.name, Upload(legal.name, legal))
    return Publication([uploads[name] for name in sorted(uploads)], manifests, base)


def _stage_files(
    config: Config, inputs: Mapping[str, Path], manifests: Mapping[str, Manifest]
) -> Iterator[tuple[str, Upload]]:
    chosen: list[tuple[str, str, str]] = []
    gguf = {*gguf_file_names(config), "Modelfile"}
    for what in config.publish.artifacts:
        step = _STEPS[what]
        for name in manifests[step].outputs:
            target = name
            if what == "adapter":
                # The base file describes the weights on this machine, which may differ from those on the hub.
                is_pushed = name.startswith("adapter/") and name != f"adapter/{adapters.BASE_FILE}"
                target = _below(config.publish.adapter_folder, name.removeprefix("adapter/"))
            else:
                is_pushed = name in gguf if what == "gguf" else name != CARD
            if is_pushed:
                chosen.append((step, name, target))
    for step, name, target in track(chosen, "check", len(chosen)):
        path = inputs[step] / name
        digest = sha256_file(path) if path.is_file() else None
        if digest != manifests[step].outputs[name]:
            raise ArtifactError(
                f"{path} is not what {step} wrote: it was {'changed' if digest else 'removed'} since",
                hint=f"rerun it: fintune run CONFIG --redo {step}",
            )
        yield target, Upload(target, path)


def gguf_file_names(config: Config) -> list[str]:
    """Return the names of the run's GGUF files in the order of ``export.types``, by convention the smallest last."""
    return [f"{config.run.name}-{kind}.gguf" for kind in config.export.types]


def _below(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _refuse_stale(manifests: Mapping[str, Manifest]) -> None:
    """Refuse a result that was made from an older result, so that the card shows no figures of another model."""
    for step, manifest in manifests.items():
        for name, digest in manifest.key.inputs.items():
            if step != "report" and digest and name in manifests and manifests[name].digest != digest:
                raise ArtifactError(
                    f"{step} was made from an older result of {name}", hint="rerun it first: fintune run CONFIG"
                )


def _manifest(folder: Path) -> Manifest:
    try:
        return Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"{folder / MANIFEST}: cannot be read ({str(error).splitlines()[0]})",
            hint=f"rerun it: fintune run CONFIG --redo {folder.name}",
        ) from None


def base_of(config: Config) -> tuple[CardOrigin, Path | None]:
    """Return the base model for the card, and its folder if it is on this machine. No weights are downloaded."""
    name, stated_id = config.model.name, config.publish.base_model or ""
    note = ""
    try:
        ref = model_ref.resolve(name, revision=config.model.revision)
    except ModelError:  # the base model was removed after training
        ref = model_ref.ModelName(name, Path(name).name)
    folder, hub_id = ref.local_path, stated_id
    if name.startswith(builtin.PREFIX):
        origin, _, note = builtin.describe(name).origin.partition(", ")
        hub_id = stated_id or origin
    elif folder is None and "/" in name and not Path(name).is_absolute():
        hub_id = stated_id or name
        folder = _cached(name, config.model.revision)
        note = f"revision {config.model.revision}" if config.model.revision else ""
    licence = ref.licence or (licence_of("", path=folder).name if folder is not None else NOT_STATED)
    if licence == "other" and folder is not None:
        named = re.search(r"^license_name:\s*(\S+)", (folder / CARD).read_text("utf-8", "replace"), re.MULTILINE)
        licence = named[1].strip("\"'") if named else licence
    return CardOrigin(hub_id or ref.base_name, hub_id, licence, is_non_commercial(licence), note), folder


def _cached(name: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    path: Any = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(path).parent if isinstance(path, str) else None
