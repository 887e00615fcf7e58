"""What the finance commands leave, laid out where their flags say: adapter, merged folder, GGUF files.

Large files are links to those of the run where the disk allows it; each appears whole.
"""

from __future__ import annotations

import filecmp
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import click

from fintune import llama_cpp_checkout
from fintune.artifact import Slot, write_atomically
from fintune.errors import ConfigError
from fintune.options import Config
from fintune.progress import say

_RECORD = "llama_cpp.json"
"""In the run's folder: what the checkout's tools made of what."""
_LAST = "tokenizer.json"
"""The file of a tokenizer that is laid out last: with it, all of it is there."""


def convert(checkout: llama_cpp_checkout.Checkout, config: Config, *, half: Path, small: Path, kind: str) -> None:
    """Both GGUF files by the checkout's tools, each unless it is from this merged model already.

    Args:
        checkout: The tools.
        config: The run, whose merged folder is converted.
        half: Gets the 16-bit file.
        small: Gets the quantised file.
        kind: Its type.

    Raises:
        ConfigError: There is no merged model.
        ResourceError: A tool fails.
    """
    merged = Slot(config.folder, "merge")
    manifest = merged.manifest()
    if manifest is None:
        raise ConfigError("there is no merged model to convert", hint="leave out --skip_merge")
    record = config.folder / _RECORD
    known = _read(record)
    made = {"merged": manifest.digest, "converter": str(checkout.converter.resolve())}
    wanted = {"half": made | _stamp(half), "small": made | _stamp(small) | {"type": kind}}
    if known == wanted and half.is_file() and small.is_file():
        say(f"{half}, {small}: up to date")
        return
    if not half.is_file() or known.get("half") != wanted["half"]:
        llama_cpp_checkout.convert(checkout, merged.folder, half)
        write_atomically(record, json.dumps({"half": made | _stamp(half)}, indent=1))
    llama_cpp_checkout.quantize(checkout, half, small, kind)
    done = {"half": made | _stamp(half), "small": made | _stamp(small) | {"type": kind}}
    write_atomically(record, json.dumps(done, indent=1))
    click.echo(f"{small}: {small.stat().st_size / 1e6:.0f} MB")


def try_converter(checkout: llama_cpp_checkout.Checkout, config: Config) -> None:
    """Convert the base model's vocabulary, since the converter imports what it needs for a model only then.

    Args:
        checkout: The tools.
        config: The run; nothing is tried where it has trained already.

    Raises:
        ModelError: The base model is not there.
        ResourceError: The converter cannot, with its last line; before hours of training.
    """
    from fintune import models

    if (config.folder / "train").is_dir():
        return
    model = models.fetch(models.resolve(config.model.name, revision=config.model.revision)).path
    assert model is not None, "fetch fills the path"
    with tempfile.TemporaryDirectory(prefix="fintune-vocabulary-") as place:
        llama_cpp_checkout.convert(checkout, model, Path(place) / "vocabulary.gguf", vocabulary_only=True)


def _stamp(path: Path) -> dict[str, object]:
    return {"file": str(path.resolve()), "size": path.stat().st_size if path.is_file() else None}


def _read(path: Path) -> Mapping[str, object]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


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
