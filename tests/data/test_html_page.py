from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from fintune.data.page_layout import read_grid
from fintune.data.page_markup import html_blocks
from fintune.data.page_table import Grid

PAGE = (
    "<p>{text}</p><table><tr><th>in millions</th><th>{header}</th><th>2018</th></tr>"
    "<tr><td>{name}</td><td>{cell}</td><td>900</td></tr></table>"
)


def parse(content):
    """Return the tables of a page, the lines before the first of them, and the lines after it."""
    blocks = html_blocks(content, Path("p.html"))
    tables = [read_grid(block, Path("p.html")).rows for block in blocks if isinstance(block, Grid)]
    first = next((k for k, block in enumerate(blocks) if isinstance(block, Grid)), len(blocks))
    lines = [[line for line in part if isinstance(line, str)] for part in (blocks[:first], blocks[first:])]
    return SimpleNamespace(tables=tables, before=lines[0], after=lines[1])


def read(text="Text.", header="2019", name="Revenue", cell="1,234"):
    page = parse(PAGE.format(text=text, header=header, name=name, cell=cell))
    ((first, second),) = page.tables
    return page.before, first[1], *second[:2]


@pytest.mark.parametrize(
    "mark", ["1", "12", "a", "*", "**", "†", "(1)", "[a]", "[note 2]", "1, 2", "<a href='#f'>3</a>", " 1 "]
)
def test_raised_footnote_marks_are_left_out(mark):
    raised = f"<sup>{mark}</sup>"
    found = read(
        text=f"Revenue{raised} was $1,250{raised} million{raised}.",
        header=f"2019{raised}",
        name=f"Revenue{raised}",
        cell=f"1,234 {raised}",
    )
    assert found == (["Revenue was $1,250 million."], "2019", "Revenue", "1,234")


def test_several_marks_and_marks_on_their_own_are_left_out():
    assert read(cell="(5.2<sup>1</sup>,<sup>2</sup>)")[3] == "(5.2)"
    assert read(cell="<sup>(1)</sup>1,234")[3] == "1,234"
    page = parse(
        "<table><tr><td>a<td>2019<td><td>2018</tr><tr><td>b<td>1,234</td><td><sup>(1)</sup></td><td>1,100</tr></table>"
    )
    assert page.tables == [[["a", "2019", "2018"], ["b", "1,234", "1,100"]]]


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ("5<sup>1</sup>/<sub>2</sub>%", "5 1 /2%"),
        ("2<sup>nd</sup>", "2 nd"),
        ("5 &times; 10<sup>6</sup>", "5 \u00d7 10 6"),
        ("10<sup>-6</sup>", "10 -6"),
    ],
)
def test_other_raised_text_is_set_apart(cell, expected):
    assert read(cell=cell)[3] == expected


@pytest.mark.parametrize(
    "section",
    [
        "<![ endif]-->",
        "<![foo[ x ]]>",
        "<![endif]-->",
        "<![if !mso]>",
        "<![",
        "<!-- <![ x -->",
        "<![CDATA[ x ]]>",
        "<![]>",
    ],
)
def test_html_marked_sections_are_skipped(section):
    assert read(text=f"Before. {section}</p><p>Text.</p>") == (["Before.", "Text."], "2019", "Revenue", "1,234")
    assert parse(f"<p>Text.</p><![ {section}").tables == []


def test_the_number_before_a_footnote_stays():
    page = parse("<p><sup>1</sup>Without tax.</p><p>And 5.</p>")
    assert page.before == ["1 Without tax.", "And 5."]


def test_a_table_that_nothing_closes_ends_with_the_page():
    page = parse("<p>Before.</p><table><tr><td>R<td>2019</tr><tr><td>R<td>1</tr><p>After.</p><p>And 5.")
    assert page.tables == [[["R", "2019"], ["R", "1"]]]
    assert (page.before, page.after) == (["Before."], ["After.", "And 5."])


ROWS = "<tr><td>R<td>2019</tr><tr><td>R<td>1</tr>"


@pytest.mark.parametrize(
    "caption",
    [
        "<caption>Sales by region<sup>1</sup><br>(in <b>millions</b>)</caption>",
        "<caption>Sales by region (in millions)<colgroup><col></colgroup><tbody>",
    ],
)
def test_a_caption_is_the_last_line_before_its_table(caption):
    page = parse(f"<p>Before.</p><table>{caption}{ROWS}</table><p>After.</p>")
    assert page.tables == [[["R", "2019"], ["R", "1"]]]
    assert (page.before, page.after) == (["Before.", "Sales by region (in millions)"], ["After."])


def test_captions_of_other_tables_are_text_in_their_places():
    layout = "<table><caption>Contents</caption><tr><td>Page one</td></tr></table>"
    second = f"<table><caption>Costs</caption>{ROWS}</table>"
    nested = f"<table><tr><td><table><caption>Sales</caption>{ROWS}</table></td></tr></table>"
    page = parse(f"{layout}{nested}<p>Between.</p>{second}")
    assert len(page.tables) == 2
    assert (page.before, page.after) == (["Contents", "Page one", "Sales"], ["Between.", "Costs"])
