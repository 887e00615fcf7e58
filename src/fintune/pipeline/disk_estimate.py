"""The disk space of each stage, predicted from the base model's sizes before anything is loaded."""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from fintune.config import Config, SourceOptions
from fintune.data.files import local_files
from fintune.errors import ModelError
from fintune.export.gguf.imatrix import read_imatrix
from fintune.export.gguf.writer import predict_gguf_bytes
from fintune.models.load import fetch_base
from fintune.models.safetensors_files import read_safetensors_header, weight_files

_MERGED_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_STORED_BYTES = {"F64": 8, "F32": 4, "F8_E4M3": 1, "F8_E5M2": 1}
_GGUF_BYTES = {"F32": 4.0, "F16": 2.0, "BF16": 2.0}
"""Bytes per weight. A quantised type has at most those of Q8_0: 34 bytes for 32 weights."""
_MARGIN = 1.05
_FIXED_BYTES = 20_000_000
"""Configuration, tokenizer and logs."""
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


def tensors(folder: Path) -> dict[str, Tensor]:
    """Return every weight of a model folder by name, from the headers of its safetensors files.

    Raises:
        ModelError: The index cannot be read.
    """
    found: dict[str, Tensor] = {}
    for path in weight_files(folder):
        with suppress(ModelError):  # the stage that reads a damaged file reports it
            found |= {entry.name: Tensor(entry.shape, entry.dtype) for entry in read_safetensors_header(path)}
    return found


def prepare_bytes(config: Config) -> int:
    """Predict the size of examples, gold records and tokens."""
    if config.data.source == "finqa":
        # Text and gold record are each about as large as the JSON. Tokens, at five bytes each, take two or three times
        # as much with a tokenizer of short tokens.
        return sum(_unpacked_bytes(path) for path in (config.data.train, config.data.eval) if path and path.is_file())
    if config.data.source == "chat":
        return sum(map(_source_bytes, config.data.sources))
    pages = config.data.statements
    companies = pages.train_companies + pages.eval_companies
    return companies * pages.pages_per_company * pages.questions_per_page * _EXAMPLE_BYTES


def _unpacked_bytes(path: Path) -> int:
    # gzip and Parquet shrink text fivefold.
    return int(path.stat().st_size * (25 if path.suffix in (".gz", ".parquet") else 5) * _MARGIN)


def _source_bytes(source: SourceOptions) -> int:
    if source.path.startswith("hub:"):
        return (source.max_rows or _HUB_ROWS) * _ROW_BYTES
    stored = sum(map(_unpacked_bytes, local_files(source)))
    return int(
        (stored if source.max_rows is None else min(stored, source.max_rows * _ROW_BYTES)) * max(source.weight, 1)
    )


def train_bytes(config: Config) -> int:
    """Predict the size of trained weights, best weights, and checkpoints with Adam's two moments (float32)."""
    copies = 1 + 3 * (config.train.save_total_limit + 1) + (2 if config.train.select_checkpoint != "last" else 0)
    if config.adapter.kind == "full":
        num_trained = _num_weights(config)
    else:
        layers = [t.shape for name, t in _base(config).items() if len(t.shape) == 2 and "embed" not in name]
        num_trained = sum(config.adapter.r * sum(shape) for shape in layers)
    return int(4 * num_trained * copies * _MARGIN) + _FIXED_BYTES


def merge_bytes(config: Config) -> int:
    """Predict the size of the merged folder."""
    stored = sum(
        math.prod(tensor.shape) * _MERGED_BYTES.get(config.merge.dtype, _STORED_BYTES.get(tensor.dtype, 2))
        for tensor in _base(config).values()
    )
    return int(stored * _MARGIN) + _FIXED_BYTES


def export_bytes(config: Config) -> int:
    """Predict the size of all GGUF files and of a computed importance matrix, from the shapes of the base.

    Raises:
        ModelError: The base cannot become a GGUF file, or the importance matrix does not fit it. This is found before
            hours of training.
    """
    if config.export.llama_cpp_path is not None:
        # Families that are unknown here, too. The checkout also writes a file in 16 or 32 bits.
        types = [*config.export.types, "F32" if config.merge.dtype == "float32" else "F16"]
        stored = sum(_num_weights(config) * _GGUF_BYTES.get(kind.upper(), 1.1) for kind in types)
        return int(stored * _MARGIN) + _FIXED_BYTES
    file = config.export.imatrix_file
    importance = None if file is None else read_imatrix(file)
    matrix = 0
    if config.export.computes_imatrix:
        # A float32 number for each column of each matrix, and the names.
        matrix = sum(4 * t.shape[1] + 500 for t in _base(config).values() if len(t.shape) == 2)
    return predict_gguf_bytes(fetch_base(config).path, config.export.types, importance) + matrix


def _base(config: Config) -> dict[str, Tensor]:
    return tensors(fetch_base(config).path)


def _num_weights(config: Config) -> int:
    return sum(math.prod(tensor.shape) for tensor in _base(config).values())
