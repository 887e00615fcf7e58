"""Parse the turns, texts and labels of a row: roles under any of their names, contents that hold text."""

from __future__ import annotations

import contextlib
import difflib
import json
import math
from collections.abc import Mapping
from typing import Final, Literal

from fintune.data.readers import BrokenRowError
from fintune.records import Message

Role = Literal["system", "user", "assistant"]

_ROLES: Final[dict[str, Role]] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
}
_TOOL_ROLES: Final = {"tool", "function", "function_call", "tool_call", "observation", "ipython"}
_TOOL_CALL_FIELDS: Final = ("tool_calls", "function_call")
_TOOL_FIELDS: Final = ("tools", "functions")
_THOUGHT_FIELDS: Final = ("reasoning_content", "reasoning", "thinking")
_NO_TOOLS: Final = "tool calls are not supported"
_NO_TOOLS_HINT: Final = "write the call into content, or remove the row"
_LABELS: Final = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
_LABEL_HINT: Final = "write true for a desired answer and false for an undesired one"
_OTHER_FORMAT_HINT: Final = "if the column is no label, name the source's format, as format: prompt_completion"


def parse_turns(value: object, field: str) -> tuple[list[Message], frozenset[int]]:
    """Parse ``[{"role", "content"}, ...]`` or ``[{"from", "value"}, ...]``, or such a list as JSON text.

    Args:
        value: The parsed value of a field.
        field: Name of the field, for messages.

    Returns:
        The messages, and the indices of those with ``"weight": 0``, which are not trained.

    Raises:
        BrokenRowError: It is no such list, a role is unknown, a content is empty, or a turn calls a tool.
    """
    value = _parse_json(value)
    if not isinstance(value, list) or not value:
        what = "empty or missing" if value in (None, "", []) else f"{_kind_of(value)}, not a list of turns"
        raise BrokenRowError("bad turns", what, field=field, hint='write [{"role": "user", "content": "..."}, ...]')
    messages = [_parse_turn(turn, f"{field}[{index}]", index) for index, turn in enumerate(value)]
    untrained = {index for index, turn in enumerate(value) if isinstance(turn, Mapping) and turn.get("weight") == 0}
    return messages, frozenset(untrained)


def refuse_tools(fields: Mapping[str, object]) -> None:
    """Refuse a row that offers tools, because no prompt would offer them.

    Args:
        fields: The row's values by name in lower case.

    Raises:
        BrokenRowError: The row has tools, or functions, which is their older name.
    """
    for name in _TOOL_FIELDS:
        if _is_filled(fields.get(name)):
            raise BrokenRowError("tool calls", _NO_TOOLS, field=name, hint=_NO_TOOLS_HINT)


def count_thoughts(value: object) -> int:
    """Count the turns of a list that have a thought in a field of its own, which is not trained."""
    turns = _parse_json(value)
    if not isinstance(turns, list):
        return 0
    return sum(
        isinstance(turn, Mapping) and any(_is_text(turn.get(name)) for name in _THOUGHT_FIELDS) for turn in turns
    )


def parse_prompt(value: object, field: str, missing: str) -> list[Message]:
    """Parse a prompt: one text of the user, or a list of turns.

    Args:
        value: The parsed value of a field.
        field: Name of the field, for messages.
        missing: The reason to count by if there is no text.
    """
    if isinstance(value, list):
        return parse_turns(value, field)[0]
    return [Message(role="user", content=parse_text(value, field, missing))]


def parse_text(value: object, field: str, missing: str) -> str:
    """Parse a text. A number becomes its text, and a list of text parts is joined.

    Args:
        value: The parsed value of a field.
        field: Name of the field, for messages.
        missing: The reason to count by if there is no text.

    Raises:
        BrokenRowError: The text is missing or blank, or the value is of another kind.
    """
    if isinstance(value, list) and value and all(isinstance(part, Mapping) for part in value):
        other = next((part.get("type") for part in value if part.get("type") != "text"), None)
        if other is not None:
            what = f"holds a part of type {other!r}"
            raise BrokenRowError("not text", what, field=field, hint="only text is trained on")
        value = "".join(_parse_part(part.get("text"), f"{field}[{index}].text") for index, part in enumerate(value))
    if (isinstance(value, int) and not isinstance(value, bool)) or (isinstance(value, float) and math.isfinite(value)):
        value = str(value)
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        raise BrokenRowError(missing, "missing or empty", field=field, hint="fill it or remove the row")
    if not isinstance(value, str):
        raise BrokenRowError("not text", f"{_kind_of(value)}, not text", field=field, hint="write it as text")
    if not value.strip():
        raise BrokenRowError(missing, "holds only white space", field=field, hint="fill it or remove the row")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        why = f"half a surrogate pair at letter {error.start}"
        raise BrokenRowError("not text", why, field=field, hint="the text was cut inside an emoji; repair it") from None
    return value


