"""Page texts and questions as a prompt shows them; every change is known by its rule and can be undone.

What is changed stands in `fintune.finqa.cleaning_rules`. Row names stay as they are, because table operations call rows
by them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from fintune.errors import DataError
from fintune.finqa.cleaning_rules import RULES, Kind, Rule


@dataclass(frozen=True)
class Edit:
    """One change of a text.

    Attributes:
        rule: Name of the rule that made it.
        start: Where it begins in the text as the rule left it.
        old: What stood there.
        new: What stands there now.
    """

    rule: str
    start: int
    old: str
    new: str


_BY_KIND: dict[Kind, tuple[Rule, ...]] = {
    "sentence": tuple(rule for rule in RULES if "sentence" in rule.kinds),
    "cell": tuple(rule for rule in RULES if "cell" in rule.kinds),
    "question": tuple(rule for rule in RULES if "question" in rule.kinds),
}


@lru_cache(50_000)  # a page is cleaned for its prompt and for the report
def clean(text: str, kind: Kind = "sentence") -> tuple[str, tuple[Edit, ...]]:
    """A text as a prompt shows it, and what was changed, in order.

    A sentence that is to be left out becomes empty.
    """
    edits: list[Edit] = []
    for rule in _BY_KIND[kind]:
        if rule.mark not in text:
            continue
        shift = 0
        parts: list[str] = []
        end = 0
        for match in rule.pattern.finditer(text):
            new = match.expand(rule.replacement) if isinstance(rule.replacement, str) else rule.replacement(match)
            edits.append(Edit(rule.name, match.start() + shift, match[0], new))
            shift += len(new) - len(match[0])
            parts += (text[end : match.start()], new)
            end = match.end()
        if parts:
            text = "".join((*parts, text[end:]))
    return text, tuple(edits)


def restore(cleaned: str, edits: Sequence[Edit]) -> str:
    """The text that `clean` was given.

    Raises:
        DataError: The edits are those of another text.
    """
    for edit in reversed(edits):
        before, after = cleaned[: edit.start], cleaned[edit.start :]
        if len(before) != edit.start or not after.startswith(edit.new):
            raise DataError(
                f"the rule {edit.rule!r} did not write {edit.new!r} at {edit.start} of {cleaned[:60]!r}",
                hint="restore a text with the edits that its own cleaning gave",
            )
        cleaned = before + edit.old + after.removeprefix(edit.new)
    return cleaned


def clean_sentence(text: str) -> str:
    """A sentence as a prompt shows it; empty where it is to be left out."""
    return clean(text, "sentence")[0]


def clean_cell(cell: str) -> str:
    """A cell, or the name of a column, as programs write its number."""
    return clean(cell, "cell")[0]


def clean_question(question: str) -> str:
    """A question as a prompt shows it."""
    return clean(question, "question")[0]
