from __future__ import annotations

import gzip
import json

import pytest

from fintune.data.page_file import read_page, sentences
from fintune.errors import DataError
from fintune.finqa.execute import execute
from fintune.finqa.program import tokenize

TABLE = (("in millions", "2019", "2018"), ("net revenue", "$ 5829", "5735"), ("net loss", "-5.2 ( 5.2 )", "-1 ( 1 )"))

CSV = 'in millions,2019,2018\nnet revenue,"$ 5,829","5,735"\n\nnet loss,(5.2),(1)\n'
MARKDOWN = """# Annual *report*

The company grew. Cash was [$ 55](note.html) in **2019**.

| in millions | 2019 | 2018 |
|:------------|-----:|:----:|
| net revenue | $ 5,829 | 5,735 |
| net loss | (5.2) | (1)

- See note 2.
"""
HTML = """<html><head><title>no text</title><style>td {a: b}</style></head><body>
<table><tr><td><p>The company grew. Cash was $&nbsp;55 in <b>2019</b>.</p></td></tr></table>
<TABLE><tr><th>in millions<th colspan=2>2019<th colspan=3>2018
<tr><td>net revenue</td><td>$</td><td>5,829</td><td></td><td>5,735</td><td></td></tr>
<tr><td>net loss</td><td></td><td>(5.2</td><td>)</td><td>(1</td><td>)</td></tr></TABLE>
<script>if (a < b) {}</script><p>See note 2.</p></body></html>"""


def read(tmp_path, name, content, **options):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_page(path, "  what was  the change? ", **options).record


@pytest.mark.parametrize("name", ["page.csv", "page.tsv", "semicolon.csv"])
def test_a_table_alone_is_a_page(tmp_path, name):
    if name == "page.tsv":
        content = CSV.replace('"', "").replace("5,", "5;").replace(",", "\t").replace("5;", "5,")
    else:
        content = (
            CSV if name == "page.csv" else 'in millions;2019;2018\nnet revenue;"$ 5,829";5,735\nnet loss;(5.2);(1)'
        )
    page = read(tmp_path, name, content, text="The company grew. Cash was $ 55 in 2019.")
    assert page.table == TABLE
    assert page.pre_text == ("The company grew.", "Cash was $ 55 in 2019.")
    assert page.qa.question == "what was the change?"


@pytest.mark.parametrize(
    ("name", "content"), [("p.md", MARKDOWN), ("p.html", HTML), ("page", MARKDOWN), ("page", HTML)]
)
def test_a_page_with_one_table_has_text_before_and_after(tmp_path, name, content):
    page = read(tmp_path, name, content)
    assert page.table == TABLE
    assert page.pre_text[-2:] == ("The company grew.", "Cash was $ 55 in 2019.")
    assert page.pre_text[:-2] in ((), ("Annual report",))
    assert page.post_text == ("See note 2.",)


def test_a_loss_in_brackets_is_a_negative_number(tmp_path):
    table = read(tmp_path, "p.csv", CSV).table
    assert execute(tokenize("table_sum(net loss, none)"), table).result == -6.2


@pytest.mark.parametrize(
    ("cell", "read_as"),
    [
        ("\u20135.2", "-5.2"),
        ("\u20125.2", "-5.2"),
        ("\ufe635.2", "-5.2"),
        ("\u22125.2", "-5.2"),
        ("\u2013.5", "-.5"),
        ("\u2013$5.2", "-$5.2"),
        ("$ \u20135.2", "$ -5.2"),
        ("\u2013 1,250", "-1250"),
        ("\u2013", "\u2013"),
        ("\u2014", "\u2014"),
        ("2018\u20132019", "2018\u20132019"),
        ("5 \u2013 7%", "5 \u2013 7%"),
    ],
)
def test_a_dash_before_a_number_is_a_minus(tmp_path, cell, read_as):
    assert read(tmp_path, "p.csv", f'a,2019\nb,"{cell}"\nc,1\n').table[1] == ("b", read_as)


@pytest.mark.parametrize("mark", ["*", "**", "†", "(a)", " (1)", "[2]", " (a) (b)", "¹"])
def test_a_footnote_mark_behind_a_loss_is_left_out(tmp_path, mark):
    page = read(tmp_path, "p.csv", f'a,2019,2018\nb,"(1,250.5){mark}",$(3.1)%{mark}\nc,(5),text{mark}\n')
    assert page.table[1:] == (("b", "-1250.5 ( 1250.5 )", "$-3.1% ( $3.1% )"), ("c", "-5 ( 5 )", f"text{mark}"))


