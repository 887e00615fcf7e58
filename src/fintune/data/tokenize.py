"""Tokenized examples: what they hold, and the work of tokenizing many of them, in this process or in several.

Every item is tokenized by itself, and results come in the order of the items. So the number of processes changes the
time alone, never the result.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import queue
import signal
import threading
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

from fintune.errors import DataError, FintuneError
from fintune.finqa.prompt import TooLongError
from fintune.records import Example, Record

T = TypeVar("T")
TokenizeChunk = Callable[[Sequence[T]], list[Any]]
"""Tokenizes some items and returns one result for each of them."""

_CHUNK_CHARACTERS = 200_000
"""Characters of the items that are tokenized at once: enough for every core, and little to keep."""
_CHARACTERS_PER_WORKER = 4_000_000
"""A worker process takes a second to start, in which about this much is tokenized."""
_MAX_WORKERS = 8
_CHUNKS_IN_FLIGHT = 2
"""Chunks that each worker holds, so that it never waits for the next one."""


@dataclass(frozen=True)
class TokenRow:
    """One row of training tokens.

    Attributes:
        id: Ids of its examples, joined by spaces.
        input_ids: Token ids; shape [num_tokens].
        completion_mask: 1 for a token that is trained, else 0; same length.
        rejected_ids: For a pair, the worse answer with its end of turn, which comes after the same prompt.
        label: For an answer without a partner, whether it is desired.
    """

    id: str
    input_ids: Sequence[int]
    completion_mask: Sequence[int]
    rejected_ids: Sequence[int] | None = None
    label: bool | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens that one pass over the row reads. A pair's prompt is read twice."""
        rejected = 0 if self.rejected_ids is None else self.completion_mask.index(1) + len(self.rejected_ids)
        return len(self.input_ids) + rejected

    @property
    def num_context_tokens(self) -> int:
        """Tokens of the longest sequence that the model sees; a pair is two sequences."""
        if self.rejected_ids is None:
            return len(self.input_ids)
        return max(len(self.input_ids), self.completion_mask.index(1) + len(self.rejected_ids))

    def compact(self) -> TokenRow:
        """Return the same row in 5 bytes a token instead of about 40."""
        rejected = None if self.rejected_ids is None else array("i", self.rejected_ids)
        ids, mask = array("i", self.input_ids), array("b", self.completion_mask)
        return replace(self, input_ids=ids, completion_mask=mask, rejected_ids=rejected)


@dataclass(frozen=True)
class TokenizedExample:
    """An example as the model will see it.

    Attributes:
        example: Prompt and completion. ``num_cut`` counts what was left out: units of a page, or turns.
        rows: Its rows. A conversation has one row for each trained turn if the chat template rewrites earlier turns.
            If questions about a page share rows, the page's first example has all of them, and the others none.
        token_counts: Tokens of the prompt and of the completion, for each row that the example has by itself.
        rejected: For a pair, the worse answer.
        label: For an answer without a partner, whether it is desired.
        kept: For a page, keys of the units in the prompt (``text_3``, ``table_1``).
        num_units: For a page, the number of all its units.
        cleaned: For a page, changes of its texts by cleaning rule.
    """

    example: Example
    rows: tuple[TokenRow, ...]
    token_counts: tuple[tuple[int, int], ...]
    rejected: str | None = None
    label: bool | None = None
    kept: frozenset[str] = frozenset()
    num_units: int = 0
    cleaned: dict[str, int] = field(default_factory=dict)

    def with_rows(self, rows: tuple[TokenRow, ...]) -> TokenizedExample:
        """Return the same example with other rows."""
        return replace(self, rows=rows)

    def compact(self) -> TokenizedExample:
        """Return the same example with rows that take little memory."""
        return replace(self, rows=tuple(row.compact() for row in self.rows))


class DroppedRow(Record):
    """A row that could not be used, as ``not_used.jsonl`` of a prepared folder lists it.

    Attributes:
        file: The file, or the split of a dataset.
        row: The row's number, from 1; None if only the id is known.
        field: The field, as ``messages[1].role``; empty for the whole row.
        reason: What is wrong.
        hint: What to do about it.
        id: The record's id, if it has one.
        category: A short reason, by which such rows are counted. It is not written.
    """

    file: str
    row: int | None = None
    field: str = ""
    reason: str
    hint: str = ""
    id: str = ""
    category: str = ""

    @classmethod
    def from_error(cls, error: DataError, **location: Any) -> DroppedRow:
        """Describe an example that cannot be tokenized.

        Args:
            error: The error.
            location: ``file``, ``row``, ``field`` and ``id`` of the example, as far as they are known.
        """
        is_too_long = isinstance(error, TooLongError)
        hint = error.hint or ("raise prompt.max_length" if is_too_long else "")
        category = "too long" if is_too_long else "not encodable"
        return cls(**{"file": "", **location}, reason=error.message, hint=hint, category=category)

    def error(self, hint: str | None = None) -> DataError:
        """Return the row as an error, with another hint if one is passed."""
        what = f"{self.field}: {self.reason}" if self.field else self.reason
        path, record_id = self.file or None, self.id or None
        return DataError(what, path=path, row=self.row, record_id=record_id, hint=hint or self.hint or None)

    def __str__(self) -> str:
        return str(self.error())


