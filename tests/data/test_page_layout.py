from __future__ import annotations

import gzip
import json
import re

import pytest

from fintune.data.page_file import read_page
from fintune.data.page_table import UNITS
from fintune.errors import DataError
from support.paths import ROOT

FILINGS = ROOT.parent / "shared" / "cases" / "pages" / "filing_tables.jsonl.gz"


def read(tmp_path, content, name="p.html", **options):
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    return read_page(path, "what?", **options)


def html(*rows):
    """Return a table; a cell is its text, or (text, colspan), or markup of its own."""

    def cell(value):
        if isinstance(value, tuple):
            return f'<td colspan="{value[1]}">{value[0]}</td>'
        return value if value.startswith("<td") else f"<td>{value}</td>"

    return "<table>" + "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows) + "</table>"


def markdown(*rows):
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]) + "\n"


YEARS = ("", ("2021", 2), ("2020", 2))


@pytest.mark.parametrize("nothing", ["&#8212;", "&#8211;", "-", "None", "N/A", "NM", "nil", "(&#8212;)"])
def test_a_sign_beside_no_number_shifts_nothing(tmp_path, nothing):
    table = read(tmp_path, html(YEARS, ("A", "$", nothing, "$", "7"), ("B", "", "5", "", "9"))).record.table
    assert table[0] == ("", "2021", "2020")
    assert (table[1][2], table[2]) == ("$ 7", ("B", "5", "9"))


@pytest.mark.parametrize("sign", ["US$", "RMB", "HK$", "CHF", "₹", "Rs."])
def test_any_sign_before_a_number_joins_it(tmp_path, sign):
    table = read(tmp_path, html(YEARS, ("A", sign, "1,250", sign, "7"), ("B", "", "5", "", "9"))).record.table
    assert table == (("", "2021", "2020"), ("A", f"{sign} 1250", f"{sign} 7"), ("B", "5", "9"))


@pytest.mark.parametrize("unit", ["years", "x", "bps", "pts", "%", "km"])
def test_any_unit_after_a_number_joins_it(tmp_path, unit):
    table = read(tmp_path, html(YEARS, ("A", "4.5", unit, "7.5", unit), ("B", "5", "", "9", ""))).record.table
    assert table == (("", "2021", "2020"), ("A", f"4.5 {unit}", f"7.5 {unit}"), ("B", "5", "9"))


def test_a_bracket_under_the_next_name_closes_its_number(tmp_path):
    rows = html(("", ("2021", 2), ("2020", 3)), ("A", "", "(5", ")", "(7", ")"), ("B", "$", "5", "", "9", ""))
    table = read(tmp_path, rows).record.table
    assert table == (("", "2021", "2020"), ("A", "-5 ( 5 )", "-7 ( 7 )"), ("B", "$ 5", "9"))


def test_a_name_over_its_sign_alone_names_the_number(tmp_path):
    rows = html(("", "2021", "", "", "2020", ""), ("A", "$", "15", "", "$", "17"), ("B", "", "25", "", "", "27"))
    assert read(tmp_path, rows).record.table == (("", "2021", "2020"), ("A", "$ 15", "$ 17"), ("B", "25", "27"))


def test_an_indent_before_row_names_is_no_column(tmp_path):
    rows = html(("", "", "2021", "2020"), ("", "Cash", "15", "17"), (("Total", 2), "25", "27"))
    assert read(tmp_path, rows).record.table == (("", "2021", "2020"), ("Cash", "15", "17"), ("Total", "25", "27"))


def test_zero_width_characters_are_nothing(tmp_path):
    zero = "\u200b\u2060\ufeff\u00ad"
    rows = html((zero, zero, ("2021", 2)), ("A", zero, "$", f"1{zero}5"), ("B", "", zero, "25"))
    assert read(tmp_path, rows).record.table == (("", "2021"), ("A", "$ 15"), ("B", "25"))


HEADER = ("", "Half year ended June 30,", "", "Year ended June 30,", "")
LEAVES = ("", "2021", "2020", "2021", "2020")
NAMES = (
    "Half year ended June 30, 2021",
    "Half year ended June 30, 2020",
    "Year ended June 30, 2021",
    "Year ended June 30, 2020",
)


