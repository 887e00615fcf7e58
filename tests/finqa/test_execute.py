import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finqa.test_program import programs
from fintune.finqa.execute import Execution, execute, run_program
from fintune.finqa.official import cell_number, str_to_num
from fintune.finqa.program import Program, tokenize
from fintune.finqa.trace import trace
from support.official import needs_shared, split, vectors

TABLE = (
    ("", "2019", "2018"),
    ("revenue", "$ 1,200", "( 13 )"),
    ("sales", "$ 100.5", "50"),
    ("loss", "-32 ( 32 )", "23.6% ( 23.6 % )"),
    ("sales", "7", "9"),
    ("empty", "", "1"),
    ("bare",),
)


@needs_shared
def test_execute_agrees_with_all_vectors() -> None:
    gold = {record["id"]: record for record in split("dev")}
    rows = vectors()
    assert len(rows) == 10_113
    for row in rows:
        record = gold[row["id"]]
        execution = execute(row["tokens"], record["table"])
        verdict = (
            execution.invalid,
            execution.result,
            not execution.invalid and execution.result == record["qa"]["exe_ans"],
        )
        assert verdict == (bool(row["invalid"]), row["result"], row["exe_correct"]), row


@needs_shared
@pytest.mark.parametrize("name", ["train", "dev"])
def test_execute_gives_the_gold_answers(name: str) -> None:
    for record in split(name):
        execution = execute(tokenize(record["qa"]["program"]), record["table"])
        assert not execution.invalid
        assert execution.result == record["qa"]["exe_ans"]


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("divide(1, 3)", 0.33333),
        ("add(1_000, 1e3)", 2000.0),
        ("multiply(const_m1, 23.6%)", -0.236),
        ("greater(2, 1)", "yes"),
        ("greater(1, 1), greater(#0, 2), add(1, 1)", None),
        ("greater(2, 1), greater(1, 2), greater(#0, #1)", "yes"),
        ("table_sum(sales, none)", 16.0),
        ("table_average(loss, none)", -15.882),
        ("table_max( , none)", 2019.0),
        ("table_max(loss, none), table_min(#0, none)", -32.0),
        ("table_sum(bare, none)", 0),
        ("add(#0, 1)", None),
        ("table_max(nothing, none)", None),
        ("table_max(revenue, none)", None),
        ("table_max(empty, none)", None),
        ("table_average(bare, none)", None),
        ("table_max(#0, none)", None),
        ("exp(-8, 0.5)", None),
        ("exp(10, 400)", None),
        ("divide(1, 0)", None),
        ("add($5, 1)", None),
        ("add(const_x, 1)", None),
    ],
)
def test_execute_gives_the_official_result(text: str, result: float | str | None) -> None:
    execution = execute(tokenize(text), TABLE)
    if result is None:
        assert execution.invalid
    else:
        assert (execution.invalid, execution.result) == (False, result)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([], (False, "n/a")),
        (["EOF"], (False, "n/a")),
        (["add(", "1", "2", ")"], (False, "n/a")),
        (["add(", "1", "2", ")", "divide(", "#0", "2", ")"], (False, 3.0)),
        (["add(", "1", "2", ")", "divide(", "#0", "EOF"], (False, 3.0)),
        (["add(", "1", "2", ")", "EOF", "EOF"], (True, "n/a")),
        (["add", "1", "2", ")", "EOF"], (True, "n/a")),
        (["add(", "1", "2", ")", "divide(", "1", "0", ")", "EOF"], (True, 3.0)),
        (["add(", "inf", "2", ")", "EOF"], (False, "inf")),
    ],
)
def test_execute_handles_broken_tokens_officially(tokens: list[str], expected: tuple[bool, float | str]) -> None:
    execution = execute(tokens, TABLE)
    assert (execution.invalid, execution.result) == expected


def test_execute_rounds_after_bad_numbers_only() -> None:
    thirds = ["divide(", "1", "3", ")"]
    assert execute([*thirds, "add(", "x", "1", ")", "EOF"], TABLE).result == 0.33333
    assert execute([*thirds, "add(", "#7", "1", ")", "EOF"], TABLE).result == 1 / 3


