"""Parse the values of a row: turns under any of their names, texts, tool calls, thoughts, loss masks and labels.

A value of a field is a text, one turn, or a list of turns. A cell may hold turns as JSON text, or as Python text,
which pandas writes. Every function raises :class:`BrokenRowError` for a value that it cannot use.
"""

from __future__ import annotations

import ast
import contextlib
import datetime
import difflib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any, Final, Literal, NamedTuple

from fintune.data.readers import BrokenRowError
from fintune.records import Message
from fintune.util.files import parse_json

Role = Literal["system", "user", "assistant", "tool"]

ROLES: Final[dict[str, Role]] = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter", "client", "customer"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatgpt", "agent", "ai", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython"), "tool"),
}
"""Known names of roles, in lower case."""
_CALL_ROLES: Final = ("function_call", "tool_call")
_CALL_FIELDS: Final = ("tool_calls", "function_call")
THOUGHT_FIELDS: Final = ("reasoning_content", "reasoning", "thinking")
_MASK_FIELDS: Final = ("weight", "train", "training", "loss")
"""Fields of a turn that exclude it from training if they are false or 0."""
_TEXT_PARTS: Final = ("text", "input_text", "output_text", None)
_TRUTH: Final = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
_LABEL_HINT: Final = "write true for a desired answer and false for an undesired one"
_TURNS_HINT: Final = 'write [{"role": "user", "content": "..."}, ...]'
_LOOKS_LIKE_TURNS: Final = re.compile(r"""\s*\[\s*\{\s*['"](role|from)['"]\s*:""")
_HH_TURN: Final = re.compile(r"\n\n(Human|Assistant): ?")
_FILL: Final = "fill it or remove the row"


class Turn(NamedTuple):
    """One turn, and whether its row lets it be trained."""

    message: Message
    is_trained: bool = True


def is_empty(value: object) -> bool:
    """Whether a value is an empty cell: null, NaN, blank text, or a list or an object without a filled value."""
    if isinstance(value, str):
        return not value.strip() or value.strip() in ("[]", "{}", "null")
    if isinstance(value, dict):
        return all(map(is_empty, value.values()))
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or (isinstance(value, Sequence) and not value)


def find_turns(value: object) -> list[object] | None:
    """Return the turns that a value holds, unparsed; None if it holds none, and is a text or something else."""
    if isinstance(value, str):
        if value.startswith("\n\nHuman:"):
            marks = list(_HH_TURN.finditer(value))
            ends = [*(mark.start() for mark in marks[1:]), len(value)]
            return [{"role": m[1].lower(), "content": value[m.end() : end]} for m, end in zip(marks, ends, strict=True)]
        parsed = parse_cell(value) if value.lstrip()[:1] in ("[", "{") else None
        if isinstance(parsed, dict):  # an answer may itself be an object
            parsed = [parsed] if str(parsed.get("role", parsed.get("from"))).lower() in ROLES else None
        is_turns = isinstance(parsed, list) and any(isinstance(turn, dict) and _has_turn(turn) for turn in parsed)
        return parsed if is_turns else None
    if isinstance(value, dict):
        if any(isinstance(value.get(key), list) for key in ("role", "from")):
            return _turns_by_key(value)
        return [value] if _has_turn(value) else None
    if isinstance(value, list) and any(isinstance(turn, dict) and turn.keys() & {"role", "from"} for turn in value):
        return value
    return None


def _turns_by_key(value: Mapping[str, object]) -> list[object] | None:
    """Return a list of turns that Arrow stores as lists by key; None if the lists are not of one length."""
    lists = {key: items for key, items in value.items() if items is not None}
    columns = [items for items in lists.values() if isinstance(items, list)]
    if len(columns) < len(lists) or len(set(map(len, columns))) > 1:
        return None
    return [dict(zip(lists, items, strict=True)) for items in zip(*columns, strict=True)]


def _has_turn(value: Mapping[str, object]) -> bool:
    keys = value.keys()
    return {"from", "value"} <= keys or ("role" in keys and not keys.isdisjoint(("content", *_CALL_FIELDS)))


