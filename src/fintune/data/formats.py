"""Data formats: how a row is recognised by its fields, becomes a conversation, and accounts for every one of its texts.

A row's columns are named as the formats name them (``columns``, aliases, any case). The first format whose fields are
filled builds the conversation. Whatever column it reads is recorded, and so is every text that it did not use.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from fintune.config import Shape as Format
from fintune.data.messages import (
    Turn,
    find_pairs,
    find_turns,
    is_empty,
    parse_cell,
    parse_label,
    parse_mask,
    parse_text,
    parse_tools,
    parse_turns,
    read_truth,
    walk_leaves,
)
from fintune.data.readers import BrokenRowError
from fintune.records import Message

_TURN_FIELDS: Final = ("messages", "conversations")
"""Fields that hold a whole conversation, also as JSON text."""
_ALIASES: Final = {
    "response": "completion",
    "query": "prompt",
    "conversation": "messages",
    "system_prompt": "system",
    "functions": "tools",
    "kto_tag": "label",
}
"""Other names of fields. They are read if the field itself is empty or missing, and not mapped."""
_PROMPTS: Final[tuple[tuple[Format, str], ...]] = (
    ("alpaca", "instruction"),
    ("prompt_completion", "prompt"),
    ("question_answer", "question"),
)
_ANSWERS: Final = ("output", "completion", "answer")
_TEXTS: Final = ("question", "prompt", "text", "sentence", "headline", "title", "news", "content")
"""Names of the text of a labelled set, as FPB, FiQA and others call it."""
_DETECTING: Final = frozenset(
    (*_TURN_FIELDS, *("chosen", "rejected", "response", "query", "conversation"), *dict(_PROMPTS).values(), *_ANSWERS)
)
"""Fields by which a format is detected. An object around rows may have a label, too, so a label is none of them."""
_READ: Final = _DETECTING | {"label", "system", "input", "context", "history", "tools", *_ALIASES}
_LABELLED: Final = ("messages", "sharegpt", "prompt_completion")
"""Formats of which an empty label makes a broken row if labels are trained on."""
_ROW_MASKS: Final = ("loss_mask", "train", "training", "weight", "loss")
"""Fields that exclude the whole row from training if they are false or 0. The last two may be figures of the data."""
FIELDS: Final = tuple(sorted(_READ.union(_ROW_MASKS)))
"""Names of all fields, to which columns may be mapped."""
_CONTROLS: Final = {"role", "from", "type", "weight", "train", "training", "loss"}
"""Keys of a turn that decide how it is read. They have no text of their own."""
_NO_TURN: Final = re.compile(r"(^|_)(u?u?id|key|hash|index|source|category|topic|title|date|lang|language|split|url)$")
"""Names of columns that are hardly a question or an answer."""
NOT_READ: Final = "not read"
_NO_COINCIDENCE: Final = 20
"""Letters from which a text that is also in another column is the same text."""


@dataclass(frozen=True)
class Conversation:
    """One row as a conversation that ends with the assistant.

    Attributes:
        messages: All turns.
        untrained: Indices of the assistant's turns that the row itself excludes from training (``"weight": 0``).
        rejected: The worse last answer of a preference pair.
        num_trailing: Turns after the last answer, which were left out.
        label: Whether the last answer is desired; None without a label.
        id: Label of its file, and its row, as ``rows.jsonl:7``.
        file: The file, or the split of a dataset, as messages name it.
        row: The row's number in it, from 1.
        source: Index of its entry in ``data.sources``.
        digest: Digest of its texts. Exact duplicates have the same one.
        is_test: Whether its file is a split for evaluation by its name.
    """

    messages: tuple[Message, ...]
    untrained: frozenset[int] = frozenset()
    rejected: Message | None = None
    num_trailing: int = 0
    label: bool | None = None
    id: str = ""
    file: str = ""
    row: int = 0
    source: int = 0
    digest: bytes = b""
    is_test: bool = False

    @property
    def is_trained(self) -> bool:
        """Whether the row lets at least one of its answers be trained."""
        answers = (index for index, message in enumerate(self.messages) if message.role == "assistant")
        return any(index not in self.untrained for index in answers)


class Converted(NamedTuple):
    """A row's format, its conversation, and what each of its filled columns was read as."""

    format: Format
    conversation: Conversation
    columns: dict[str, str]


