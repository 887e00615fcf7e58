"""A Hugging Face folder to GGUF files of several types, in one reading of the weights.

Memory holds one slab of rows at a time, so it does not grow with the model. A file appears under its name only when it
is complete.

Every function here raises :class:`~fintune.errors.ModelError` for a folder or type that cannot be exported (unknown
family, tensor without a place, missing tensor or shard, truncated weights, tokenizer that llama.cpp does not have,
values that a type cannot hold) and :class:`~fintune.errors.ResourceError` for a full disk or a missing library.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from fintune.errors import ModelError, ResourceError
from fintune.export.gguf.ggml import Ggml, load_ggml
from fintune.export.gguf.importance import Importance
from fintune.export.gguf.plan import FilePlan, ModelPlan, Source
from fintune.export.merge.merged_weights import Weights
from fintune.export.merge.safetensor_reader import SafetensorFolder
from fintune.util.disk import name_full_disk, require_space

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# What all threads have in hand together, and what one has at least.
_SLAB_ELEMENTS = 4 << 20
_MIN_SLAB_ELEMENTS = 1 << 19
_WHAT = "the GGUF files"


@dataclass(frozen=True)
class ExportedFile:
    """One finished GGUF file.

    Attributes:
        num_tensors_by_type: How many tensors have each ggml type.
    """

    kind: str
    path: Path
    num_bytes: int
    num_tensors_by_type: Mapping[str, int]


@dataclass(frozen=True)
class ExportReport:
    """What an export did.

    Attributes:
        files: One per requested type, in the order requested.
        num_bytes_read: Bytes of weights.
        seconds: Wall time.
        eos_token: The token at which the files say that generation ends, None where there is none.
        notes: What a reader should know, such as an end token that was replaced by the end of a turn.
    """

    files: tuple[ExportedFile, ...]
    num_bytes_read: int
    seconds: float
    eos_token: str | None
    notes: tuple[str, ...]


def predict_bytes(folder: Path, types: Sequence[str], importance: Importance | None = None) -> int:
    """Bytes that the files of these types will have together: exact, without reading a weight."""
    with SafetensorFolder(folder) as weights:
        plan = ModelPlan(folder, weights, importance=importance)
        return sum(plan.file(kind).num_bytes for kind in types)


def export(
    folder: Path,
    outputs: Mapping[str, Path],
    *,
    threads: int = 1,
    progress: Callable[[int, int], None] | None = None,
    name: str | None = None,
    weights: Weights | None = None,
    importance: Importance | None = None,
) -> ExportReport:
    """Write one GGUF file per type.

    Args:
        folder: A Hugging Face folder with safetensors weights, without adapters.
        outputs: Type ("F16", "Q4_K_M" ...) -> file; existing files are replaced.
        threads: Threads that read and convert; the bytes do not depend on it.
        progress: Called with (bytes of weights done, bytes in all).
        name: ``general.name`` of the files, by which they do not depend on the folder's name.
        weights: Where the weights are read instead of the folder, such as a base with an adapter.
        importance: How much an error in each column of each matrix matters, for the quantised types.

    Returns:
        What was written.

    Raises:
        ModelError: See the module.
        ArtifactError: An adapter that leaves weights as they were.
        ResourceError: See the module.
    """
    from threadpoolctl import threadpool_limits

    started = time.monotonic()
    ggml = load_ggml()
    with ExitStack() as stack:
        if weights is None:
            weights = stack.enter_context(SafetensorFolder(folder))
        plan = ModelPlan(folder, weights, name, importance)
        files = {path: plan.file(kind) for kind, path in outputs.items()}
        _check_disk(files)
        temporary = {path: path.with_name(f".{path.name}.{os.getpid()}.part") for path in files}
        for part in temporary.values():
            stack.callback(part.unlink, missing_ok=True)
        with name_full_disk(next(iter(files)).parent, _WHAT), ExitStack() as opened:
            targets = [_Target(file, opened.enter_context(temporary[path].open("wb"))) for path, file in files.items()]
            # Every thread multiplies small matrices of its own: a pool of BLAS's behind each would only get in the
            # others' way.
            with threadpool_limits(1, user_api="blas"):
                done = _stream(plan, _Worker(ggml, weights, targets, importance), threads, progress)
            weights.check()
            for target in targets:
                target.finish()
        for path, part in temporary.items():
            part.replace(path)
    vocabulary = plan.vocabulary
    return ExportReport(
        files=tuple(_describe(path, file) for path, file in files.items()),
        num_bytes_read=done,
        seconds=time.monotonic() - started,
        eos_token=None if vocabulary.eos_id is None else vocabulary.tokens[vocabulary.eos_id],
        notes=_notes(plan),
    )


class _Target:
    """An output that is being written: rows arrive in any order and go to their own places."""

    def __init__(self, plan: FilePlan, file: BinaryIO) -> None:
        self.plan = plan
        self._file = file
        self._lock = threading.Lock()
        file.write(plan.header)

    def write(self, tensor: str, position: int, data: NDArray[np.uint8]) -> None:
        with self._lock:
            self._file.seek(self.plan.places[tensor].offset + position)
            self._file.write(data.data)

    def finish(self) -> None:
        self._file.truncate(self.plan.num_bytes)
        self._file.flush()
        os.fsync(self._file.fileno())


@dataclass(frozen=True)
class _Slab:
    """Some rows of a tensor: what one thread does at a time."""

    source: Source
    start: int
    stop: int

    @property
    def num_bytes(self) -> int:
        """Bytes of stored weights."""
        stored = self.source.stored
        return 0 if stored is None else stored.num_bytes // stored.shape[0] * (self.stop - self.start)


@dataclass(frozen=True)
class _Worker:
    """Reads a slab once and writes it to every target; each row's bytes depend on that row alone."""

    ggml: Ggml
    weights: Weights
    targets: Sequence[_Target]
    importance: Importance | None

    def __call__(self, slab: _Slab) -> int:
        name, rows = slab.source.name, self._rows(slab)
        # A vector is one row, wherever it starts.
        first = slab.start if len(slab.source.shape) == 2 else 0
        converted: dict[tuple[str, bool], NDArray[np.uint8]] = {}
        for target in self.targets:
            type_name = target.plan.places[name].type_name
            # Files that are not quantised are the converter's, which knows of no importance.
            weighed = self.importance is not None and target.plan.quantised
            key = (type_name, weighed)
            if key not in converted:
                converted[key] = self._convert(slab, type_name, rows, weighed=weighed)
            target.write(name, first * converted[key].shape[1], converted[key])
        return slab.num_bytes

    def _rows(self, slab: _Slab) -> NDArray[np.float32]:
        """Rows as a matrix, those of q and k in llama.cpp's order."""
        import numpy as np

        source = slab.source
        if source.stored is None:
            assert source.values is not None
            return source.values.reshape(1, -1)
        rows = self.weights.rows(source.stored, slab.start, slab.stop)
        if source.num_heads:
            # Rotary halves (first half, second half) become neighbouring pairs.
            halves = rows.reshape(-1, 2, source.shape[0] // source.num_heads // 2, *rows.shape[1:])
            rows = halves.swapaxes(1, 2).reshape(rows.shape)
        return np.ascontiguousarray(rows if rows.ndim == 2 else rows[None, :])

    def _convert(self, slab: _Slab, type_name: str, rows: NDArray[np.float32], *, weighed: bool) -> NDArray[np.uint8]:
        importance = self.importance.columns.get(slab.source.name) if weighed and self.importance else None
        data = self.ggml.quantise(type_name, rows, importance)
        if not self.ggml.is_valid(type_name, data):
            place = slab.source.stored.name if slab.source.stored else slab.source.name
            raise ModelError(
                f"tensor {place} holds values that are not finite in {type_name}",
                hint="the training diverged, or the values exceed what 16-bit floats hold: export BF16 or F32",
            )
        return data


def _stream(plan: ModelPlan, worker: _Worker, threads: int, progress: Callable[[int, int], None] | None) -> int:
    total = sum(source.stored.num_bytes for source in plan.sources.values() if source.stored)
    done = 0
    waiting: deque[Future[int]] = deque()
    slabs = (slab for source in plan.sources.values() for slab in _slabs(source, threads))
    with ThreadPoolExecutor(threads) as pool:
        try:
            while True:
                for slab in itertools.islice(slabs, 2 * threads - len(waiting)):
                    waiting.append(pool.submit(worker, slab))
                if not waiting:
                    break
                done += waiting.popleft().result()
                if progress is not None:
                    progress(done, total)
        finally:
            for future in waiting:
                future.cancel()
    return done


def _slabs(source: Source, threads: int) -> Iterator[_Slab]:
    num_rows = source.shape[0]
    columns = source.shape[1] if len(source.shape) == 2 else 1
    # Rows of a head trade places with each other, so that a slab must hold whole heads.
    unit = num_rows // source.num_heads if source.num_heads else 1
    elements = max(_SLAB_ELEMENTS // threads, _MIN_SLAB_ELEMENTS)
    step = num_rows if len(source.shape) == 1 else max(1, elements // columns // unit) * unit
    for start in range(0, num_rows, step):
        yield _Slab(source, start, min(num_rows, start + step))


def _check_disk(files: Mapping[Path, FilePlan]) -> None:
    needed: dict[Path, int] = {}
    for path, plan in files.items():
        if not path.parent.is_dir():
            raise ResourceError(f"{path.parent}: no such folder to write {path.name} to")
        needed[path.parent] = needed.get(path.parent, 0) + plan.num_bytes
    for folder, num_bytes in needed.items():
        require_space(folder, num_bytes, _WHAT)


def _describe(path: Path, plan: FilePlan) -> ExportedFile:
    counts: dict[str, int] = {}
    for place in plan.places.values():
        counts[place.type_name] = counts.get(place.type_name, 0) + 1
    return ExportedFile(plan.kind, path, plan.num_bytes, counts)


def _notes(plan: ModelPlan) -> tuple[str, ...]:
    vocabulary = plan.vocabulary
    if vocabulary.eos_replaced is None or vocabulary.eos_id is None:
        return ()
    theirs, ours = vocabulary.tokens[vocabulary.eos_replaced], vocabulary.tokens[vocabulary.eos_id]
    return (f"the end token is {ours}, which ends a turn of the chat template, not the tokenizer's {theirs}",)
