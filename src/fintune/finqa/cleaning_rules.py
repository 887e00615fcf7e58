r"""What is changed in FinQA's texts before a model sees them, rule by rule.

FinQA's texts were cut into words by a program that wrote some numbers twice and lost the backslash of Unicode escapes:
``firm\u2019s`` became ``firm 2019s``. What could be a number stays: ``2013``, ``2014``, ``2019`` and ``2022`` alone are
dashes, apostrophes and bullets in some places and years in others.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["sentence", "cell", "question"]
"""What a text is; the names of columns are cells."""


@dataclass(frozen=True)
class Rule:
    """One kind of change.

    Attributes:
        name: As counted.
        does: What it does, in words.
        example: A text before and after.
        kinds: Texts that it is for.
        mark: Stands wherever the pattern matches; most texts lack it, and looking for it is quick.
        pattern: What it finds.
        replacement: What it writes, as in `re.sub`.
    """

    name: str
    does: str
    example: tuple[str, str]
    kinds: frozenset[Kind]
    mark: str
    pattern: re.Pattern[str]
    replacement: str | Callable[[re.Match[str]], str]


def _one_space(match: re.Match[str]) -> str:
    return "" if match.start() == 0 or match.end() == len(match.string) else " "


def _rule(
    name: str,
    does: str,
    example: tuple[str, str],
    kinds: Sequence[Kind],
    mark: str,
    pattern: str,
    replacement: str | Callable[[re.Match[str]], str],
) -> Rule:
    return Rule(name, does, example, frozenset(kinds), mark, re.compile(pattern), replacement)


_YEAR_BEFORE = "in of on or to by from and for than since until during fiscal year years ended ending through"
_NO_YEAR = "".join(rf"(?<!\b{word} 201[34])" for word in _YEAR_BEFORE.split())

RULES: tuple[Rule, ...] = (
    _rule(
        "typed newline",
        r"the characters \n, typed by hand, at the end are left out",
        ("what was the margin?\\n", "what was the margin?"),
        ["question"],
        "",
        r"(?:\s|\\+n)+\Z",
        "",
    ),
    _rule(
        "currency",
        "a dollar sign is left out; no program names it",
        ("$ 5829", "5829"),
        ["cell"],
        "$",
        r"\s*\$[\s$]*",
        _one_space,
    ),
    _rule(
        "space",
        "white space is squeezed (of a question: left out before it)",
        ("cash  rose ", "cash rose"),
        ["sentence", "cell"],
        "",
        r"\A\s+|\s+\Z|[^\S ]\s*| \s+",
        _one_space,
    ),
    _rule("space", "", (" what fell?", "what fell?"), ["question"], "", r"\A\s+", ""),
    _rule(
        "lone stop",
        "a sentence that is nothing but a full stop is left out",
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
        r'"\1"',
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
        "2014 or 2013 before letters is a dash, unless the word before speaks of a year",
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
        "",
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
        r"-\1",
    ),
    _rule(
        "percentage",
        "a percentage is not repeated in brackets",
        ("23.6% ( 23.6 % )", "23.6%"),
        ["sentence", "cell"],
        "% ( ",
        r"([^\s()]*)( ?)% \( +\1 ?% \)",
        r"\1\2%",
    ),
)
"""In the order in which they are applied."""