def find_pairs(value: object) -> list[object] | None:
    """Return ``[[question, answer], ...]``, also as JSON text, as unparsed turns; None if a value is no such list."""
    pairs = parse_cell(value) if isinstance(value, str) and value.lstrip().startswith("[") else value
    if not isinstance(pairs, list) or not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs):
        return None
    names = ("user", "assistant")
    return [{"role": role, "content": text} for pair in pairs for role, text in zip(names, pair, strict=True)]


def parse_turns(
    value: object, field: str, roles: Mapping[str, str] | None = None, mask: Sequence[object] = ()
) -> list[Turn]:
    """Parse one turn or a list of turns, each ``{"role", "content"}`` or ``{"from", "value"}``.

    Args:
        value: The parsed value of a field.
        field: Name of the field, for messages.
        roles: Further names of roles.
        mask: Whether each turn, or each answer, is trained.
    """
    turns = find_turns(value)
    if turns is None:
        turns = parse_cell(value) if isinstance(value, str) else value  # type: ignore[assignment]
    if not isinstance(turns, list) or not turns:
        what = "empty or missing" if is_empty(value) else f"{_kind_of(value)}, not a list of turns"
        raise BrokenRowError("bad turns", what, field=field, hint=_TURNS_HINT)
    known = {**ROLES, **{name.strip().lower(): ROLES[role] for name, role in (roles or {}).items()}}
    parsed = [_parse_turn(turn, f"{field}[{index}]", index, known) for index, turn in enumerate(turns)]
    if mask:
        answers = [index for index, turn in enumerate(parsed) if turn and turn.message.role == "assistant"]
        if len(mask) not in (len(parsed), len(answers)):
            why = f"{len(mask)} values for {len(parsed)} turns with {len(answers)} answers"
            raise BrokenRowError("bad mask", why, field="loss_mask", hint="write one value a turn, or one an answer")
        flags = [parse_mask(flag, f"loss_mask[{index}]") for index, flag in enumerate(mask)]
        for index, flag in zip(range(len(parsed)) if len(mask) == len(parsed) else answers, flags, strict=True):
            if (turn := parsed[index]) is not None:
                parsed[index] = turn._replace(is_trained=turn.is_trained and flag)
    return [turn for turn in parsed if turn is not None]


def _parse_turn(turn: object, field: str, index: int, roles: Mapping[str, Role]) -> Turn | None:
    """Parse a turn; None for an empty system message, which says nothing."""
    if not isinstance(turn, dict):
        raise BrokenRowError("bad turns", f"{_kind_of(turn)}, not a turn", field=field, hint="write role and content")
    name, content_name = ("role", "content") if "role" in turn else ("from", "value")
    raw = turn.get(name)
    if raw is None:
        names = ", ".join(map(str, turn)) or "nothing"
        raise BrokenRowError("bad role", f"has no role but {names}", field=field, hint="write role and content")
    word = str(raw).strip().lower()
    role = "assistant" if word in _CALL_ROLES else roles.get(word)
    if role is None:
        near = difflib.get_close_matches(word, roles, n=1, cutoff=0.75)
        known = "the known roles are system, user (human), assistant (gpt); or map it, as roles: {NAME: assistant}"
        hint = f"did you mean {near[0]!r}?" if near else known
        raise BrokenRowError("bad role", f"{raw!r} is no role", field=f"{field}.{name}", hint=hint)
    content, at = turn.get(content_name), f"{field}.{content_name}"
    if role == "system" and is_empty(content):
        return None
    if role == "system" and index > 0:
        what = "a system turn that is not the first"
        raise BrokenRowError("bad role", what, field=field, hint="move it to the front")
    more: dict[str, Any] = {}
    if role == "assistant":
        if word in _CALL_ROLES:
            more["tool_calls"], content = _parse_calls(content, at), None
        for key in _CALL_FIELDS:
            if not is_empty(turn.get(key)):
                more["tool_calls"] = _parse_calls(turn[key], f"{field}.{key}")
        thought, content = _thought_of(turn, content)
        if thought:
            more["reasoning_content"] = thought
    elif role == "tool":
        more = {key: str(turn[key]) for key in ("name", "tool_call_id") if not is_empty(turn.get(key))}
        content = json.dumps(content, ensure_ascii=False) if isinstance(content, dict) else content
    has_text = not (is_empty(content) and ("tool_calls" in more or role == "tool"))
    text = parse_text(content, at, f"no {content_name}") if has_text else ""
    return Turn(Message(role=role, content=text, **more), _is_trained(turn, field))