def convert_row(
    row: object,
    format_: Format | None = None,
    columns: Mapping[str, str] | None = None,
    *,
    is_labelled: bool = False,
    reads_label: bool = True,
    roles: Mapping[str, str] | None = None,
    instruction: str = "",
) -> Converted:
    """Convert a row to a conversation.

    Args:
        row: The parsed row, or the error of parsing it.
        format_: The row's format; detected if None.
        columns: The row's names of a format's fields. A dot goes into an object.
        is_labelled: Whether labels are trained on. Then an empty label makes the row broken, not of another format.
        reads_label: Whether a column called ``label`` says if an answer is good. If not, the column is not read.
        roles: Further names of roles.
        instruction: What is asked about the text of each row of a labelled set, whose label is the answer.

    Raises:
        BrokenRowError: The row cannot be converted, with field, reason and hint.
    """
    if isinstance(row, BrokenRowError):
        raise row
    if isinstance(row, list) and find_turns(row):
        row = {"messages": row}
    if not isinstance(row, dict):
        kind = "a list" if isinstance(row, list) else "null" if row is None else f"{row!r:.40}"
        raise BrokenRowError("not an object", f"{kind} is no object with named fields")
    try:
        fields = _Fields(row, columns or {}, roles or {})
        if instruction:
            fields.ask(instruction)
        elif not reads_label:
            fields.values.pop("label", None)
        return _convert(fields, format_, is_labelled)
    except RecursionError:
        why = "lists or objects are nested hundreds deep"
        raise BrokenRowError("too deep", why, hint="repair or remove the row") from None


class _Fields:
    """A row's values by the formats' names. It records the columns that are read."""

    def __init__(self, row: Mapping[str, object], columns: Mapping[str, str], roles: Mapping[str, str]) -> None:
        self.row, self.columns, self.roles = row, columns, roles
        self.is_named = False  # whether the user names the format, so that no other format's prompt is read
        self.values = {str(name).strip().lower(): value for name, value in row.items()}
        self.original = {str(name).strip().lower(): str(name) for name in row}
        self.read: dict[str, str] = {}
        mapped = {field.lower(): _find_column(row, column) for field, column in columns.items()}
        self.values |= {field: value for field, (_, value) in mapped.items()}
        self.original |= {field: name for field, (name, _) in mapped.items()}
        for alias, name in _ALIASES.items():
            if alias in self.values and name not in mapped and is_empty(self.values.get(name)):
                self._rename(alias, name)
        for name, other in (_TURN_FIELDS, _TURN_FIELDS[::-1]):
            turns = find_turns(self.values.get(name)) or [None]
            is_sharegpt = isinstance(turns[0], dict) and "role" not in turns[0] and "from" in turns[0]
            if is_empty(self.values.get(other)) and turns[0] is not None and is_sharegpt == (name == "messages"):
                self._rename(name, other)
            elif name in self.values and self.values[name] is None:
                del self.values[name]

    def _rename(self, name: str, other: str) -> None:
        self.values[other], self.original[other] = self.values.pop(name), self.original[name]

    def ask(self, instruction: str) -> None:
        """Make a row of a labelled set an instruction about its text, with its label as the answer."""
        for name, others in (("input", _TEXTS), ("output", (*_ANSWERS[1:], "label"))):
            found = next((other for other in others if self.is_filled(other)), None)
            if found and not self.is_filled(name):
                self._rename(found, name)
        self.values.pop("label", None)
        self.values["instruction"] = instruction
        self.original.pop("instruction", None)

    def is_filled(self, *names: str) -> bool:
        """Whether all these fields have a value."""
        return all(not is_empty(self.values.get(name)) for name in names)

    def take(self, name: str, what: str = "") -> object:
        """Return a value, and record that its column was read."""
        if name in self.original:
            self.read[self.original[name]] = what or name
        return self.values.get(name)

    def original_name(self, field: str) -> str:
        """Return ``Antwort`` for ``answer``, ``dialog[1].role`` for ``messages[1].role``."""
        name = re.match(r"\w*", field)
        return self.original.get(name[0], name[0]) + field[len(name[0]) :] if name and name[0] else field


