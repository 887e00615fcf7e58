"""Turns and texts of a row, checked: roles under any of their names, contents that hold text."""

from __future__ import annotations

import contextlib
import difflib
import json
import math
from collections.abc import Mapping
from typing import Final, Literal

from fintune.records import Message
from fintune.sources.rows import BrokenRowError

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


def list_of_turns(value: object, field: str) -> tuple[list[Message], frozenset[int]]:
    """``[{"role", "content"}, ...]`` or ``[{"from", "value"}, ...]``, also as JSON text in a cell.

    Returns:
        The messages, and the places of those with ``"weight": 0``.

    Raises:
        BrokenRowError: No such list, an unknown role, an empty content.
    """
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = json.loads(value)
    if not isinstance(value, list) or not value:
        what = "empty or missing" if value in (None, "", []) else f"{_kind(value)}, not a list of turns"
        raise BrokenRowError("bad turns", what, field=field, hint='write [{"role": "user", "content": "..."}, ...]')
    messages = [_message(turn, f"{field}[{place}]", place) for place, turn in enumerate(value)]
    untrained = {place for place, turn in enumerate(value) if isinstance(turn, Mapping) and turn.get("weight") == 0}
    return messages, frozenset(untrained)


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
