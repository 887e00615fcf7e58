import pytest
from hypothesis import given
from hypothesis import strategies as st

from fintune.errors import FintuneError
from fintune.finqa.parse import ParseError, parse, parse_nested, parse_tokens
from fintune.finqa.program import (
    CONSTANTS,
    MAX_NESTED_CHARS,
    OPERATIONS,
    TABLE_OPERATIONS,
    Constant,
    Nothing,
    Number,
    Program,
    ProgramStep,
    Reference,
    RowName,
    extract_program,
    tokenize,
    untokenize,
)
from support.official import needs_shared, split

NUMBERS = st.builds(
    "{}{}{}{}".format, *map(st.sampled_from, (["", "-"], ["0", "57", "5735"], ["", ".", ".04"], ["", "%"]))
).map(Number)
ROWS = st.text(st.sampled_from("abz é&'-.0:$"), min_size=1).filter(lambda name: name == name.strip()).map(RowName)


@st.composite
def programs(draw: st.DrawFn, max_steps: int = 6) -> Program:
    steps: list[ProgramStep] = []
    for number in range(draw(st.integers(1, max_steps))):
        operation = draw(st.sampled_from(OPERATIONS))
        if operation in TABLE_OPERATIONS:
            steps.append(ProgramStep(operation, draw(ROWS), Nothing()))
            continue
        kinds = [NUMBERS, st.sampled_from(CONSTANTS).map(Constant)]
        if number:
            kinds.append(st.integers(0, number - 1).map(Reference))
        steps.append(ProgramStep(operation, draw(st.one_of(kinds)), draw(st.one_of(kinds))))
    return Program(tuple(steps))


@given(programs())
def test_every_form_leads_back_to_the_program(program: Program) -> None:
    assert parse(program.text) == program
    assert parse_tokens(program.tokens) == program
    assert tokenize(program.text) == program.tokens
    assert untokenize(program.tokens) == program.text
    assert parse_nested(program.nested).nested == program.nested


@needs_shared
@pytest.mark.parametrize("name", ["train", "dev"])
def test_all_gold_programs_round_trip(name: str) -> None:
    for record in split(name):
        text, nested = record["qa"]["program"], record["qa"]["program_re"]
        program = parse(text)
        assert (program.text, program.tokens, program.nested) == (text, tokenize(text), nested)
        assert parse_tokens(program.tokens) == program
        assert parse_nested(nested).nested == nested


def test_the_tree_is_typed() -> None:
    assert parse("table_max(net sales, none), multiply(#0, 5.2%), exp(#1, const_m1)") == Program(
        (
            ProgramStep("table_max", RowName("net sales"), Nothing()),
            ProgramStep("multiply", Reference(0), Number("5.2%")),
            ProgramStep("exp", Reference(1), Constant("const_m1")),
        )
    )


@pytest.mark.parametrize(
    ("text", "position", "expected"),
    [
        ("", 0, "one of add"),
        ("sum(1, 2)", 0, "one of add"),
        ("Add(1, 2)", 0, "one of add"),
        ("add(1, 2", 8, "')'"),
        ("add(1, 2))", 9, "another step, or the end"),
        ("add(1, 2) ", 9, "another step, or the end"),
        ("add(1, 2), ", 11, "one of add"),
        ("add(1,2)", 4, "a number"),
        ("add($5, 2)", 4, "a number"),
        ("add(1e3, 2)", 4, "a number"),
        ("add(1, none)", 7, "a number"),
        ("add(1, 2, 3)", 8, "')'"),
        ("add(#0, 2)", 4, "none yet"),
        ("add(1, 2), add(#0, #1)", 19, "#0 to #0"),
        ("add(1, 2), add(#00, 1)", 15, "a number"),
        ("add(1, 2), add(# 0, 1)", 15, "a number"),
        ("table_max(a, b)", 13, "'none'"),
        ("table_max(a (b), none)", 10, "without parentheses"),
        ("table_max(, none)", 10, "table row"),
        ("add(1, 2), table_max(#0, none)", 21, "table row"),
    ],
)
def test_a_text_outside_the_language_is_refused_at_its_place(text: str, position: int, expected: str) -> None:
    with pytest.raises(ParseError, match=f"at character {position} expected") as caught:
        parse(text)
    assert caught.value.position == position
    assert expected in caught.value.expected


