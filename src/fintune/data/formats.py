"""Data formats: how a row is recognised by its fields and becomes a conversation, with one small function a format."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

from fintune.config import Shape as Format
from fintune.data.messages import count_thoughts, parse_label, parse_prompt, parse_text, parse_turns, refuse_tools
from fintune.data.readers import BrokenRowError
from fintune.records import Message

Fields = Mapping[str, object]
"""A row's values by name in lower case."""

_TURN_FIELDS: Final = ("messages", "conversations")
"""Fields that hold turns, also as JSON text."""
_ALIASES: Final = {"response": "completion", "conversation": "messages", "system_prompt": "system"}
"""Other names of fields."""


@dataclass(frozen=True)
class Conversation:
    """One row as a conversation that ends with the assistant.

    Attributes:
        messages: All turns.
        untrained: Indices of the assistant's turns that the row itself excludes from training (``"weight": 0``).
        rejected: The worse last answer of a preference pair.
        num_trailing: Turns after the last answer, which were left out.
        label: Whether the last answer is desired; None without a label.
        num_thoughts: Turns with a thought in a field of its own, which was left out.
        id: Label of its file, and its row, as ``rows.jsonl:7``.
        file: The file, or the split of a dataset, as messages name it.
        row: The row's number in it, from 1.
        source: Index of its entry in ``data.sources``.
        digest: Digest of its texts. Exact duplicates have the same one.
        end_token_field: The field that holds the end-of-turn token, for the message about the row; empty if unknown.
    """

    messages: tuple[Message, ...]
    untrained: frozenset[int] = frozenset()
    rejected: str | None = None
    num_trailing: int = 0
    label: bool | None = None
    num_thoughts: int = 0
    id: str = ""
    file: str = ""
    row: int = 0
    source: int = 0
    digest: bytes = b""
    end_token_field: str = ""


def convert_row(
    row: object,
    format_: Format | None = None,
    columns: Mapping[str, str] | None = None,
    *,
    is_labelled: bool = False,
) -> tuple[Format, Conversation]:
    """Convert a row to a conversation.

    Args:
        row: The parsed row, or the error of parsing it.
        format_: The row's format; detected if None.
        columns: The row's names of a format's fields. A dot goes into an object.
        is_labelled: Whether labels are trained on. Then an empty label makes the row broken, not of another format.

    Returns:
        The format and the conversation.

    Raises:
        BrokenRowError: The row cannot be converted, with field, reason and hint.
    """
    if isinstance(row, BrokenRowError):
        raise row
    if not isinstance(row, dict):
        kind = "a list" if isinstance(row, list) else "null" if row is None else f"{row!r:.40}"
        raise BrokenRowError("not an object", f"{kind} is no object with named fields")
    try:
        return _convert_object(row, format_, columns or {}, is_labelled)
    except RecursionError:
        why = "lists or objects are nested hundreds deep"
        raise BrokenRowError("too deep", why, hint="repair or remove the row") from None


def _convert_object(
    row: Mapping[str, object], format_: Format | None, columns: Mapping[str, str], is_labelled: bool
) -> tuple[Format, Conversation]:
    named = _name_fields(row, columns)
    detected = format_ or detect_format(named.fields, is_labelled=is_labelled)
    if detected is None:
        raise _unknown_format(named.fields, row)
    try:
        return detected, _convert_fields(detected, named.fields)
    except BrokenRowError as broken:
        is_turns = broken.field in _TURN_FIELDS and not named.original.keys().isdisjoint(_TURN_FIELDS)
        if format_ is not None and broken.field in _FORMAT_FIELDS - named.original.keys() and not is_turns:
            _suggest_column(broken.field, row, columns)
        broken.field = named.original_name(broken.field)
        raise


def _suggest_column(field: str, row: Mapping[str, object], columns: Mapping[str, str]) -> None:
    """Raise with a hint if a field is missing and the row has a column that nothing reads."""
    read = _DETECTING_FIELDS | _MORE_FIELDS
    others = [name for name in map(str, row) if name not in columns.values() and name.strip().lower() not in read]
    if others:
        why = f"not in the row, which has {', '.join(others[:8])}"
        hint = f"fill it or remove the row; or name its column, as columns: {{{field}: {others[0]}}}"
        raise BrokenRowError("no such column", why, field=field, hint=hint) from None