def test_names_of_several_rows_in_every_kind_of_file(tmp_path):
    values = ("Sales", "41", "39", "120", "115")
    spans = html(("", (HEADER[1], 2), (HEADER[3], 2)), LEAVES, values)
    csv = "\n".join(";".join(row) for row in (HEADER, LEAVES, values))
    for name, content in (("p.html", spans), ("p.csv", csv), ("p.md", markdown(HEADER, LEAVES, values))):
        table = read(tmp_path, content, name).record.table
        assert table == (("", *NAMES), values)


def test_words_of_a_name_in_several_rows_stay_over_their_column(tmp_path):
    rows = (("", "", "Weighted"), ("", "Number of", "average"), ("", "shares", "price"), ("Granted", "15", "2.5"))
    for name, content in (("p.html", html(*rows)), ("p.md", markdown(*rows))):
        page = read(tmp_path, content, name)
        assert page.record.table[0] == ("", "Number of shares", "Weighted average price")


def test_stacked_words_that_name_columns_do_not_spread(tmp_path):
    rows = (("", "General", "Limited", ""), ("", "units", "units", "Total"), ("Granted", "15", "2.5", "17.5"))
    assert read(tmp_path, html(*rows)).record.table[0] == ("", "General units", "Limited units", "Total")


def test_what_a_name_covers_is_noted_if_nothing_says_it(tmp_path):
    page = read(
        tmp_path, markdown(("", "Audited group", "", ""), ("", "Oil", "Gas", "Sun"), ("A", "1", "2", "3")), "p.md"
    )
    assert page.record.table[0] == ("", "Audited group Oil", "Gas", "Sun")
    assert page.notes == ("row 1: the table does not say which columns Audited group cover",)


def test_titles_are_text_and_units_stay(tmp_path):
    rows = html(
        (("Balance sheets (USD $) - in thousands", 3),), ("", "Dec. 31, 2021", "Dec. 31, 2020"), ("A", "1", "2")
    )
    page = read(tmp_path, rows)
    assert page.record.pre_text == ("Balance sheets (USD $) - in thousands",)
    assert page.record.table[0] == ("( in thousands )", "Dec. 31, 2021", "Dec. 31, 2020")
    assert page.units == ("in thousands",)
    page = read(tmp_path, html(("", ("2021", 1), "2020"), ("(In millions)", "", ""), ("A", "1", "2")))
    assert page.record.table[0][0] in ("", "(In millions)")


@pytest.mark.parametrize(
    "unit",
    ["(in millions)", "In thousands", "(Dollars in billions, except per share amounts)", "£000", "EUR m", "$'000"],
)
def test_units_are_known_in_the_corner(tmp_path, unit):
    page = read(tmp_path, html((unit, "2021"), ("A", "1")))
    assert page.units == (unit,)
    assert page.record.table[0][0] == unit


def test_equal_names_get_letters(tmp_path):
    page = read(tmp_path, html(("", "2021", "Change", "2020", "Change"), ("A", "1", "2", "3", "4")))
    assert page.record.table[0] == ("", "2021", "Change (A)", "2020", "Change (B)")


def test_several_values_under_one_name_are_several_columns(tmp_path):
    page = read(tmp_path, html(("", ("2021", 3)), ("A", "$", "15", "7.5%"), ("B", "", "25", "8.5%")))
    assert page.record.table == (("", "2021 (A)", "2021 (B)"), ("A", "$ 15", "7.5%"), ("B", "25", "8.5%"))


def test_figures_without_a_name_are_noted(tmp_path):
    page = read(tmp_path, html(("A", "15", "17"), ("B", "25", "27")))
    assert page.record.table[0] == ("", "", "")
    assert page.notes == ("no name is above column 2, 3",)


def test_later_headers_name_their_own_rows(tmp_path):
    rows = (("", "2021", "2020"), ("A", "15", "17"), ("", "2019", "2018"), ("A", "25", "27"))
    page = read(tmp_path, html(*rows))
    assert page.record.table[1:] == (("A", "15", "17", "", ""), ("A", "", "", "25", "27"))
    assert page.notes == ("the table has several headers: each number is under the names of its own header",)
    again = read(tmp_path, html(*rows[:2], rows[0], ("B", "25", "27")))
    assert (again.record.table[1:], again.notes) == ((("A", "15", "17"), ("B", "25", "27")), ())


def test_two_tables_side_by_side_are_one_below_the_other(tmp_path):
    rows = html(
        ("Assets", "2021", "2020", "Debt", "2021", "2020"),
        ("Cash", "1", "2", "Loans", "3", "4"),
        ("Land", "5", "6", "Bonds", "7", "8"),
    )
    page = read(tmp_path, rows)
    assert page.record.table[1:] == (("Cash", "1", "2"), ("Land", "5", "6"), ("Loans", "3", "4"), ("Bonds", "7", "8"))
    assert "side by side" in page.notes[0]