def parse_label(value: object) -> bool:
    """Parse a KTO label (arXiv 2402.01306): true and false, or 0 and 1, also as text in any case.

    Raises:
        BrokenRowError: The label is missing or anything else. Words such as "good" are refused, because which of them
            means yes would be a guess.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        raise BrokenRowError("no label", "missing or empty", field="label", hint=_LABEL_HINT)
    if isinstance(value, bool):
        return value
    if isinstance(value, (int, float)):
        if value in (0, 1):
            return value == 1
        if isinstance(value, float) and math.isnan(value):
            raise BrokenRowError("no label", "missing or empty", field="label", hint=_LABEL_HINT)
        # The `g` format needs a float, and some integers are too large for one.
        what = f"{value:g} is no label" if isinstance(value, float) else f"{value!s:.40} is no label"
        hint = f"{_LABEL_HINT}, of a rating by a threshold; {_OTHER_FORMAT_HINT}"
        raise BrokenRowError("bad label", what, field="label", hint=hint)
    if not isinstance(value, str):
        raise BrokenRowError("bad label", "holds more than one value", field="label", hint=_LABEL_HINT)
    word = value.strip().casefold()
    if word in _LABELS:
        return _LABELS[word]
    near = difflib.get_close_matches(word, ("true", "false"), n=1, cutoff=0.7)
    hint = f"did you mean {near[0]}?" if near else f"{_LABEL_HINT}; {_OTHER_FORMAT_HINT}"
    raise BrokenRowError("bad label", f"{value!r:.40} is no label", field="label", hint=hint)


def _parse_turn(turn: object, field: str, index: int) -> Message:
    if not isinstance(turn, Mapping):
        raise BrokenRowError("bad turns", f"{_kind_of(turn)}, not a turn", field=field, hint="write role and content")
    name, content = ("role", "content") if "role" in turn else ("from", "value")
    raw = turn.get(name)
    if raw is None:
        names = ", ".join(map(str, turn)) or "nothing"
        raise BrokenRowError("bad role", f"has no role but {names}", field=field, hint="write role and content")
    role = _ROLES.get(str(raw).strip().lower())
    if call := next((key for key in _TOOL_CALL_FIELDS if _is_filled(turn.get(key))), None):
        raise BrokenRowError("tool calls", _NO_TOOLS, field=f"{field}.{call}", hint=_NO_TOOLS_HINT)
    if str(raw).strip().lower() in _TOOL_ROLES:
        raise BrokenRowError("tool calls", f"{raw!r}: {_NO_TOOLS}", field=f"{field}.{name}", hint=_NO_TOOLS_HINT)
    if role is None:
        near = difflib.get_close_matches(str(raw).lower(), _ROLES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "the known roles are system, user (human), assistant (gpt)"
        raise BrokenRowError("bad role", f"{raw!r} is no role", field=f"{field}.{name}", hint=hint)
    if role == "system" and index > 0:
        what = "a system turn that is not the first"
        raise BrokenRowError("bad role", what, field=field, hint="move it to the front")
    return Message(role=role, content=parse_text(turn.get(content), f"{field}.{content}", f"no {content}"))


def _parse_part(text: object, field: str) -> str:
    if text is not None and not isinstance(text, str):
        raise BrokenRowError("not text", f"{_kind_of(text)}, not text", field=field, hint="write it as text")
    return text or ""


def _parse_json(value: object) -> object:
    if isinstance(value, str):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def _is_filled(value: object) -> bool:
    """Whether a value is more than a table's empty cell: more than ``[]`` as text or an object of nulls."""
    parsed = _parse_json(value.strip() if isinstance(value, str) else value)
    return any(map(_is_filled, parsed.values())) if isinstance(parsed, Mapping) else bool(parsed)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _kind_of(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "a truth value", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