def _convert(fields: _Fields, format_: Format | None, is_labelled: bool) -> Converted:
    base = format_ if format_ not in (None, "unpaired_preference") else detect_format(fields.values)
    is_empty_label = is_labelled and "label" in fields.values and base in _LABELLED
    with_label = fields.is_filled("label") or is_empty_label
    is_unpaired = format_ == "unpaired_preference" or (format_ is None and with_label and base != "preference")
    if base is None and not format_:
        raise _unknown_format(fields)
    fields.is_named = base is not None and base == format_
    base = base or "prompt_completion"
    detected: Format = "unpaired_preference" if is_unpaired else base
    try:
        turns, rejected = _BUILDERS[base](fields)
        conversation = _finish(fields, turns, rejected, parse_label if is_unpaired else None, base)
    except BrokenRowError as broken:
        is_turns = broken.field in _TURN_FIELDS and not fields.original.keys().isdisjoint(_TURN_FIELDS)
        is_missing = broken.field in _DETECTING | {"label"} and broken.field not in fields.original
        if format_ is not None and is_missing and not is_turns:
            _suggest_column(broken.field, fields)
        broken.field = fields.original_name(broken.field)
        raise
    trailing = [turn.message for turn in turns[len(turns) - conversation.num_trailing :]]
    return Converted(detected, conversation, _account(fields, conversation, trailing))


def _suggest_column(field: str, fields: _Fields) -> None:
    """Raise with a hint if a field is missing and the row has a column that nothing reads."""
    names = [name for name in map(str, fields.row) if name not in fields.columns.values()]
    others = [name for name in names if name.strip().lower() not in _READ]
    if others:
        why = f"not in the row, which has {', '.join(others[:8])}"
        hint = f"fill it or remove the row; or name its column, as columns: {{{field}: {others[0]}}}"
        raise BrokenRowError("no such column", why, field=field, hint=hint) from None


def detect_format(values: Mapping[str, object]) -> Format | None:
    """Return the first format whose fields are all filled, else the first whose fields are all present."""
    filled = {name for name, value in values.items() if not is_empty(value)}
    for names in (filled, values.keys()):
        if {"chosen", "rejected"} <= names:
            return "preference"
        for name, format_ in zip(_TURN_FIELDS, ("messages", "sharegpt"), strict=True):
            if name in names:
                return format_  # type: ignore[return-value]
        if not names.isdisjoint(_ANSWERS):
            for detected, prompt in _PROMPTS:
                if prompt in names or (prompt == "instruction" and {"input", "output"} <= names):
                    return detected
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
    return is_mapped or bool(names & _DETECTING)


def find_text(value: object, text: str, name: str = "") -> str:
    """Return the first field of a row that holds a text, as ``messages[1].content``; empty if none does."""
    if isinstance(value, str):
        return name if text in value else ""
    items: list[tuple[str, object]] = []
    if isinstance(value, dict):
        items = [(f"{name}.{key}" if name else str(key), item) for key, item in value.items()]
    elif isinstance(value, list):
        items = [(f"{name}[{index}]", item) for index, item in enumerate(value)]
    return next((field for key, item in items if (field := find_text(item, text, key))), "")


