from __future__ import annotations

from pathlib import Path

import pytest

from fintune.data.page_file import csv_blocks, read_page
from fintune.data.page_layout import read_grid
from fintune.data.page_table import Grid
from fintune.errors import DataError

TABLE = [["Item", "2019", "2018"], ["Revenue", "1,234", "1,100"], ["Costs", "900", "800"]]


def read(content, name="p.csv"):
    blocks, sign = csv_blocks(Path(name), content)
    above = [line for line in blocks if isinstance(line, str)]
    tables = [read_grid(block, Path(name)).rows for block in blocks if isinstance(block, Grid)]
    return above, tables[0] if tables else [], sign


@pytest.mark.parametrize(
    ("content", "above", "sign"),
    [
        ('Item,2019,2018\nRevenue,"1,234","1,100"\nCosts,900,800\n', [], ","),
        ('Item, "2019", "2018"\nRevenue, "1,234", "1,100"\nCosts, 900, 800\n', [], ","),
        ('Apple Inc.\nIncome statement\nItem,2019,2018\nRevenue,"1,234","1,100"\nCosts,900,800\n', 2, ","),
        ('Apple Inc.,,\n\nIncome statement,,\nItem,2019,2018\nRevenue,"1,234","1,100"\nCosts,900,800\n', 2, ","),
        ('Apple Inc.\nIncome statement\n"Item";"2019";"2018"\nRevenue;1,234;1,100\nCosts;900;800\n', 2, ";"),
        ("sep=;\r\nItem;2019;2018\r\nRevenue;1,234;1,100\r\nCosts;900;800\r\n", [], ";"),
        ('"sep=|"\nItem|2019|2018\nRevenue|1,234|1,100\nCosts|900|800\n', [], "|"),
        ("Apple Inc.\nIncome statement\nItem\t2019\t2018\nRevenue\t1,234\t1,100\nCosts\t900\t800\n", 2, "\t"),
    ],
)
def test_a_table_is_read_with_the_lines_above_it(content, above, sign):
    lines = ["Apple Inc.", "Income statement"] if above else []
    assert read(content) == (lines, TABLE, sign)


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        ("Item,\nRevenue,5\nCosts,3\n", [["Item", ""], ["Revenue", "5"], ["Costs", "3"]]),
        (",2019\nRevenue,5\n", [["", "2019"], ["Revenue", "5"]]),
        ("Item,2019\nAssets,\nCash,5\n", [["Item", "2019"], ["Assets", ""], ["Cash", "5"]]),
        ("Item,2019,2018\nNet; sum,5,6\n", [["Item", "2019", "2018"], ["Net; sum", "5", "6"]]),
        ("R;1,2;1,3\nS;2,1;2,2\n", [["", "", ""], ["R", "1,2", "1,3"], ["S", "2,1", "2,2"]]),
        ("Only\none\ncolumn\n", []),
        ("Title\nItem,2019\n", []),
    ],
)
def test_headers_and_separators_are_told_from_text(content, rows):
    assert read(content)[1] == rows


def test_lines_above_a_table_are_text_of_the_page(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text("Apple Inc.\nIncome statement. In millions.\nItem,2019,2018\nRevenue,100,(200)\n")
    page = read_page(path, "what?", text="Before.").record
    assert page.pre_text == ("Before.", "Apple Inc.", "Income statement.", "In millions.")
    assert page.table == (("Item ( In millions )", "2019", "2018"), ("Revenue", "100", "-200 ( 200 )"))


def test_a_row_that_is_too_long_is_counted_with_the_lines_above():
    with pytest.raises(DataError, match=r"p\.csv, row 3: has 5 cells where the header has 3: put a cell with a comma"):
        read("Apple Inc.\nItem,2019,2018\nRevenue,1,234,1,100\nCosts,1,2\n")


def test_long_row_shows_supposed_header():
    told = r'in quotes: "1,250" \(row 2 was taken for the header: Acme \| Inc\.\)$'
    with pytest.raises(DataError, match=told):
        read("\nAcme, Inc.\nItem,2019,2018\nRevenue,234,100\nCosts,1,2\n")


def test_long_row_is_numbered_with_blank_rows():
    with pytest.raises(DataError, match=r"p\.csv, row 6: has 5 cells"):
        read('Apple Inc.\n\nItem,2019,2018\n,,\n"Net\nsum",5,6\nRevenue,1,234,1,100\nCosts,1,2\n')
