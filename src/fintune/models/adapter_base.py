"""Which base weights an adapter was trained on: noted beside it, and compared wherever both are given. Needs no torch.

An adapter on other weights of the same sizes answers without an error and wrongly; on the model that it was merged into
it counts twice. Names tell public models apart, but folders move, so the weights themselves are compared.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from fintune.errors import ModelError
from fintune.models.folder import adapter_base, file_hash, weight_files

FILE = "fintune.json"
"""Beside ``adapter_config.json``, which PEFT alone writes and reads."""

_BASE = "base_weights_sha256"
_MERGED = "adapter_sha256"
_WEIGHTS = "adapter_model.safetensors"
_PUBLIC_NAME = re.compile(r"builtin:\S+|[\w.-]+/[\w.-]+")


def weights_hash(folder: Path) -> str:
    """sha256 over the contents of a model's weight files; tokenizer and settings may differ between equal bases.

    Raises:
        ModelError: The folder holds no weights.
    """
    hashes = sorted(map(file_hash, weight_files(folder)))
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def note(adapter: Path, base: Path) -> None:
    """Write beside an adapter which weights it belongs to."""
    (adapter / FILE).write_text(json.dumps({_BASE: weights_hash(base)}) + "\n", encoding="utf-8")


def merged_facts(adapter: Path) -> dict[str, str]:
    """For the manifest of a merged folder: what :func:`check_weights` knows its adapter by."""
    return {_MERGED: file_hash(adapter / _WEIGHTS)}


def check_name(name: str, adapter: Path) -> None:
    """Compare public names, before anything is fetched or loaded.

    Args:
        name: The model, as the user named it.
        adapter: Folder in PEFT's format.

    Raises:
        ModelError: No adapter there, or it says that it was trained on another public model.
    """
    if not (adapter / "adapter_config.json").is_file():
        raise ModelError(
            f"{adapter} holds no adapter: adapter_config.json is missing", hint="give a folder in PEFT format"
        )
    trained_on = adapter_base(adapter)
    public = [_PUBLIC_NAME.fullmatch(each) and not Path(each).exists() for each in (name, trained_on)]
    if all(public) and name.casefold() != trained_on.casefold():
        raise ModelError(f"{adapter} was trained on {trained_on}, not on {name}", hint=f"use it with {trained_on}")


def is_named(base: Path, trained_on: str) -> bool:
    """Whether a model folder is the one that an adapter says it was trained on: that folder, or the hub's copy."""
    if Path(trained_on).expanduser().resolve() == base.resolve():
        return True
    return "models--" + trained_on.replace("/", "--") in base.resolve().parts


def check_weights(base: Path, adapter: Path, *, name: str | None = None) -> None:
    """Compare the weights with those that the adapter was trained on, where these are known.

    They are noted beside adapters that this package saved; of others the folder that ``adapter_config.json`` names is
    read, where it is there. Hashes of large files are kept in the cache folder.

    Args:
        base: Model folder.
        adapter: Folder in PEFT's format.
        name: The model as the user named it; the folder where None.

    Raises:
        ModelError: They are other weights, or have this adapter in them already.
    """
    given, trained_on = name or str(base), adapter_base(adapter)
    if _is_merged(base, adapter):
        raise ModelError(
            f"{given} has {adapter} merged into it already", hint=f"leave the adapter out, or use it with {trained_on}"
        )
    expected = _expected(base, adapter, trained_on)
    if expected is not None and expected != weights_hash(base):
        raise ModelError(
            f"{adapter} was trained on {trained_on}, not on the weights of {given}", hint=f"use it with {trained_on}"
        )


def _expected(base: Path, adapter: Path, trained_on: str) -> str | None:
    noted = _read(adapter / FILE).get(_BASE)
    if isinstance(noted, str):
        return noted
    folder = Path(trained_on).expanduser()
    if not (folder / "config.json").is_file() or folder.resolve() == base.resolve():
        return None
    return weights_hash(folder)


def _is_merged(base: Path, adapter: Path) -> bool:
    facts = _read(base / "manifest.json").get("facts")
    found = facts.get(_MERGED) if isinstance(facts, dict) else None
    return found is not None and (adapter / _WEIGHTS).is_file() and found == file_hash(adapter / _WEIGHTS)


def _read(path: Path) -> dict[str, object]:
    """A JSON object; empty where there is none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
