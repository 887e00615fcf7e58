"""All questions of a file or a run through an engine: each answer goes to the journal when it is there.

Answers come as they end, not in the order of the questions; the journal goes by id, and so must whoever reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice

from fintune.config import PredictOptions
from fintune.errors import ArtifactError
from fintune.finqa.verdict import executes_to_gold
from fintune.inference.candidates import decoding, grammars, predict_one
from fintune.inference.journal import Journal
from fintune.inference.pages import page_order, prompts_named
from fintune.inference.protocol import Answered, Completion, Decoding
from fintune.records import FinQARecord, Prediction
from fintune.util.console import bar

Ask = Callable[[Sequence[str], Decoding, frozenset[int]], Iterator[Answered]]
"""Puts the questions with these ids to an engine, but those at the places that are done."""
Check = Callable[[str, Completion], None]
"""Looks at the first completion of the question with this id."""


_QUOTED = 60
"""Characters of a completion that a message repeats."""
_NUM_ASKED_AGAIN = 3


def answer_all(
    title: str,
    records: Sequence[FinQARecord],
    options: PredictOptions,
    journal: Journal,
    ask: Ask,
    check: Check | None,
    *,
    is_served: bool = False,
) -> None:
    """Answer what the journal does not hold.

    Questions about a page are asked one behind the other, those that are done among them, see
    :meth:`fintune.inference.protocol.Engine.generate`.

    Args:
        title: Of the progress bar.
        records: All questions with their pages; gold in them is read for the running accuracy alone.
        options: How they are asked.
        journal: Grows by a line with each answer.
        ask: The engine.
        check: Refuses an answer.
        is_served: Whether a server answers, whose weights may be others by now: going on with greedy decoding, the
            first answers that are there are asked for once more.

    Raises:
        ArtifactError: The server answers otherwise than before.
        ModelError: The engine cannot take a question, which it names, or another way of asking.
    """
    if all(record.id in journal.done for record in records):
        return
    records = [records[at] for at in page_order(records)]
    done = frozenset(at for at, record in enumerate(records) if record.id in journal.done)
    allowed = grammars(options, records)
    running = Running()
    for at in sorted(done):
        running.add_earlier(journal.done[records[at].id], records[at])
    ids, way = [record.id for record in records], decoding(options, allowed)
    with prompts_named(records), bar(title, len(records), done=len(done), slow=True) as shown:
        if is_served and done and way.temperature == 0:
            _check_server(ids, way, journal, ask)
        for place, found in ask(ids, way, done):
            record = records[place]
            if check is not None:
                check(record.id, found[0])
            prediction = predict_one(record.id, found, options, record.table, allowed[place] if allowed else None)
            journal.append(prediction)
            running.add(prediction, record)
            shown.advance()
            shown.note(running.told())


def _check_server(ids: Sequence[str], way: Decoding, journal: Journal, ask: Ask) -> None:
    """Some of the answers that are there once more; one of them may be a near-tie that falls otherwise today."""
    known = set(ids)
    chosen = list(islice((each for each in journal.done if each in known), _NUM_ASKED_AGAIN))
    others = frozenset(place for place, each in enumerate(ids) if each not in chosen)
    now = {ids[place]: found[0].text for place, found in ask(ids, way, others)}
    differing = [each for each in chosen if now[each] != journal.done[each].text]
    if 2 * len(differing) > len(chosen):
        first = differing[0]
        raise ArtifactError(
            f"the server answers {first} otherwise than when {journal.path} was begun: "
            f"{now[first][:_QUOTED]!r}, not {journal.done[first].text[:_QUOTED]!r} "
            f"({len(differing)} of {len(chosen)} questions asked again)",
            hint="serve the same model again, or remove that file to begin anew",
        )


class Running:
    """Speed and execution accuracy so far."""

    def __init__(self) -> None:
        self._num_tokens, self._seconds, self._num_gold, self._num_right = 0, 0.0, 0, 0

    def add(self, prediction: Prediction, record: FinQARecord) -> None:
        """Count an answer."""
        self._num_tokens += num_tokens(prediction)
        self._seconds += prediction.seconds
        self.add_earlier(prediction, record)

    def add_earlier(self, prediction: Prediction, record: FinQARecord) -> None:
        """Count an answer of an interrupted attempt, whose speed says nothing about this one."""
        right = is_right(prediction, record)
        if right is not None:
            self._num_gold += 1
            self._num_right += right

    def told(self) -> str:
        """``31 tok/s, 12.5% right``, or the speed alone where there is no gold."""
        right = f", {self._num_right / self._num_gold:.1%} right" if self._num_gold else ""
        return f"{self._num_tokens / max(self._seconds, 1e-9):.0f} tok/s{right}"


def num_tokens(prediction: Prediction) -> int:
    """Generated tokens, those of all candidates."""
    return sum(each.num_tokens for each in prediction.candidates) or len(prediction.token_ids)


def is_right(prediction: Prediction, record: FinQARecord) -> bool | None:
    """Whether the program's result is gold's; None where there is no gold."""
    return executes_to_gold(prediction.program, record) if record.qa.program else None


def less_memory(batch_size: int, max_length: int, four_bit: str | None) -> str:
    """What to change when memory ran out, the cheapest change first.

    Args:
        batch_size: Completions that were decoded together.
        max_length: ``prompt.max_length``.
        four_bit: What loads the weights in 4 bits; None where they are already, or cannot be.
    """
    ways = [f"set predict.batch_size={batch_size // 2}"] if batch_size > 1 else []
    ways += [four_bit] if four_bit else []
    return ", or ".join([*ways, f"lower prompt.max_length (now {max_length})"])
