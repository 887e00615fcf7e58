"""Read and write safetensors files row by row. Memory is bounded by the number of rows that are read at a time.

Source: github.com/huggingface/safetensors, "Format": 8 bytes little-endian header length, a JSON header, then the data.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from fintune.errors import ModelError
from fintune.util.files import read_json

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""Name of a type in safetensors -> in torch, for the types that can be merged and exported."""

INDEX_FILE = "model.safetensors.index.json"

_ELEMENT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_MAX_HEADER_BYTES = 100_000_000
"""Largest header that the safetensors library reads."""


class _HeaderEntry(BaseModel):
    dtype: str
    shape: Annotated[tuple[Annotated[int, Field(ge=0, lt=1 << 48)], ...], Field(max_length=16)]
    data_offsets: tuple[int, int]


_HEADER = TypeAdapter(dict[str, _HeaderEntry | dict[str, str]])


@dataclass(frozen=True)
class StoredTensor:
    """The position of one tensor in a file."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """Type as the format writes it, such as "F32", "BF16" or "U8"."""
    path: Path
    offset: int
    """First byte of the data in the file."""
    num_bytes: int


def read_safetensors_header(path: Path) -> list[StoredTensor]:
    """Return the tensors of a safetensors file, sorted by name, from its header alone.

    Raises:
        ModelError: The file is truncated, too long, or not a safetensors file.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if not 0 < header_bytes <= min(size - 8, _MAX_HEADER_BYTES):
                raise ValueError("no header")
            header = _HEADER.validate_json(file.read(header_bytes), strict=True)
        entries = {name: entry for name, entry in sorted(header.items()) if name != "__metadata__"}
    except ValueError as error:  # pydantic's error is one
        raise ModelError(f"{path} is not a readable safetensors file", hint="download or copy it again") from error
    tensors, end = [], 8 + header_bytes
    for name, entry in entries.items():
        if not isinstance(entry, _HeaderEntry):
            raise ModelError(f"{path}: tensor {name[:200]} has no type and shape", hint="download or copy it again")
        start, stop = (8 + header_bytes + offset for offset in entry.data_offsets)
        expected = prod(entry.shape) * _ELEMENT_BYTES.get(entry.dtype, 0)
        if not 8 + header_bytes <= start <= stop or (expected and stop - start != expected):
            raise ModelError(
                f"{path}: tensor {name[:200]} has {stop - start:,} bytes, its shape says {expected:,}",
                hint="download or copy the file again",
            )
        tensors.append(StoredTensor(name, entry.shape, entry.dtype, path, start, stop - start))
        end = max(end, stop)
    if size != end:
        raise ModelError(
            f"{path} has {size:,} bytes, but its header describes {end:,}",
            hint="it is truncated or damaged; download or copy it again",
        )
    return tensors


def read_float_tensors(path: Path) -> list[StoredTensor]:
    """Return the tensors of a safetensors file as :func:`read_safetensors_header` does.

    Raises:
        ModelError: As for that function, or a tensor holds no 16 or 32-bit floats.
    """
    tensors = read_safetensors_header(path)
    for tensor in tensors:
        if tensor.dtype not in DTYPES:
            raise ModelError(
                f"{path}: tensor {tensor.name} has type {tensor.dtype}, expected one of {', '.join(DTYPES)}",
                hint="a quantised model can be neither merged nor exported: use the 16-bit weights it was made from",
            )
    return tensors


