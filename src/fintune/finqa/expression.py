"""Expressions of programs as graphs, and proofs that two expressions are equal or different without sympy.

Expressions that sympy builds as one object are one node. Expressions with different values at some point are different
functions. Everything else is left to sympy, see `fintune.finqa.equal`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TypeAlias

Node: TypeAlias = tuple[str, int, int]
"""Operation and the ids of its two operands; ("symbol", index, 0) for a leaf."""

PRIME = (1 << 61) - 1
MAX_BITS = 4096
"""Largest size of exact numbers. Squaring in each step doubles the size, so longer numbers count as unknown."""

_NUM_SIGN_POINTS = 6


@dataclass
class Graph:
    """Nodes of one or more expressions over numbered symbols; operands come before the nodes that use them.

    Attributes:
        nodes: The nodes by id.
        ids: The ids by canonical key.
    """

    nodes: list[Node] = field(default_factory=list)
    ids: dict[tuple[object, ...], int] = field(default_factory=dict)
    _factors: list[dict[int, int] | None] = field(default_factory=list)
    _terms: list[dict[int, int] | None] = field(default_factory=list)

    def copy(self) -> Graph:
        """Return a copy, to which nodes can be added without changing this graph."""
        return Graph(self.nodes.copy(), self.ids.copy(), self._factors.copy(), self._terms.copy())

    def symbol(self, index: int) -> int:
        """Return the id of a symbol."""
        return self._intern(("symbol", index), ("symbol", index, 0), None, None)

    def node(self, operation: str, left: int, right: int) -> int:
        """Return the id of an operation on two nodes.

        Operands of + and * may have either order. A sum of symbols in which nothing cancels is one node, whatever its
        order and parentheses. So are products and quotients of distinct symbols and of sums of distinct symbols. sympy
        builds each of these as one object.
        """
        sign = -1 if operation in {"subtract", "divide"} else 1
        if operation in {"add", "subtract"}:
            terms = _collected(self._as_sum(left), self._as_sum(right), sign)
            if terms is not None:
                return self._intern(("sum", *sorted(terms.items())), (operation, left, right), None, terms)
        elif operation in {"multiply", "divide"}:
            factors = _merged(self._as_product(left), self._as_product(right), sign)
            if factors is not None:
                return self._intern(("product", *sorted(factors.items())), (operation, left, right), factors, None)
        low, high = (min(left, right), max(left, right)) if operation in {"add", "multiply"} else (left, right)
        return self._intern((operation, low, high), (operation, left, right), None, None)

    def _intern(
        self, key: tuple[object, ...], node: Node, factors: dict[int, int] | None, terms: dict[int, int] | None
    ) -> int:
        if key not in self.ids:
            self.ids[key] = len(self.nodes)
            self.nodes.append(node)
            self._factors.append(factors)
            self._terms.append(terms)
        return self.ids[key]

    def _as_sum(self, node: int) -> dict[int, int] | None:
        return {node: 1} if self.nodes[node][0] == "symbol" else self._terms[node]

    def _as_product(self, node: int) -> dict[int, int] | None:
        # A multiple (a + a) is not a factor: sympy moves its 2, and then the order of the factors matters.
        terms = {node: 1} if self.nodes[node][0] == "symbol" else self._terms[node]
        is_factor = terms is not None and all(abs(number) == 1 for number in terms.values())
        return {node: 1} if is_factor else self._factors[node]


def _collected(left: dict[int, int] | None, right: dict[int, int] | None, sign: int) -> dict[int, int] | None:
    if left is None or right is None:
        return None
    terms = left.copy()
    for node, number in right.items():
        if terms.get(node, 0) * sign * number < 0:
            return None
        terms[node] = terms.get(node, 0) + sign * number
    return terms


def _merged(left: dict[int, int] | None, right: dict[int, int] | None, sign: int) -> dict[int, int] | None:
    if left is None or right is None or left.keys() & right.keys():
        return None
    return left | {node: sign * power for node, power in right.items()}


def differ(graph: Graph, left: int, right: int) -> bool:
    """Return whether two nodes are proved to be different functions; False means that there is no proof.

    Arithmetic expressions are compared by their values modulo a prime at one point of whole numbers. A power is
    computed if its exponent is a whole number there. Comparisons are compared by their truth at a few rational points.
    A comparison never equals an arithmetic expression.
    """
    kinds = graph.nodes[left][0] == "greater", graph.nodes[right][0] == "greater"
    if kinds[0] != kinds[1]:
        return True
    if kinds[0]:
        return any(_truth_differs(graph, left, right, point) for point in range(_NUM_SIGN_POINTS))
    values = _modular(graph.nodes)
    first, second = values[left], values[right]
    return first is not None and second is not None and first != second


def _modular(nodes: Sequence[Node]) -> list[int | None]:
    exponents = _exact(nodes) if any(node[0] == "exp" for node in nodes) else []
    values: list[int | None] = []
    for operation, left, right in nodes:
        if operation == "symbol":
            values.append(_coordinate(left))
            continue
        first, second = values[left], values[right]
        if first is None or second is None or operation == "greater":
            values.append(None)
        elif operation == "exp":
            values.append(_power(first, exponents[right]))
        elif operation == "divide":
            inverse = _power(second, -1)
            values.append(None if inverse is None else first * inverse % PRIME)
        else:
            values.append(int(_arithmetic(operation, first, second)) % PRIME)
    return values


def _coordinate(symbol: int) -> int:
    # Any set of whole numbers would do. It is fixed, so a verdict never depends on chance.
    return pow(7, 1009 + 613 * symbol, PRIME)


def _power(base: int, exponent: int | None) -> int | None:
    if exponent is None or base == 0:
        return None
    return pow(base, exponent, PRIME)


def _exact(nodes: Sequence[Node]) -> list[int | None]:
    """Return the values at the same point if they are whole numbers and not too long."""
    values: list[int | None] = []
    for operation, left, right in nodes:
        value: int | None = None
        if operation == "symbol":
            value = _coordinate(left)
        elif operation in {"add", "subtract", "multiply"}:
            first, second = values[left], values[right]
            if first is not None and second is not None:
                value = int(_arithmetic(operation, first, second))
        values.append(value if value is not None and value.bit_length() < MAX_BITS else None)
    return values


def _arithmetic(operation: str, first: Fraction | int, second: Fraction | int) -> Fraction | int:
    if operation == "add":
        return first + second
    if operation == "subtract":
        return first - second
    return first * second


def _truth_differs(graph: Graph, left: int, right: int, point: int) -> bool:
    values: list[Fraction | None] = []
    for operation, first, second in graph.nodes:
        value: Fraction | None = None
        if operation == "symbol":
            value = Fraction(_coordinate(first + 101 * point) % 2001 - 1000, 7)
        elif operation not in {"exp", "greater"}:
            one, other = values[first], values[second]
            if one is not None and other is not None:
                if operation != "divide":
                    value = Fraction(_arithmetic(operation, one, other))
                elif other:
                    value = one / other
        if value is not None and max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
            value = None
        values.append(value)
    truths = [_truth(graph.nodes[node], values) for node in (left, right)]
    return None not in truths and truths[0] != truths[1]


def _truth(node: Node, values: Sequence[Fraction | None]) -> bool | None:
    first, second = values[node[1]], values[node[2]]
    return None if first is None or second is None else first > second