def test_a_parse_error_is_a_users_mistake_and_a_value_error() -> None:
    with pytest.raises(ParseError) as caught:
        parse("add(1, x)")
    assert isinstance(caught.value, FintuneError)
    assert isinstance(caught.value, ValueError)
    assert "found 'x)'" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "position"),
    [
        ("", 0),
        ("5", 0),
        ("add(add(1, 2), 3", 16),
        ("add(#0, 2)", 4),
        ("add(1, 2) x", 9),
        ("table_max(add(1, 2), none)", 19),
        ("table_max(a, add(1, 2))", 22),
    ],
)
def test_a_nested_text_outside_the_language_is_refused_at_its_place(text: str, position: int) -> None:
    with pytest.raises(ParseError) as caught:
        parse_nested(text)
    assert caught.value.position == position


def test_nesting_may_be_deeper_than_python_calls() -> None:
    text = "add(" * 5000 + "1, 2)" + ", 3)" * 4999
    assert len(parse_nested(text).steps) == 5000


def test_a_step_used_twice_stays_one_step_when_nested_and_back() -> None:
    program = parse("add(1, 2), multiply(#0, #0)")
    assert program.nested == "multiply(add(1, 2), add(1, 2))"
    assert parse_nested(program.nested) == program


def test_a_nested_form_that_doubles_with_each_step_is_refused() -> None:
    doubling = Program(
        (
            ProgramStep("add", Number("1"), Number("2")),
            *(ProgramStep("add", Reference(n), Reference(n)) for n in range(60)),
        )
    )
    with pytest.raises(FintuneError, match=str(MAX_NESTED_CHARS)):
        _ = doubling.nested


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("", ["EOF"]),
        ("add(1,2)", ["add(", "1,2", ")", "EOF"]),
        ("add( 1 , 2 )", ["add(", " 1 ", "2 ", ")", "EOF"]),
        ("table_max(a (b), none)", ["table_max(", "a (", "b", ")", "none", ")", "EOF"]),
        ("table_max(a, b, none)", ["table_max(", "a", "b", "none", ")", "EOF"]),
        ("((x))", ["(", "(", "x", ")", ")", "EOF"]),
        ("add(1, 2),  add(#0, 1)", ["add(", "1", "2", ")", " add(", "#0", "1", ")", "EOF"]),
    ],
)
def test_any_text_is_cut_as_the_official_script_cuts_it(text: str, tokens: list[str]) -> None:
    assert tokenize(text) == tokens


@given(st.text(st.sampled_from("a1(), #\n")))
def test_cutting_agrees_with_the_rule_spelled_out(text: str) -> None:
    expected: list[str] = []
    for piece in text.split(", "):
        word = ""
        for character in piece:
            if character == ")" and word:
                expected.append(word)
                word = ""
            word += character
            if character in "()":
                expected.append(word)
                word = ""
        expected += [word] if word else []
    assert tokenize(text) == [*expected, "EOF"]


@pytest.mark.parametrize(
    "completion",
    [
        "add(1, 2)",
        "  add(1, 2)\n",
        "\n\nadd(1, 2)\nThe answer is 3.",
        "add(1, 2).",
        "`add(1, 2)`",
        "```\nadd(1, 2)\n```",
        "```text\nadd(1, 2).\n```\n",
        "add(1, 2)\r\n",
    ],
)
def test_a_program_is_read_from_what_commonly_surrounds_it(completion: str) -> None:
    assert extract_program(completion) == "add(1, 2)"


@pytest.mark.parametrize("program", ["add(1, 2", "add(1,2)", "Answer: add(1, 2)", "add(1, 2.", "divide(a, b))"])
def test_a_program_is_never_mended(program: str) -> None:
    assert extract_program(f"{program}\n") == program


def test_an_empty_completion_holds_no_program() -> None:
    assert extract_program(" \n```\n") == ""