def read_weight_map(folder: Path) -> dict[str, str]:
    """Return tensor name -> file by the index of a sharded model; an empty dictionary without an index.

    Raises:
        ModelError: The index is unreadable, or names a file outside the folder.
    """
    index = folder / INDEX_FILE
    if not index.is_file():
        return {}
    try:
        weight_map = TypeAdapter(dict[str, str]).validate_python(read_json(index, ModelError).get("weight_map"))
    except ValidationError:
        weight_map = {}
    shards = set(weight_map.values())
    if not weight_map or any(Path(shard).name != shard or not 0 < len(shard) < 256 for shard in shards):
        raise ModelError(
            f"{index} has no weight_map from tensor names to files beside it", hint="download the model again"
        )
    return weight_map


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model: those of its index, or all ``model*.safetensors`` without an index.

    Raises:
        ModelError: There are no such files, or some that the index names are missing.
    """
    shards = sorted(set(read_weight_map(folder).values()))
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise ModelError(
            f"{folder} lacks {len(missing)} of the {len(shards)} weight files that {INDEX_FILE} names: {missing[0]}",
            hint="download the model again or copy the missing files",
        )
    files = [folder / shard for shard in shards] or sorted(folder.glob("model*.safetensors"))
    if not files:
        others = sorted({*folder.glob("pytorch_model*.bin"), *folder.glob("*.gguf"), *folder.glob("*.pth")})
        raise ModelError(
            f"{folder} holds no safetensors weights{f', only {others[0].name}' if others else ''}",
            hint="only safetensors are read; save the model with save_pretrained of a recent transformers",
        )
    return files


class SafetensorFolder(ExitStack):
    """All tensors of a model folder, open for reading; use it as a context manager.

    Attributes:
        tensors: Name -> position, sorted by shard, then by name.

    Raises:
        ModelError: There are no weights, a shard is missing, a file is truncated or unreadable, or weights are not 16
            or 32-bit floats.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.tensors = {tensor.name: tensor for path in weight_files(folder) for tensor in read_float_tensors(path)}
        self._files: dict[tuple[Path, int], BinaryIO] = {}
        absent = sorted(read_weight_map(folder).keys() - self.tensors.keys())
        if absent:
            raise ModelError(
                f"{folder}: {len(absent)} tensors of the index are in no shard, the first is {absent[0]}",
                hint="copy or download the folder again",
            )

    def rows(self, tensor: StoredTensor, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """Return rows ``start`` to ``stop`` (axis 0) as float32.

        Raises:
            ModelError: The file ended early.
        """
        import numpy as np

        num_rows = tensor.shape[0]
        stop = num_rows if stop is None else stop
        row_bytes = tensor.num_bytes // num_rows
        buffer = bytearray((stop - start) * row_bytes)
        # A file handle has one position, so every thread opens its own.
        key = (tensor.path, threading.get_ident())
        if key not in self._files:
            self._files[key] = self.enter_context(tensor.path.open("rb"))
        file = self._files[key]
        file.seek(tensor.offset + start * row_bytes)
        if file.readinto(buffer) != len(buffer):  # type: ignore[attr-defined]
            raise ModelError(f"{tensor.path}: the data of {tensor.name} ends early", hint="copy the file again")
        values = np.frombuffer(buffer, {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[tensor.dtype])
        return from_stored(values).reshape((stop - start, *tensor.shape[1:]))

    def check_read(self) -> None:
        """Do nothing: a folder without an adapter has nothing to check."""


def to_stored(values: NDArray[np.float32], dtype: str) -> NDArray[np.generic]:
    """Round float32 values to a stored type, ties to even as in torch. bfloat16 is returned as its bits in uint16."""
    import numpy as np

    if dtype == "float32":
        return values
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16)
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    # The rounding above would turn NaN into infinity or zero.
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def from_stored(stored: NDArray[np.generic]) -> NDArray[np.float32]:
    """Return the float32 values of the result of :func:`to_stored`."""
    import numpy as np

    if stored.dtype == np.uint16:
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32, copy=False)


@contextmanager
def safetensors_writer(
    path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str
) -> Iterator[Callable[[NDArray[np.generic]], object]]:
    """Yield a function that appends rows, in the stored type, to a file that gets its name when the block ends.

    Args:
        path: The finished file.
        shapes: Tensor name -> shape, in the order in which the rows will be written.
        dtype: "float32", "bfloat16" or "float16".
    """
    import numpy as np

    code = next(code for code, name in DTYPES.items() if name == dtype)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in shapes.items():
        end = position + prod(shape) * _ELEMENT_BYTES[code]
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            yield lambda rows: file.write(np.ascontiguousarray(rows).data)
            file.flush()
            os.fsync(file.fileno())
            assert file.tell() == 8 + len(text) + position, f"{path}: rows are missing"
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