def _thought_of(turn: Mapping[str, object], content: object) -> tuple[str, object]:
    """Return the thought of a turn, from a field or a part of the content, and the content without it."""
    thoughts = [text for name in THOUGHT_FIELDS if isinstance(text := turn.get(name), str) and text.strip()]
    if isinstance(content, list):
        parts = [part for part in content if isinstance(part, dict) and part.get("type") in ("thinking", "reasoning")]
        thoughts += [text for part in parts if isinstance(text := part.get("thinking", part.get("text")), str)]
        content = [part for part in content if not any(part is thought for thought in parts)]
    return "\n\n".join(dict.fromkeys(thoughts)), content


def _is_trained(turn: Mapping[str, object], field: str) -> bool:
    flags = [parse_mask(turn[name], f"{field}.{name}") for name in _MASK_FIELDS if not is_empty(turn.get(name))]
    return all(flags)


def parse_mask(value: object, field: str) -> bool:
    """Parse whether a turn is trained: true or false, 1 or 0, also as text."""
    truth = read_truth(value)
    if truth is None:
        hint = "write true (1) to train the answer and false (0) to leave it out"
        raise BrokenRowError("bad mask", f"{value!r:.40} is neither true nor false", field=field, hint=hint)
    return truth


def read_truth(value: object) -> bool | None:
    """Return the truth value that a value means: true and false, 0 and 1, also as text in any case; else None."""
    if isinstance(value, bool):
        return value
    if isinstance(value, (int, float)):
        return value == 1 if value in (0, 1) else None
    return _TRUTH.get(value.strip().casefold()) if isinstance(value, str) else None


def _parse_calls(value: object, field: str) -> tuple[dict[str, Any], ...]:
    """Parse tool calls into ``{"type", "function": {"name", "arguments"}}``, with arguments as an object."""
    parsed = parse_cell(value) if isinstance(value, str) else value
    calls = []
    for call in parsed if isinstance(parsed, list) else [parsed]:
        function: Any = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            hint = 'write [{"function": {"name": "...", "arguments": {...}}}]'
            raise BrokenRowError("bad tool call", f"{_kind_of(call)} without a function's name", field=field, hint=hint)
        arguments = function.get("arguments", {})
        arguments = parse_cell(arguments) if isinstance(arguments, str) else arguments
        whole = {"name": function["name"], "arguments": _without_nulls(arguments or {})}
        call_id = {"id": str(call["id"])} if isinstance(call, dict) and call.get("id") else {}
        calls.append({"type": "function", **call_id, "function": whole})
    return tuple(calls)


def parse_tools(value: object) -> tuple[dict[str, Any], ...]:
    """Return the tools that a row offers, as ``{"type", "function"}``; nothing if the value describes none."""
    parsed = parse_cell(value) if isinstance(value, str) else value
    if not isinstance(parsed, list):
        return ()
    functions: list[Any] = [tool.get("function", tool) if isinstance(tool, dict) else None for tool in parsed]
    if not all(isinstance(function, dict) and isinstance(function.get("name"), str) for function in functions):
        return ()
    return tuple({"type": "function", "function": _without_nulls(function)} for function in functions)


