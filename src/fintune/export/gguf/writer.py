"""Write GGUF files of several types from a Hugging Face folder, in one pass over the weights.

Memory holds one slab of rows for each thread, so it does not grow with the model. A file gets its name only when it is
complete.

The functions raise :class:`~fintune.errors.ModelError` for a folder or type that cannot be exported: an unknown
architecture or tensor, a missing tensor or shard, truncated weights, a tokenizer that llama.cpp does not have, or
values that a type cannot hold. They raise :class:`~fintune.errors.ResourceError` for a full disk or a missing library.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from fintune.errors import ModelError, ResourceError
from fintune.export.gguf.ggml import QUANT_TYPES, Ggml, load_ggml
from fintune.export.gguf.imatrix import ImportanceMatrix
from fintune.export.gguf.layout import FileLayout, ModelLayout, TensorSource
from fintune.export.merge.merged_weights import WeightSource
from fintune.models.safetensors_files import SafetensorFolder
from fintune.util.disk import name_full_disk, require_space

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# Elements that all threads hold together, and the minimum of one thread.
_SLAB_ELEMENTS = 4 << 20
_MIN_SLAB_ELEMENTS = 1 << 19
_WHAT = "the GGUF files"


@dataclass(frozen=True)
class ExportedFile:
    """One finished GGUF file of a type such as "Q4_K_M", with the number of its tensors of each ggml type."""

    kind: str
    path: Path
    num_bytes: int
    num_tensors_by_type: Mapping[str, int]


@dataclass(frozen=True)
class ExportReport:
    """The result of an export: one file for each requested type, in the requested order."""

    files: tuple[ExportedFile, ...]
    num_bytes_read: int
    """Bytes of weights."""
    seconds: float
    eos_token: str | None
    """The token that ends generation by the files' metadata, or None."""
    notes: tuple[str, ...]
    """Remarks for the user, such as an end token that was replaced by the end of a turn."""


def predict_gguf_bytes(folder: Path, types: Sequence[str], imatrix: ImportanceMatrix | None = None) -> int:
    """Return the exact total size of the files of these types, without reading a weight."""
    with SafetensorFolder(folder) as weights:
        layout = ModelLayout(folder, weights, imatrix=imatrix)
        return sum(layout.file(kind).num_bytes for kind in types)


def write_gguf(
    folder: Path,
    outputs: Mapping[str, Path],
    *,
    threads: int = 1,
    progress: Callable[[int, int], None] | None = None,
    name: str | None = None,
    weights: WeightSource | None = None,
    imatrix: ImportanceMatrix | None = None,
) -> ExportReport:
    """Write one GGUF file for each type.

    Args:
        folder: A Hugging Face folder with safetensors weights, without adapters.
        outputs: Type ("F16", "Q4_K_M" ...) -> file. Existing files are replaced.
        threads: Number of threads that read and convert. The bytes do not depend on it.
        progress: Called with (bytes of weights done, total bytes).
        name: ``general.name`` of the files. With it, the bytes do not depend on the folder's name.
        weights: Source of the weights if it is not the folder, such as a base with an adapter.
        imatrix: Importance matrix for the quantised types.

    Raises:
        ModelError: See the module.
        ArtifactError: An adapter does not change a weight that it adapts.
        ResourceError: See the module.
    """
    from threadpoolctl import threadpool_limits

    started = time.monotonic()
    ggml = load_ggml()
    with ExitStack() as stack:
        if weights is None:
            weights = stack.enter_context(SafetensorFolder(folder))
        layout = ModelLayout(folder, weights, name, imatrix)
        files = {path: layout.file(kind) for kind, path in outputs.items()}
        needed: Counter[Path] = Counter()
        for path, file in files.items():
            needed[path.parent] += file.num_bytes
        for parent, num_bytes in needed.items():
            if not parent.is_dir():
                raise ResourceError(f"{parent}: no such folder for the GGUF files")
            require_space(parent, num_bytes, _WHAT)
        temporary = {path: path.with_name(f".{path.name}.{os.getpid()}.part") for path in files}
        for part in temporary.values():
            stack.callback(part.unlink, missing_ok=True)
        with name_full_disk(next(iter(files)).parent, _WHAT), ExitStack() as opened:
            targets = [_Target(file, opened.enter_context(temporary[path].open("wb"))) for path, file in files.items()]
            # Every thread multiplies small matrices of its own. A BLAS pool for each of them would slow the others.
            with threadpool_limits(1, user_api="blas"):
                done = _stream(layout, _Worker(ggml, weights, targets, imatrix), threads, progress)
            weights.check_read()
            for target in targets:
                target.finish()
        for path, part in temporary.items():
            part.replace(path)
    vocabulary, notes = layout.vocabulary, []
    eos_token = None if vocabulary.eos_id is None else vocabulary.tokens[vocabulary.eos_id]
    if vocabulary.eos_replaced is not None and eos_token is not None:
        replaced = vocabulary.tokens[vocabulary.eos_replaced]
        notes = [
            f"the end token is {eos_token}, which ends a turn of the chat template, not the tokenizer's {replaced}"
        ]
    exported = tuple(
        ExportedFile(file.kind, path, file.num_bytes, dict(Counter(slot.type_name for slot in file.slots.values())))
        for path, file in files.items()
    )
    return ExportReport(exported, done, time.monotonic() - started, eos_token, tuple(notes))


