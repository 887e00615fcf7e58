"""What the finance commands leave, laid out where their flags say: adapter, merged folder, GGUF files.

Large files are links to those of the run where the disk allows it; each appears whole.
"""

from __future__ import annotations

import filecmp
import os
import shutil
from pathlib import Path

import click

from fintune.artifact import write_atomically
from fintune.options import Config

_LAST = "tokenizer.json"
"""The file of a tokenizer that is laid out last: with it, all of it is there."""


def lay_out_adapter(config: Config, target: Path) -> None:
    """Adapter and tokenizer, as copies: who trains on from there must not write into the run."""
    from fintune import models

    lay_out(config.folder / "train" / "adapter", target, link=False)
    if not (target / "adapter_config.json").is_file() or (target / _LAST).is_file():
        return
    beside = config.folder / ".tokenizer"
    reference = models.resolve(config.model.name, revision=config.model.revision)
    models.load_tokenizer(reference, trust_remote_code=config.model.trust_remote_code).save_pretrained(beside)
    for path in sorted(beside.iterdir(), key=lambda path: path.name == _LAST):
        place(path, target / path.name, link=False, quiet=True)
    shutil.rmtree(beside)


def lay_out(source: Path, target: Path, *, link: bool) -> None:
    """Every file of a finished folder but its manifest, each appearing whole."""
    if not source.is_dir():
        return
    for path in sorted(source.iterdir()):
        if path.is_file() and path.name != "manifest.json":
            place(path, target / path.name, link=link, quiet=True)
    click.echo(f"{target}")


def place(source: Path, target: Path, *, link: bool = True, quiet: bool = False) -> None:
    """The same file under another name: a hard link, or a copy where asked or on another disk."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if not _is_there(source, target, link=link):
        part = target.with_name(f".{target.name}.part")
        part.unlink(missing_ok=True)
        try:
            (os.link if link else shutil.copyfile)(source, part)
        except OSError:  # another disk, or one without links
            shutil.copyfile(source, part)
        part.replace(target)
    if not quiet:
        click.echo(f"{target}: {target.stat().st_size / 1e6:.0f} MB")


def _is_there(source: Path, target: Path, *, link: bool) -> bool:
    if not target.is_file():
        return False
    if target.samefile(source):
        return link  # who wants a copy may write into it
    return filecmp.cmp(source, target, shallow=False)


def modelfile(source: Path, name: str, target: Path) -> None:
    """Ollama's file beside the quantised model, naming it."""
    if source.is_file():
        text = source.read_text(encoding="utf-8").replace(name, target.name)
        path = target.with_name(f"{target.name}.Modelfile")
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            write_atomically(path, text)