def _key_of(row: Mapping[str, object], column: str) -> str | None:
    """Return the row's key for a column: the very name, or the only one that differs in case alone."""
    if column in row:
        return column
    same = [name for name in row if str(name).strip().lower() == column.strip().lower()]
    return same[0] if len(same) == 1 else None


def _find_column(row: Mapping[str, object], column: str) -> tuple[str, object]:
    """Return a column's name as the row writes it, and its value."""
    whole = _key_of(row, column)
    if whole is not None:
        return whole, row[whole]
    value: object = row
    for part in column.split("."):
        key = _key_of(value, part) if isinstance(value, dict) else None
        if key is None or not isinstance(value, dict):
            names = list(map(str, row))
            near = [name for name in names if name.strip().lower() == column.strip().lower()]
            near = near or difflib.get_close_matches(column, names, n=1)
            hint = f"did you mean {' or '.join(near)}?" if near else f"the row has {', '.join(names)}"
            raise BrokenRowError("no such column", "the column is not in the row", field=column, hint=hint)
        value = value[key]
    return column, value


def _unknown_format(fields: _Fields) -> BrokenRowError:
    names = ", ".join(list(map(str, fields.row))[:8]) or "none"
    filled = fields.values.keys()
    if {"pre_text", "qa"} <= filled:
        hint = "these are FinQA records; read them with data.source: finqa"
    elif ("chosen" in filled) != ("rejected" in filled):
        hint = f"a pair has both answers; {'rejected' if 'chosen' in filled else 'chosen'} is missing"
    elif "text" in filled and len(filled) == 1:
        hint = "running text has no turns; write prompt and completion"
    else:
        filled_texts = (name for name, value in fields.row.items() if isinstance(value, str) and value.strip())
        texts = [name for name in map(str, filled_texts) if not _NO_TURN.search(name.lower())]
        question = next((str(fields.original[name]) for _, name in _PROMPTS if fields.is_filled(name)), None)
        answer = next((str(fields.original[name]) for name in _ANSWERS if fields.is_filled(name)), None)
        free = [name for name in texts if name not in (question, answer)]
        question = question or (free.pop(0) if free else "...")
        answer = answer or (free[-1] if free else "...")
        hint = f"name them, as data.columns.question={question} data.columns.answer={answer} on the command line, or "
        hint += f"as columns: {{question: {question}, answer: {answer}}} of the source; docs/data.md lists the formats"
    return BrokenRowError("unknown format", f"the fields {names} are no known format", hint=hint)


# --- one small function a format: the turns of the row, and the rejected answer


_Built = tuple[list[Turn], Message | None]


def _from_turns(fields: _Fields) -> _Built:
    name = "messages" if "messages" in fields.values else "conversations"
    value = fields.take(name, "turns")
    mask = fields.take("loss_mask", "loss mask") if isinstance(fields.values.get("loss_mask"), list) else None
    turns = parse_turns(value, name, fields.roles, mask)  # type: ignore[arg-type]
    if not any(turn.message.role == "assistant" for turn in turns):
        hint = "the last turn must be the answer to train on"
        raise BrokenRowError("no answer", "no turn is the assistant's", hint=hint)
    return turns, None


def _from_preference(fields: _Fields) -> _Built:
    better, worse = _answer(fields, "chosen", "no answer"), _answer(fields, "rejected", "no rejected answer")
    shared = better[:-1]
    if _texts(worse[:-1]) not in ([], _texts(shared)):
        why = "the turns before the last differ from those of chosen"
        raise BrokenRowError("not one prompt", why, field="rejected", hint="a pair is two answers to one prompt")
    name = _prompt_name(fields)
    prompt = _prompt(fields) if name or not shared else []
    ours, theirs = _texts(prompt), _texts(shared)
    if shared and (not ours or theirs[-len(ours) :] == ours):
        prompt = shared
    elif shared and ours[-len(theirs) :] != theirs:
        if find_turns(fields.values[name]):
            why = f"the turns before the last differ from those of {name}"
            raise BrokenRowError("not one prompt", why, field="chosen", hint="a pair is two answers to one prompt")
        prompt = shared
    if _texts(better[-1:]) == _texts(worse[-1:]) and better[-1].message == worse[-1].message.model_copy(
        update={"content": better[-1].message.content}
    ):
        why = "chosen and rejected are the same"
        raise BrokenRowError("no preference", why, field="rejected", hint="remove the row")
    return [*prompt, better[-1]], worse[-1].message


