"""llama.cpp's importance matrix (imatrix): the mean square of a layer's input in each column of its weight.

A quantiser keeps columns with large inputs more exactly. Two formats can be read, GGUF and the older binary format;
GGUF is written. Source: llama.cpp, ``tools/imatrix`` (the sums), ``common/imatrix-loader.cpp`` (the formats) and
``tools/quantize`` (from sums to weights, and the metadata of the quantised file).
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fintune.errors import DataError, ModelError
from fintune.export.gguf.architectures import gguf_tensor_name

if TYPE_CHECKING:
    import numpy as np
    import torch
    from gguf import GGUFWriter
    from numpy.typing import NDArray
    from torch import nn

_SUMS, _COUNTS = ".in_sum2", ".counts"
# llama.cpp's tool cuts longer texts in the header of the quantised file.
_MAX_TEXT = 127
_CHUNK_TOKENS = 512
"""Default chunk of llama.cpp's tool."""


@dataclass(frozen=True)
class ImportanceMatrix:
    """Weights of the columns of a model's matrices, and what the file says about their data."""

    columns: Mapping[str, NDArray[np.float32]]
    """GGUF tensor name -> weight of each column, (num_columns,)."""
    file: str
    dataset: str | None
    num_chunks: int
    """Number of chunks of tokens, or 0 if the file does not have it."""

    def write_metadata(self, writer: GGUFWriter) -> None:
        """Add the keys that llama.cpp's quantiser writes about its importance matrix."""
        writer.add_string("quantize.imatrix.file", self.file[:_MAX_TEXT])
        if self.dataset is not None:
            writer.add_string("quantize.imatrix.dataset", self.dataset[:_MAX_TEXT])
        writer.add_uint32("quantize.imatrix.entries_count", len(self.columns))
        if self.num_chunks > 0:
            writer.add_uint32("quantize.imatrix.chunks_count", self.num_chunks)

    def check_fits(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Check that the matrix belongs to a model, whose tensors have these shapes by their GGUF names.

        Raises:
            ModelError: It belongs to another model.
        """
        if not self.columns.keys() & shapes.keys():
            raise ModelError(f"{self.file}: none of its entries is a tensor of this model")
        for name, columns in self.columns.items():
            shape = shapes.get(name)
            # The embedding is looked up, not multiplied. llama.cpp ignores an entry that does not fit it.
            if shape is not None and columns.shape != shape[-1:] and name != "token_embd.weight":
                raise ModelError(
                    f"{self.file}: {columns.size} values for {name}, which has {shape[-1]} columns",
                    hint="it was computed on another model",
                )


def read_imatrix(path: Path) -> ImportanceMatrix:
    """Read an importance matrix in either format.

    Raises:
        ModelError: The file is missing, truncated or no importance matrix, or a value is negative or not finite.
    """
    import numpy as np

    try:
        with path.open("rb") as file:
            is_gguf = file.read(4) == b"GGUF"
        imatrix = _read_gguf(path) if is_gguf else _read_legacy(path)
    except (OSError, ValueError, KeyError, IndexError, TypeError, OverflowError, struct.error) as error:
        raise ModelError(
            f"{path}: no readable importance matrix ({error})",
            hint="create it with llama.cpp's imatrix, or leave the option out",
        ) from error
    wrong = [name for name, columns in imatrix.columns.items() if not np.isfinite(columns).all() or columns.min() < 0]
    if wrong:
        raise ModelError(f"{path}: a value of {wrong[0]} is negative or not finite")
    return imatrix


def _read_gguf(path: Path) -> ImportanceMatrix:
    import gguf
    import numpy as np

    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    missing = [key for key in ("datasets", "chunk_count", "chunk_size") if f"imatrix.{key}" not in fields]
    if missing:
        raise ValueError(f"imatrix.{missing[0]} is missing")
    # The reader's tensors are views into the mapped file, so they are copied.
    tensors = {tensor.name: np.array(tensor.data, np.float32).reshape(-1) for tensor in reader.tensors}
    columns = {}
    for key, sums in tensors.items():
        if not key.endswith(_SUMS):
            continue
        name = key.removesuffix(_SUMS)
        counts = tensors[name + _COUNTS]
        if counts.size != 1 or not sums.size:
            raise ValueError(f"{name} is a mixture of experts, or has no values")
        count = np.float32(round(float(counts[0])))
        columns[name] = sums / count if count > 0 else np.ones_like(sums)
    if not columns:
        raise ValueError("it holds no entries")
    datasets = fields["imatrix.datasets"]
    return ImportanceMatrix(columns, path.name, datasets[0] if datasets else None, int(fields["imatrix.chunk_count"]))


def _read_legacy(path: Path) -> ImportanceMatrix:
    """Read the older format.

    It holds the number of entries; for every entry its name, number of calls, number of values and values; then the
    total number of calls and the name of the text.
    """
    import numpy as np

    data = io.BytesIO(path.read_bytes())
    size = len(data.getbuffer())

    def take(number: int) -> bytes:
        if not 0 <= number <= size - data.tell():
            raise ValueError("truncated")
        return data.read(number)

    def integer() -> int:
        return int(struct.unpack("<i", take(4))[0])

    columns = {}
    for _ in range(integer()):
        name = take(integer()).decode()
        num_calls, num_values = integer(), integer()
        if num_values < 1:
            raise ValueError(f"{name} has no values")
        values = np.frombuffer(take(4 * num_values), "<f4")
        columns[name] = values / np.float32(num_calls) if num_calls > 0 else values
    if not columns:
        raise ValueError("it holds no entries")
    num_chunks = integer() if data.tell() < size else 0
    dataset = take(integer()).decode() if data.tell() < size else ""
    return ImportanceMatrix(columns, path.name, dataset or None, num_chunks)


def write_imatrix(
    path: Path,
    sums: Mapping[str, NDArray[np.float32]],
    counts: Mapping[str, int],
    *,
    datasets: Sequence[str],
    chunk_size: int,
) -> None:
    """Write llama.cpp's GGUF format. The file gets its name only when it is complete.

    Args:
        path: The file.
        sums: GGUF tensor name -> sum of the squares in each column, (num_columns,).
        counts: GGUF tensor name -> number of tokens in the sum.
        datasets: Names of the data.
        chunk_size: Number of tokens in a chunk.
    """
    import gguf
    import numpy as np

    beside = path.with_name(f".{path.name}.part")
    writer = gguf.GGUFWriter(beside, "imatrix")
    # The file is no model, and llama.cpp writes no architecture either.
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


def compute_imatrix(
    model: nn.Module, texts: Iterable[Sequence[int]], path: Path, *, dataset: str, max_tokens: int
) -> int:
    """Compute the importance matrix of a model on texts, write it, and return the number of tokens that were read.

    Args:
        model: A causal language model with the weights that will be exported.
        texts: Token ids of the texts.
        path: The file, in llama.cpp's GGUF format.
        dataset: Name of the data for the file's metadata.
        max_tokens: After this number of tokens no further text is read.

    Raises:
        DataError: There is no text.
    """
    import torch

    sums: dict[str, torch.Tensor] = {}

    def add_squares(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            total = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).double().square().sum(0)
            sums[name] = sums[name] + total if name in sums else total

        return hook

    hooks = []
    modules = dict(model.named_modules())
    for module_name, module in modules.items():
        name = gguf_tensor_name(f"{module_name}.weight", len(modules))
        # llama.cpp excludes the output embedding, too.
        if isinstance(module, torch.nn.Linear) and name is not None and name.startswith("blk."):
            hooks.append(module.register_forward_pre_hook(add_squares(name)))
    num_tokens = 0
    try:
        with torch.inference_mode():
            for ids in texts:
                if num_tokens >= max_tokens:
                    break
                model(input_ids=torch.tensor([list(ids)], device=next(model.parameters()).device), logits_to_keep=1)
                num_tokens += len(ids)
    finally:
        for handle in hooks:
            handle.remove()
    if not num_tokens:
        raise DataError(f"{dataset} holds no text to compute an importance matrix on")
    totals = {name: total.float().cpu().numpy() for name, total in sums.items()}
    write_imatrix(
        path, totals, dict.fromkeys(totals, num_tokens), datasets=[dataset], chunk_size=min(_CHUNK_TOKENS, num_tokens)
    )
    return num_tokens