def test_execute_keeps_the_unrounded_number() -> None:
    assert execute(tokenize("divide(1, 3)"), TABLE) == Execution(False, 0.33333, unrounded=1 / 3)


@pytest.mark.parametrize(
    ("text", "number"),
    [("1,234", 1234.0), (" 7 ", 7.0), ("5%", 0.05), ("const_100", 100.0), ("$5", None), ("5%x", None)],
)
def test_str_to_num_reads_officially(text: str, number: float | None) -> None:
    assert str_to_num(text) == number


def test_str_to_num_raises_for_empty_constants() -> None:
    with pytest.raises(ValueError, match="x"):
        str_to_num("const_x")
    assert cell_number("$ -32 ( 32 )") == -32


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("foo(1, 2)", "token 1, 'foo(', is not an operation"),
        ("divide(3, 0)", "step 1: division by zero"),
        ("add(1, 2), add(#0, x)", "step 2: 'x' is not a number"),
        ("add(#1, 2)", "step 1: '#1' is not an earlier step"),
        ("table_max(nothing, none)", "step 1: the table has no row 'nothing'"),
        ("table_max(empty, none)", "step 1: cell 1 of row 'empty' is not a number: ''"),
        ("greater(1, 2), add(#0, 1)", "step 2: add cannot take 'no' and 1.0"),
        ("", "no complete step"),
    ],
)
def test_run_program_gives_the_reason_of_a_failure(text: str, reason: str) -> None:
    assert run_program(tokenize(text), TABLE).reason == reason


@given(
    programs(), st.lists(st.lists(st.sampled_from(["a", "b", "1", "2 ( 3 )", "", "const_x"]), max_size=4), max_size=4)
)
def test_trace_agrees_with_execute(program: Program, table: list[list[str]]) -> None:
    execution = execute(program.tokens, table)
    traced = trace(program.tokens, table, ["5 and 2 %", "none"])
    assert traced.execution == execution
    assert (traced.reason is None) == (not execution.invalid)
    if not execution.invalid:
        assert len(traced.steps) == len(program.steps)
        assert all(step.reason is None for step in traced.steps)
        last = traced.steps[-1].value
        if isinstance(last, float) and math.isfinite(last):
            assert round(last, 5) == execution.result


@given(st.lists(st.text(st.sampled_from("add(#0)|1- %_,tblemx")), max_size=9), st.lists(st.lists(st.text(max_size=4))))
def test_execute_never_raises(tokens: list[str], table: list[list[str]]) -> None:
    execution = execute(tokens, table)
    assert execution == run_program(tokens, table).execution
    assert execution == trace(tokens, table).execution


def test_trace_locates_operands() -> None:
    table = (("", "2019"), ("sales", "$ 100.5"), ("loss", "( 13 )"))
    sentences = ("sales were 100.5 .", "tax was 21 % in 2019 .")
    program = "subtract(100.5, -13), multiply(#0, 21%), divide(#1, const_100), add(#2, 77), table_sum(sales, none)"
    steps = trace(tokenize(program), table, sentences).steps
    first, second = steps[0].operands
    assert (first.kind, first.cells, first.sentences) == ("cell", ((1, 1),), (0,))
    assert (second.kind, second.cells, second.value) == ("cell", ((2, 1),), -13.0)
    assert (steps[1].operands[0].kind, steps[1].operands[0].step, steps[1].operands[0].value) == ("step", 0, 113.5)
    assert (steps[1].operands[1].kind, steps[1].operands[1].sentences, steps[1].operands[1].value) == (
        "sentence",
        (1,),
        0.21,
    )
    assert steps[2].operands[1].kind == "constant"
    assert steps[3].operands[1].kind == "elsewhere"
    assert (steps[4].operands[0].kind, steps[4].operands[0].cells) == ("row", ((1, 1),))


def test_trace_keeps_operands_of_a_failed_step() -> None:
    traced = trace(tokenize("add(1, 2), divide(#0, x)"), TABLE)
    assert traced.steps[1].operands[0].value == 3.0
    assert traced.steps[1].operands[1].value is None
    assert traced.steps[1].reason == "'x' is not a number"