def _convert_fields(format_: Format, fields: Fields) -> Conversation:
    conversation = _CONVERTERS[format_](fields)
    values = [(name, fields.get(name)) for name in _FIELDS_WITH_TURNS[format_]]
    turns = [value for name, value in values if isinstance(value, list) or (name in _TURN_FIELDS and value is not None)]
    if turns:
        refuse_tools(fields)
    return replace(conversation, num_thoughts=sum(map(count_thoughts, turns)))


def detect_format(fields: Fields, *, is_labelled: bool = False) -> Format | None:
    """Return the first format whose fields are all filled, else the first whose fields are all present.

    Args:
        fields: The row's values.
        is_labelled: Whether an empty label counts as filled.
    """
    filled = {name for name, value in fields.items() if value is not None and value not in ("", [])}
    filled |= {"label"} & fields.keys() if is_labelled else set()
    for names in (filled, set(fields)):
        for format_, needed in _NEEDED_FIELDS:
            if needed <= names:
                return format_
    return None


def is_row(value: Mapping[str, object], columns: Mapping[str, str]) -> bool:
    """Whether an object is a row, not an object around rows: it has a format's field, or all mapped columns.

    Args:
        value: The parsed object.
        columns: The row's names of a format's fields.
    """
    names = {str(name).strip().lower() for name in value}
    is_mapped = bool(columns) and all(
        (_key_of(value, column) or _key_of(value, column.split(".")[0])) is not None for column in columns.values()
    )
    return is_mapped or bool(names & _DETECTING_FIELDS)


def find_text(value: object, text: str, name: str = "") -> str:
    """Return the first field of a row that holds a text, as ``messages[1].content``; empty if none does."""
    if isinstance(value, str):
        return name if text in value else ""
    items: list[tuple[str, object]] = []
    if isinstance(value, Mapping):
        items = [(f"{name}.{key}" if name else str(key), item) for key, item in value.items()]
    elif isinstance(value, list):
        items = [(f"{name}[{index}]", item) for index, item in enumerate(value)]
    return next((field for key, item in items if (field := find_text(item, text, key))), "")


class _NamedFields(NamedTuple):
    """A row's values under the names of the formats' fields, and the row's own name of each field."""

    fields: dict[str, object]
    original: dict[str, str]

    def original_name(self, field: str) -> str:
        """Return ``Antwort`` for ``answer``, ``dialog[1].role`` for ``messages[1].role``."""
        match = re.match(r"\w*", field)
        name = match.group() if match else ""
        return self.original.get(name, name) + field[len(name) :] if name else field


def _name_fields(row: Mapping[str, object], columns: Mapping[str, str]) -> _NamedFields:
    """Name a row's values as the formats do. Turns come under the one of the two names that fits them."""
    fields = {str(name).strip().lower(): value for name, value in row.items()}
    original = {str(name).strip().lower(): str(name) for name in row}
    mapped = {field.lower(): _find_column(row, column) for field, column in columns.items()}
    fields |= {field: value for field, (_, value) in mapped.items()}
    original |= {field: name for field, (name, _) in mapped.items()}
    for alias, name in _ALIASES.items():
        if alias in fields and name not in mapped and fields.get(name) in (None, "", []):
            fields[name], original[name] = fields[alias], original[alias]
    holder = "messages" if fields.get("messages") is not None else "conversations"
    turns = fields.get(holder)
    if turns is not None:
        first = _first_turn(turns)
        is_sharegpt = isinstance(first, dict) and "role" not in first and "from" in first
        name, other = ("conversations", "messages") if is_sharegpt else ("messages", "conversations")
        fields[name], original[name], fields[other] = turns, original[holder], None
    kept = {name: value for name, value in fields.items() if name not in _TURN_FIELDS or value is not None}
    return _NamedFields(kept, original)


def _key_of(row: Mapping[str, object], column: str) -> str | None:
    """Return the row's key for a column: the very name, or the only one that differs in case alone."""
    if column in row:
        return column
    same = [name for name in row if str(name).strip().lower() == column.strip().lower()]
    return same[0] if len(same) == 1 else None


def _first_turn(turns: object) -> object:
    if isinstance(turns, str):  # a list as text in a cell
        try:
            turns = json.loads(turns)
        except (ValueError, RecursionError):
            return None
    return turns[0] if isinstance(turns, list) and turns else None


