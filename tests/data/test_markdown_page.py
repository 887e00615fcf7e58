from __future__ import annotations

from pathlib import Path

import pytest

from fintune.data.page_file import read_page
from fintune.data.page_layout import read_grid
from fintune.data.page_markup import markdown_blocks
from fintune.data.page_table import Grid
from fintune.errors import DataError

FIGURES = "| a | 2019 |\n|---|---|\n| {name} | {cell} |\n"
ROWS = [["a", "2019"], ["R", "1"]]


def markdown_page(content):
    """Return the tables of a page, the lines before the first of them, and the lines after it."""
    blocks = markdown_blocks(content, Path("p.md"))
    tables = [read_grid(block, Path("p.md")).rows for block in blocks if isinstance(block, Grid)]
    first = next((k for k, block in enumerate(blocks) if isinstance(block, Grid)), len(blocks))
    return tables, *([line for line in part if isinstance(line, str)] for part in (blocks[:first], blocks[first:]))


def row(name="R", cell="1"):
    ((_, found),), _, _ = markdown_page(FIGURES.format(name=name, cell=cell))
    return found


@pytest.mark.parametrize("cell", ["- 5.2", "> 10%", "12. 5", "+ 3", "# 4", "1) 2"])
def test_a_cell_keeps_what_would_mark_a_line(cell):
    assert row(name=cell, cell=cell) == [cell, cell]


def test_a_spaced_minus_is_a_negative_number(tmp_path):
    path = tmp_path / "p.md"
    path.write_text(
        "| a | 2019 | 2018 | 2017 |\n|---|---|---|---|\n| 1. S | - 5.2 | $ - 7 | - $ 1,250 |\n| b | - | -3 | 5 - 7 |\n"
    )
    assert read_page(path, "what?").record.table[1:] == (("1. S", "-5.2", "$ -7", "-$1250"), ("b", "-", "-3", "5 - 7"))


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("net_income_ttm", "net_income_ttm"),
        ("_net_ __income__ ___x___", "net income x"),
        ("**5** *6* `7`", "5 6 7"),
        ("2*3 and 5*", "2*3 and 5*"),
        (r"\$5 \*a\_b", "$5 *a_b"),
        ("[**$ 55**](url) ![x](y)", "$ 55"),
        ("A&amp;B 2&nbsp;000", "A&B 2 000"),
        ("3<br>4<br/>5", "3 4 5"),
        ("1,234<sup>1</sup> <b>x</b>", "1,234 x"),
        ("a < b & c", "a < b & c"),
    ],
)
def test_marks_inside_a_line_are_left_out(written, read):
    assert " ".join(row(name=written)[0].split()) == read
    assert " ".join(" ".join(markdown_page(f"## {written}")[1]).split()) == read


@pytest.mark.parametrize("mark", ["#", "-", "*", "+", ">", "1.", "2)"])
def test_what_marks_a_line_is_left_out_at_its_start_alone(mark):
    assert markdown_page(f"  {mark} It was **$5** in 2019. So > 4 - 3 + 1.")[1] == [
        "It was $5 in 2019. So > 4 - 3 + 1."
    ]


def test_tables_without_figures_are_text():
    words = "| name | who |\n|--|--|\n| Bob | CEO |\n"
    tables, above, below = markdown_page(f"{words}\n{FIGURES.format(name='R', cell=1)}\n{words}")
    assert tables == [ROWS]
    assert [line for line in above if line] == [line for line in below if line] == ["name", "who", "Bob", "CEO"]


def test_a_table_in_html_is_read():
    table = "<table><tr><th>a</th><th>2019</th></tr><tr><td>R</td><td>1</td></tr></table>"
    tables, above, below = markdown_page(f"# Report\n\nIt *grew*.\n\n{table}\n\n- See note 2.\n")
    assert tables == [ROWS]
    assert [line for line in above if line] == ["Report", "It grew."]
    assert [line for line in below if line] == ["See note 2."]
    assert markdown_page(f"{table}\n{table}")[0] == [ROWS, ROWS]
    assert markdown_page(table.removesuffix("</table>"))[0] == [ROWS]


def test_a_table_of_one_column_is_none(tmp_path):
    path = tmp_path / "p.md"
    path.write_text("| a |\n|---|\n| 12 |\n")
    with pytest.raises(DataError, match=r"p\.md: holds no table"):
        read_page(path, "what?")


def test_a_form_feed_above_a_table_does_not_shift_its_lines(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("One\x0cTwo\u2028Three\n\n| | 2019 | 2018 |\n|---|---|---|\n| sales | 5 | 6 |\n", encoding="utf-8")
    assert read_page(page).record.table == (("", "2019", "2018"), ("sales", "5", "6"))
