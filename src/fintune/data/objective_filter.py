"""Which rows an objective trains on: answers to imitate, pairs to compare, or answers with a label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from fintune.config import Shape as Format
from fintune.data.formats import Conversation
from fintune.errors import DataError
from fintune.records import Message

RowKind = Literal["answers", "pairs", "labels"]
"""``answers``: all rows but those labelled false. ``pairs``: preference pairs. ``labels``: answers with a label, and
pairs, which have one answer of each label."""

ROW_NOUNS: Mapping[RowKind, str] = {"answers": "conversations", "pairs": "pairs", "labels": "answers"}
_UNPAIRED: Format = "unpaired_preference"


def row_kind_of(objective: str) -> RowKind:
    """Return the kind of rows that ``train.objective`` trains on."""
    return "answers" if objective == "sft" else "labels" if objective == "kto" else "pairs"


def skip_reason(format_: Format, conversation: Conversation, row_kind: RowKind) -> str | None:
    """Return the reason to count a usable row by that the objective does not train on; None for the others."""
    if not conversation.is_trained:
        return "marked as not to be trained"
    if row_kind == "answers":
        return "labelled false" if conversation.label is False else None
    if conversation.rejected is not None or (row_kind == "labels" and conversation.label is not None):
        return None
    return f"{'no pair' if row_kind == 'pairs' else 'no label'} ({format_})"


def dedup_messages(conversation: Conversation, row_kind: RowKind) -> Sequence[Message]:
    """Return the messages by which duplicates are found: the turns, and the rejected answer or label if it is trained.

    A label becomes a number, and near duplicates must have the same numbers. So the votes for and against an answer are
    both kept.
    """
    if row_kind != "answers" and conversation.rejected is not None:
        return (*conversation.messages, conversation.rejected)
    if row_kind == "labels" and conversation.label is not None:
        return (*conversation.messages, Message(role="assistant", content=str(int(conversation.label))))
    return conversation.messages


def no_rows_error(paths: Sequence[str], num_rows: int, dropped: Mapping[str, int], row_kind: RowKind) -> DataError:
    """Return the error for sources without a row that the objective trains on.

    Args:
        paths: Paths of the sources.
        num_rows: Number of their rows.
        dropped: Number of rows by the reason for which they were left out.
        row_kind: What the objective trains on.
    """
    what = {
        "answers": "no answer labelled true",
        "pairs": "no preference pair",
        "labels": "neither a labelled answer nor a preference pair",
    }
    hint = {
        "answers": "sft trains on answers labelled true; set train.objective: kto to train on those labelled false too",
        "pairs": "a pair has the fields prompt, chosen and rejected; set train.objective: sft to train on "
        "conversations",
        "labels": "a labelled answer has the fields prompt, completion and label (true or false), a pair prompt, "
        "chosen and rejected; set train.objective: sft to train on conversations",
    }[row_kind]
    if row_kind == "pairs" and any(_UNPAIRED in reason for reason in dropped):
        hint = "each of these rows is one answer with a label, not a pair; set train.objective: kto to train on them"
    counts = ", ".join(f"{reason}: {number}" for reason, number in dropped.items())
    return DataError(f"{', '.join(paths)}: {what[row_kind]} among {num_rows} rows ({counts})", hint=hint)
