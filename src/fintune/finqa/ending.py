"""Where a text stands in a grammar of the program language: whether it is whole, and the shortest way to end it.

A text is read with partial derivatives (V. Antimirov, Partial derivatives of regular expressions and finite automaton
constructions, 1996): what may follow a text is a set of expressions, each a row of parts that are still to come. The
grammars of :mod:`fintune.finqa.grammar` name no rule within itself and repeat nothing that may be empty, so that the
sets stay small and every walk ends.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from fintune.finqa.grammar import Characters, Choice, Expression, Grammar, Repeated, Rule, Series, Text

_Parts = tuple[Expression, ...]

_SAMPLES = "1a"
"""A character of each class that the grammars have, so that an ending holds no zero to divide by."""


def ending(grammar: Grammar, text: str) -> str | None:
    """The shortest text that makes ``text`` a whole one; "" where it is whole, None where no program begins so."""
    rules = grammar.rules
    states: set[_Parts] = {(Rule(next(iter(rules))),)}
    for character in text:
        states = {rest for state in states for rest in _after(state, character, rules)}
    ends = ["".join(_shortest(part, rules) for part in state) for state in states]
    return min(ends, key=lambda end: (len(end), end), default=None)


def takes(grammar: Grammar, text: str) -> bool:
    """Whether the grammar has this text."""
    return ending(grammar, text) == ""


def _after(parts: _Parts, character: str, rules: Mapping[str, Expression]) -> Iterator[_Parts]:
    """What is still to come of a row of parts behind a character, for each way to read it."""
    if not parts:
        return
    head, tail = parts[0], parts[1:]
    if isinstance(head, Text):
        if head.value.startswith(character):
            left = head.value[1:]
            yield (Text(left), *tail) if left else tail
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
