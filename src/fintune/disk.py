"""How much disk each stage will take, predicted from the sizes of the base model before anything is loaded."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

from fintune.options import Config

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_MARGIN = 1.05
_HEADER_BYTES = 100 << 20
"""Largest header of a safetensors file that its authors' reader takes."""

_EXAMPLE_BYTES = 24_000
"""A prepared FinQA example: prompt text, gold record and tokens; the largest page of dev makes 21 kB."""


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a folder's safetensors files, from their headers alone."""
    found: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > _HEADER_BYTES:
                continue  # damaged; the stage that reads it says so
            header = json.loads(file.read(length))
        found |= {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    return found


def prepare_bytes(config: Config) -> int:
    """Examples, gold records and tokens."""
    if config.data.source == "finqa":
        files = [path for path in (config.data.train, config.data.eval) if path is not None and path.is_file()]
        # JSON shrinks about fivefold under gzip; text, gold and tokens are each about as large as the JSON.
        return int(sum(path.stat().st_size * (15 if path.suffix == ".gz" else 3) for path in files) * _MARGIN)
    pages = config.data.statements
    companies = pages.train_companies + pages.eval_companies
    return companies * pages.pages_per_company * pages.questions_per_page * _EXAMPLE_BYTES


def train_bytes(config: Config) -> int:
    """Adapter, and three checkpoints of adapter and Adam's two moments, in float32."""
    layers = [shape for name, shape in _base(config).items() if len(shape) == 2 and "embed" not in name]
    weights = sum(config.adapter.r * sum(shape) for shape in layers)
    return int(4 * weights * (1 + 3 * 3) * _MARGIN) + 20_000_000


def merge_bytes(config: Config) -> int:
    """The merged folder."""
    width = _BYTES.get(config.merge.dtype, 2)
    return int(_num_weights(config) * width * _MARGIN) + 20_000_000


def export_bytes(config: Config) -> int:
    """All GGUF files together; the merged model has the base's shapes.

    Raises:
        ModelError: A base that cannot become a GGUF, found out before hours of training.
    """
    from fintune.gguf.export import predict_bytes as gguf_bytes

    return gguf_bytes(_base_folder(config), config.export.types)


def predict_bytes(config: Config) -> int:
    """Predictions, or their scores."""
    return 20_000_000


def _num_weights(config: Config) -> int:
    return sum(math.prod(shape) for shape in _base(config).values())


def _base(config: Config) -> dict[str, tuple[int, ...]]:
    return shapes(_base_folder(config))


def _base_folder(config: Config) -> Path:
    from fintune import models

    path = models.fetch(models.resolve(config.model.name, revision=config.model.revision)).path
    assert path is not None, "fetch fills the path"
    return path
