"""Which rows an objective learns from: answers to imitate, pairs to compare, or answers with a label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from fintune.config import Shape
from fintune.data.shapes import Conversation
from fintune.errors import DataError
from fintune.records import Message

Wanted = Literal["answers", "pairs", "labels"]
"""``answers``: all but the undesired; ``pairs``: preference pairs; ``labels``: answers with a label, and pairs, which
hold one of each."""

_UNPAIRED: Shape = "unpaired_preference"


def wanted_by(objective: str) -> Wanted:
    """What ``train.objective`` learns from."""
    return "answers" if objective == "sft" else "labels" if objective == "kto" else "pairs"


def left_out(shape: Shape, conversation: Conversation, wanted: Wanted) -> str | None:
    """The reason to count a usable row by that is not wanted; None for one that is."""
    if wanted == "answers":
        return "labelled false" if conversation.label is False else None
    if conversation.rejected is not None or (wanted == "labels" and conversation.label is not None):
        return None
    return f"{'no pair' if wanted == 'pairs' else 'no label'} ({shape})"


def said(conversation: Conversation, wanted: Wanted) -> Sequence[Message]:
    """What decides whether two rows are the same: the turns and, where they are learned from, rejected answer or label.

    A label goes in as a number, since near duplicates have the same numbers: who says yes to an answer and who says no
    to it are both heard.
    """
    more = None
    if wanted != "answers" and conversation.rejected is not None:
        more = conversation.rejected
    elif wanted == "labels" and conversation.label is not None:
        more = str(int(conversation.label))
    return conversation.messages if more is None else (*conversation.messages, Message(role="assistant", content=more))


def nothing_wanted(paths: Sequence[str], num_rows: int, dropped: Mapping[str, int], wanted: Wanted) -> DataError:
    """What to say where no row of any source is wanted.

    Args:
        paths: Of the sources.
        num_rows: That they hold.
        dropped: Rows by the reason for which they were left out.
        wanted: By the objective.
    """
    what = {
        "answers": "no answer labelled true",
        "pairs": "no preference pair",
        "labels": "neither a labelled answer nor a preference pair",
    }
    hint = {
        "answers": "sft learns from answers labelled true; set train.objective: kto to learn from those labelled false",
        "pairs": "a pair has the fields prompt, chosen and rejected; set train.objective: sft to train on "
        "conversations",
        "labels": "a labelled answer has the fields prompt, completion and label (true or false), a pair prompt, "
        "chosen and rejected; set train.objective: sft to train on conversations",
    }[wanted]
    if wanted == "pairs" and any(_UNPAIRED in reason for reason in dropped):
        hint = "each of these rows is one answer with a label, and no pair; set train.objective: kto to learn from them"
    counts = ", ".join(f"{reason}: {times}" for reason, times in dropped.items())
    return DataError(f"{', '.join(paths)}: {what[wanted]} among {num_rows} rows ({counts})", hint=hint)
