"""Parsers of the three written forms of a FinQA program; an error says where a text leaves the language."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fintune.errors import DataError
from fintune.finqa.program import (
    ARITHMETIC_OPERATIONS,
    END,
    NOTHING,
    OPERATIONS,
    TABLE_OPERATIONS,
    Argument,
    Constant,
    Nothing,
    Number,
    Program,
    ProgramStep,
    Reference,
    RowName,
    untokenize,
)

_NUMBER = re.compile(r"-?(?:\d+\.?\d*|\.\d+)%?", re.ASCII)
_CONSTANT = re.compile(r"const_m?(?:\d+\.?\d*|\.\d+)", re.ASCII)
_REFERENCE = re.compile(r"#(0|[1-9]\d*)", re.ASCII)
_OPERATION = re.compile(rf"({'|'.join(OPERATIONS)})\(")
_ATOM = re.compile(r"#\d*|(?:(?!, )[^()#|])*", re.ASCII)


class ParseError(DataError, ValueError):
    """A text that is not a program.

    Attributes:
        position: The 0-based character at which the text leaves the language.
        expected: What the language allows there.
    """

    def __init__(self, text: str, position: int, expected: str) -> None:
        actual = repr(text[position : position + 20]) if position < len(text) else "the end"
        super().__init__(f"not a FinQA program: at character {position} expected {expected}, found {actual}")
        self.position, self.expected = position, expected


def parse(text: str) -> Program:
    """Read the linear form; ``parse(text).text == text``.

    Raises:
        ParseError: The text is not a program. The error has the position and what was expected there.
    """
    steps: list[ProgramStep] = []
    position = 0
    while True:
        operation, position = _operation(text, position)
        start = position
        atom, position = _atom(text, position)
        first = _argument(text, start, atom, operation, num_steps=len(steps))
        position = _literal(text, position, ", ")
        start = position
        atom, position = _atom(text, position)
        second = _second(text, start, atom, operation, num_steps=len(steps))
        position = _literal(text, position, ")")
        steps.append(ProgramStep(operation, first, second))
        if position == len(text):
            return Program(tuple(steps))
        if not text.startswith(", ", position):
            raise ParseError(text, position, "', ' and another step, or the end")
        position += 2


def parse_tokens(tokens: Sequence[str]) -> Program:
    """Read the official prediction format; ``parse_tokens(tokens).tokens == list(tokens)``.

    Raises:
        ParseError: The tokens are not a program. The position is the one in their linear form.
    """
    text = untokenize(tokens)
    if not tokens or tokens[-1] != END:
        raise ParseError(text, len(text), f"the token {END}")
    program = parse(text)
    if program.tokens != list(tokens):
        raise ParseError(text, len(text), "one token for each part of a step")
    return program


def parse_nested(text: str) -> Program:
    """Read the nested form. Steps are numbered in the order in which they must run, left argument first.

    A step that is written twice becomes one step that is used twice, so ``parse_nested(text).nested == text``. The
    original linear form comes back, unless it had unused steps or another order.

    Raises:
        ParseError: The text is not a nested program. The error has the position and what was expected there.
    """
    steps: dict[ProgramStep, int] = {}
    # A stack instead of recursion: an untrusted text may nest deeper than Python's calls can.
    open_steps: list[tuple[str, list[Argument]]] = []
    position = 0
    while True:
        done: Argument
        if match := _OPERATION.match(text, position):
            open_steps.append((match[1], []))
            position = match.end()
            continue
        if not open_steps:
            raise ParseError(text, position, _one_of_the_operations())
        operation, arguments = open_steps[-1]
        start = position
        atom, position = _atom(text, position)
        if atom.startswith("#"):
            raise ParseError(text, start, "an argument or a step; the nested form has no references")
        reader = _second if arguments else _argument
        done = reader(text, start, atom, operation, num_steps=0)
        while True:
            operation, arguments = open_steps[-1]
            if operation in TABLE_OPERATIONS and isinstance(done, Reference):
                raise ParseError(text, position, f"a row name and '{NOTHING}' as arguments of {operation}")
            arguments.append(done)
            if len(arguments) == 1:
                position = _literal(text, position, ", ")
                break
            position = _literal(text, position, ")")
            number = steps.setdefault(ProgramStep(operation, arguments[0], arguments[1]), len(steps))
            open_steps.pop()
            if not open_steps:
                if position < len(text):
                    raise ParseError(text, position, "the end")
                return Program(tuple(steps))
            done = Reference(number)


def _operation(text: str, position: int) -> tuple[str, int]:
    match = _OPERATION.match(text, position)
    if not match:
        raise ParseError(text, position, _one_of_the_operations())
    return match[1], match.end()


def _one_of_the_operations() -> str:
    return f"one of {', '.join(OPERATIONS)}, and '('"


def _atom(text: str, position: int) -> tuple[str, int]:
    # Everything up to the next separator. The caller checks the content, because it knows the operation.
    match = _ATOM.match(text, position)
    assert match, "the pattern matches the empty string"
    return match[0], match.end()


def _literal(text: str, position: int, literal: str) -> int:
    if not text.startswith(literal, position):
        raise ParseError(text, position, repr(literal))
    return position + len(literal)


def _argument(text: str, start: int, atom: str, operation: str, *, num_steps: int) -> Argument:
    if operation in TABLE_OPERATIONS:
        if not atom or atom != atom.strip() or atom.startswith("#"):
            what = "the name of a table row (without parentheses, ', ', '#', '|' and space at its ends)"
            raise ParseError(text, start, what)
        return RowName(atom)
    if _NUMBER.fullmatch(atom):
        return Number(atom)
    if _CONSTANT.fullmatch(atom):
        return Constant(atom)
    if match := _REFERENCE.fullmatch(atom):
        if len(match[1]) < 9 and int(match[1]) < num_steps:
            return Reference(int(match[1]))
        known = f"#0 to #{num_steps - 1}" if num_steps else "of which there are none yet"
        raise ParseError(text, start, f"the number of an earlier step, {known}")
    raise ParseError(text, start, "a number, number%, const_<number> or #<step>")


def _second(text: str, start: int, atom: str, operation: str, *, num_steps: int) -> Argument:
    if operation in ARITHMETIC_OPERATIONS:
        return _argument(text, start, atom, operation, num_steps=num_steps)
    if atom != NOTHING:
        raise ParseError(text, start, f"'{NOTHING}', the second argument of {operation}")
    return Nothing()
