"""What a row looks like, and how it becomes a conversation: one small function a shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final

from fintune.config import Shape
from fintune.data.fields import ALIASES, TURNS, Fields, fields_of, key_of
from fintune.data.labels import label_of
from fintune.data.rows import BrokenRowError
from fintune.data.turns import list_of_turns, messages_of, num_thoughts, refuse_tools, text_of
from fintune.records import Message


@dataclass(frozen=True)
class Conversation:
    """One row as a conversation that ends with the assistant.

    Attributes:
        messages: Every turn.
        untrained: Places of assistant's turns that the row itself excludes from training (``"weight": 0``).
        rejected: The worse answer in the last turn's place, of a preference pair.
        num_trailing: Turns behind the last answer, which were left out.
        label: Whether the last answer is desired, where the row says so.
        num_thoughts: Turns with a thought in a field of its own, which was left out.
    """

    messages: tuple[Message, ...]
    untrained: frozenset[int] = frozenset()
    rejected: str | None = None
    num_trailing: int = 0
    label: bool | None = None
    num_thoughts: int = 0


def convert(
    row: object,
    shape: Shape | None = None,
    columns: Mapping[str, str] | None = None,
    *,
    labelled: bool = False,
) -> tuple[Shape, Conversation]:
    """Make a row a conversation.

    Args:
        row: As it was parsed.
        shape: What it must look like; found out where None.
        columns: Names of a shape's fields in the row; a dot goes into an object.
        labelled: Labels are learned from, so that an empty one is no row of another shape but a broken one.

    Returns:
        The shape and the conversation.

    Raises:
        BrokenRowError: It cannot be one, with field, reason and suggestion.
    """
    if isinstance(row, BrokenRowError):
        raise row
    if not isinstance(row, dict):
        kind = "a list" if isinstance(row, list) else "null" if row is None else f"{row!r:.40}"
        raise BrokenRowError("not an object", f"{kind} is no object with named fields")
    try:
        return _told_by_column(row, shape, columns or {}, labelled)
    except RecursionError:
        why = "lists or objects stand hundreds deep in each other"
        raise BrokenRowError("too deep", why, hint="mend or remove the row") from None


def _told_by_column(
    row: Mapping[str, object], shape: Shape | None, columns: Mapping[str, str], labelled: bool
) -> tuple[Shape, Conversation]:
    named = fields_of(row, columns)
    found = shape or detect(named.fields, labelled=labelled)
    if found is None:
        raise _unknown(named.fields, row)
    try:
        return found, _converted(found, named.fields)
    except BrokenRowError as broken:
        elsewhere = broken.field in TURNS and not named.written.keys().isdisjoint(TURNS)
        if shape is not None and broken.field in _FIELDS - named.written.keys() and not elsewhere:
            _refuse_other_names(broken.field, row, columns)
        broken.field = named.as_written(broken.field)
        raise


def _refuse_other_names(field: str, row: Mapping[str, object], columns: Mapping[str, str]) -> None:
    """Of a field that is not in the row: a column that nothing is read from may be it."""
    read = _TELLING | _MORE
    names = map(str, row)
    others = [each for each in names if each not in columns.values() and each.strip().lower() not in read]
    if others:
        why = f"not in the row, which has {', '.join(others[:8])}"
        hint = f"fill it or remove the row; or name its column, as columns: {{{field}: {others[0]}}}"
        raise BrokenRowError("no such column", why, field=field, hint=hint) from None


def _converted(found: Shape, fields: Fields) -> Conversation:
    conversation = _CONVERT[found](fields)
    turns = [(name, fields.get(name)) for name in _TURNS[found]]
    lists = [value for name, value in turns if isinstance(value, list) or (name in TURNS and value is not None)]
    if lists:
        refuse_tools(fields)
    return replace(conversation, num_thoughts=sum(map(num_thoughts, lists)))


def detect(fields: Fields, *, labelled: bool = False) -> Shape | None:
    """The first shape whose fields are all filled; else the first whose fields are there at all.

    Args:
        fields: Of the row.
        labelled: Take an empty label for a filled one.
    """
    filled = {name for name, value in fields.items() if value is not None and value not in ("", [])}
    filled |= {"label"} & fields.keys() if labelled else set()
    for present in (filled, set(fields)):
        for shape, needed in _NEEDS:
            if needed <= present:
                return shape
    return None


def is_row(value: Mapping[str, object], columns: Mapping[str, str]) -> bool:
    """Whether an object is a row, and none around rows: it has a field that tells a shape, or all mapped columns.

    Args:
        value: As it was parsed.
        columns: Names of a shape's fields in a row.
    """
    names = {str(name).strip().lower() for name in value}
    mapped = bool(columns) and all(
        (key_of(value, each) or key_of(value, each.split(".")[0])) is not None for each in columns.values()
    )
    return mapped or bool(names & _TELLING)


def _unknown(fields: Fields, row: Mapping[str, object]) -> BrokenRowError:
    names = ", ".join(list(map(str, row))[:8]) or "none"
    if {"pre_text", "qa"} <= fields.keys():
        hint = "these are FinQA records; read them with data.source: finqa"
    elif ("chosen" in fields) != ("rejected" in fields):
        hint = f"a pair has both answers; {'rejected' if 'chosen' in fields else 'chosen'} is missing"
    elif "text" in fields:
        hint = "running text has no turns; write prompt and completion"
    else:
        hint = "name them, as columns: {question: ..., answer: ...}; docs/data.md lists the shapes"
    return BrokenRowError("unknown shape", f"fields {names} are no known shape", hint=hint)


def _from_messages(fields: Fields) -> Conversation:
    return _ended(list_of_turns(fields.get("messages"), "messages"))


def _from_sharegpt(fields: Fields) -> Conversation:
    return _ended(list_of_turns(fields.get("conversations"), "conversations"), system=fields.get("system"))


def _ended(turns: tuple[list[Message], frozenset[int]], *, system: object = None) -> Conversation:
    messages, untrained = turns
    last = max((place for place, each in enumerate(messages) if each.role == "assistant"), default=None)
    if last is None:
        raise BrokenRowError(
            "no answer", "no turn is the assistant's", hint="the last turn must be the answer to train on"
        )
    if not any(each.role == "user" for each in messages[:last]):
        raise BrokenRowError("no question", "no user's turn before the answer", hint="add the question")
    before = _system(system) if messages[0].role != "system" else ()
    kept = (*before, *messages[: last + 1])
    return Conversation(
        kept,
        frozenset(place + len(before) for place in untrained if place <= last),
        num_trailing=len(messages) - 1 - last,
    )


def _from_preference(fields: Fields) -> Conversation:
    chosen, rejected = fields.get("chosen"), fields.get("rejected")
    if not isinstance(chosen, list) and not isinstance(rejected, list):
        before = _preference_prompt(fields)
        answer, worse = text_of(chosen, "chosen", "no answer"), text_of(rejected, "rejected", "no rejected answer")
    else:
        better, other = list_of_turns(chosen, "chosen")[0], list_of_turns(rejected, "rejected")[0]
        answer, worse = _answer(better, "chosen"), _answer(other, "rejected")
        before = better[:-1] or _preference_prompt(fields)
        if other[:-1] not in ([], better[:-1]):
            raise BrokenRowError(
                "not one prompt",
                "the turns before the last differ from those of chosen",
                field="rejected",
                hint="a pair is two answers to one prompt",
            )
    if answer.strip() == worse.strip():
        raise BrokenRowError(
            "no preference", "chosen and rejected are the same", field="rejected", hint="remove the row"
        )
    return Conversation((*_with_system(fields, before), Message(role="assistant", content=answer)), rejected=worse)


def _preference_prompt(fields: Fields) -> list[Message]:
    """The prompt under any of the names that preference sets give it."""
    if fields.get("prompt") in (None, "", []):
        if "instruction" in fields:
            return [Message(role="user", content=_instruction(fields))]
        if "question" in fields:
            return messages_of(fields["question"], "question", "no question")
    return messages_of(fields.get("prompt"), "prompt", "no question")


def _answer(turns: list[Message], field: str) -> str:
    if turns[-1].role != "assistant":
        raise BrokenRowError(
            "no answer", "the last turn is not the assistant's", field=field, hint="end it with the answer"
        )
    return turns[-1].content


def _from_unpaired_preference(fields: Fields) -> Conversation:
    if "label" not in fields:
        hint = "name the column that says it, as columns: {label: liked}"
        raise BrokenRowError("no label", "not in the row", field="label", hint=hint)
    label = label_of(fields["label"])
    if fields.get("conversations") is not None:
        found = _from_sharegpt(fields)
    elif fields.get("messages") is not None:
        found = _from_messages(fields)
    else:
        found = _completed(fields, _preference_prompt(fields))
    if len(found.messages) - 1 in found.untrained:
        raise BrokenRowError(
            "no answer", "the labelled answer has weight 0", field="label", hint="remove the weight, or the row"
        )
    return replace(found, label=label)


def _from_alpaca(fields: Fields) -> Conversation:
    return _pair(fields, _instruction(fields), text_of(fields.get("output"), "output", "no answer"))


def _instruction(fields: Fields) -> str:
    question = text_of(fields.get("instruction"), "instruction", "no question")
    extra = fields.get("input")
    return question if extra in (None, "") else f"{question}\n\n{text_of(extra, 'input', 'bad input')}"


def _from_question_answer(fields: Fields) -> Conversation:
    question = text_of(fields.get("question"), "question", "no question")
    context = fields.get("context")
    if context is not None and str(context).strip():
        question = f"Context: {text_of(context, 'context', 'bad context')}\n\nQuestion: {question}"
    return _pair(fields, question, text_of(fields.get("answer"), "answer", "no answer"))


def _from_prompt_completion(fields: Fields) -> Conversation:
    return _completed(fields, messages_of(fields.get("prompt"), "prompt", "no question"))


def _completed(fields: Fields, before: list[Message]) -> Conversation:
    completion = fields.get("completion")
    if isinstance(completion, list):
        answer = _answer(list_of_turns(completion, "completion")[0], "completion")
    else:
        answer = text_of(completion, "completion", "no answer")
    return Conversation((*_with_system(fields, before), Message(role="assistant", content=answer)))


def _pair(fields: Fields, question: str, answer: str) -> Conversation:
    turns = [Message(role="user", content=question), Message(role="assistant", content=answer)]
    return Conversation(_with_system(fields, turns))


def _with_system(fields: Fields, turns: list[Message]) -> tuple[Message, ...]:
    return (*(_system(fields.get("system")) if turns[0].role != "system" else ()), *turns)


def _system(value: object) -> tuple[Message, ...]:
    if value is None or not str(value).strip():
        return ()
    return (Message(role="system", content=text_of(value, "system", "bad system message")),)


_NEEDS: Final[tuple[tuple[Shape, set[str]], ...]] = (
    ("preference", {"chosen", "rejected"}),
    ("unpaired_preference", {"prompt", "completion", "label"}),
    ("unpaired_preference", {"messages", "label"}),
    ("unpaired_preference", {"conversations", "label"}),
    ("messages", {"messages"}),
    ("sharegpt", {"conversations"}),
    ("alpaca", {"instruction", "output"}),
    ("prompt_completion", {"prompt", "completion"}),
    ("question_answer", {"question", "answer"}),
)
"""The fields that tell a shape, in the order in which they are looked for."""
# A label may also be that of a whole list of rows; in a row it stands beside another field.
_FIELDS: Final = {name for _, needed in _NEEDS for name in needed} - {"label"}
_MORE: Final = {"label", "system", "system_prompt", "input", "context"}
"""What is read besides."""
_TELLING: Final = _FIELDS | {name for name, known in ALIASES.items() if known in _FIELDS}
_CONVERT: Final[dict[Shape, Callable[[Fields], Conversation]]] = {
    "preference": _from_preference,
    "unpaired_preference": _from_unpaired_preference,
    "messages": _from_messages,
    "sharegpt": _from_sharegpt,
    "alpaca": _from_alpaca,
    "prompt_completion": _from_prompt_completion,
    "question_answer": _from_question_answer,
}
_TURNS: Final[dict[Shape, tuple[str, ...]]] = {
    "preference": ("prompt", "chosen", "rejected"),
    "unpaired_preference": ("messages", "conversations", "prompt", "completion"),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": (),
    "prompt_completion": ("prompt", "completion"),
    "question_answer": (),
}
"""Fields that may hold turns."""
