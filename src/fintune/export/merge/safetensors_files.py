"""Read and write safetensors files row by row. Memory is bounded by the number of rows that are read at a time.

Source: github.com/huggingface/safetensors, "Format": 8 bytes little-endian header length, a JSON header, then the data.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO, Protocol

from fintune.errors import ModelError
from fintune.models.folder import read_safetensors_header

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_ELEMENT_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class StoredTensor:
    """The position of one tensor in a file.

    Attributes:
        name: Name of the tensor.
        shape: Dimensions, rows first.
        dtype: "F32", "F16" or "BF16".
        path: The file.
        offset: First byte of the data in the file.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    path: Path
    offset: int

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole tensor."""
        return prod(self.shape) * _ELEMENT_BYTES[self.dtype]


class WeightSource(Protocol):
    """Tensors that several threads can read row by row: those of a folder, or of a base with an adapter."""

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Name -> shape, type and position."""

    def rows(self, tensor: StoredTensor, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """Return rows ``start`` to ``stop`` (axis 0) as float32."""

    def check_read(self) -> None:
        """Check the weights after all rows were read.

        Raises:
            ArtifactError: An adapter does not change a weight that it adapts.
        """


class SafetensorFolder:
    """All tensors of a folder, open for reading; use it as a context manager.

    Args:
        folder: Folder with ``model.safetensors``, or with shards and ``model.safetensors.index.json``.

    Attributes:
        tensors: Name -> position, sorted by shard, then by name.

    Raises:
        ModelError: There are no weights, a shard is missing, a file is truncated or unreadable, or weights are not 16
            or 32-bit floats.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[str, StoredTensor] = {}
        self._stack = ExitStack()
        self._files: dict[tuple[Path, int], BinaryIO] = {}
        index = _read_index(folder)
        paths = sorted({folder / shard for shard in index.values()}) or sorted(folder.glob("model*.safetensors"))
        if not paths:
            raise ModelError(
                f"{folder}: no weights (model*.safetensors)",
                hint="name a Hugging Face folder with safetensors weights",
            )
        for path in paths:
            if not path.is_file():
                raise ModelError(
                    f"{folder}: shard {path.name} of model.safetensors.index.json is missing",
                    hint="copy or download the folder again",
                )
            for tensor in read_header(path):
                self.tensors[tensor.name] = tensor
        absent = sorted(set(index) - set(self.tensors))
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
        file = self._file(tensor.path)
        file.seek(tensor.offset + start * row_bytes)
        if file.readinto(buffer) != len(buffer):  # type: ignore[attr-defined]
            raise ModelError(f"{tensor.path}: the data of {tensor.name} ends early", hint="copy the file again")
        values: NDArray[np.float32]
        if tensor.dtype == "F32":
            values = np.frombuffer(buffer, "<f4")
        elif tensor.dtype == "F16":
            values = np.frombuffer(buffer, "<f2").astype(np.float32)
        else:
            values = (np.frombuffer(buffer, "<u2").astype(np.uint32) << 16).view(np.float32)
        return values.reshape((stop - start, *tensor.shape[1:]))

    def check_read(self) -> None:
        """Do nothing: a folder without an adapter has nothing to check."""

    def _file(self, path: Path) -> BinaryIO:
        # A file handle has one position, so every thread opens its own.
        key = (path, threading.get_ident())
        if key not in self._files:
            self._files[key] = self._stack.enter_context(path.open("rb"))
        return self._files[key]

    def __enter__(self) -> SafetensorFolder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._files.clear()
        self._stack.close()


def _read_index(folder: Path) -> dict[str, str]:
    path = folder / "model.safetensors.index.json"
    if not path.is_file():
        return {}
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): str(shard) for name, shard in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path}: unreadable: {error}", hint="copy or download the folder again") from error


def read_header(path: Path) -> Iterator[StoredTensor]:
    """Yield the tensors of one safetensors file, sorted by name.

    Raises:
        ModelError: The file is truncated or unreadable, or its weights are not 16 or 32-bit floats.
    """
    for entry in read_safetensors_header(path):
        if entry.dtype not in _ELEMENT_BYTES:
            raise ModelError(
                f"{path}: tensor {entry.name} has type {entry.dtype}, expected one of {', '.join(_ELEMENT_BYTES)}",
                hint="a quantised model can be neither merged nor exported: use the 16-bit weights it was made from",
            )
        tensor = StoredTensor(entry.name, entry.shape, entry.dtype, path, entry.start)
        num_bytes = entry.stop - entry.start
        if num_bytes != tensor.num_bytes:
            raise ModelError(f"{path}: tensor {entry.name} has {num_bytes} bytes, its shape says {tensor.num_bytes}")
        yield tensor


CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""Name of a type in torch -> in safetensors."""


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
    return stored.astype(np.float32)


class SafetensorWriter:
    """A file that is being written; use it as a context manager.

    The file gets its name when the block ends without an error.

    Args:
        path: The finished file.
        shapes: Tensor name -> shape, in the order in which the rows will be written.
        dtype: "float32", "bfloat16" or "float16".
    """

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str) -> None:
        self._path, self._part = path, path.with_name(f".{path.name}.part")
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        position = 0
        for name, shape in shapes.items():
            end = position + prod(shape) * _ELEMENT_BYTES[CODES[dtype]]
            header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [position, end]}
            position = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.num_bytes = 8 + len(text) + position
        self._file = self._part.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, rows: NDArray[np.generic]) -> None:
        """Append rows, in the stored type, of the tensor that is next in ``shapes``."""
        import numpy as np

        self._file.write(np.ascontiguousarray(rows).data)

    def __enter__(self) -> SafetensorWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())
                assert self._file.tell() == self.num_bytes, f"{self._path}: rows are missing"
        if kind is None:
            self._part.replace(self._path)
        else:
            self._part.unlink(missing_ok=True)
