"""The disk space of each stage, predicted from the base model's sizes before anything is loaded."""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from fintune.config import Config, SourceOptions
from fintune.data.files import local_files
from fintune.errors import ModelError
from fintune.models.folder import TensorEntry, read_safetensors_header, weight_files

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_STORED_BYTES = {"F64": 8, "F32": 4, "F8_E4M3": 1, "F8_E5M2": 1}
_GGUF_BYTES = {"F32": 4.0, "F16": 2.0, "BF16": 2.0}
"""Bytes per weight. A quantised type has at most those of Q8_0: 34 bytes for 32 weights."""
_MARGIN = 1.05

_EXAMPLE_BYTES = 24_000
"""A prepared FinQA example with prompt, gold record and tokens. The largest page of dev needs 21 kB."""
_ROW_BYTES = 20_000
"""A prepared conversation of a thousand words, in bytes."""
_HUB_ROWS = 100_000
"""Assumed rows of a hub dataset, whose size is unknown before it is fetched."""


class Tensor(NamedTuple):
    """A stored weight."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def num_weights(self) -> int:
        """The number of weights in the tensor."""
        return math.prod(self.shape)


def tensors(folder: Path) -> dict[str, Tensor]:
    """Return every weight of a model folder by name, from the headers of its safetensors files.

    Raises:
        ModelError: The index cannot be read.
    """
    entries: list[TensorEntry] = []
    for path in weight_files(folder):
        # The stage that reads a damaged file reports it.
        with suppress(ModelError):
            entries += read_safetensors_header(path)
    return {entry.name: Tensor(entry.shape, entry.dtype) for entry in entries}


def prepare_bytes(config: Config) -> int:
    """Predict the size of examples, gold records and tokens."""
    if config.data.source == "finqa":
        files = [path for path in (config.data.train, config.data.eval) if path is not None and path.is_file()]
        # gzip shrinks JSON fivefold. Text and gold record are each about as large as the JSON. Tokens, at five bytes
        # each, take two or three times as much with a tokenizer of short tokens.
        return int(sum(path.stat().st_size * (25 if path.suffix == ".gz" else 5) for path in files) * _MARGIN)
    if config.data.source == "chat":
        return sum(_source_bytes(source) for source in config.data.sources)
    pages = config.data.statements
    companies = pages.train_companies + pages.eval_companies
    return companies * pages.pages_per_company * pages.questions_per_page * _EXAMPLE_BYTES


def _source_bytes(source: SourceOptions) -> int:
    if source.path.startswith("hub:"):
        return (source.max_rows or _HUB_ROWS) * _ROW_BYTES
    # Text, and tokens at five bytes each. Parquet shrinks text as gzip does.
    packed = (".gz", ".parquet")
    stored = sum(path.stat().st_size * (25 if path.suffix in packed else 5) for path in local_files(source))
    rows = source.max_rows * _ROW_BYTES if source.max_rows is not None else stored
    return int(min(stored, rows) * max(source.weight, 1.0) * _MARGIN)


def train_bytes(config: Config) -> int:
    """Predict the size of trained weights, best weights, and checkpoints with Adam's two moments (float32)."""
    written = 3 * (config.train.save_total_limit + 1)
    best = 2 if config.train.select_checkpoint != "last" else 0
    if config.adapter.kind == "full":
        all_weights = sum(tensor.num_weights for tensor in _base(config).values())
        return int(4 * all_weights * (1 + written + best) * _MARGIN) + 20_000_000
    layers = [t.shape for name, t in _base(config).items() if len(t.shape) == 2 and "embed" not in name]
    weights = sum(config.adapter.r * sum(shape) for shape in layers)
    return int(4 * weights * (1 + written + best) * _MARGIN) + 20_000_000


def merge_bytes(config: Config) -> int:
    """Predict the size of the merged folder."""
    stored = sum(
        tensor.num_weights * _BYTES.get(config.merge.dtype, _STORED_BYTES.get(tensor.dtype, 2))
        for tensor in _base(config).values()
    )
    return int(stored * _MARGIN) + 20_000_000


def export_bytes(config: Config) -> int:
    """Predict the size of all GGUF files and of a computed importance matrix, from the shapes of the base.

    Raises:
        ModelError: The base cannot become a GGUF file, or the importance matrix does not fit it. This is found before
            hours of training.
    """
    from fintune.export.gguf.imatrix import read_imatrix
    from fintune.export.gguf.writer import predict_gguf_bytes

    if config.export.llama_cpp_path is not None:
        return _checkout_bytes(config)
    file = config.export.imatrix_file
    importance = None if file is None else read_imatrix(file)
    matrix = 0
    if config.export.computes_imatrix:
        # A float32 number for each column of each matrix, and the names.
        shapes = [tensor.shape for tensor in _base(config).values() if len(tensor.shape) == 2]
        matrix = sum(4 * columns + 500 for _, columns in shapes)
    return predict_gguf_bytes(_base_folder(config), config.export.types, importance) + matrix


def _checkout_bytes(config: Config) -> int:
    """Predict what a llama.cpp checkout writes, for families unknown here too: the files, and one in 16 or 32 bits."""
    weights = sum(tensor.num_weights for tensor in _base(config).values())
    kinds = [*config.export.types, "F32" if config.merge.dtype == "float32" else "F16"]
    return int(sum(weights * _GGUF_BYTES.get(kind.upper(), 1.1) for kind in kinds) * _MARGIN) + 20_000_000


def predict_bytes(config: Config) -> int:
    """Predict the size of predictions or of their scores."""
    return 20_000_000


def _base(config: Config) -> dict[str, Tensor]:
    return tensors(_base_folder(config))


def _base_folder(config: Config) -> Path:
    from fintune.models.load import fetch_base

    return fetch_base(config).path
