"""What of a run is pushed to the hub: files, proved to be those that the stages wrote, and the facts of their card."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fintune.config import Config
from fintune.data.licences import NOT_STATED, is_non_commercial, licence_of
from fintune.errors import ArtifactError, ConfigError, ModelError
from fintune.manifest import MANIFEST, Manifest
from fintune.models import adapter as adapters
from fintune.models import builtin
from fintune.models import resolve as model_ref
from fintune.report.card import Base
from fintune.util.console import track
from fintune.util.files import read_json, sha256_file
from fintune.util.hub import Upload

CARD = "README.md"
_STEPS = {"adapter": "train", "merged": "merge", "gguf": "export"}
_LEGAL = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")


@dataclass(frozen=True)
class Publication:
    """What is pushed, without the card.

    Attributes:
        uploads: The files.
        manifests: Of every finished stage, by its name.
        base: The base model.
    """

    uploads: list[Upload]
    manifests: Mapping[str, Manifest]
    base: Base


def gather(config: Config, inputs: Mapping[str, Path], folder: Path) -> Publication:
    """Find the files.

    Args:
        config: The run.
        inputs: Finished folders by step name.
        folder: Gets what is not pushed as it lies in the run: the adapter's configuration, which names the base model
            as the hub knows it.

    Raises:
        ArtifactError: A result that is asked for, or that of ``prepare``, is not there; one was made from an older one,
            or was changed since.
        ModelError: The base model's folder is damaged.
    """
    manifests = {step: _manifest(path) for step, path in inputs.items()}
    for what in config.publish.artifacts:
        if _STEPS[what] not in inputs:
            raise ArtifactError(
                f"publish.artifacts asks for {what}, and {_STEPS[what]} has no result in {config.folder}",
                hint="make it first: fintune run CONFIG",
            )
    if "prepare" not in manifests:
        raise ArtifactError(
            f"{config.folder} has no result of prepare, without which the card cannot name the data and their licences",
            hint="put it back, or make it anew first: fintune prepare CONFIG",
        )
    _refuse_stale(manifests)
    base, base_folder = base_of(config)
    found = dict(_files(config, inputs, manifests))
    if "adapter" in config.publish.artifacts:
        name = _below(config.publish.adapter_folder, "adapter_config.json")
        path = folder / "adapter_config.json"
        adapter = read_json(inputs["train"] / "adapter" / "adapter_config.json", ModelError)
        adapter["base_model_name_or_path"] = base.hub_id or base.name
        path.write_text(json.dumps(adapter, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        found[name] = Upload(name, path, sha256_file(path))
    for legal in sorted(base_folder.iterdir()) if base_folder is not None else []:
        if legal.is_file() and legal.name.upper().startswith(_LEGAL):
            found.setdefault(legal.name, Upload(legal.name, legal))
    return Publication([found[name] for name in sorted(found)], manifests, base)


def _files(
    config: Config, inputs: Mapping[str, Path], manifests: Mapping[str, Manifest]
) -> Iterator[tuple[str, Upload]]:
    chosen: list[tuple[str, str, str]] = []
    gguf = {*gguf_names(config), "Modelfile"}
    for what in config.publish.artifacts:
        step = _STEPS[what]
        for name in manifests[step].outputs:
            if name == f"adapter/{adapters.BASE_FILE}":
                continue  # of weights on this machine; the hub's may be those before they were rounded
            if what == "adapter" and name.startswith("adapter/"):
                chosen.append((step, name, _below(config.publish.adapter_folder, name.removeprefix("adapter/"))))
            elif name in gguf if what == "gguf" else what == "merged" and name != CARD:
                chosen.append((step, name, name))
    for step, name, there in track(chosen, "check", len(chosen)):
        path = inputs[step] / name
        digest = sha256_file(path) if path.is_file() else None
        if digest != manifests[step].outputs[name]:
            raise ArtifactError(
                f"{path} is not what {step} wrote: it was {'changed' if digest else 'removed'} since",
                hint=f"--redo {step} makes it anew",
            )
        yield there, Upload(there, path, digest)


def gguf_names(config: Config) -> list[str]:
    """GGUF files of the run, as the export stage calls them, the smallest last by custom."""
    return [f"{config.run.name}-{kind}.gguf" for kind in config.export.types]


def _below(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _refuse_stale(manifests: Mapping[str, Manifest]) -> None:
    """A figure of an older model must not stand beside a newer one."""
    for step, manifest in manifests.items():
        for name, digest in manifest.key.inputs.items():
            if step != "report" and digest and name in manifests and manifests[name].digest != digest:
                raise ArtifactError(
                    f"{step} was made from an older result of {name}", hint="make it anew first: fintune run CONFIG"
                )


def _manifest(folder: Path) -> Manifest:
    try:
        return Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"{folder / MANIFEST}: cannot be read ({str(error).splitlines()[0]})",
            hint=f"--redo {folder.name} makes it anew",
        ) from None


def base_of(config: Config) -> tuple[Base, Path | None]:
    """The base model as the card names it, and its folder where it is on this machine. No weights are fetched."""
    name, given = config.model.name, config.publish.base_model or ""
    note = ""
    try:
        ref = model_ref.resolve(name, revision=config.model.revision)
    except ModelError:  # its folder has gone since; what was made from it is there
        ref = model_ref.ModelName(name, Path(name).name)
    folder, hub_id = ref.local_path, given
    if name.startswith(builtin.PREFIX):
        origin, _, note = builtin.describe(name).origin.partition(", ")
        hub_id = given or origin
    elif folder is None and "/" in name and not Path(name).is_absolute():
        hub_id = given or name
        folder = _cached(name, config.model.revision)
        note = f"revision {config.model.revision}" if config.model.revision else ""
    licence = ref.licence or (licence_of("", path=folder).name if folder is not None else NOT_STATED)
    if licence == "other" and folder is not None:
        named = re.search(r"^license_name:\s*(\S+)", (folder / CARD).read_text("utf-8", "replace"), re.MULTILINE)
        licence = named[1].strip("\"'") if named else licence
    shown = hub_id or ref.base_name
    base = Base(shown, hub_id, licence, note, is_non_commercial(licence), config.model.trust_remote_code)
    return base, folder


def _cached(name: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found: Any = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def refuse_licence(asked: str | None, restricted: Mapping[str, str]) -> None:
    """A licence that the user gives must not allow what the origin of the model forbids.

    Args:
        asked: ``publish.license``.
        restricted: What forbids commercial use, with its licence.

    Raises:
        ConfigError: It does.
    """
    if asked and restricted and not is_non_commercial(asked) and asked.lower() != "other":
        names = ", ".join(f"{name} ({licence})" for name, licence in restricted.items())
        raise ConfigError(
            f"publish.license: {asked} allows commercial use, which {names} forbids",
            hint="leave it out, and the card says what they ask for",
            option="publish.license",
        )