def test_rowspans_repeat_names_and_values(tmp_path):
    rows = html(
        ("Area", "Year", "Sales"), ('<td rowspan="2">North</td>', "2021", "5"), ("2020", '<td rowspan="0">6</td>')
    )
    assert read(tmp_path, rows).record.table[1:] == (("North", "2021", "5"), ("North", "2020", "6"))


@pytest.mark.parametrize("lines", ["<br>", "</p><p>", "</div><div>", "\n</li><li>"])
def test_lines_of_all_cells_are_rows(tmp_path, lines):
    rows = html(("", "2021", "2020"), tuple(lines.join(pair) for pair in (("Low", "High"), ("12", "350"), ("7", "9"))))
    assert read(tmp_path, rows).record.table[1:] == (("Low", "12", "7"), ("High", "350", "9"))


def test_lines_in_a_single_cell_are_refused_with_their_place(tmp_path):
    message = r"row 2 \(Range\), column 2: 12 / 350 are several numbers in one cell: give each number"
    for name, content in (
        ("p.html", html(("", "2021"), ("Range", "<td>12<br>350</td>"))),
        ("p.md", markdown(("", "2021"), ("Range", "12<br>350"))),
        ("p.csv", ',2021\nRange,"12\n350"\n'),
    ):
        with pytest.raises(DataError, match=message):
            read(tmp_path, content, name)


@pytest.mark.parametrize(
    "hiding",
    ['style="display: none"', 'style="VISIBILITY:hidden"', "hidden", 'style="font-size:0"', 'class="h x"', 'id="i"'],
)
def test_hidden_text_is_not_read(tmp_path, hiding):
    sheet = "<style>@media print {.p {display:none}} .h, td.g, #i {display:none} .p {color:red}</style>"
    rows = html(("", "2021"), ("A", f"85<span {hiding}>85</span>"), ("B", '<td class="p">7</td>'))
    page = read(tmp_path, f"{sheet}<p>Shown.<b {hiding}>Not 5.</b></p>{rows}<ix:header>9</ix:header>")
    assert (page.record.pre_text, page.record.table[1:]) == (("Shown.",), (("A", "85"), ("B", "7")))


@pytest.mark.parametrize(
    "style",
    [
        "vertical-align:super",
        "position:relative;top:-3pt",
        "position:relative; bottom:.4em",
        "vertical-align: 4px",
        "font-size:60%",
    ],
)
@pytest.mark.parametrize("mark", ["4", "(3)", "a"])
def test_marks_raised_by_style_are_left_out(tmp_path, style, mark):
    raised = f'<span style="{style}">{mark}</span>'
    page = read(tmp_path, html(("", f"2021{raised}"), ("A", f"64{raised}"), ("B", f"(7){raised}")))
    assert page.record.table == (("", "2021"), ("A", "64"), ("B", "-7 ( 7 )"))
    assert page.notes == (f"raised marks were left out: {mark}",)


def test_a_mark_in_a_cell_of_its_own_is_no_figure(tmp_path):
    head = ("", ("2021", 2), "", ("2020", 2), "")
    page = read(tmp_path, html(head, ("A", "$", "15", "(1)", "$", "17", ""), ("B", "", "25", "", "", "27", "(b)")))
    assert page.record.table == (("", "2021", "2020"), ("A", "$ 15", "$ 17"), ("B", "25", "27"))
    page = read(tmp_path, html(("", ("2021", 3)), ("A", "$", "15", "(1)"), ("B", "", "25", "*")))
    assert page.record.table == (("", "2021"), ("A", "$ 15"), ("B", "25"))
    assert "(1) after 15 was left out as a footnote mark" in page.notes
    assert read(tmp_path, html(("", "2021", "2020"), ("A", "(27)", "(1)"))).record.table[1] == (
        "A",
        "-27 ( 27 )",
        "-1 ( 1 )",
    )


@pytest.mark.parametrize("mark", ["*", "†", " (a)", " [2]", "²"])
def test_marks_after_a_number_are_left_out(tmp_path, mark):
    page = read(tmp_path, f'a,2021\nb,"1,250{mark}"\nc,4.5%{mark}\n', "p.csv")
    assert (page.record.table[1:], len(page.notes)) == ((("b", "1250"), ("c", "4.5%")), 1)


