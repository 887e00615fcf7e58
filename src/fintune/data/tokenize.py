"""Tokenized examples: what they hold, and the work of tokenizing many of them, in this process or in several.

Every item is tokenized by itself, and results come in the order of the items. So the number of processes changes the
time alone, never the result.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import subprocess
import sys
import threading
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
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
        notes: For a conversation, what the chat template made necessary; see `fintune.data.tokenize_chat`.
    """

    example: Example
    rows: tuple[TokenRow, ...]
    token_counts: tuple[tuple[int, int], ...]
    rejected: str | None = None
    label: bool | None = None
    kept: frozenset[str] = frozenset()
    num_units: int = 0
    cleaned: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

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


_BOOTSTRAP = """import pickle, sys
sys.path[:] = pickle.load(sys.stdin.buffer)
from fintune.data.tokenize import work
work()
"""


def work() -> None:
    """Tokenize the chunks that come on standard input until it ends, in a worker process."""
    output = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints must not get between the results
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes share the cores already
    with contextlib.suppress(EOFError, BrokenPipeError):  # the parent process has ended
        tokenize = pickle.load(sys.stdin.buffer)()  # noqa: S301 - the parent process sends it
        while True:
            chunk = pickle.load(sys.stdin.buffer)  # noqa: S301 - the parent process sends it
            try:
                results = tokenize(chunk)
            except FintuneError as error:
                results = error
            pickle.dump(results, output)
            output.flush()


def _run_in_workers(payload: bytes, chunks: Sequence[Sequence[T]], num_workers: int) -> Iterator[Any]:
    """Tokenize chunks in processes of their own, with a thread for each that sends chunks and receives results.

    The processes run a fresh Python. A forked copy of a process with threads (tokenizers, torch) may deadlock, and
    `multiprocessing` would import the user's script again. They get no Ctrl-C, and end with their standard input.
    """
    command = [sys.executable, "-c", _BOOTSTRAP]
    processes: list[subprocess.Popen[bytes]] = []
    received: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
    waiting = iter(range(len(chunks)))
    done: dict[int, Any] = {}
    try:
        for _ in range(num_workers):
            process = subprocess.Popen(  # noqa: S603 - this interpreter
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
            )
            processes.append(process)
            threading.Thread(target=_feed, args=(process, payload, chunks, waiting, received), daemon=True).start()
        for number in range(len(chunks)):
            while number not in done:
                with contextlib.suppress(queue.Empty):  # a timeout, so that Ctrl-C is noticed everywhere
                    chunk_number, results = received.get(timeout=1)
                    done[chunk_number] = results
                    if isinstance(results, (OSError, EOFError, pickle.PickleError)):
                        raise DataError(
                            "a process that tokenizes the data ended early",
                            hint="it may have run out of memory; set data.num_proc=0 to tokenize in the main process",
                        ) from results
            results = done.pop(number)
            if isinstance(results, FintuneError):
                raise results
            yield from results
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _feed(
    process: subprocess.Popen[bytes],
    payload: bytes,
    chunks: Sequence[Sequence[Any]],
    waiting: Iterator[int],
    received: queue.SimpleQueue[tuple[int, Any]],
) -> None:
    assert process.stdin is not None and process.stdout is not None, "both are pipes"
    number = -1
    with process.stdin as stdin, process.stdout as stdout:
        try:
            pickle.dump(sys.path, stdin)
            stdin.write(payload)
            for number in waiting:
                pickle.dump(chunks[number], stdin)
                stdin.flush()
                received.put((number, pickle.load(stdout)))  # noqa: S301 - the worker process sends it
        except (OSError, EOFError, pickle.PickleError) as error:
            received.put((number, error))
            with contextlib.suppress(OSError):
                stdin.close()
