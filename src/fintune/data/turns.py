"""Turns and texts of a row, checked: roles under any of their names, contents that hold text."""

from __future__ import annotations

import contextlib
import difflib
import json
import math
from collections.abc import Mapping
from typing import Final, Literal

from fintune.data.rows import BrokenRowError
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
_CALLS: Final = ("tool_calls", "function_call")
_TOOLS: Final = ("tools", "functions")
_THOUGHTS: Final = ("reasoning_content", "reasoning", "thinking")
_WITHOUT_TOOLS: Final = "tool calls are not trained"
_INSTEAD: Final = "write the call into content, or remove the row"


def list_of_turns(value: object, field: str) -> tuple[list[Message], frozenset[int]]:
    """``[{"role", "content"}, ...]`` or ``[{"from", "value"}, ...]``, also as JSON text in a cell.

    Returns:
        The messages, and the places of those with ``"weight": 0``.

    Raises:
        BrokenRowError: No such list, an unknown role, an empty content, a call of a tool.
    """
    value = _parsed(value)
    if not isinstance(value, list) or not value:
        what = "empty or missing" if value in (None, "", []) else f"{_kind(value)}, not a list of turns"
        raise BrokenRowError("bad turns", what, field=field, hint='write [{"role": "user", "content": "..."}, ...]')
    messages = [_message(turn, f"{field}[{place}]", place) for place, turn in enumerate(value)]
    untrained = {place for place, turn in enumerate(value) if isinstance(turn, Mapping) and turn.get("weight") == 0}
    return messages, frozenset(untrained)


def refuse_tools(row: Mapping[str, object]) -> None:
    """Turns of which the row says that tools can be called in them: no prompt would offer the tools.

    Args:
        row: Names in lower case.

    Raises:
        BrokenRowError: It names tools, or functions as tools once were called.
    """
    for name in _TOOLS:
        if _is_filled(row.get(name)):
            raise BrokenRowError("tool calls", _WITHOUT_TOOLS, field=name, hint=_INSTEAD)


def num_thoughts(value: object) -> int:
    """How many turns of a list hold a thought beside their content, which is not trained."""
    turns = _parsed(value)
    if not isinstance(turns, list):
        return 0
    return sum(isinstance(turn, Mapping) and any(_is_text(turn.get(name)) for name in _THOUGHTS) for turn in turns)


def messages_of(value: object, field: str, missing: str) -> list[Message]:
    """A prompt: one text of the user's, or a list of turns."""
    if isinstance(value, list):
        return list_of_turns(value, field)[0]
    return [Message(role="user", content=text_of(value, field, missing))]


def text_of(value: object, field: str, missing: str) -> str:
    """A text; a number becomes one, parts of text are joined.

    Args:
        value: As it was parsed.
        field: Where it stands.
        missing: The reason to count by where there is none.

    Raises:
        BrokenRowError: None there, blank, or something else.
    """
    if isinstance(value, list) and value and all(isinstance(part, Mapping) for part in value):
        other = next((part.get("type") for part in value if part.get("type") != "text"), None)
        if other is not None:
            raise BrokenRowError(
                "not text", f"holds a part of type {other!r}", field=field, hint="only text is trained on"
            )
        value = "".join(_part(part.get("text"), f"{field}[{place}].text") for place, part in enumerate(value))
    if (isinstance(value, int) and not isinstance(value, bool)) or (isinstance(value, float) and math.isfinite(value)):
        value = str(value)
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        raise BrokenRowError(missing, "missing or empty", field=field, hint="fill it or remove the row")
    if not isinstance(value, str):
        raise BrokenRowError("not text", f"{_kind(value)}, not text", field=field, hint="write it as text")
    if not value.strip():
        raise BrokenRowError(missing, "holds only white space", field=field, hint="fill it or remove the row")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        why = f"half a surrogate pair at letter {error.start}"
        raise BrokenRowError("not text", why, field=field, hint="the text was cut inside an emoji; mend it") from None
    return value


def _parsed(value: object) -> object:
    if isinstance(value, str):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def _is_filled(value: object) -> bool:
    """Whether it is more than what a table writes for nothing: ``[]`` as text, an object of which all is null."""
    found = _parsed(value.strip() if isinstance(value, str) else value)
    return any(map(_is_filled, found.values())) if isinstance(found, Mapping) else bool(found)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _part(text: object, field: str) -> str:
    if text is not None and not isinstance(text, str):
        raise BrokenRowError("not text", f"{_kind(text)}, not text", field=field, hint="write it as text")
    return text or ""


def _message(turn: object, field: str, place: int) -> Message:
    if not isinstance(turn, Mapping):
        raise BrokenRowError("bad turns", f"{_kind(turn)}, not a turn", field=field, hint="write role and content")
    name, key, said = ("role", "content", "content") if "role" in turn else ("from", "value", "value")
    raw = turn.get(name)
    if raw is None:
        found = ", ".join(map(str, turn)) or "nothing"
        raise BrokenRowError("bad role", f"has no role but {found}", field=field, hint="write role and content")
    role = _ROLES.get(str(raw).strip().lower())
    if call := next((each for each in _CALLS if _is_filled(turn.get(each))), None):
        raise BrokenRowError("tool calls", _WITHOUT_TOOLS, field=f"{field}.{call}", hint=_INSTEAD)
    if str(raw).strip().lower() in _TOOL_ROLES:
        raise BrokenRowError("tool calls", f"{raw!r}: {_WITHOUT_TOOLS}", field=f"{field}.{name}", hint=_INSTEAD)
    if role is None:
        near = difflib.get_close_matches(str(raw).lower(), _ROLES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "known are system, user (human), assistant (gpt)"
        raise BrokenRowError("bad role", f"{raw!r} is no role", field=f"{field}.{name}", hint=hint)
    if role == "system" and place > 0:
        raise BrokenRowError(
            "bad role", "a system turn that is not the first", field=field, hint="move it to the front"
        )
    return Message(role=role, content=text_of(turn.get(key), f"{field}.{said}", f"no {said}"))


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "a truth value", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
