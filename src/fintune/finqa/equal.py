"""Program accuracy: whether two programs are equal, decided as the official script decides it.

The official script turns the literals and table steps of the gold program into symbols. The predicted program may use
no others. The script compares the last steps of both programs after ``sympy.simplify``, which takes about 20 ms a pair.
Here sympy is used only if it is needed:

1. Identical tokens are equal, and so are expressions that sympy builds as one object (``a + b``, ``b + a``).
2. Expressions with different values at some point are not equal, because simplifying changes no value.
3. The rest are one function in two shapes, such as ``(a + b) / c`` and ``a / c + b / c``. For these sympy decides.
   Symbols are numbered by their position in the gold program, so programs of one shape share its cached result.

sympy gets expressions of its own symbols and never a text, so no part of a prediction is evaluated as code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from fintune.errors import DataError
from fintune.finqa.expression import Graph, Node, differ
from fintune.finqa.official import split_step, split_steps, structure_error
from fintune.finqa.program import ARITHMETIC_OPERATIONS

if TYPE_CHECKING:
    from sympy import Basic


class _RawStep(NamedTuple):
    key: str
    operation: str
    arguments: tuple[str, str]

    @property
    def reads_table(self) -> bool:
        return "table" in self.operation


class _Gold(NamedTuple):
    body: tuple[str, ...]
    steps: list[_RawStep]
    symbols: dict[str, int]


@dataclass(frozen=True)
class _Meaning:
    graph: Graph
    root: int
    equals_itself: bool
    failure: str | None = None


class _NotComparableError(Exception):
    """The official comparison cannot read a program."""


def equal_program(gold_tokens: Sequence[str], pred_tokens: Sequence[str]) -> bool:
    """Return whether a predicted program equals the gold program.

    Args:
        gold_tokens: The official tokens of the gold program, "EOF" included.
        pred_tokens: The official tokens of the prediction; the last one is dropped, whatever it is.

    Raises:
        DataError: The gold program is not a program, so the official script itself fails on it.
    """
    tokens = tuple(gold_tokens)
    gold = _gold(tokens)
    body = pred_tokens[:-1]
    if tuple(body) == gold.body and _meaning(tokens).equals_itself:
        return True
    try:
        steps = _checked(body, gold.symbols)
    except _NotComparableError:
        return False
    meaning = _meaning(tokens)
    if meaning.failure:
        raise _gold_error(gold_tokens, meaning.failure)
    graph = meaning.graph.copy()
    try:
        root = _build(graph, steps, gold.symbols)
    except _NotComparableError:
        return False
    return root == meaning.root or (not differ(graph, meaning.root, root) and _sympy_agrees(meaning, graph, root))


def _sympy_agrees(gold: _Meaning, graph: Graph, root: int) -> bool:
    try:
        simplified = _simplify(tuple(graph.nodes[: root + 1]), root)
    except Exception:
        # For the official script, an expression that sympy cannot simplify is unequal, whatever the reason.
        return False
    return bool(_simplify(tuple(gold.graph.nodes[: gold.root + 1]), gold.root) == simplified)


@lru_cache(maxsize=8192)
def _gold(tokens: tuple[str, ...]) -> _Gold:
    body = tokens[:-1]
    try:
        steps = _read(body)
    except _NotComparableError as error:
        raise _gold_error(tokens, str(error)) from None
    return _Gold(body, steps, _symbols(steps))


@lru_cache(maxsize=8192)
def _meaning(tokens: tuple[str, ...]) -> _Meaning:
    gold = _gold(tokens)
    graph = Graph()
    try:
        root = _build(graph, gold.steps, gold.symbols)
    except _NotComparableError as error:
        # The official script also fails on this program, but first it refuses predictions with other literals.
        return _Meaning(graph, -1, equals_itself=False, failure=str(error))
    try:
        _check_steps(gold.steps, gold.symbols)
        equals_itself = structure_error(gold.body) is None
    except _NotComparableError:
        equals_itself = False
    return _Meaning(graph, root, equals_itself)


def _gold_error(tokens: Sequence[str], reason: str) -> DataError:
    return DataError(f"the gold program {' '.join(tokens)!r} cannot be compared: {reason}")


def _read(body: Sequence[str]) -> list[_RawStep]:
    steps: list[_RawStep] = []
    for raw in split_steps(body):
        key = raw.strip()
        try:
            operation, first, second = split_step(key)
        except ValueError as error:
            raise _NotComparableError(str(error)) from None
        # The key keeps the "|" between a step and the one before it. So a table step that comes first and one that
        # comes later are two symbols, even if they read the same row.
        steps.append(_RawStep(key, operation, (first, second)))
    return steps


def _symbols(steps: Sequence[_RawStep]) -> dict[str, int]:
    symbols: dict[str, int] = {}
    for step in steps:
        names = [step.key] if step.reads_table else [name for name in step.arguments if "#" not in name]
        for name in names:
            symbols.setdefault(name, len(symbols))
    return symbols


def _checked(body: Sequence[str], symbols: dict[str, int]) -> list[_RawStep]:
    """Return the steps of a prediction that passes the official test."""
    if broken := structure_error(body):
        raise _NotComparableError(broken)
    steps = _read(body)
    _check_steps(steps, symbols)
    return steps


def _check_steps(steps: Sequence[_RawStep], symbols: Mapping[str, int]) -> None:
    """Run the official test: only literals of the gold program, and only references to earlier steps."""
    for index, step in enumerate(steps):
        if step.reads_table:
            if step.key not in symbols:
                raise _NotComparableError(f"{step.key!r} is not in the gold program")
            continue
        for name in step.arguments:
            if "#" in name:
                if _reference(name.strip("#")) >= index:
                    raise _NotComparableError(f"{name!r} is not an earlier step")
            elif name not in symbols:
                raise _NotComparableError(f"{name!r} is not in the gold program")


def _reference(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise _NotComparableError(f"{text!r} is not a step number") from None


def _build(graph: Graph, steps: Sequence[_RawStep], symbols: dict[str, int]) -> int:
    """Add the last step and all that it uses to a graph, and return its id; other steps are ignored."""
    if not steps:
        raise _NotComparableError("no step")
    ids: dict[int, int] = {}
    for index in sorted(_used(steps)):
        step = steps[index]
        if step.reads_table:
            ids[index] = graph.symbol(symbols[step.key])
            continue
        if step.operation not in ARITHMETIC_OPERATIONS:
            raise _NotComparableError(f"{step.operation!r} is not an operation")
        operands = [
            ids[_reference(name.replace("#", ""))] if "#" in name else graph.symbol(symbols[name])
            for name in step.arguments
        ]
        if any(graph.nodes[operand][0] == "greater" for operand in operands):
            # Neither sympy nor the official script takes a comparison as an operand.
            raise _NotComparableError("the result of greater is used in a calculation")
        ids[index] = graph.node(step.operation, operands[0], operands[1])
    return ids[len(steps) - 1]


def _used(steps: Sequence[_RawStep]) -> set[int]:
    used: set[int] = set()
    pending = [len(steps) - 1]
    while pending:
        index = pending.pop()
        if index in used:
            continue
        used.add(index)
        if steps[index].reads_table:
            continue
        for name in steps[index].arguments:
            if "#" not in name:
                continue
            reference = _reference(name.replace("#", ""))
            if not 0 <= reference < index:
                raise _NotComparableError(f"{name!r} is not an earlier step")
            pending.append(reference)
    return used


@lru_cache(maxsize=8192)
def _simplify(nodes: tuple[Node, ...], root: int) -> Basic:
    from sympy import simplify

    # The script calls simplify(text, evaluate=False). The option affects only what simplify calls. The text itself is
    # read with evaluation on, which is what Python's operators on symbols do.
    return simplify(build_sympy(nodes, root), evaluate=False)


def build_sympy(nodes: Sequence[Node], root: int) -> Basic:
    """Build the sympy expression of a node, with symbols a0, a1, ... as the official script names them."""
    from sympy import Symbol

    built: list[Basic] = []
    for operation, left, right in nodes[: root + 1]:
        if operation == "symbol":
            built.append(Symbol(f"a{left}"))
            continue
        first, second = built[left], built[right]
        if operation == "add":
            built.append(first + second)
        elif operation == "subtract":
            built.append(first - second)
        elif operation == "multiply":
            built.append(first * second)
        elif operation == "divide":
            built.append(first / second)
        elif operation == "exp":
            built.append(first**second)
        else:
            built.append(first > second)
    return built[root]
