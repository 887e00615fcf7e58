import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fintune.errors import DataError
from fintune.finqa import equal as module
from fintune.finqa.equal import build_sympy, equal_program
from fintune.finqa.expression import Graph, differ
from fintune.finqa.program import tokenize
from support import official
from support.official import Steps, needs_shared, split, vectors

ARITHMETIC = ("add", "subtract", "multiply", "divide", "exp")


@st.composite
def steps(draw: st.DrawFn, max_steps: int = 4) -> Steps:
    """Steps over few literals, so that two draws often mean one function; greater only as the last."""
    number = draw(st.integers(1, max_steps))
    made: Steps = []
    for index in range(number):
        names = ("add", "add", "subtract", "subtract", "multiply", "multiply", "divide", "divide", "exp")
        name = draw(st.sampled_from((*names, "greater") if index == number - 1 else names))
        literals = ["x", "y", "z"]
        arguments = st.sampled_from([*literals, *(f"#{n}" for n in range(index))])
        made.append((name, draw(arguments), draw(arguments)))
    return made


@needs_shared
def test_equal_program_agrees_with_all_vectors() -> None:
    gold = {record["id"]: tokenize(record["qa"]["program"]) for record in split("dev")}
    for row in vectors():
        assert equal_program(gold[row["id"]], row["tokens"]) == row["program_correct"], row


@needs_shared
def test_equal_program_needs_no_sympy_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("sympy was asked")

    monkeypatch.setattr(module, "_simplify", refuse)
    for record in [*split("train"), *split("dev")]:
        assert equal_program(tokenize(record["qa"]["program"]), tokenize(record["qa"]["program"]))


