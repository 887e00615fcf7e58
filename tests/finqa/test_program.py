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
def test_every_form_parses_back_to_the_program(program: Program) -> None:
    assert parse(program.text) == program
    assert parse_tokens(program.tokens) == program
    assert tokenize(program.text) == program.tokens
    assert untokenize(program.tokens) == program.text
    assert parse_nested(program.nested).nested == program.nested


@needs_shared
@pytest.mark.parametrize("name", ["train", "dev"])
def test_parse_round_trips_gold_programs(name: str) -> None:
    for record in split(name):
        text, nested = record["qa"]["program"], record["qa"]["program_re"]
        program = parse(text)
        assert (program.text, program.tokens, program.nested) == (text, tokenize(text), nested)
        assert parse_tokens(program.tokens) == program
        assert parse_nested(nested).nested == nested


def test_parse_gives_a_typed_tree() -> None:
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
def test_parse_error_has_position_and_expectation(text: str, position: int, expected: str) -> None:
    with pytest.raises(ParseError, match=f"at character {position} expected") as caught:
        parse(text)
    assert caught.value.position == position
    assert expected in caught.value.expected


def test_parse_error_is_a_value_error() -> None:
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
def test_parse_nested_error_has_the_position(text: str, position: int) -> None:
    with pytest.raises(ParseError) as caught:
        parse_nested(text)
    assert caught.value.position == position


def test_parse_nested_reads_deep_nesting() -> None:
    text = "add(" * 5000 + "1, 2)" + ", 3)" * 4999
    assert len(parse_nested(text).steps) == 5000


def test_parse_nested_merges_repeated_steps() -> None:
    program = parse("add(1, 2), multiply(#0, #0)")
    assert program.nested == "multiply(add(1, 2), add(1, 2))"
    assert parse_nested(program.nested) == program


def test_nested_refuses_exponential_length() -> None:
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
def test_tokenize_splits_officially(text: str, tokens: list[str]) -> None:
    assert tokenize(text) == tokens


@given(st.text(st.sampled_from("a1(), #\n")))
def test_tokenize_agrees_with_the_written_rule(text: str) -> None:
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
def test_extract_program_drops_surroundings(completion: str) -> None:
    assert extract_program(completion) == "add(1, 2)"


@pytest.mark.parametrize("program", ["add(1, 2", "add(1,2)", "Answer: add(1, 2)", "add(1, 2.", "divide(a, b))"])
def test_extract_program_never_repairs(program: str) -> None:
    assert extract_program(f"{program}\n") == program


def test_extract_program_of_empty_text() -> None:
    assert extract_program(" \n```\n") == ""
