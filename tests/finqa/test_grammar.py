"""The grammars as their real readers take them: llguidance for both notations, llama.cpp for GBNF."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import llguidance
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance.gbnf_to_lark import gbnf_to_lark

from finqa.test_program import programs
from fintune.errors import ModelError
from fintune.finqa.grammar import Grammar, can_be_named, general, outside, restricted, vocabulary
from fintune.finqa.parse import ParseError, parse
from fintune.finqa.program import Program
from support.official import needs_shared, split
from support.paths import ROOT

BYTES = llguidance.LLTokenizer("byte")
TABLE = [
    ["( in millions )", "2019", "2018 ( restated )"],
    ["net sales", "$ 5,829", "$ 5735"],
    ['"other" income, net', "-32 ( 32 )", "23.6 % ( 23.6 % )"],
    ["costs (a)", "5", "6"],
    ["notes", "see page 7", "8"],
    ['the "other"', "1", "2"],
]
TEXTS = ["a rate of ( 4.5 ) % fell by .25 in 2017-2018 .", "what is 1000 times as much?"]


class Reader:
    """One grammar in one notation."""

    def __init__(self, lark: str) -> None:
        self._start = llguidance.LLMatcher(BYTES, llguidance.LLMatcher.grammar_from_lark(lark))
        assert self._start.get_error() == ""

    def _read(self, text: str) -> tuple[bool, bool]:
        matcher = self._start.deep_copy()
        tokens = BYTES.tokenize_str(text)
        return matcher.try_consume_tokens(tokens) == len(tokens), matcher.is_accepting()

    def takes(self, text: str) -> bool:
        return all(self._read(text))

    def begins(self, text: str) -> bool:
        return self._read(text)[0]


def readers(grammar: Grammar) -> tuple[Reader, Reader]:
    return Reader(grammar.lark()), Reader(gbnf_to_lark(grammar.gbnf()))


GENERAL = readers(general())
WORDS = vocabulary(TABLE, TEXTS)
RESTRICTED = readers(restricted(WORDS))


@pytest.mark.parametrize("notation", GENERAL, ids=["lark", "gbnf"])
@settings(deadline=None)
@given(program=programs())
def test_general_accepts_what_the_parser_accepts(notation: Reader, program: Program) -> None:
    assert notation.takes(program.text)


PIECES = [
    "",
    "add(",
    "table_max(",
    "1",
    ".",
    "-",
    "%",
    "#0",
    "#1",
    "const_",
    "m",
    ", ",
    ",",
    " ",
    "a",
    "none",
    "(",
    ")",
]


@pytest.mark.parametrize("notation", GENERAL, ids=["lark", "gbnf"])
@settings(deadline=None)
@given(program=programs(max_steps=3), data=st.data())
def test_general_agrees_with_the_parser_on_changed_text(
    notation: Reader, program: Program, data: st.DataObject
) -> None:
    text = program.text
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(len(text), start + 3)))
    text = text[:start] + data.draw(st.sampled_from(PIECES)) + text[end:]
    try:
        parse(text)
        known = True
    except ParseError:
        known = False
    assert notation.takes(text) == known


@needs_shared
@pytest.mark.parametrize("notation", GENERAL, ids=["lark", "gbnf"])
@pytest.mark.parametrize("name", ["train", "dev"])
def test_general_accepts_every_gold_program(notation: Reader, name: str) -> None:
    assert [record["id"] for record in split(name) if not notation.takes(record["qa"]["program"])] == []


@needs_shared
@pytest.mark.parametrize("name", ["train", "dev"])
def test_restricted_accepts_every_gold_program(name: str) -> None:
    refused = []
    for k, record in enumerate(split(name)):
        texts = [*record["pre_text"], *record["post_text"], record["qa"]["question"]]
        words = vocabulary(record["table"], texts)
        reasons = outside(parse(record["qa"]["program"]), words)
        # Building a reader takes milliseconds: every tenth shows that the reasons are the grammar's own.
        if reasons or (k % 10 == 0 and not Reader(restricted(words).lark()).takes(record["qa"]["program"])):
            refused.append((record["id"], reasons))
    assert refused == []


def test_vocabulary_has_numbers_as_programs_write_them() -> None:
    assert WORDS.numbers >= {"5829", "5735", "-32", "32", "23.6%", "23.6", "-4.5", "4.5", ".25", "2017", "1000"}
    assert not WORDS.numbers & {"5,829", "$ 5829", "-5829", "5829%", "829", "23", "1,000"}


def test_vocabulary_has_readable_rows() -> None:
    assert WORDS.rows == {"net sales", 'the "other"'}


def test_vocabulary_takes_the_last_row_of_a_name() -> None:
    assert vocabulary([["a", "x"], ["a", "1"]], ()).rows == {"a"}
    assert vocabulary([["a", "1"], ["a", "x"]], ()).rows == set()


@pytest.mark.parametrize("notation", RESTRICTED, ids=["lark", "gbnf"])
@pytest.mark.parametrize(
    ("text", "known"),
    [
        ("subtract(5829, 5735), divide(#0, 5735)", True),
        ("add(-32, 23.6%), multiply(#0, const_100), exp(#1, #0)", True),
        ("table_average(net sales, none), greater(#0, 1000)", True),
        ('table_max(the "other", none)', True),
        ("add(5829, 5736)", False),
        ("add(#0, 5735)", False),
        ("add(1, 2), add(#0, #1)", False),
        ("add(1, const_11)", False),
        ("table_sum(notes, none)", False),
        ("table_sum(costs (a), none)", False),
        ("table_sum(net sales, 5735)", False),
        (", ".join(["add(1, 2)"] * 6), True),
        (", ".join(["add(1, 2)"] * 7), False),
    ],
)
def test_restricted_accepts_words_of_the_page_only(notation: Reader, text: str, known: bool) -> None:
    assert notation.takes(text) == known


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("add(-5829, 2)", "number with another sign"),
        ("add(77, 2)", "number that is not on the page"),
        ("add(2, const_11)", "constant"),
        ("table_max(notes, none)", "row"),
        (", ".join(["add(1, 2)"] * 7), "more steps"),
    ],
)
def test_outside_gives_the_reason(text: str, reason: str) -> None:
    assert [text.startswith(reason) for text in outside(parse(text), WORDS)] == [True]
    assert not RESTRICTED[0].takes(text)


@settings(deadline=None)
@given(st.text(st.sampled_from("ab, é(|#\t"), min_size=1, max_size=8))
def test_can_be_named_agrees_with_the_parser(name: str) -> None:
    try:
        read = parse(f"table_max({name}, none)").steps[0].first.text == name
    except ParseError:
        read = False
    assert can_be_named(name) == (read and "\t" not in name)


def test_can_be_named_is_fast_for_long_names() -> None:
    assert can_be_named(",a " * 20_000 + "a")
    assert not can_be_named(",a " * 20_000 + "(")


def test_restricted_of_an_empty_page_has_constants() -> None:
    notation = Reader(restricted(vocabulary([], [])).lark())
    assert notation.takes("add(const_1, const_2), divide(#0, const_m1)")
    assert not notation.begins("table_max(")


def test_docs_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "finqa.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "docs/finqa.md", "exec"), {})
    assert Path("finqa.gbnf").read_text() == general().gbnf()
    assert Reader(Path("page.lark").read_text()).takes("subtract(5829, 5735), divide(#0, 5735)")


def test_general_refuses_zero_steps() -> None:
    with pytest.raises(ValueError, match="at least one step"):
        general(0)


@pytest.fixture(scope="module")
def llama_cpp(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from fintune.export.gguf.writer import write_gguf
    from fintune.inference.llama_cpp import LlamaCppEngine
    from support.synthetic import write_folder

    folder = tmp_path_factory.mktemp("grammar")
    write_folder(folder / "model", num_layers=1)
    write_gguf(folder / "model", {"F16": folder / "m.gguf"})
    with (
        closing(LlamaCppEngine(folder / "m.gguf", context_tokens=512, parallel=1)) as engine,
        closing(engine._connect()) as line,
    ):

        def write(grammar: str, seed: int) -> Any:
            body = {"prompt": "the", "n_predict": 200, "seed": seed, "temperature": 2.0, "grammar": grammar}
            return engine._post(line, "/completion", body)

        yield write


@pytest.mark.parametrize(("grammar", "reader"), [(general(), GENERAL[0]), (restricted(WORDS), RESTRICTED[0])])
def test_llama_cpp_writes_programs_of_the_grammar(llama_cpp: Any, grammar: Grammar, reader: Reader) -> None:
    written = [llama_cpp(grammar.gbnf(), seed) for seed in range(8)]
    # Random weights may go on for ever, and be cut within a character.
    texts = [item["content"].rstrip("\ufffd") for item in written]
    assert [text for text in texts if not reader.begins(text)] == []
    assert len(set(texts)) > 1
    whole = [text for text, each in zip(texts, written, strict=True) if each["stop_type"] == "eos"]
    assert all(parse(text) for text in whole)


def test_llama_cpp_refuses_an_invalid_grammar(llama_cpp: Any) -> None:
    with pytest.raises(ModelError, match="grammar"):
        llama_cpp(general().gbnf().replace("arithmetic ::=", "other ::="), 0)