class _Target:
    """An output file that is being written. Rows arrive in any order."""

    def __init__(self, layout: FileLayout, file: BinaryIO) -> None:
        self.layout = layout
        self._file = file
        self._lock = threading.Lock()
        file.write(layout.header)

    def write(self, tensor: str, position: int, data: NDArray[np.uint8]) -> None:
        with self._lock:
            self._file.seek(self.layout.slots[tensor].offset + position)
            self._file.write(data.data)

    def finish(self) -> None:
        self._file.truncate(self.layout.num_bytes)
        self._file.flush()
        os.fsync(self._file.fileno())


class _Slab(NamedTuple):
    """Consecutive rows of a tensor: the unit of work of a thread."""

    source: TensorSource
    start: int
    stop: int


@dataclass(frozen=True)
class _Worker:
    """Reads a slab once and writes it to every target. The bytes of a row depend on that row alone."""

    ggml: Ggml
    weights: WeightSource
    targets: Sequence[_Target]
    imatrix: ImportanceMatrix | None

    def __call__(self, slab: _Slab) -> int:
        """Return the bytes of stored weights that were read, 0 for a computed tensor."""
        import numpy as np

        (name, shape, stored), rows = (slab.source.name, slab.source.shape, slab.source.stored), self._rows(slab)
        # A vector counts as one row.
        first = slab.start if len(shape) == 2 else 0
        is_finite = bool(np.isfinite(rows).all())  # some quantised types lose a NaN
        converted: dict[tuple[str, bool], NDArray[np.uint8]] = {}
        for target in self.targets:
            type_name = target.layout.slots[name].type_name
            # Unquantised files follow llama.cpp's converter, which takes no importance matrix.
            is_weighted = self.imatrix is not None and QUANT_TYPES[target.layout.kind].quantised
            data = converted.get((type_name, is_weighted))
            if data is None:
                columns = self.imatrix.columns.get(name) if self.imatrix is not None and is_weighted else None
                data = converted[type_name, is_weighted] = self.ggml.quantise(type_name, rows, columns)
                if not is_finite or not self.ggml.is_valid(type_name, data):
                    raise ModelError(
                        f"tensor {stored.name if stored else name} holds values that are not finite in {type_name}",
                        hint="the training diverged, or the values exceed the range of 16-bit floats: "
                        "export BF16 or F32",
                    )
            target.write(name, first * data.shape[1], data)
        return 0 if stored is None else stored.num_bytes // stored.shape[0] * (slab.stop - slab.start)

    def _rows(self, slab: _Slab) -> NDArray[np.float32]:
        """Return the rows as a matrix, those of q and k in llama.cpp's order."""
        import numpy as np

        source = slab.source
        if source.stored is None:
            assert source.values is not None
            return source.values.reshape(1, -1)
        rows = self.weights.rows(source.stored, slab.start, slab.stop)
        if source.num_heads:
            # llama.cpp rotates neighbouring pairs; transformers rotates the two halves of a head.
            halves = rows.reshape(-1, 2, source.shape[0] // source.num_heads // 2, *rows.shape[1:])
            rows = halves.swapaxes(1, 2).reshape(rows.shape)
        return np.ascontiguousarray(rows if rows.ndim == 2 else rows[None, :])


def _stream(layout: ModelLayout, worker: _Worker, threads: int, progress: Callable[[int, int], None] | None) -> int:
    total = sum(source.stored.num_bytes for source in layout.sources.values() if source.stored)
    done = 0
    waiting: deque[Future[int]] = deque()
    slabs = (slab for source in layout.sources.values() for slab in _slabs(source, threads))
    with ThreadPoolExecutor(threads) as pool:
        try:
            while True:
                for slab in itertools.islice(slabs, 2 * threads - len(waiting)):
                    waiting.append(pool.submit(worker, slab))
                if not waiting:
                    return done
                done += waiting.popleft().result()
                if progress is not None:
                    progress(done, total)
        finally:
            for future in waiting:
                future.cancel()


def _slabs(source: TensorSource, threads: int) -> Iterator[_Slab]:
    num_rows, columns = source.shape[0], source.shape[-1]
    # The rows of a head are reordered, so a slab must hold whole heads.
    unit = num_rows // source.num_heads if source.num_heads else 1
    elements = max(_SLAB_ELEMENTS // threads, _MIN_SLAB_ELEMENTS)
    step = num_rows if len(source.shape) == 1 else max(1, elements // columns // unit) * unit
    for start in range(0, num_rows, step):
        yield _Slab(source, start, min(num_rows, start + step))
