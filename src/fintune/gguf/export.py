"""A Hugging Face folder to GGUF files of several types, in one reading of the weights.

Memory holds one slab of rows at a time, so it does not grow with the model. A file appears under its name only when it
is complete.

Every function here raises :class:`~fintune.errors.ModelError` for a folder or type that cannot be exported (unknown
family, tensor without a place, missing tensor or shard, truncated weights, tokenizer that llama.cpp does not have,
values that a type cannot hold) and :class:`~fintune.errors.ResourceError` for a full disk or a missing library.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from fintune.errors import ModelError, ResourceError
from fintune.gguf.ggml import Ggml, load_ggml
from fintune.gguf.plan import FilePlan, ModelPlan, Source
from fintune.gguf.safetensor_reader import SafetensorFolder

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_SLAB_ELEMENTS = 4 << 20


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


def predict_bytes(folder: Path, types: Sequence[str]) -> int:
    """Bytes that the files of these types will have together: exact, without reading a weight."""
    with SafetensorFolder(folder) as weights:
        plan = ModelPlan(folder, weights)
        return sum(plan.file(kind).num_bytes for kind in types)


def export(
    folder: Path,
    outputs: Mapping[str, Path],
    *,
    threads: int = 1,
    progress: Callable[[int, int], None] | None = None,
    name: str | None = None,
) -> ExportReport:
    """Write one GGUF file per type.

    Args:
        folder: A Hugging Face folder with safetensors weights, without adapters.
        outputs: Type ("F16", "Q4_K_M" ...) -> file; existing files are replaced.
        threads: Threads that convert; the bytes do not depend on it.
        progress: Called with (bytes of weights done, bytes in all).
        name: ``general.name`` of the files, by which they do not depend on the folder's name.

    Returns:
        What was written.

    Raises:
        ModelError: See the module.
        ResourceError: See the module.
    """
    started = time.monotonic()
    ggml = load_ggml()
    with SafetensorFolder(folder) as weights, ExitStack() as stack:
        plan = ModelPlan(folder, weights, name)
        files = {path: plan.file(kind) for kind, path in outputs.items()}
        _check_disk(files)
        pool = stack.enter_context(ThreadPoolExecutor(threads))
        temporary = {path: path.with_name(f".{path.name}.{os.getpid()}.part") for path in files}
        for part in temporary.values():
            stack.callback(part.unlink, missing_ok=True)
        try:
            with ExitStack() as opened:
                targets = [
                    _Target(file, opened.enter_context(temporary[path].open("wb"))) for path, file in files.items()
                ]
                done = _stream(plan, weights, targets, _Converter(ggml, pool, threads), progress)
                for target in targets:
                    target.finish()
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise ResourceError(f"{next(iter(files)).parent}: the disk is full") from error
            raise
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
    """An output that is being written: the tensors arrive in the folder's order and go to their own places."""

    def __init__(self, plan: FilePlan, file: BinaryIO) -> None:
        self.plan = plan
        self._file = file
        file.write(plan.header)

    def write(self, tensor: str, position: int, data: NDArray[np.uint8]) -> None:
        self._file.seek(self.plan.places[tensor].offset + position)
        self._file.write(data.data)

    def finish(self) -> None:
        self._file.truncate(self.plan.num_bytes)
        self._file.flush()
        os.fsync(self._file.fileno())


@dataclass(frozen=True)
class _Converter:
    ggml: Ggml
    pool: Executor
    num_threads: int

    def __call__(self, source: Source, type_name: str, rows: NDArray[np.float32]) -> NDArray[np.uint8]:
        data = self.ggml.quantise(type_name, rows, self.pool, self.num_threads)
        if not self.ggml.is_valid(type_name, data):
            place = source.stored.name if source.stored else source.name
            raise ModelError(
                f"tensor {place} holds values that are not finite in {type_name}",
                hint="the training diverged, or the values exceed what 16-bit floats hold: export BF16 or F32",
            )
        return data


def _stream(
    plan: ModelPlan,
    weights: SafetensorFolder,
    targets: Sequence[_Target],
    convert: _Converter,
    progress: Callable[[int, int], None] | None,
) -> int:
    total = sum(source.stored.num_bytes for source in plan.sources.values() if source.stored)
    done = 0
    for source in plan.sources.values():
        positions = [0] * len(targets)
        for rows, num_bytes in _slabs(source, weights):
            converted: dict[str, NDArray[np.uint8]] = {}
            for index, target in enumerate(targets):
                type_name = target.plan.places[source.name].type_name
                if type_name not in converted:
                    converted[type_name] = convert(source, type_name, rows)
                target.write(source.name, positions[index], converted[type_name])
                positions[index] += converted[type_name].nbytes
            done += num_bytes
            if progress is not None:
                progress(done, total)
    return done


def _slabs(source: Source, weights: SafetensorFolder) -> Iterator[tuple[NDArray[np.float32], int]]:
    """Yield (rows as a matrix, bytes read), with rows of q and k already in llama.cpp's order."""
    import numpy as np

    if source.stored is None:
        assert source.values is not None
        yield source.values.reshape(1, -1), 0
        return
    num_rows = source.shape[0]
    columns = source.shape[1] if len(source.shape) == 2 else 1
    # Rows of a head trade places with each other, so that a slab must hold whole heads.
    unit = num_rows // source.num_heads if source.num_heads else 1
    step = num_rows if len(source.shape) == 1 else max(1, _SLAB_ELEMENTS // columns // unit) * unit
    for start in range(0, num_rows, step):
        stop = min(num_rows, start + step)
        rows = weights.rows(source.stored, start, stop)
        if source.num_heads:
            # Rotary halves (first half, second half) become neighbouring pairs.
            halves = rows.reshape(-1, 2, unit // 2, *rows.shape[1:])
            rows = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)
        num_bytes = source.stored.num_bytes // num_rows * (stop - start)
        yield np.ascontiguousarray(rows.reshape(stop - start, -1) if rows.ndim == 2 else rows[None, :]), num_bytes


def _check_disk(files: Mapping[Path, FilePlan]) -> None:
    needed: dict[Path, int] = {}
    for path, plan in files.items():
        if not path.parent.is_dir():
            raise ResourceError(f"{path.parent}: no such folder to write {path.name} to")
        needed[path.parent] = needed.get(path.parent, 0) + plan.num_bytes
    for folder, num_bytes in needed.items():
        free = shutil.disk_usage(folder).free
        if free < num_bytes:
            raise ResourceError(f"{folder}: {num_bytes:,} bytes are needed, {free:,} are free", hint="free some space")


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