def _find_column(row: Mapping[str, object], column: str) -> tuple[str, object]:
    """Return a column's name as the row writes it, and its value."""
    whole = _key_of(row, column)
    if whole is not None:
        return whole, row[whole]
    value: object = row
    for part in column.split("."):
        key = _key_of(value, part) if isinstance(value, Mapping) else None
        if key is None or not isinstance(value, Mapping):
            names = list(map(str, row))
            near = [name for name in names if name.strip().lower() == column.strip().lower()]
            near = near or difflib.get_close_matches(column, names, n=1)
            hint = f"did you mean {' or '.join(near)}?" if near else f"the row has {', '.join(names)}"
            raise BrokenRowError("no such column", "the column is not in the row", field=column, hint=hint)
        value = value[key]
    return column, value


def _unknown_format(fields: Fields, row: Mapping[str, object]) -> BrokenRowError:
    names = ", ".join(list(map(str, row))[:8]) or "none"
    if {"pre_text", "qa"} <= fields.keys():
        hint = "these are FinQA records; read them with data.source: finqa"
    elif ("chosen" in fields) != ("rejected" in fields):
        hint = f"a pair has both answers; {'rejected' if 'chosen' in fields else 'chosen'} is missing"
    elif "text" in fields:
        hint = "running text has no turns; write prompt and completion"
    else:
        hint = "name them, as columns: {question: ..., answer: ...}; docs/data.md lists the formats"
    return BrokenRowError("unknown format", f"the fields {names} are no known format", hint=hint)


def _from_messages(fields: Fields) -> Conversation:
    return _end_with_answer(parse_turns(fields.get("messages"), "messages"))


def _from_sharegpt(fields: Fields) -> Conversation:
    return _end_with_answer(parse_turns(fields.get("conversations"), "conversations"), system=fields.get("system"))


def _end_with_answer(turns: tuple[list[Message], frozenset[int]], *, system: object = None) -> Conversation:
    messages, untrained = turns
    last = max((index for index, message in enumerate(messages) if message.role == "assistant"), default=None)
    if last is None:
        hint = "the last turn must be the answer to train on"
        raise BrokenRowError("no answer", "no turn is the assistant's", hint=hint)
    if not any(message.role == "user" for message in messages[:last]):
        raise BrokenRowError("no question", "no user's turn before the answer", hint="add the question")
    head = _system_turns(system) if messages[0].role != "system" else ()
    return Conversation(
        (*head, *messages[: last + 1]),
        frozenset(index + len(head) for index in untrained if index <= last),
        num_trailing=len(messages) - 1 - last,
    )


def _from_preference(fields: Fields) -> Conversation:
    chosen, rejected = fields.get("chosen"), fields.get("rejected")
    if not isinstance(chosen, list) and not isinstance(rejected, list):
        prompt = _preference_prompt(fields)
        answer = parse_text(chosen, "chosen", "no answer")
        worse = parse_text(rejected, "rejected", "no rejected answer")
    else:
        better_turns, worse_turns = parse_turns(chosen, "chosen")[0], parse_turns(rejected, "rejected")[0]
        answer, worse = _last_answer(better_turns, "chosen"), _last_answer(worse_turns, "rejected")
        prompt = better_turns[:-1] or _preference_prompt(fields)
        if worse_turns[:-1] not in ([], better_turns[:-1]):
            why = "the turns before the last differ from those of chosen"
            hint = "a pair is two answers to one prompt"
            raise BrokenRowError("not one prompt", why, field="rejected", hint=hint)
    if answer.strip() == worse.strip():
        why = "chosen and rejected are the same"
        raise BrokenRowError("no preference", why, field="rejected", hint="remove the row")
    return Conversation((*_with_system(fields, prompt), Message(role="assistant", content=answer)), rejected=worse)


def _preference_prompt(fields: Fields) -> list[Message]:
    """Return the prompt, under any of the names that preference sets give it."""
    if fields.get("prompt") in (None, "", []):
        if "instruction" in fields:
            return [Message(role="user", content=_instruction(fields))]
        if "question" in fields:
            return parse_prompt(fields["question"], "question", "no question")
    return parse_prompt(fields.get("prompt"), "prompt", "no question")


