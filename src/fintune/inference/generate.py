"""Generate predictions for all questions of a file or a run. Each prediction goes to the log as soon as it is there.

Completions arrive as they end, not in the order of the questions. The log identifies them by id, and its readers must
too. It is safe against interruptions, and never has predictions of two models.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError

from fintune.config import PredictOptions
from fintune.errors import ArtifactError
from fintune.finqa.verdict import executes_to_gold
from fintune.inference.decoding_strategies import choose_prediction, decoding_from_options, make_grammars
from fintune.inference.prefix_cache import name_prompts, page_order
from fintune.inference.protocol import Completion, Decoding, PromptResult
from fintune.records import FinQARecord, Prediction
from fintune.util.console import bar
from fintune.util.files import read_json, write_atomically
from fintune.util.text import first_line

_SYNC_SECONDS = 5.0
_CHANGES = {"prompts": "other questions or prompts"}
"""Descriptions of changed key parts; the default is "another NAME"."""

CompleteIds = Callable[[Sequence[str], Decoding, frozenset[int]], Iterator[PromptResult]]
"""Complete the prompts of these ids, except those at the indices of the set; see :class:`~.protocol.Engine`."""
CheckCompletion = Callable[[str, Completion], None]
"""Raise an error if the first completion of the question with this id is unusable."""


class PredictionLog:
    """A resumable JSON Lines file of predictions.

    Args:
        path: The file. ``NAME.key.json`` beside it holds the key.
        key: What the predictions depend on: model, prompts, decoding.

    Attributes:
        path: The file.
        done: Predictions in the file by the id of their example.

    Raises:
        ArtifactError: The file was started with another key, or contains a line that is not a prediction.
    """

    def __init__(self, path: Path, key: Mapping[str, str]) -> None:
        self.path, self._key_path = path, path.with_suffix(".key.json")
        self._check_key(dict(key))
        self.done: dict[str, Prediction] = {prediction.id: prediction for prediction in self._read()}
        self._file = path.open("a", encoding="utf-8")
        self._synced = time.monotonic()

    def append(self, prediction: Prediction) -> None:
        """Add a line. The operating system has it at once, the disk after at most some seconds."""
        self._file.write(prediction.model_dump_json() + "\n")
        self._file.flush()
        if time.monotonic() - self._synced >= _SYNC_SECONDS:
            self.sync()
        self.done[prediction.id] = prediction

    def sync(self) -> None:
        """Flush the appended lines to the disk."""
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def close(self) -> None:
        """Flush everything to the disk and close the file."""
        self.sync()
        self._file.close()

    def _check_key(self, key: dict[str, str]) -> None:
        if self._key_path.exists():
            old = read_json(self._key_path, ArtifactError)
            changed = [name for name in sorted(key.keys() | old.keys()) if key.get(name) != old.get(name)]
            if changed:
                changes = ", ".join(_CHANGES.get(name, f"another {name}") for name in changed)
                raise ArtifactError(
                    f"{self.path} was started with {changes}",
                    hint="remove the folder, or rerun the stage with --redo",
                )
        elif self.path.exists():
            raise ArtifactError(f"{self.path} does not say which model it is from", hint="remove the file")
        write_atomically(self._key_path, json.dumps(key, indent=1))

    def _read(self) -> list[Prediction]:
        if not self.path.exists():
            return []
        whole, newline, torn = self.path.read_bytes().rpartition(b"\n")
        if torn:
            os.truncate(self.path, len(whole) + len(newline))
        try:
            return [Prediction.model_validate_json(line) for line in whole.split(b"\n") if line]
        except ValidationError as error:
            raise ArtifactError(
                f"{self.path} contains a line that is not a prediction ({first_line(error)})", hint="remove the file"
            ) from None


def generate_all(
    title: str,
    records: Sequence[FinQARecord],
    options: PredictOptions,
    log: PredictionLog,
    complete: CompleteIds,
    check: CheckCompletion | None = None,
) -> None:
    """Generate the predictions that the log does not contain yet.

    Questions about one page follow each other, those that are done included; see
    :meth:`fintune.inference.protocol.Engine.generate`.

    Raises:
        ModelError: The engine cannot take a question, which the message names, or does not support the decoding.
    """
    if all(record.id in log.done for record in records):
        return
    records = [records[index] for index in page_order(records)]
    done = frozenset(index for index, record in enumerate(records) if record.id in log.done)
    grammars = make_grammars(options, records)
    stats = RunningStats()
    for index in sorted(done):
        stats.add_earlier(log.done[records[index].id], records[index])
    ids, decoding = [record.id for record in records], decoding_from_options(options, grammars)
    with name_prompts(records), bar(title, len(records), done=len(done), slow=True) as progress:
        for index, completions in complete(ids, decoding, done):
            record = records[index]
            if check is not None:
                check(record.id, completions[0])
            grammar = grammars[index] if grammars else None
            prediction = choose_prediction(record.id, completions, options, record.table, grammar)
            log.append(prediction)
            stats.add(prediction, record)
            progress.advance()
            progress.note(str(stats))


class RunningStats:
    """Speed and execution accuracy so far. As text: ``31 tok/s, 12.5% right``, or only the speed without gold."""

    def __init__(self) -> None:
        self._num_tokens, self._seconds, self._num_gold, self._num_correct = 0, 0.0, 0, 0

    def add(self, prediction: Prediction, record: FinQARecord) -> None:
        """Count a prediction."""
        self._num_tokens += num_generated_tokens(prediction)
        self._seconds += prediction.seconds
        self.add_earlier(prediction, record)

    def add_earlier(self, prediction: Prediction, record: FinQARecord) -> None:
        """Count a prediction of an interrupted attempt, whose speed says nothing about this one."""
        is_correct = is_correct_prediction(prediction, record)
        if is_correct is not None:
            self._num_gold += 1
            self._num_correct += is_correct

    def __str__(self) -> str:
        accuracy = f", {self._num_correct / self._num_gold:.1%} right" if self._num_gold else ""
        return f"{self._num_tokens / max(self._seconds, 1e-9):.0f} tok/s{accuracy}"


def num_generated_tokens(prediction: Prediction) -> int:
    """Return the number of generated tokens, those of all candidates included."""
    return sum(candidate.num_tokens for candidate in prediction.candidates) or len(prediction.token_ids)


def is_correct_prediction(prediction: Prediction, record: FinQARecord) -> bool | None:
    """Whether the program executes to the gold result; None if the record has no gold program."""
    return executes_to_gold(prediction.program, record) if record.qa.program else None


def memory_hint(batch_size: int, max_length: int, load_in_4bit: str | None) -> str:
    """Return what to change when memory ran out, the smallest change first.

    ``load_in_4bit`` says how to load the weights in 4 bits; it is None if they already are, or cannot be.
    """
    changes = [f"set predict.batch_size={batch_size // 2}"] if batch_size > 1 else []
    changes += [load_in_4bit] if load_in_4bit else []
    return ", or ".join([*changes, f"lower prompt.max_length (now {max_length})"])