def test_a_table_in_the_last_row_of_a_table_is_text(tmp_path):
    notes = "<table><tr><td>[1]</td><td>Restated in 2018.</td></tr><tr><td>[2]</td><td>See 5.</td></tr></table>"
    rows = html(("Income", ("Months ended", 2)), ("", "2021", "2020"), ("A", "5", "6"), ("B", "7", "8"), ((notes, 3),))
    page = read(tmp_path, f"<p>Before.</p>{rows}")
    assert page.record.table[1:] == (("A", "5", "6"), ("B", "7", "8"))
    assert " ".join(page.record.post_text) == "[1] Restated in 2018. [2] See 5."


@pytest.mark.parametrize("row", ["| a|b | 52 | 13 |", "| Revenue | 1,250 |"])
def test_a_markdown_row_of_other_length_is_refused(tmp_path, row):
    with pytest.raises(DataError, match=r"p\.md, row 3: has \d cells where the header has 3"):
        read(tmp_path, f"| a | 2021 | 2020 |\n|---|---|---|\n{row}\n", "p.md")


def test_empty_names_of_converters_are_empty(tmp_path):
    rows = (("Income", "Unnamed: 1", "Unnamed: 2"), ("NaN", "NaN", "NaN"), ("USD m", "2021", "2020"), ("A", "5", "NaN"))
    page = read(tmp_path, markdown(*rows), "p.md")
    assert page.record.pre_text == ("Income",)
    assert page.record.table == (("USD m", "2021", "2020"), ("A", "5", ""))


TABLES = (
    "<h2>Debt</h2><p>Loans by year.</p>"
    + html(("", "2021"), ("Bank loans", "15"), ("Bonds", "25"))
    + "<h2>Leases</h2><p>Lease cost by year.</p>"
    + html(("", "2021"), ("Lease cost", "35"), ("Rent", "45"))
    + "<p>After.</p>"
)


def test_the_table_that_fits_the_question_is_read(tmp_path):
    path = tmp_path / "p.html"
    path.write_text(TABLES)
    page = read_page(path, "what was the cost of a lease in 2021?")
    assert (page.number, page.num_tables, page.record.table[1][0]) == (2, 2, "Lease cost")
    assert (page.record.pre_text, page.record.post_text) == (("Leases", "Lease cost by year."), ("After.",))
    assert page.notes == ("table 2 of 2 was read, under 'Lease cost by year.'; --table N reads another",)
    assert read_page(path, "what was the cost of a lease?", table=1).record.table[1][0] == "Bank loans"
    with pytest.raises(DataError, match=r"has 2 tables, so no table 3: give another --table"):
        read_page(path, "what?", table=3)


@pytest.mark.parametrize(
    "content",
    [
        html(("", "2021"), *[('<td colspan="1000" rowspan="65000">5</td>',) * 20] * 20),
        "<table><tr><td>" * 3000,
        "<!--" * 100_000 + html(("", "2021"), ("A", "5")),
        html(("", "2021"), ("A", "("), ("B", "1 " * 50_000)),
    ],
)
def test_hostile_pages_end_soon(tmp_path, content):
    # The former reader needed minutes or gigabytes for such pages.
    try:
        assert len(read(tmp_path, content).record.table) < 30
    except DataError as error:
        assert "\n" not in str(error)


@pytest.mark.skipif(not FILINGS.is_file(), reason="the tables of filings are beside the checkout")
def test_numbers_of_filings_are_under_their_names(tmp_path):
    def plain(text):
        return re.sub(r"[\s,.:$()\u200b]", "", text).lower()

    num_right = num = 0
    with gzip.open(FILINGS, "rt") as lines:
        tables = [json.loads(line) for line in lines][::12]
    for table in tables:
        rows = read(tmp_path, table["html"], decimal="point").record.table
        at = {number: k for row in rows for k, cell in enumerate(row) for number in re.findall(r"\d+", cell)}
        for number, names in table["numbers"].items():
            num += bool(names["column"])
            num_right += bool(names["column"]) and all(plain(n) in plain(rows[0][at[number]]) for n in names["column"])
    assert num > 900
    assert num_right / num > 0.99


@pytest.mark.parametrize("text", ["in a " + "of " * 60 + "x", "in " + "US $" * 60 + "x", "in " * 20_000])
def test_a_text_that_is_almost_a_unit_takes_no_time(text):
    assert UNITS.search(text) is None
    assert UNITS.search(f"{text}; amounts in millions of US $ thousands")