def test_a_finqa_record_keeps_its_page_and_gets_the_question(tmp_path):
    record = {"id": "A/2019/page_1.pdf-1", "pre_text": ["a ."], "post_text": [], "table": [["x", "1"], ["y", "2"]]}
    full = {**record, "qa": {"question": "other?", "program": "add(1, 2)", "exe_ans": 3.0}}
    for content in (record, full, [full]):
        page = read(tmp_path, "p.json", json.dumps(content))
        assert (page.id, page.pre_text, page.table) == (record["id"], ("a .",), (("x", "1"), ("y", "2")))
        assert (page.qa.question, page.qa.program) == ("what was the change?", "")
    two = json.dumps([full, {**full, "id": "B"}])
    assert read(tmp_path, "p.json", two, record_id="B").id == "B"
    with pytest.raises(DataError, match="holds 2 records: say which one with --id"):
        read(tmp_path, "p.json", two)
    with pytest.raises(DataError, match="id C: no record has this id"):
        read(tmp_path, "p.json", two, record_id="C")


def test_a_record_whose_id_is_a_number_is_chosen_by_it(tmp_path):
    rows = [{"id": each, "table": [["a", "2019"], ["R", str(each)]]} for each in (4, 5)]
    page = read(tmp_path, "p.json", json.dumps([*rows, {"table": []}]), record_id="5")
    assert (page.id, page.table[1]) == ("5", ("R", "5"))
    with pytest.raises(DataError, match="id None: no record has this id"):
        read(tmp_path, "p.json", json.dumps([*rows, {"table": []}]), record_id="None")


def test_rows_of_unequal_length_are_filled_up(tmp_path):
    assert read(tmp_path, "p.csv", "a,2019,2018\nb,1\n").table == (("a", "2019", "2018"), ("b", "1", ""))


def test_a_packed_file_is_read(tmp_path):
    assert read(tmp_path, "p.csv.gz", gzip.compress(CSV.encode())).table == TABLE


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.md", "# Only text\n\nNo table | here.", "p.md: holds no table"),
        ("p.html", "<p>5,829</p>", "p.html: holds no table"),
        ("p.html", "<table><tr><td>menu</td></tr></table>", "p.html: holds no table"),
        ("p.csv", "only one column\n1\n2\n", "p.csv: holds no table"),
        ("p.csv", 'a,b\n"1,2\n', "p.csv: no CSV table"),
        ("p.json", '{"pre_text": ["x"]}', "p.json: holds no table: a FinQA record has"),
        (
            "p.json",
            '{"table": [["a", 2019.5]]}',
            r"p.json: is no FinQA record: row 1, column 2 of its table is a number \(2019.5\): "
            'write every cell as text: "2019.5"',
        ),
        (
            "p.json",
            '{"table": [["a"], ["R", null]]}',
            r'row 2, column 2 of its table is no text \(null\): write every cell as text: ""',
        ),
        ("p.json", '{"table": "| a |"}', "is no FinQA record: table is no list of rows: write it as"),
        ("p.json", '{"table": [["a"]], "pre_text": "One."}', "is no FinQA record: pre_text is no list of texts"),
        ("p.json", '{"table": ', "p.json: not JSON"),
        (
            "p.json",
            '[{"table": {}, "questions": []}, {"table": {}}]',
            "is no FinQA file: none of its 2 rows is a record",
        ),
        ("p.json", "[" * 100_000, r"p.json: not JSON \(nested more than 200 levels deep"),
        ("p.csv", "", "p.csv: the file is empty"),
        ("p.pdf", "%PDF-1.7", "p.pdf: no kind of page that is known"),
        ("p.csv", "a,2019\nb,1".encode("utf-16"), r"p.csv: not UTF-8 text \(byte 0\): save it as CSV UTF-8$"),
        ("p.csv", "für,2019\nb,1".encode("latin-1"), "p.csv: not UTF-8 .*: save it as CSV UTF-8$"),
        ("p.html", "<p>für".encode("latin-1"), "p.html: not UTF-8 .*: save it as UTF-8$"),
        ("p.pdf", b"%PDF\xff", "p.pdf: not UTF-8 .*: give a FinQA record"),
    ],
)
def test_what_is_no_page_is_one_line(tmp_path, name, content, message):
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path, name, content)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "content"), [("p.csv", CSV), ("p.html", HTML)])
def test_a_page_that_is_no_finqa_file_has_no_record_to_choose(tmp_path, name, content):
    with pytest.raises(DataError, match=rf"{name}: no FinQA file, so it has no record A-1: leave out --id"):
        read(tmp_path, name, content, record_id="A-1")


def test_an_empty_question_is_refused(tmp_path):
    (tmp_path / "p.csv").write_text(CSV)
    with pytest.raises(DataError, match="no question was asked"):
        read_page(tmp_path / "p.csv", " ")


def test_text_is_cut_into_sentences():
    text = "Revenue rose 5.2 % . It was $ 3,100,000. Acme Inc. grew (see No. 4). 2019 was good!\nA line"
    assert sentences([text]) == [
        "Revenue rose 5.2 % .",
        "It was $ 3100000.",
        "Acme Inc. grew (see No. 4).",
        "2019 was good!",
        "A line",
    ]