class Tokenizing(Generic[T]):
    """The work of tokenizing many items, in this process or in worker processes.

    Args:
        start: Makes the function that tokenizes a chunk. It is called once in every process, so it must be picklable.
        size_of: Returns the number of characters of an item.
        num_workers: Worker processes; 0 does the work in this process, None chooses by cores and characters.
    """

    def __init__(
        self, start: Callable[[], TokenizeChunk[T]], size_of: Callable[[T], int], *, num_workers: int | None = None
    ) -> None:
        self._start, self._size_of, self._num_workers = start, size_of, num_workers
        self._tokenize: TokenizeChunk[T] | None = None

    def run(self, items: Sequence[T]) -> Iterator[Any]:
        """Yield one result for each item, in order.

        Raises:
            FintuneError: The first error, in the order of the items, that is no result.
        """
        sizes = [self._size_of(item) for item in items]
        chunks = list(_chunks(items, sizes))
        num_workers = _choose_workers(sum(sizes)) if self._num_workers is None else self._num_workers
        num_workers = min(num_workers, len(chunks))
        payload = _pickled(self._start) if num_workers else None
        if payload is None:
            self._tokenize = self._tokenize or self._start()
            for chunk in chunks:
                yield from self._tokenize(chunk)
        else:
            yield from _run_in_workers(payload, chunks, num_workers)


def _chunks(items: Sequence[T], sizes: Sequence[int]) -> Iterator[Sequence[T]]:
    start, num_characters = 0, 0
    for index, size in enumerate(sizes):
        num_characters += size
        if num_characters > _CHUNK_CHARACTERS:
            yield items[start : index + 1]
            start, num_characters = index + 1, 0
    if start < len(items):
        yield items[start:]


def _choose_workers(num_characters: int) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    num_workers = min(cores, _MAX_WORKERS, num_characters // _CHARACTERS_PER_WORKER)
    return num_workers if num_workers > 1 else 0


def _pickled(start: object) -> bytes | None:
    """Return the bytes for a worker; None if the tokenizer is of a class that no other process can import."""
    try:
        return pickle.dumps(start)
    except (pickle.PicklingError, AttributeError, TypeError):
        return None


class _Worker:
    """A worker process and the numbers of the chunks that it has."""

    def __init__(self, payload: bytes) -> None:
        # "spawn", because a forked copy of a process with threads (tokenizers, torch) may deadlock.
        context = multiprocessing.get_context("spawn")
        self.connection, other_end = context.Pipe()
        self.process = context.Process(target=_work, args=(other_end,), daemon=True)
        self.process.start()
        other_end.close()  # so that the end of the worker is the end of the connection
        self.chunks: deque[int] = deque()
        self.connection.send(payload)

    def stop(self) -> None:
        self.connection.close()  # the worker ends when it cannot read
        self.process.join(1)
        if self.process.is_alive():
            self.process.terminate()
            self.process.join()


def _work(connection: Connection) -> None:
    """Tokenize chunks until the other end is closed, in a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends this process
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes share the cores already
    chunks: queue.SimpleQueue[Any] = queue.SimpleQueue()
    # A thread reads, because both ends would wait forever if each sent more than the pipe holds.
    threading.Thread(target=_receive, args=(connection, chunks), daemon=True).start()
    with contextlib.suppress(EOFError, OSError):
        payload = chunks.get()
        tokenize = pickle.loads(payload)() if payload else None  # noqa: S301 - sent by the parent process
        while tokenize and (chunk := chunks.get()) is not None:
            try:
                results = tokenize(chunk)
            except FintuneError as error:
                results = error
            connection.send(results)


def _receive(connection: Connection, chunks: queue.SimpleQueue[Any]) -> None:
    with contextlib.suppress(EOFError, OSError):
        while True:
            chunks.put(connection.recv())
    chunks.put(None)


def _run_in_workers(payload: bytes, chunks: Sequence[Sequence[T]], num_workers: int) -> Iterator[Any]:
    workers: list[_Worker] = []
    done: dict[int, Any] = {}
    waiting = iter(range(len(chunks)))
    try:
        workers += [_Worker(payload) for _ in range(num_workers)]
        for worker in workers * _CHUNKS_IN_FLIGHT:
            _send_next(worker, waiting, chunks)
        for number in range(len(chunks)):
            while number not in done:
                for ready in wait([worker.connection for worker in workers if worker.chunks]):
                    worker = next(worker for worker in workers if worker.connection is ready)
                    done[worker.chunks.popleft()] = worker.connection.recv()
                    _send_next(worker, waiting, chunks)
            results = done.pop(number)
            if isinstance(results, FintuneError):
                raise results
            yield from results
    except (EOFError, ConnectionError) as error:
        raise DataError(
            "a process that tokenizes the data ended early",
            hint="it may have run out of memory; set data.num_proc: 0 to tokenize in one process",
        ) from error
    finally:
        for worker in workers:
            worker.stop()


def _send_next(worker: _Worker, waiting: Iterator[int], chunks: Sequence[Sequence[Any]]) -> None:
    number = next(waiting, None)
    if number is not None:
        worker.chunks.append(number)
        worker.connection.send(chunks[number])
