"""The program language as a grammar for constrained decoding, defined once and written in two notations.

=====  ================================================================================================
GBNF   llama.cpp (``grammar`` of its server and tools)
Lark   llguidance and what builds on it (vLLM, SGLang, ...); an EBNF of rules and upper-case terminals
=====  ================================================================================================

`general` accepts what `fintune.finqa.parse.parse` accepts, with two limits. The number of steps is limited, because
each step has its own rules: a reference must point to an earlier step. Row names have no control characters and no
uncommon spaces. `restricted` accepts only programs about one page: see `Vocabulary`.

`shortest_ending` completes a text to a program. It uses partial derivatives (V. Antimirov, Partial derivatives of
regular expressions and finite automaton constructions, 1996): what may follow a text is a set of expressions, each a
sequence of parts. No rule of these grammars refers to itself, and nothing that may be empty is repeated, so the sets
stay small.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

from fintune.finqa.official import cell_number
from fintune.finqa.program import (
    ARITHMETIC_OPERATIONS,
    CONSTANTS,
    NOTHING,
    TABLE_OPERATIONS,
    Constant,
    Number,
    Program,
    RowName,
)

MAX_STEPS = 6
"""One step more than the longest gold program of FinQA."""

_BREAKS = r"()#|\x00-\x20\x7f-\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
"""Characters that no word of a row name contains, as the inside of a character class."""
_ROW_NAME = re.compile(rf"(?:(?:,*[^,{_BREAKS}])+ +)*(?:(?:,*[^,{_BREAKS}])+,*|,+)")
_NUMBER = re.compile(r"(-|- |\( *)?((?<![\d.])(?:\d[\d,]*\.?\d*|\.\d+))( ?%)?", re.ASCII)


@dataclass(frozen=True)
class Text:
    """Exactly this text."""

    value: str


@dataclass(frozen=True)
class Characters:
    """One character of a class; ``inside`` is the text between the brackets, the same in both notations."""

    inside: str


@dataclass(frozen=True)
class Rule:
    """A reference to the rule of this name."""

    name: str


@dataclass(frozen=True)
class Series:
    """A sequence of expressions."""

    parts: tuple[Expression, ...]


@dataclass(frozen=True)
class Choice:
    """One of several expressions."""

    options: tuple[Expression, ...]


@dataclass(frozen=True)
class Repeated:
    """An expression with the sign ``?``, ``*`` or ``+``."""

    item: Expression
    sign: str


Expression: TypeAlias = Text | Characters | Rule | Series | Choice | Repeated


@dataclass(frozen=True)
class Grammar:
    """Rules by name; a text begins with the first one.

    Attributes:
        rules: The rules; their names are letters and digits, which both notations accept.
        terminals: Names of the rules that Lark must treat as one word, because their parts are single characters.
    """

    rules: Mapping[str, Expression]
    terminals: frozenset[str] = frozenset()

    def gbnf(self) -> str:
        """Write the grammar for llama.cpp."""
        names = {name: "root" if k == 0 else name for k, name in enumerate(self.rules)}
        return "".join(f"{names[name]} ::= {_write(rule, names, '[]')}\n" for name, rule in self.rules.items())

    def lark(self) -> str:
        """Write the grammar for Lark and llguidance."""
        names = {name: name.upper() if name in self.terminals else name for name in self.rules}
        names[next(iter(self.rules))] = "start"
        return "".join(f"{names[name]}: {_write(rule, names, '//')}\n" for name, rule in self.rules.items())


@dataclass(frozen=True)
class Vocabulary:
    """The words that a program about one page can use.

    Attributes:
        numbers: Numbers as programs write them, without "," and "$". If the page has a minus or a bracket before a
            number, the form with "-" is included; if it has a "%" after it, the form with "%" is included.
        rows: Names of the rows that a table operation can read: every cell except the name is a number, and nothing in
            the name ends an argument. If several rows have one name, the last one counts, as in the official script.
        constants: The constants of FinQA's vocabulary.
    """

    numbers: frozenset[str]
    rows: frozenset[str]
    constants: tuple[str, ...] = CONSTANTS


def vocabulary(table: Sequence[Sequence[str]], texts: Iterable[str]) -> Vocabulary:
    """Return the words of one page.

    Args:
        table: Rows of cells.
        texts: The sentences of the page, and the question, because some programs take a number from it.
    """
    numbers = frozenset[str]().union(*map(_numbers_in, (*(cell for row in table for cell in row), *texts)))
    last = {row[0]: row for row in table if row}
    return Vocabulary(numbers, frozenset(name for name, row in last.items() if _can_be_read(row)))


@lru_cache(maxsize=4096)
def _numbers_in(text: str) -> frozenset[str]:
    """Return the numbers of a cell or a sentence. The questions about a page ask for them again and again."""
    numbers: set[str] = set()
    for sign, digits, percent in _NUMBER.findall(text):
        bare = digits.replace(",", "")
        for number in {bare, bare.rstrip(".")}:
            forms = {number, f"{number}%"} if percent else {number}
            numbers |= forms | ({f"-{form}" for form in forms} if sign else set())
    return frozenset(numbers)


def can_be_named(name: str) -> bool:
    """Return whether a program can name a table row so: nothing in it ends an argument, no space is at its ends."""
    return _ROW_NAME.fullmatch(name) is not None


def general(max_steps: int = MAX_STEPS) -> Grammar:
    """Return the grammar of the whole language, for programs of at most ``max_steps`` steps."""
    digits = Repeated(Characters("0-9"), "+")
    point = Series((Text("."), Repeated(Characters("0-9"), "*")))
    amount = Choice((Series((digits, Repeated(point, "?"))), Series((Text("."), digits))))
    word = Repeated(Series((Repeated(Text(","), "*"), Characters(f"^,{_BREAKS}"))), "+")
    # The comma before "none" is in this rule, too: a name may end in commas, and a lexer does not step back.
    words = Series((Repeated(Series((word, Repeated(Text(" "), "+"))), "*"), _last(word), Text(f", {NOTHING}")))
    return _grammar(
        {
            "number": Series((Repeated(Text("-"), "?"), amount, Repeated(Text("%"), "?"))),
            "constant": Series((Text("const_"), Repeated(Text("m"), "?"), amount)),
            "row": words,
        },
        max_steps,
    )


def restricted(words: Vocabulary, max_steps: int = MAX_STEPS) -> Grammar:
    """Return the grammar of one page, for programs of at most ``max_steps`` steps."""
    lists = {
        "number": words.numbers,
        "constant": words.constants,
        "row": [f"{name}, {NOTHING}" for name in words.rows],
    }
    # The longest first: some readers take the first word that fits.
    ordered = {kind: sorted(texts, key=lambda text: (-len(text), text)) for kind, texts in lists.items()}
    return _grammar({kind: Choice(tuple(map(Text, texts))) for kind, texts in ordered.items() if texts}, max_steps)


def outside(program: Program, words: Vocabulary, max_steps: int = MAX_STEPS) -> list[str]:
    """Return why `restricted` refuses a program, a reason for each argument; an accepted program has none."""
    reasons = ["more steps"] if len(program.steps) > max_steps else []
    known = {number.strip("-%") for number in words.numbers}
    for argument in (argument for step in program.steps for argument in (step.first, step.second)):
        if isinstance(argument, Number) and argument.text not in words.numbers:
            other = argument.text.strip("-%") in known
            reasons.append("number with another sign or percent sign" if other else "number that is not on the page")
        elif isinstance(argument, Constant) and argument.text not in words.constants:
            reasons.append("constant outside FinQA's vocabulary")
        elif isinstance(argument, RowName) and argument.text not in words.rows:
            reasons.append("row that no table operation can read")
    return reasons


def _grammar(words: dict[str, Expression], max_steps: int) -> Grammar:
    if max_steps < 1:
        raise ValueError("a program has at least one step")
    rules: dict[str, Expression] = {}
    for step in range(max_steps):
        more = Series((Text(", "), Rule(f"steps{step + 1}")))
        last = step == max_steps - 1
        rules[f"steps{step}"] = Rule(f"step{step}") if last else Series((Rule(f"step{step}"), Repeated(more, "?")))
    for step in range(max_steps):
        argument = Rule(f"argument{step}")
        forms: list[Expression] = [Series((Rule("arithmetic"), Text("("), argument, Text(", "), argument, Text(")")))]
        if "row" in words:
            forms.append(Series((Rule("over"), Text("("), Rule("row"), Text(")"))))
        rules[f"step{step}"] = Choice(tuple(forms))
        names = [Rule(name) for name in ("number", "constant") if name in words]
        rules[f"argument{step}"] = Choice((*names, *(Text(f"#{earlier}") for earlier in range(step))))
    rules["arithmetic"] = Choice(tuple(map(Text, ARITHMETIC_OPERATIONS)))
    if "row" in words:
        rules["over"] = Choice(tuple(map(Text, TABLE_OPERATIONS)))
    return Grammar(rules | words, frozenset(words))


def _last(word: Expression) -> Expression:
    """Return the last word of a name, which may end in commas or be only commas."""
    return Choice((Series((word, Repeated(Text(","), "*"))), Repeated(Text(","), "+")))


def _can_be_read(row: Sequence[str]) -> bool:
    try:
        return can_be_named(row[0]) and len(row) > 1 and all(cell_number(cell) is not None for cell in row[1:])
    except ValueError:
        return False


def _write(rule: Expression, names: Mapping[str, str], marks: str, *, part: bool = False) -> str:
    """Write a rule in one notation.

    Args:
        rule: The rule to write.
        names: The names of the rules in this notation.
        marks: The delimiters of a character class, "[]" or "//".
        part: Whether the rule is inside another one, so that a sequence or a choice needs brackets.
    """
    if isinstance(rule, Text):
        return '"' + rule.value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(rule, Characters):
        return f"[{rule.inside}]" if marks == "[]" else f"/[{rule.inside}]/"
    if isinstance(rule, Rule):
        return names[rule.name]
    if isinstance(rule, Repeated):
        return _write(rule.item, names, marks, part=True) + rule.sign
    if isinstance(rule, Choice):
        text, is_joined = " | ".join(_write(option, names, marks) for option in rule.options), len(rule.options) > 1
    else:
        text, is_joined = " ".join(_write(item, names, marks, part=True) for item in rule.parts), True
    return f"({text})" if part and is_joined else text


_Parts: TypeAlias = tuple[Expression, ...]

_SAMPLES = "1a"
"""A character of every class in the grammars. No ending contains a zero, which a program could divide by."""


def shortest_ending(grammar: Grammar, text: str) -> str | None:
    """Return the shortest text that completes ``text`` to a program; None if no program begins with it."""
    rules = grammar.rules
    states: set[_Parts] = {(Rule(next(iter(rules))),)}
    for character in text:
        states = {later for state in states for later in _after(state, character, rules)}
    ends = ["".join(_shortest(part, rules) for part in state) for state in states]
    return min(ends, key=lambda end: (len(end), end), default=None)


def _after(parts: _Parts, character: str, rules: Mapping[str, Expression]) -> Iterator[_Parts]:
    """Yield the parts that remain after a character, for every reading of it."""
    if not parts:
        return
    head, tail = parts[0], parts[1:]
    if isinstance(head, Text):
        if head.value.startswith(character):
            remaining = head.value[1:]
            yield (Text(remaining), *tail) if remaining else tail
        elif not head.value:
            yield from _after(tail, character, rules)
    elif isinstance(head, Characters):
        if re.fullmatch(f"[{head.inside}]", character):
            yield tail
    elif isinstance(head, Rule):
        yield from _after((rules[head.name], *tail), character, rules)
    elif isinstance(head, Series):
        yield from _after((*head.parts, *tail), character, rules)
    elif isinstance(head, Choice):
        for option in head.options:
            yield from _after((option, *tail), character, rules)
    else:
        again = () if head.sign == "?" else (Repeated(head.item, "*"),)
        yield from _after((head.item, *again, *tail), character, rules)
        if head.sign != "+":
            yield from _after(tail, character, rules)


def _shortest(expression: Expression, rules: Mapping[str, Expression]) -> str:
    if isinstance(expression, Text):
        return expression.value
    if isinstance(expression, Characters):
        return next(sample for sample in _SAMPLES if re.fullmatch(f"[{expression.inside}]", sample))
    if isinstance(expression, Rule):
        return _shortest(rules[expression.name], rules)
    if isinstance(expression, Series):
        return "".join(_shortest(part, rules) for part in expression.parts)
    if isinstance(expression, Choice):
        return min((_shortest(option, rules) for option in expression.options), key=lambda end: (len(end), end))
    return _shortest(expression.item, rules) if expression.sign == "+" else ""