def _from_named(prompt: str, answer: str) -> Callable[[_Fields], _Built]:
    """Return the builder of a format with one answer."""

    def build(fields: _Fields) -> _Built:
        turns = _prompt(fields, prompt)
        name = next((other for other in (answer, *_ANSWERS) if fields.is_filled(other)), answer)
        return [*turns, *_answer(fields, name, "no answer")], None

    return build


_BUILDERS: Final[dict[Format, Callable[[_Fields], _Built]]] = {
    "messages": _from_turns,
    "sharegpt": _from_turns,
    "preference": _from_preference,
    "alpaca": _from_named("instruction", "output"),
    "prompt_completion": _from_named("prompt", "completion"),
    "question_answer": _from_named("question", "answer"),
}


def _prompt_name(fields: _Fields) -> str:
    names = ("prompt", *_TURN_FIELDS, "instruction", "question")
    return next((name for name in names if fields.is_filled(name)), "")


def _prompt(fields: _Fields, name: str = "") -> list[Turn]:
    """Return the turns before the answer, from the field of a name or from the first prompt that is filled."""
    extras = [other for other in ("input", "context") if fields.is_filled(other)]
    if not fields.is_filled(name) and not (name == "instruction" and extras) and not (name and fields.is_named):
        name = _prompt_name(fields) or name or "prompt"
    value = fields.take(name, "turns" if name in _TURN_FIELDS else "")
    if isinstance(value, list) or find_turns(value):
        return parse_turns(value, name, fields.roles)
    if name == "instruction" and extras:
        extra = parse_text(fields.take(extras[0]), extras[0], f"bad {extras[0]}")
        text = f"{parse_text(value, name, 'no question')}\n\n{extra}" if fields.is_filled(name) else extra
    elif name == "question" and "context" in extras:
        context = parse_text(fields.take("context"), "context", "bad context")
        text = f"Context: {context}\n\nQuestion: {parse_text(value, name, 'no question')}"
    else:
        text = parse_text(value, name, "no question")
    return [Turn(Message(role="user", content=text))]


def _answer(fields: _Fields, name: str, missing: str) -> list[Turn]:
    """Return the turns of an answer: one of the assistant's if it is a text."""
    value = fields.take(name)
    if isinstance(value, list) or find_turns(value):
        turns = parse_turns(value, name, fields.roles)
        if not turns or turns[-1].message.role != "assistant":
            why = "the last turn is not the assistant's"
            raise BrokenRowError("no answer", why, field=name, hint="end it with the answer")
        return turns
    return [Turn(Message(role="assistant", content=parse_text(value, name, missing)))]


def _texts(turns: Sequence[Turn]) -> list[tuple[str, str]]:
    return [(turn.message.role, turn.message.content.strip()) for turn in turns]


# --- what any format may have beside its turns


