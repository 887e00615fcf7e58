"""What the steps of a run read from outside it: its fingerprint, and what is refused before anything runs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from importlib import import_module
from pathlib import Path

from fintune.config import Config
from fintune.data.files import local_files, tried
from fintune.errors import DataError, ModelError
from fintune.export.gguf import llama_cpp_checkout
from fintune.util.files import sha256_file


def nothing(config: Config) -> dict[str, str]:
    """No file and no model."""
    return {}


def model(config: Config) -> dict[str, str]:
    """The base model's weights."""
    return {"model.name": _model_fingerprint(config.model.name, config.model.revision)}


@lru_cache(maxsize=4)
def _model_fingerprint(name: str, revision: str | None) -> str:
    from fintune.models import builtin
    from fintune.models import load as models

    if name.startswith(builtin.PREFIX):
        return builtin.describe(name).wheel_sha256  # known before it is fetched
    return models.model_fingerprint(models.fetch(name, revision=revision).path)


def importance(config: Config) -> dict[str, str]:
    """The importance matrix, where one is read from a file."""
    return {option: _content(path) for option, path in _importance_file(config)}


def base_and_importance(config: Config) -> dict[str, str]:
    """Both."""
    return importance(config) | model(config)


def data_and_model(config: Config) -> dict[str, str]:
    """The files of the data, and the model."""
    # The files first: a missing one is known before the model is fetched.
    found = {option: _content(path) for option, path in _files(config)}
    return found | model(config)


def check_data_and_model(config: Config) -> None:
    """Refuse a missing file or model."""
    list(_files(config))
    check_model(config)


def check_model(config: Config) -> None:
    """Refuse a model that cannot be."""
    from fintune.models.resolve import resolve

    resolve(config.model.name, revision=config.model.revision)


def check_base(config: Config) -> None:
    """Of training, merge and export, which need its own weights."""
    from fintune.models import builtin
    from fintune.models.folder import check_unquantised
    from fintune.models.resolve import fetch_config

    check_model(config)
    if not config.model.name.startswith(builtin.PREFIX):
        check_unquantised(fetch_config(config.model.name, revision=config.model.revision))


def check_export(config: Config) -> None:
    """Refuse an importance matrix or a llama.cpp checkout that is of no use."""
    list(_importance_file(config))
    if config.export.llama_cpp_path is not None:
        llama_cpp_checkout.check(config.export.llama_cpp_path, config.export.types)
    check_base(config)


def check_publishing(config: Config) -> None:
    """Refuse what would stop the publishing."""
    import_module("fintune.pipeline.stages.publish").check(config)


def check_four_bit_model(config: Config) -> None:
    """Refuse 4 bits where they cannot be read."""
    # Before hours of training.
    import_module("fintune.models.load").check_four_bit()
    check_model(config)


def check_training(config: Config) -> None:
    """Refuse what would stop the training."""
    import_module("fintune.pipeline.stages.train").check(config)
    check_base(config)


def _files(config: Config) -> Iterator[tuple[str, Path]]:
    if config.data.source == "chat":
        for number, source in enumerate(config.data.sources):
            # A hub dataset is what its options say; its newest is looked for when it is first read.
            yield from ((f"data.sources[{number}] {path}", path) for path in local_files(source))
        return
    for name in ("train", "eval"):
        path: Path | None = getattr(config.data, name)
        if config.data.source == "finqa" and path is not None:
            if not path.is_file():
                what = "is a folder, not a file" if path.is_dir() else "no such file"
                raise DataError(what, path=path, hint=f"data.{name} must name a FinQA JSON file{tried(path)}")
            yield f"data.{name}", path


def _importance_file(config: Config) -> Iterator[tuple[str, Path]]:
    path = config.export.importance_file
    if path is not None:
        if not path.is_file():
            what = "is a folder, not a file" if path.is_dir() else "no such file"
            raise ModelError(f"{path}: {what}", hint="export.importance must name an importance matrix, or be compute")
        yield "export.importance", path


def _content(path: Path) -> str:
    stat = path.stat()
    return _hash(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=16)
def _hash(path: Path, size: int, mtime_ns: int) -> str:
    # Size and time are only the cache's key; the fingerprint is of the content.
    return sha256_file(path)
