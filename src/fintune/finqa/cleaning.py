r"""Page texts and questions as a prompt shows them; every change is recorded with its rule and can be undone.

A program split FinQA's texts into words. It wrote some numbers twice and lost the backslash of Unicode escapes:
``firm\u2019s`` became ``firm 2019s``. The rules repair this. A text that could be a number stays: ``2013``, ``2014``,
``2019`` and ``2022`` alone are dashes, apostrophes and bullets in some texts and years in others. Row names are never
changed, because table operations name rows by them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from fintune.errors import DataError

TextKind = Literal["sentence", "cell", "question"]
"""The kind of a text; names of columns are cells."""


@dataclass(frozen=True)
class CleaningRule:
    """One kind of change.

    Attributes:
        name: The name under which changes are counted.
        does: What the rule does, in words.
        example: A text before and after.
        kinds: The kinds of text that the rule applies to.
        may_match: A fast check that every text with a match passes. Most texts fail it.
        pattern: The pattern to find.
        replacement: The replacement, or a function of the match.
    """

    name: str
    does: str
    example: tuple[str, str]
    kinds: frozenset[TextKind]
    may_match: Callable[[str], bool]
    pattern: re.Pattern[str]
    replacement: str | Callable[[re.Match[str]], str]


def _one_space(match: re.Match[str]) -> str:
    return "" if match.start() == 0 or match.end() == len(match.string) else " "


def _rule(
    name: str,
    does: str,
    example: tuple[str, str],
    kinds: Sequence[TextKind],
    mark: str | Callable[[str], bool],
    pattern: str,
    replacement: str | Callable[[re.Match[str]], str],
) -> CleaningRule:
    may_match = (lambda text: mark in text) if isinstance(mark, str) else mark
    return CleaningRule(name, does, example, frozenset(kinds), may_match, re.compile(pattern), replacement)


def _has_odd_space(text: str) -> bool:
    return " ".join(text.split()) != text


def _has_bullet(text: str) -> bool:
    return "f0b7" in text or "25cf" in text or "25e6" in text or "25aa" in text


_YEAR_BEFORE = "in of on or to by from and for than since until during fiscal year years ended ending through"
_NO_YEAR = "".join(rf"(?<!\b{word} 201[34])" for word in _YEAR_BEFORE.split())

RULES: tuple[CleaningRule, ...] = (
    _rule(
        "typed newline",
        r"the characters \n at the end, typed by hand, are removed",
        ("what was the margin?\\n", "what was the margin?"),
        ["question"],
        "",
        r"(?:\s|\\+n)+\Z",
        "",
    ),
    _rule(
        "currency",
        "a dollar sign is removed; no program contains it",
        ("$ 5829", "5829"),
        ["cell"],
        "$",
        r"\s*\$[\s$]*",
        _one_space,
    ),
    _rule(
        "space",
        "white space becomes one space (before a question, it is removed)",
        ("cash  rose ", "cash rose"),
        ["sentence", "cell"],
        _has_odd_space,
        r"\A\s+|\s+\Z|[^\S ]\s*| \s+",
        _one_space,
    ),
    _rule("space", "", (" what fell?", "what fell?"), ["question"], "", r"\A\s+", ""),
    _rule(
        "lone stop",
        "a sentence that is only a full stop becomes empty",
        (".", ""),
        ["sentence"],
        ".",
        r"\A\.\Z",
        "",
    ),
    _rule(
        "paired quotes",
        "2018 2018 ... 2019 2019 around words are quotes",
        ("( 2018 2018espp 2019 2019 )", '( "espp" )'),
        ["sentence"],
        "2018 2018",
        r"(?<!\S)2018 2018(?=[a-z])((?:(?!2018 2018).){1,120}?) 2019 2019(?!\S)",
        lambda match: f'"{match[1]}"',
    ),
    _rule(
        "opening quote",
        "201c is a quote",
        ("the 201cmake-whole price", 'the "make-whole price'),
        ["sentence", "cell", "question"],
        "201c",
        r"(?<!\S)201c ?(?=\S)",
        '"',
    ),
    _rule(
        "closing quote",
        "201d is a quote",
        ('the "plan 201d )', 'the "plan" )'),
        ["sentence", "cell", "question"],
        "201d",
        r" ?(?<!\w)201d",
        '"',
    ),
    _rule(
        "apostrophe",
        "2019 before s, t, re, ve, ll, d, m, or after o and d before more letters, is an apostrophe",
        ("the firm 2019s equity", "the firm's equity"),
        ["sentence", "cell", "question"],
        " 2019",
        r"(?<=\S) 2019(?=(?:s|t|re|ve|ll|d|m)(?!\w))|(?<=\b[od]) 2019(?=[a-z]{2})",
        "'",
    ),
    _rule(
        "dash",
        "2014 or 2013 before letters is a dash, unless the word before it introduces a year",
        ("note 8 2014commitments", "note 8 \u2014commitments"),
        ["sentence"],
        " 201",
        rf"(?<=[^\s,]) 201([34])(?=[a-z]{{2}}){_NO_YEAR}",
        lambda match: " \u2013" if match[1] == "3" else " \u2014",
    ),
    _rule(
        "euro",
        "20ac before a digit is the euro sign",
        ("20ac650 million", "\u20ac650 million"),
        ["sentence", "cell"],
        "20ac",
        r"(?<!\w)20ac(?=\d)",
        "\u20ac",
    ),
    _rule(
        "bullet",
        "f0b7, 25cf, 25e6 and 25aa alone are bullets",
        ("25cf in august", "\u2022 in august"),
        ["sentence"],
        _has_bullet,
        r"(?<!\S)(?:f0b7|25cf|25e6|25aa)(?!\S)",
        "\u2022",
    ),
    _rule(
        "negative",
        "a negative number is not repeated in brackets",
        ("-32 ( 32 )", "-32"),
        ["sentence", "cell"],
        " ( ",
        r"(?<!\S)-([\d.,]+) \( \1 \)",
        lambda match: f"-{match[1]}",
    ),
    _rule(
        "percentage",
        "a percentage is not repeated in brackets",
        ("23.6% ( 23.6 % )", "23.6%"),
        ["sentence", "cell"],
        "% ( ",
        r"([^\s()]*)( ?)% \( +\1 ?% \)",
        lambda match: f"{match[1]}{match[2]}%",
    ),
)
"""The rules in the order in which they are applied."""


@dataclass(frozen=True)
class Edit:
    """One change of a text.

    Attributes:
        rule: The name of the rule.
        start: The first character of the change, counted in the text after the rule.
        old: The text before.
        new: The text after.
    """

    rule: str
    start: int
    old: str
    new: str


_BY_KIND: dict[TextKind, tuple[CleaningRule, ...]] = {
    "sentence": tuple(rule for rule in RULES if "sentence" in rule.kinds),
    "cell": tuple(rule for rule in RULES if "cell" in rule.kinds),
    "question": tuple(rule for rule in RULES if "question" in rule.kinds),
}


@lru_cache(50_000)  # a page is cleaned for its prompt and for the report
def clean(text: str, kind: TextKind = "sentence") -> tuple[str, tuple[Edit, ...]]:
    """Clean a text for a prompt; return it with the changes in order.

    A sentence that the prompt leaves out becomes empty.
    """
    edits: list[Edit] = []
    for rule in _BY_KIND[kind]:
        if not rule.may_match(text):
            continue
        shift = 0
        parts: list[str] = []
        end = 0
        for match in rule.pattern.finditer(text):
            new = rule.replacement if isinstance(rule.replacement, str) else rule.replacement(match)
            edits.append(Edit(rule.name, match.start() + shift, match[0], new))
            shift += len(new) - len(match[0])
            parts += (text[end : match.start()], new)
            end = match.end()
        if parts:
            text = "".join((*parts, text[end:]))
    return text, tuple(edits)


def restore(cleaned: str, edits: Sequence[Edit]) -> str:
    """Undo the changes of `clean`.

    Raises:
        DataError: The edits are those of another text.
    """
    for edit in reversed(edits):
        before, after = cleaned[: edit.start], cleaned[edit.start :]
        if len(before) != edit.start or not after.startswith(edit.new):
            raise DataError(
                f"the rule {edit.rule!r} did not write {edit.new!r} at {edit.start} of {cleaned[:60]!r}",
                hint="restore a text with the edits that `clean` returned for it",
            )
        cleaned = before + edit.old + after.removeprefix(edit.new)
    return cleaned


def clean_sentence(text: str) -> str:
    """Clean a sentence for a prompt; the result is empty if the prompt leaves it out."""
    return clean(text, "sentence")[0]


def clean_cell(cell: str) -> str:
    """Clean a cell or the name of a column, so that its number is written as in programs."""
    return clean(cell, "cell")[0]


def clean_question(question: str) -> str:
    """Clean a question for a prompt."""
    return clean(question, "question")[0]