def _last_answer(turns: list[Message], field: str) -> str:
    if turns[-1].role != "assistant":
        why = "the last turn is not the assistant's"
        raise BrokenRowError("no answer", why, field=field, hint="end it with the answer")
    return turns[-1].content


def _from_unpaired_preference(fields: Fields) -> Conversation:
    if "label" not in fields:
        hint = "name the column of the labels, as columns: {label: liked}"
        raise BrokenRowError("no label", "not in the row", field="label", hint=hint)
    label = parse_label(fields["label"])
    if fields.get("conversations") is not None:
        conversation = _from_sharegpt(fields)
    elif fields.get("messages") is not None:
        conversation = _from_messages(fields)
    else:
        conversation = _complete(fields, _preference_prompt(fields))
    if len(conversation.messages) - 1 in conversation.untrained:
        why = "the labelled answer has weight 0"
        raise BrokenRowError("no answer", why, field="label", hint="remove the weight, or the row")
    return replace(conversation, label=label)


def _from_alpaca(fields: Fields) -> Conversation:
    return _one_turn(fields, _instruction(fields), parse_text(fields.get("output"), "output", "no answer"))


def _instruction(fields: Fields) -> str:
    question = parse_text(fields.get("instruction"), "instruction", "no question")
    extra = fields.get("input")
    return question if extra in (None, "") else f"{question}\n\n{parse_text(extra, 'input', 'bad input')}"


def _from_question_answer(fields: Fields) -> Conversation:
    question = parse_text(fields.get("question"), "question", "no question")
    context = fields.get("context")
    if context is not None and str(context).strip():
        question = f"Context: {parse_text(context, 'context', 'bad context')}\n\nQuestion: {question}"
    return _one_turn(fields, question, parse_text(fields.get("answer"), "answer", "no answer"))


def _from_prompt_completion(fields: Fields) -> Conversation:
    return _complete(fields, parse_prompt(fields.get("prompt"), "prompt", "no question"))


def _complete(fields: Fields, prompt: list[Message]) -> Conversation:
    completion = fields.get("completion")
    if isinstance(completion, list):
        answer = _last_answer(parse_turns(completion, "completion")[0], "completion")
    else:
        answer = parse_text(completion, "completion", "no answer")
    return Conversation((*_with_system(fields, prompt), Message(role="assistant", content=answer)))


def _one_turn(fields: Fields, question: str, answer: str) -> Conversation:
    turns = [Message(role="user", content=question), Message(role="assistant", content=answer)]
    return Conversation(_with_system(fields, turns))


def _with_system(fields: Fields, turns: list[Message]) -> tuple[Message, ...]:
    return (*(_system_turns(fields.get("system")) if turns[0].role != "system" else ()), *turns)


def _system_turns(value: object) -> tuple[Message, ...]:
    if value is None or not str(value).strip():
        return ()
    return (Message(role="system", content=parse_text(value, "system", "bad system message")),)


_NEEDED_FIELDS: Final[tuple[tuple[Format, set[str]], ...]] = (
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
"""The fields by which a format is detected, in the order in which they are tried."""
# An object around rows may have a label, too, so a label alone does not make a row.
_FORMAT_FIELDS: Final = {name for _, needed in _NEEDED_FIELDS for name in needed} - {"label"}
_MORE_FIELDS: Final = {"label", "system", "system_prompt", "input", "context"}
"""Further fields that are read."""
_DETECTING_FIELDS: Final = _FORMAT_FIELDS | {alias for alias, name in _ALIASES.items() if name in _FORMAT_FIELDS}
_CONVERTERS: Final[dict[Format, Callable[[Fields], Conversation]]] = {
    "preference": _from_preference,
    "unpaired_preference": _from_unpaired_preference,
    "messages": _from_messages,
    "sharegpt": _from_sharegpt,
    "alpaca": _from_alpaca,
    "prompt_completion": _from_prompt_completion,
    "question_answer": _from_question_answer,
}
_FIELDS_WITH_TURNS: Final[dict[Format, tuple[str, ...]]] = {
    "preference": ("prompt", "chosen", "rejected"),
    "unpaired_preference": ("messages", "conversations", "prompt", "completion"),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": (),
    "prompt_completion": ("prompt", "completion"),
    "question_answer": (),
}
"""Fields that may hold turns."""
