"""llama.cpp's importance matrix: for each column of each matrix, the mean square of what it is multiplied with.

A quantiser that knows it keeps more exactly what matters more. Two formats are read, GGUF and the older binary
one; GGUF is written. Source: llama.cpp, ``tools/imatrix`` (what is summed), ``common/imatrix-loader.cpp`` (formats),
``tools/quantize`` (how sums become weights and what the quantised file says about them).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fintune.errors import ModelError

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFWriter
    from numpy.typing import NDArray

_SUMS, _COUNTS = ".in_sum2", ".counts"
# llama.cpp's tool cuts texts of the quantised file's header here.
_MAX_TEXT = 127


@dataclass(frozen=True)
class Importance:
    """What quantised files are weighed with.

    Attributes:
        columns: GGUF tensor name -> weight of each column, float32.
        file: Name of the file that it was read from.
        dataset: What it was computed on, None where the file does not say.
        num_chunks: Runs of tokens that it was computed on, 0 where the file does not say.
    """

    columns: Mapping[str, NDArray[np.float32]]
    file: str
    dataset: str | None
    num_chunks: int

    def write_metadata(self, writer: GGUFWriter) -> None:
        """Add what llama.cpp's quantiser says about its importance matrix."""
        writer.add_string("quantize.imatrix.file", self.file[:_MAX_TEXT])
        if self.dataset is not None:
            writer.add_string("quantize.imatrix.dataset", self.dataset[:_MAX_TEXT])
        writer.add_uint32("quantize.imatrix.entries_count", len(self.columns))
        if self.num_chunks > 0:
            writer.add_uint32("quantize.imatrix.chunks_count", self.num_chunks)

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Compare with a model's tensors, by GGUF name.

        Raises:
            ModelError: Another model's.
        """
        if not self.columns.keys() & shapes.keys():
            raise ModelError(f"{self.file}: none of its entries is a tensor of this model")
        for name, columns in self.columns.items():
            shape = shapes.get(name)
            # The embedding is looked up, not multiplied: llama.cpp passes over an entry that does not fit it.
            if shape is not None and columns.shape != shape[-1:] and name != "token_embd.weight":
                raise ModelError(
                    f"{self.file}: {columns.size} values for {name}, which has {shape[-1]} columns",
                    hint="it was computed on another model",
                )


def read_importance(path: Path) -> Importance:
    """Read an importance matrix in either format.

    Raises:
        ModelError: Missing, truncated, of another kind, or with values that are not finite.
    """
    import numpy as np

    try:
        with path.open("rb") as file:
            is_gguf = file.read(4) == b"GGUF"
        found = _read_gguf(path) if is_gguf else _read_legacy(path)
    except (OSError, ValueError, KeyError, IndexError, struct.error, UnicodeDecodeError) as error:
        raise ModelError(
            f"{path}: no readable importance matrix ({error})", hint="make it with llama.cpp's imatrix, or leave it out"
        ) from error
    wrong = [name for name, columns in found.columns.items() if not np.isfinite(columns).all() or columns.min() < 0]
    if wrong:
        raise ModelError(f"{path}: values of {wrong[0]} are not finite or below 0")
    return found


def write_importance(
    path: Path,
    sums: Mapping[str, NDArray[np.float32]],
    counts: Mapping[str, int],
    *,
    datasets: Sequence[str],
    chunk_size: int,
) -> None:
    """Write llama.cpp's GGUF format; the file appears whole.

    Args:
        path: The file.
        sums: GGUF tensor name -> sum of the squares in each column, (num_columns,).
        counts: GGUF tensor name -> tokens that were summed.
        datasets: Names of what was read.
        chunk_size: Tokens in a run.
    """
    import gguf
    import numpy as np

    beside = path.with_name(f".{path.name}.part")
    writer = gguf.GGUFWriter(beside, "imatrix")
    # It is no model: llama.cpp writes no architecture either.
    writer.kv_data[0].pop("general.architecture")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", list(datasets))
    writer.add_uint32("imatrix.chunk_count", max(counts.values()) // chunk_size)
    writer.add_uint32("imatrix.chunk_size", chunk_size)
    for name in sorted(sums):
        writer.add_tensor(name + _SUMS, np.ascontiguousarray(sums[name], np.float32)[None, :])
        writer.add_tensor(name + _COUNTS, np.array([[counts[name]]], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    beside.replace(path)


def _read_gguf(path: Path) -> Importance:
    import gguf
    import numpy as np

    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    missing = [key for key in ("datasets", "chunk_count", "chunk_size") if f"imatrix.{key}" not in fields]
    if missing:
        raise ValueError(f"imatrix.{missing[0]} is missing")
    # A tensor of the reader is a view into the file's mapping.
    tensors = {tensor.name: np.array(tensor.data, np.float32).reshape(-1) for tensor in reader.tensors}
    columns = {}
    for key, sums in tensors.items():
        if not key.endswith(_SUMS):
            continue
        name = key.removesuffix(_SUMS)
        counts = tensors[name + _COUNTS]
        if counts.size != 1:
            raise ValueError(f"{name} is a mixture of experts")
        count = np.float32(round(float(counts[0])))
        columns[name] = sums / count if count > 0 else np.ones_like(sums)
    if not columns:
        raise ValueError("it holds no entries")
    datasets = fields["imatrix.datasets"]
    return Importance(columns, path.name, datasets[0] if datasets else None, int(fields["imatrix.chunk_count"]))


def _read_legacy(path: Path) -> Importance:
    """Number of entries; of each the name, calls, number of values, values; then calls in all and the text's name."""
    import numpy as np

    data = path.read_bytes()
    position = 0

    def take(number: int) -> bytes:
        nonlocal position
        if not 0 <= number <= len(data) - position:
            raise ValueError("truncated")
        position += number
        return data[position - number : position]

    def integer() -> int:
        return int(struct.unpack("<i", take(4))[0])

    num_entries = integer()
    if num_entries < 1:
        raise ValueError("it holds no entries")
    columns = {}
    for _ in range(num_entries):
        name = take(integer()).decode()
        num_calls, num_values = integer(), integer()
        if num_values < 1:
            raise ValueError(f"{name} has no values")
        values = np.frombuffer(take(4 * num_values), "<f4")
        columns[name] = values / np.float32(num_calls) if num_calls > 0 else values
    num_chunks, dataset = 0, None
    if position < len(data):
        num_chunks = integer()
        length = integer() if position < len(data) else 0
        dataset = take(length).decode() if length > 0 else None
    return Importance(columns, path.name, dataset, num_chunks)