@pytest.mark.parametrize(
    "predicted",
    ["add(x, y), add(#0, x)", "add(x, x), add(y, #0)", "add(y, x), add(x, #0)"],
)
def test_equal_program_needs_no_sympy_for_repeated_terms(predicted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_simplify", lambda *_: pytest.fail("sympy was asked"))
    assert equal_program(tokenize("add(x, x), add(#0, y)"), tokenize(predicted))
    assert not equal_program(tokenize("add(x, x), add(#0, y)"), tokenize(f"{predicted}, add(#1, y)"))


@given(steps(), steps())
@settings(max_examples=60, deadline=None)
def test_equal_program_agrees_with_sympy(gold: Steps, predicted: Steps) -> None:
    assert equal_program(official.tokens(gold), official.tokens(predicted)) == official.equal(gold, predicted)


@pytest.mark.parametrize(
    ("gold", "predicted", "equal"),
    [
        ("add(1, 2)", "add(2, 1)", True),
        ("subtract(1, 2)", "subtract(2, 1)", False),
        ("add(1, 2), divide(#0, 3)", "divide(1, 3), divide(2, 3), add(#0, #1)", True),
        ("subtract(1, 2), divide(#0, 2)", "divide(1, 2), divide(2, 2), subtract(#0, #1)", True),
        ("add(1, 2), add(#0, 3)", "add(3, 2), add(1, #0)", True),
        ("multiply(1, 2), divide(#0, 3)", "divide(2, 3), multiply(1, #0)", True),
        ("add(1, 2)", "multiply(1, 2), add(1, 2)", True),
        ("add(5, 1)", "add(5.0, 1)", False),
        ("divide(5, 100)", "divide(5, const_100)", False),
        ("multiply(2, 2)", "exp(2, 2)", False),
        ("greater(1, 2)", "greater(2, 1)", False),
        ("greater(1, 2)", "subtract(1, 2)", False),
        ("greater(1, 2)", "greater(1, 2), add(#0, 1)", False),
        ("add(1, 2)", "add(#0, 1)", False),
        ("add(1, 2)", "add(#-1, 1)", False),
        ("divide(1, 2)", "subtract(1, 1), divide(2, #0)", False),
        ("table_max(a, none)", "table_max(a, none)", True),
        ("table_max(a, none)", "table_max(a, const_1)", False),
        ("table_max(a, none), add(#0, 1)", "add(1, 1), table_max(a, none), add(#1, 1)", False),
        ("add(1, 2)", "", False),
        ("exp(1, 2), multiply(#0, 1)", "exp(1, 2), multiply(1, #0)", True),
        ("exp(1, 2)", "divide(1, 2), exp(1, #0)", False),
    ],
)
def test_equal_program_known_verdicts(gold: str, predicted: str, equal: bool) -> None:
    assert equal_program(tokenize(gold), tokenize(predicted)) is equal


@pytest.mark.parametrize("operation", ARITHMETIC)
@pytest.mark.parametrize("arguments", [("#0", "x"), ("x", "#0"), ("#0", "#0")])
@pytest.mark.parametrize("comparison", [("x", "y"), ("x", "x")])
def test_equal_program_refuses_comparison_operands(
    operation: str, arguments: tuple[str, str], comparison: tuple[str, str]
) -> None:
    gold: Steps = [("add", "x", "y")]
    predicted: Steps = [("greater", *comparison), (operation, *arguments)]
    assert official.equal(gold, predicted) is False
    with pytest.raises(TypeError):
        graph = Graph()
        x, y = graph.symbol(0), graph.symbol(1)
        compared = graph.node("greater", x, y if comparison[1] == "y" else x)
        first, second = (compared if argument == "#0" else x for argument in arguments)
        build_sympy(graph.nodes, graph.node(operation, first, second))


@given(steps(max_steps=5), steps(max_steps=5))
@settings(max_examples=200, deadline=None)
def test_graph_node_is_one_sympy_object(first: Steps, second: Steps) -> None:
    graph = Graph()
    left, right = _node(graph, first), _node(graph, second)
    if left == right:
        # Built apart, each from its own nodes: the shared ones would hide a difference.
        one, other = Graph(), Graph()
        assert build_sympy(one.nodes, _node(one, first)) == build_sympy(other.nodes, _node(other, second))
        assert not differ(graph, left, right)


def _node(graph: Graph, made: Steps) -> int:
    symbols = {name: graph.symbol(index) for index, name in enumerate("xyz")}
    ids: list[int] = []
    for name, *arguments in made:
        first, second = (ids[int(a[1:])] if a.startswith("#") else symbols[a] for a in arguments)
        ids.append(graph.node(name, first, second))
    return ids[-1]


def test_equal_program_never_evaluates_code(monkeypatch: pytest.MonkeyPatch) -> None:
    import sympy

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a text was given to sympy")

    monkeypatch.setattr(sympy.parsing.sympy_parser, "eval_expr", refuse)
    module._simplify.cache_clear()
    evil = "[].append.__self__"
    assert equal_program(["add(", evil, "2", ")", "EOF"], ["add(", evil, "2", ")", "EOF"])
    distributed = ["divide(", evil, "2", ")", "divide(", "2", "2", ")", "add(", "#0", "#1", ")", "EOF"]
    assert equal_program(["add(", evil, "2", ")", "divide(", "#0", "2", ")", "EOF"], distributed)


def test_differ_is_fast_for_chains_of_squares() -> None:
    squares = ["multiply(", "x", "x", ")", *(t for n in range(60) for t in ("multiply(", f"#{n}", f"#{n}", ")")), "EOF"]
    assert equal_program(["add(", "x", "y", ")", "EOF"], squares) is False
    powers = ["exp(", "x", "y", ")", *(t for n in range(8) for t in ("exp(", "x", f"#{n}", ")")), "EOF"]
    assert equal_program(["exp(", "x", "y", ")", "EOF"], powers) is False


@pytest.mark.parametrize(
    "gold", [["EOF"], ["add(", "1", ")", "EOF"], ["add(", "#3", "1", ")", "EOF"], ["foo(", "1", "2", ")", "EOF"]]
)
def test_equal_program_refuses_a_broken_gold_program(gold: list[str]) -> None:
    with pytest.raises(DataError, match="cannot be compared"):
        equal_program(gold, ["EOF"])