def _without_nulls(value: Any) -> Any:
    """Leave out nulls, with which Arrow fills the keys that only other rows have."""
    if isinstance(value, dict):
        return {str(key): _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def parse_text(value: object, field: str, missing: str) -> str:
    """Parse a text. A number, a truth value or a date becomes its text, and a list of text parts is joined.

    Args:
        value: The parsed value of a field.
        field: Name of the field, for messages.
        missing: The reason to count by if there is no text.
    """
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        value = "".join(_parse_part(part, f"{field}[{index}]") for index, part in enumerate(value))
    value = format_scalar(value)
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        raise BrokenRowError(missing, "missing or empty", field=field, hint=_FILL)
    if not isinstance(value, str):
        raise BrokenRowError("not text", f"{_kind_of(value)}, not text", field=field, hint="write it as text")
    if not value.strip():
        raise BrokenRowError(missing, "holds only white space", field=field, hint=_FILL)
    if _LOOKS_LIKE_TURNS.match(value) and find_turns(value) is None:
        why = "text that looks like a list of turns, but is not JSON"
        raise BrokenRowError("bad turns", why, field=field, hint="write it with json.dumps")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        why = f"half a surrogate pair at letter {error.start}"
        raise BrokenRowError("not text", why, field=field, hint="the text was cut inside an emoji; repair it") from None
    return value


def format_scalar(value: object) -> object:
    """Write a number, a truth value or a date as text, without an exponent; return any other value as it is."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        text = repr(value)
        return format(Decimal(text), "f") if "e" in text else text
    if isinstance(value, Decimal) and value.is_finite():
        return format(value, "f")
    return value.isoformat() if isinstance(value, (datetime.date, datetime.time)) else value


def _parse_part(part: Mapping[str, object], field: str) -> str:
    kind, text = part.get("type"), part.get("text")
    if kind not in _TEXT_PARTS or (kind is None and "text" not in part) or part.keys() & {"image", "image_url"}:
        what = f"holds a part of type {kind!r}" if kind else f"holds a part with {', '.join(map(str, part))}"
        raise BrokenRowError("not text", what, field=field.rpartition("[")[0], hint="only text is trained on")
    if text is not None and not isinstance(text, str):
        what = f"{_kind_of(text)}, not text"
        raise BrokenRowError("not text", what, field=f"{field}.text", hint="write it as text")
    return text or ""


def parse_label(value: object, base_format: str = "prompt_completion") -> bool:
    """Parse a KTO label (arXiv 2402.01306): true and false, or 0 and 1, also as text in any case.

    Words such as "good" are refused, because which of them means yes would be a guess.

    Args:
        value: The value.
        base_format: The format that the row has without its label, for the hint.
    """
    if is_empty(value):
        raise BrokenRowError("no label", "missing or empty", field="label", hint=_LABEL_HINT)
    truth = read_truth(value)
    if truth is not None:
        return truth
    other = f"if the column is no label, name the source's format, as format: {base_format}"
    hint, what = f"{_LABEL_HINT}; {other}", f"{value!r:.40} is no label"
    if isinstance(value, (int, float)):
        # The `g` format needs a float, and some integers are too large for one.
        what = f"{value:g} is no label" if isinstance(value, float) else f"{value!s:.40} is no label"
        hint = f"{_LABEL_HINT}, of a rating by a threshold; {other}"
    elif not isinstance(value, str):
        what, hint = "holds more than one value", _LABEL_HINT
    elif near := difflib.get_close_matches(value.strip().casefold(), ("true", "false"), n=1, cutoff=0.7):
        hint = f"did you mean {near[0]}?"
    raise BrokenRowError("bad label", what, field="label", hint=hint)


def walk_leaves(value: object, path: str) -> Iterator[tuple[str, object]]:
    """Yield every filled value of a structure with its path, as ``messages[].content``."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from walk_leaves(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from walk_leaves(item, f"{path}[]")
    elif not is_empty(value):
        yield path, value


def parse_cell(text: str) -> Any:
    """Parse the JSON or Python text of a cell; return the text if it is neither."""
    with contextlib.suppress(ValueError):
        return parse_json(text)
    with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
        return ast.literal_eval(text.strip())
    return text


def _kind_of(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "a truth value", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