def _finish(
    fields: _Fields,
    turns: list[Turn],
    rejected: Message | None,
    parse: Callable[[object, str], bool] | None,
    base: Format,
) -> Conversation:
    label = None
    if parse is not None:
        if "label" not in fields.values:
            hint = "name the column of the labels, as columns: {label: liked}"
            raise BrokenRowError("no label", "not in the row", field="label", hint=hint)
        label = parse(fields.take("label"), base)
    has_system = turns[0].message.role == "system"
    whole = [*(turns[:1] if has_system else _system(fields)), *_history(fields), *turns[int(has_system) :]]
    answers = [index for index, turn in enumerate(whole) if turn.message.role == "assistant"]
    trained = [index for index in answers if whole[index].is_trained]
    num_trailing = len(whole) - (trained if trained and label is None else answers)[-1] - 1
    whole = whole[: len(whole) - num_trailing]
    if not any(turn.message.role == "user" for turn in whole[:-1]):
        raise BrokenRowError("no question", "no user's turn before the answer", hint="add the question")
    if label is not None and not whole[-1].is_trained:
        why = "the labelled answer has weight 0"
        raise BrokenRowError("no answer", why, field="label", hint="remove the weight, or the row")
    messages = [turn.message for turn in whole]
    if fields.is_filled("tools") and (tools := parse_tools(fields.values["tools"])):
        fields.take("tools", "tools")
        messages[0] = messages[0].model_copy(update={"tools": tools})
    is_excluded = _is_excluded(fields)
    untrained = {
        index for index, turn in enumerate(whole) if turn.message.role == "assistant" and (is_excluded or not turn[1])
    }
    return Conversation(tuple(messages), frozenset(untrained), rejected, num_trailing=num_trailing, label=label)


def _system(fields: _Fields) -> list[Turn]:
    if not fields.is_filled("system"):
        return []
    text = parse_text(fields.take("system", "system message"), "system", "bad system message")
    return [Turn(Message(role="system", content=text))]


def _history(fields: _Fields) -> list[Turn]:
    """Return the earlier turns of ``history``: pairs of question and answer, or a list of turns."""
    turns = find_turns(fields.values.get("history")) or find_pairs(fields.values.get("history"))
    if not turns:
        return []
    fields.take("history", "earlier turns")
    return parse_turns(turns, "history", fields.roles)


def _is_excluded(fields: _Fields) -> bool:
    """Whether the row says of itself that it is not to be trained."""
    for name in _ROW_MASKS:
        value = fields.values.get(name)
        is_figure = name in ("weight", "loss") and read_truth(value) is None
        if is_empty(value) or isinstance(value, (list, dict)) or is_figure:
            continue
        if not parse_mask(value, name):
            fields.take(name, "loss mask")
            return True
        fields.take(name, "loss mask")
    return False


def _account(fields: _Fields, conversation: Conversation, trailing: Sequence[Message]) -> dict[str, str]:
    """Return what each filled column was read as. A text that is nowhere in the conversation is not read."""
    rejected = [] if conversation.rejected is None else [conversation.rejected]
    texts: set[str] = set()
    for message in (*conversation.messages, *rejected, *trailing):
        texts |= {str(leaf).strip() for _, leaf in walk_leaves(message.as_dict(), "")}
    whole = "\n".join(texts)
    columns: dict[str, str] = {}
    for name, value in fields.row.items():
        column = str(name)
        parsed = find_turns(value) if isinstance(value, str) and column in fields.read else None
        unread: dict[str, str] = {}
        used = ""
        for path, leaf in walk_leaves(value if parsed is None else parsed, column):
            what = fields.read.get(column) or fields.read.get(path, "")
            key = path.rpartition(".")[2] if path != column else ""
            if what in ("label", "loss mask") or (what and key in _CONTROLS) or _is_in(leaf, bool(what), texts, whole):
                used = what or used or "part of another column"
            else:
                unread[path] = NOT_READ
        if used:
            columns[column] = used
            columns |= unread
        elif unread:
            columns[column] = NOT_READ
    return columns


def _is_in(leaf: object, is_read: bool, texts: set[str], whole: str) -> bool:
    """Whether the conversation has a value; one that no format reads must be long to be no coincidence."""
    text = str(leaf).strip()
    if text in texts or (is_read and not isinstance(leaf, str)):
        return True
    if is_read and text[:1] in ("{", "[") and not isinstance(parsed := parse_cell(text), str):
        return all(_is_in(item, True, texts, whole) for _, item in walk_leaves(parsed, ""))
    return isinstance(leaf, str) and (is_read or len(text) > _NO_COINCIDENCE) and text in whole
