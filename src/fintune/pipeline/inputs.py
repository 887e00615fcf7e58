"""What the steps of a run read from outside it: fingerprints, and checks before anything runs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from fintune.config import Config
from fintune.data import hub
from fintune.data.files import describe_tried, local_files
from fintune.errors import DataError, ModelError
from fintune.export.gguf import llama_cpp_checkout
from fintune.models import builtin
from fintune.models.folder import check_unquantised, model_fingerprint
from fintune.models.load import check_four_bit, fetch, fetch_config, resolve
from fintune.pipeline.stages.train import check_training
from fintune.util.files import sha256_file


def model_source(config: Config) -> dict[str, str]:
    """Return the fingerprint of the base model."""
    return {"model.name": _fingerprint_model(config.model.name, config.model.revision)}


@lru_cache(maxsize=4)
def _fingerprint_model(name: str, revision: str | None) -> str:
    if name.startswith(builtin.PREFIX):
        return builtin.describe(name).wheel_sha256  # known before the model is fetched
    return model_fingerprint(fetch(name, revision=revision).path)


def base_and_adapter_sources(config: Config) -> dict[str, str]:
    """Return the fingerprints of the base model and of the adapter that is trained further."""
    folder = config.adapter.continue_from
    files = ("adapter_config.json", "adapter_model.safetensors") if folder is not None else ()
    return model_source(config) | {
        f"adapter.continue_from {name}": sha256_file(folder / name) for name in files if folder
    }


def importance_source(config: Config) -> dict[str, str]:
    """Return the hash of the importance matrix, if one is read from a file."""
    return {option: sha256_file(path) for option, path in _importance_file(config)}


def base_and_importance_sources(config: Config) -> dict[str, str]:
    """Return the fingerprints of the base model and of the importance matrix."""
    return importance_source(config) | model_source(config)


def data_and_model_sources(config: Config) -> dict[str, str]:
    """Return the hashes of the data files and the fingerprint of the model."""
    # The files come first, so that a missing one is found before the model is fetched.
    return {option: sha256_file(path) for option, path in _data_files(config)} | model_source(config)


def check_data_and_model(config: Config) -> None:
    """Refuse a missing data file, a dataset that cannot be reached, or a model name that cannot be right."""
    list(_data_files(config))
    for source in config.data.sources if config.data.source == "chat" else ():
        if source.path.startswith(hub.PREFIX):
            hub.check_split(hub.HubSplit.of_source(source))
    check_model(config)


def check_model(config: Config) -> None:
    """Refuse a model name that cannot be right."""
    resolve(config.model.name, revision=config.model.revision)


def check_base(config: Config) -> None:
    """Refuse a quantised base: training, merge and export need its own weights."""
    check_model(config)
    if not config.model.name.startswith(builtin.PREFIX):
        check_unquantised(fetch_config(config.model.name, revision=config.model.revision))


def check_export(config: Config) -> None:
    """Refuse an importance matrix or a llama.cpp checkout that cannot be used."""
    list(_importance_file(config))
    if config.export.llama_cpp_path is not None:
        llama_cpp_checkout.check_checkout(config.export.llama_cpp_path, config.export.types)
    check_base(config)


def check_four_bit_model(config: Config) -> None:
    """Refuse 4-bit predictions on a machine that cannot make them, before hours of training."""
    check_four_bit()
    check_model(config)


def check_training_inputs(config: Config) -> None:
    """Refuse what would stop the training."""
    check_training(config)
    check_base(config)


def _data_files(config: Config) -> Iterator[tuple[str, Path]]:
    if config.data.source == "chat":
        for number, source in enumerate(config.data.sources):
            # The options identify a hub dataset; its newest revision is looked up when it is first read.
            yield from ((f"data.sources[{number}] {path}", path) for path in local_files(source))
    for name, path in (("train", config.data.train), ("eval", config.data.eval)):
        if config.data.source == "finqa" and path is not None:
            if not path.is_file():
                what = "is a folder, not a file" if path.is_dir() else "no such file"
                raise DataError(what, path=path, hint=f"data.{name} must name a FinQA JSON file{describe_tried(path)}")
            yield f"data.{name}", path


def _importance_file(config: Config) -> Iterator[tuple[str, Path]]:
    path = config.export.imatrix_file
    if path is not None:
        if not path.is_file():
            what = "is a folder, not a file" if path.is_dir() else "no such file"
            raise ModelError(f"{path}: {what}", hint="export.imatrix must name an importance matrix, or be compute")
        yield "export.imatrix", path
