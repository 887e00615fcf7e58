"""What the finance commands leave, laid out where their flags say: adapter, merged folder, GGUF files.

Large files are links to those of the run where the disk allows it; each appears whole. Only what these commands laid
out is replaced or removed (:mod:`fintune.cli.legacy.owned_files`).
"""

from __future__ import annotations

import filecmp
import os
import shutil
from pathlib import Path

import click

from fintune.cli.legacy.owned_files import Record
from fintune.config import Config
from fintune.errors import ArtifactError, ResourceError
from fintune.manifest import MANIFEST, Manifest
from fintune.util.console import say
from fintune.util.files import write_atomically

_LAST = "tokenizer.json"
"""The file of a tokenizer that is laid out last: with it, all of it is there."""
_CONFIG = "config.json"
"""Without it no library loads a folder, so it goes first and comes last."""


def lay_out_adapter(config: Config, target: Path) -> None:
    """Adapter and tokenizer, as copies: who trains on from there must not write into the run."""
    from fintune.models import load as models

    source = config.folder / "train" / "adapter"
    lay_out(source, target, kind="adapter", link=False)
    if not (source / "adapter_config.json").is_file() or (source / _LAST).is_file():
        return
    manifest = Manifest.model_validate_json((config.folder / "train" / MANIFEST).read_bytes())
    made_from = manifest.key.sources.get("model.name", "")
    if Record(target).is_whole("tokenizer", made_from, _LAST):
        return
    beside = config.folder / ".tokenizer"
    shutil.rmtree(beside, ignore_errors=True)
    reference = models.fetch_base(config)
    models.load_tokenizer(reference, trust_remote_code=config.model.trust_remote_code).save_pretrained(beside)
    _remove_others(target, "tokenizer", {path.name for path in beside.iterdir()})
    for path in sorted(beside.iterdir(), key=lambda path: path.name == _LAST):
        place(path, target / path.name, kind="tokenizer", made_from=made_from, link=False, quiet=True)
    shutil.rmtree(beside)


def lay_out(source: Path, target: Path, *, kind: str, link: bool) -> None:
    """Every file of a finished folder but its manifest, each appearing whole; what an earlier one had more goes.

    Raises:
        ArtifactError: A file of someone else's is in the way.
        ResourceError: A file cannot be written.
    """
    if not source.is_dir():
        return
    paths = [path for path in sorted(source.iterdir()) if path.is_file() and path.name != MANIFEST]
    names, record = {path.name for path in paths}, Record(target)
    old = target / _CONFIG
    changes = any(not is_there(path, target / path.name, link=link) for path in paths)
    changes |= any(path.name not in names for path in record.owned(kind))
    if changes and record.owns(old):
        record.remove(old)
    for path in (path for path in paths if path.name != _CONFIG):
        place(path, target / path.name, kind=kind, link=link, quiet=True)
    _remove_others(target, kind, names)
    if _CONFIG in names:
        place(source / _CONFIG, old, kind=kind, link=link, quiet=True)
    click.echo(f"{target}")


def _remove_others(target: Path, kind: str, names: set[str]) -> None:
    """Libraries take an old model.safetensors before new shards, and an old template before a new tokenizer's."""
    record = Record(target)
    for path in record.owned(kind):
        if path.name not in names:
            record.remove(path)


def place(
    source: Path, target: Path, *, kind: str, made_from: str = "", link: bool = True, quiet: bool = False
) -> None:
    """The same file under another name: a hard link, or a copy where asked or on another disk.

    Raises:
        ArtifactError: A file of someone else's is in the way.
        ResourceError: It cannot be written.
    """
    part = target.with_name(f".{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        record = Record(target.parent)
        if not is_there(source, target, link=link):
            if os.path.lexists(target) and not record.owns(target):
                raise ArtifactError(
                    f"{target} is in the way: these commands did not lay it out",
                    hint=f"move it elsewhere and run the same command again; the new one is {source}",
                )
            part.unlink(missing_ok=True)
            _link_or_copy(source, part, link=link)
            record.add(target, as_in=part, kind=kind, made_from=made_from)
            part.replace(target)
        elif record.owns(target):
            record.add(target, as_in=target, kind=kind, made_from=made_from)
    except OSError as error:
        raise ResourceError(
            f"{target}: cannot be written ({error.strerror or error})",
            hint=f"{source} is whole: make room or name another place, and run the same command again",
        ) from None
    finally:
        if part.is_file():
            part.unlink()
    if not quiet:
        click.echo(f"{target}: {target.stat().st_size / 1e6:.0f} MB")


def _link_or_copy(source: Path, part: Path, *, link: bool) -> None:
    if link:
        try:
            os.link(source, part)
        except OSError:  # another disk, or one without links
            shutil.copyfile(source, part)
    else:
        shutil.copyfile(source, part)


def is_there(source: Path, target: Path, *, link: bool) -> bool:
    """Whether the target is the source's file already, or where copies are wanted one with the same content."""
    if not target.is_file():
        return False
    if target.samefile(source):
        return link  # who wants a copy may write into it
    return filecmp.cmp(source, target, shallow=False)


def modelfile(source: Path, name: str, target: Path) -> None:
    """Ollama's file beside the quantised model, naming it; one that the user changed stays."""
    if not source.is_file():
        return
    text = source.read_text(encoding="utf-8").replace(name, target.name)
    path = target.with_name(f"{target.name}.Modelfile")
    if path.is_file() and path.read_text(encoding="utf-8", errors="replace") == text:
        return
    record = Record(path.parent)
    if os.path.lexists(path) and not record.owns(path):
        say(f"{path}: stays as it is, these commands did not write it so; the run's own is {source}")
        return
    beside = path.with_name(f".{path.name}.part")
    write_atomically(beside, text)
    record.add(path, as_in=beside, kind="gguf")
    beside.replace(path)
