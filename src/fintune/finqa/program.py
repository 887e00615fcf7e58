"""FinQA programs in their four forms, the conversions between them, and the words of the language.

========  ==========================================================================================
text      ``subtract(5829, 5735), divide(#0, 5735)``; exactly ", " separates steps and arguments
tokens    ``["subtract(", "5829", "5735", ")", "divide(", "#0", "5735", ")", "EOF"]``, the scored form
nested    ``divide(subtract(5829, 5735), 5735)``, FinQA's ``program_re``
tree      `Program`, typed
========  ==========================================================================================

`tokenize` splits any text as the official script does. It does not check whether the text is a program.
`fintune.finqa.parse` reads each form into the tree. It takes only what is in the language, and reports where a text
leaves it. The language is described in Chen et al. 2021, FinQA, section 3 (github.com/czyssrs/FinQA).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from fintune.errors import DataError

ARITHMETIC_OPERATIONS = ("add", "subtract", "multiply", "divide", "exp", "greater")
"""Operations on two numbers; ``greater`` gives "yes" or "no"."""

TABLE_OPERATIONS = ("table_max", "table_min", "table_sum", "table_average")
"""Operations on all cells of one table row; the second argument is ``none``."""

OPERATIONS = ARITHMETIC_OPERATIONS + TABLE_OPERATIONS

CONSTANTS = (
    *(f"const_{value}" for value in range(1, 11)),
    "const_100",
    "const_1000",
    "const_10000",
    "const_100000",
    "const_1000000",
    "const_10000000",
    "const_1000000000",
    "const_m1",
)
"""Constants of the official generator's vocabulary; ``const_m1`` is -1. The evaluator takes ``const_<any number>``."""

END = "EOF"
"""Last token of every program in the official prediction format."""

NOTHING = "none"
"""Second argument of a table operation."""

MAX_NESTED_CHARS = 100_000
"""Longest form that `Program.nested` gives. A step that uses the one before it twice doubles the length."""

_TOKEN = re.compile(r"[^()]*\(|[^()]+|\)")
_FENCE = re.compile(r"\s*(?:```|~~~)[\w-]*\s*")


@dataclass(frozen=True)
class Number:
    """A literal number as written, ``5735`` or ``23.6%``."""

    text: str


@dataclass(frozen=True)
class Constant:
    """A constant as written, ``const_100``."""

    text: str


@dataclass(frozen=True)
class Reference:
    """The result of an earlier step, ``#0``; ``step`` is 0-based."""

    step: int

    @property
    def text(self) -> str:
        """The argument as written in a program."""
        return f"#{self.step}"


@dataclass(frozen=True)
class RowName:
    """The first cell of the table row that a table operation reads."""

    text: str


@dataclass(frozen=True)
class Nothing:
    """The unused second argument of a table operation."""

    text: str = NOTHING


Argument: TypeAlias = Number | Constant | Reference | RowName | Nothing


@dataclass(frozen=True)
class ProgramStep:
    """An operation and its two arguments."""

    operation: str
    first: Argument
    second: Argument

    @property
    def text(self) -> str:
        """The step in linear form."""
        return f"{self.operation}({self.first.text}, {self.second.text})"


@dataclass(frozen=True)
class Program:
    """A program of at least one step. Its result is the result of the last step."""

    steps: tuple[ProgramStep, ...]

    @property
    def text(self) -> str:
        """The linear form."""
        return ", ".join(step.text for step in self.steps)

    @property
    def tokens(self) -> list[str]:
        """The official prediction format, "EOF" included."""
        parts = ((f"{step.operation}(", step.first.text, step.second.text, ")") for step in self.steps)
        return [token for part in parts for token in part] + [END]

    @property
    def nested(self) -> str:
        """The nested form. It lacks the steps that the last one does not use, and repeats a step that is used twice.

        Raises:
            DataError: The form is longer than `MAX_NESTED_CHARS`.
        """
        forms: list[str] = []
        for step in self.steps:
            first, second = (
                forms[argument.step] if isinstance(argument, Reference) else argument.text
                for argument in (step.first, step.second)
            )
            forms.append(f"{step.operation}({first}, {second})")
            if len(forms[-1]) > MAX_NESTED_CHARS:
                raise DataError(f"the nested form of this program has more than {MAX_NESTED_CHARS} characters")
        return forms[-1]


def tokenize(text: str) -> list[str]:
    """Split any text into the official tokens, "EOF" included. Nothing is stripped.

    A row name that contains ", ", "(" or ")" is split there, as in the official script.
    """
    return [token for piece in text.split(", ") for token in _TOKEN.findall(piece)] + [END]


def extract_program(text: str) -> str:
    """Read the program from a model's free completion.

    The program is the first line that is not empty and not the opening line of a Markdown code fence. White space,
    backticks, and a full stop after the last ")" are dropped. The program itself is never repaired, because the score
    is about what the model wrote: a missing parenthesis, a wrong separator or words before the program stay.

    Returns:
        The linear form, or "" if the completion is empty.
    """
    for raw in text.split("\n"):
        if _FENCE.fullmatch(raw):
            continue
        line = raw.strip().strip("`").strip()
        if line:
            return line[:-1].rstrip() if line.endswith(".") and line[:-1].rstrip().endswith(")") else line
    return ""


def untokenize(tokens: Sequence[str]) -> str:
    """Join official tokens to the linear form, for people. A final "EOF" is left out.

    Any tokens are accepted. `tokenize` gives them back if they are a program.
    """
    body = tokens[:-1] if tokens and tokens[-1] == END else tokens
    text, glue = "", ""
    for piece in body:
        text += piece if piece == ")" else glue + piece
        glue = "" if piece.endswith("(") else ", "
    return text
