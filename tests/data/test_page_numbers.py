from __future__ import annotations

import pytest

from fintune.data.page_file import read_page
from fintune.errors import DataError


def read(tmp_path, name, content, **options):
    path = tmp_path / name
    path.write_text(content)
    return read_page(path, "what fell?", **options).record


def cells(page):
    return [list(row[1:]) for row in page.table[1:]]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("p.csv", "name;2023;2022\nrevenue;1.250,5;1.120,0", [["1250.5", "1120.0"]]),
        ("p.csv", "name;2023;2022\nrevenue;1.250.000;1.120", [["1250000", "1120"]]),
        ("p.csv", "name;sold;price\nnuts;1.250;12,5", [["1250", "12.5"]]),
        ("p.csv", 'name,2023\nrevenue,"1.250,5"', [["1250.5"]]),
        ("p.csv", "name;2023\nloss;(1.250,5)\nshare;12,5 %", [["-1250.5 ( 1250.5 )"], ["12.5 %"]]),
        ("p.csv", "name;2023;2022\nspaced;1 250,5;12 500", [["1250.5", "12500"]]),
        ("p.md", "| n | 2023 |\n|---|---|\n| revenue | € 1.250,5 |", [["€ 1250.5"]]),
        ("p.html", "<table><tr><td>n<td>2023</tr><tr><td>revenue<td>1.250,5</tr></table>", [["1250.5"]]),
        ("p.csv", "name;2023;2022\nrevenue;1.250,5m;12,5x", [["1250.5m", "12.5x"]]),
        # A decimal point stays what it is.
        ("p.csv", 'name,2023,2022\nrevenue,"1,250","1,120"', [["1250", "1120"]]),
        ("p.csv", "name,2023,2022\nratio,1.250,1.120", [["1.250", "1.120"]]),
        ("p.csv", "name;2023;2022\nrevenue;1,250;1,120.5", [["1250", "1120.5"]]),
        ("p.csv", "name;2023\nrevenue;12,34,567\nswiss;1'250.5", [["1234567"], ["1250.5"]]),
        ("p.html", "<table><tr><td>n<td>2023<td>EPS</tr><tr><td>a<td>1,250<td>4.75</tr></table>", [["1250", "4.75"]]),
    ],
)  # fmt: skip
def test_decimals_of_a_table_get_a_point(tmp_path, name, content, expected):
    assert cells(read(tmp_path, name, content)) == expected


def test_text_goes_by_its_table(tmp_path):
    page = read(tmp_path, "p.csv", "name;2023\nrevenue;1.250,5", text="Es waren 12,5 % von 1.250.")
    assert page.pre_text == ("Es waren 12.5 % von 1250.",)
    page = read(tmp_path, "p.csv", 'name,2023\nrevenue,"1,250.5"', text="See notes 4,7 and 1,250 of 1.5.")
    assert page.pre_text == ("See notes 4,7 and 1250 of 1.5.",)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("name;2023\nrevenue;1.250", r"row 2 \(revenue\), column 2 \(2023\): 1.250 can be 1250 or 1.250"),
        ("name;2023\nrevenue;1,250", r"row 2 \(revenue\), column 2 \(2023\): 1,250 can be 1250 or 1.250"),
        ("name;2023\na;1.250,5\nb;12.5", r"row 3 \(b\), column 2 \(2023\): 12.5 contradicts 1.250,5 in row 2"),
        ("name|2023\nrate|1,250 %", r"row 2 \(rate\), column 2 \(2023\): 1,250 can be 1250 or 1.250"),
        ("name;2023;2022;2021\na;1.250,5;1,250.5;1.250", r"row 2 \(a\), column 4 \(2021\): 1.250 can be"),
    ],
)
def test_a_number_of_two_readings_is_refused_with_its_place(tmp_path, content, told):
    with pytest.raises(DataError, match=rf"p.csv: {told}.*: --decimal") as caught:
        read(tmp_path, "p.csv", content)
    assert "\n" not in str(caught.value)


def test_what_is_known_is_not_found_out(tmp_path):
    content = "name;2023\nrevenue;1.250"
    assert cells(read(tmp_path, "p.csv", content, decimal="comma")) == [["1250"]]
    assert cells(read(tmp_path, "p.csv", content, decimal="point")) == [["1.250"]]


def test_a_comma_that_shifts_the_cells_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"p\.csv, row 2: has 3 cells where the header has 2: put a cell with a comma"):
        read(tmp_path, "p.csv", "name,2023\nrevenue,1.250,5\n")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.csv", "ticker,sector\nAAPL,tech\n"),
        ("p.csv", "ticker,2023\nAAPL,tech\n"),
        ("p.json", '{"id": "A", "table": [["ticker", "sector"], ["AAPL", "tech"]]}'),
    ],
)
def test_a_page_without_any_number_is_refused(tmp_path, name, content):
    with pytest.raises(DataError, match=f"{name}: no cell holds a number"):
        read(tmp_path, name, content)
    assert read(tmp_path, name, content, text="It had 77 employees.").pre_text == ("It had 77 employees.",)


def test_an_id_of_no_record_is_answered_with_the_nearest(tmp_path):
    rows = '[{"id": "V/2008/page_17.pdf-1"}, {"id": "V/2008/page_18.pdf-1"}]'
    with pytest.raises(DataError, match=r"no record has this id: did you mean V/2008/page_17.pdf-1\?"):
        read(tmp_path, "p.json", rows, record_id="V/2008/page_17.pdf")
