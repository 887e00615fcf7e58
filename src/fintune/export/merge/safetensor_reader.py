"""Reads the safetensors files of a Hugging Face folder row by row, with memory bounded by the rows asked for."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO

from fintune.errors import ModelError
from fintune.models.folder import read_safetensors_header

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_ELEMENT_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies.

    Attributes:
        shape: Rows first.
        dtype: "F32", "F16" or "BF16".
        path: The file.
        offset: First byte of the data within the file.
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


class SafetensorFolder:
    """All tensors of a folder, open for reading; use it as a context manager.

    Args:
        folder: Holds ``model.safetensors``, or shards with ``model.safetensors.index.json``.

    Attributes:
        tensors: Name -> place, by shard, then by name.

    Raises:
        ModelError: No weights, a missing shard, a truncated or unreadable file, or weights that are not 16 or 32-bit
            floats.
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
                hint="give a Hugging Face folder that was saved with safe_serialization",
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
        """Read rows ``start`` to ``stop`` (axis 0) as float32.

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

    def check(self) -> None:
        """Nothing was merged, so nothing can have stood still."""

    def _file(self, path: Path) -> BinaryIO:
        # A position belongs to a handle, so each thread has its own.
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
