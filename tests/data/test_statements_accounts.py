from __future__ import annotations

import random

import pytest

from fintune.data.synthetic.company import line_names, make_accounts, make_company, phrases, split_total
from fintune.data.synthetic.page import PageContext
from fintune.data.synthetic.tables import TABLE_WEIGHTS, make_page_table


def cell_value(cell: str) -> float:
    text = cell.removeprefix("$ ").split(" ")[0]
    return float(text.removesuffix("%"))


@pytest.mark.parametrize("small", [True, False])
def test_books_balance_and_cash_ties(small):
    for index in range(150):
        company = make_company(7, index, small=small)
        books = make_accounts(company, random.Random(index), small=small)
        line = books.lines
        for year in books.years:
            assert line["total_assets"][year] == line["liabilities_and_equity"][year]
            flows = ("operating_cash", "investing_cash", "financing_cash")
            assert line["cash_change"][year] == sum(line[name][year] for name in flows)
            assert line["cash_end"][year] == line["cash"][year] > 0
            if year > books.years[0]:
                assert line["cash_beginning"][year] == line["cash"][year - 1]
            assert line["revenue"][year] == sum(values[year] for values in books.segments.values())
            assert line["revenue"][year] == sum(values[year] for values in books.regions.values())
            assert line["net_income"][year] == line["pretax_income"][year] - line["income_tax"][year]


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("kind", TABLE_WEIGHTS)
def test_make_table_keeps_the_identities(kind, small):
    num_checked = 0
    is_statement = kind in ("income", "balance", "cash_flow")
    for index in range(60):
        company = make_company(7, index, small=small)
        rng = random.Random(index)
        books = make_accounts(company, rng, small=small)
        table = make_page_table(kind, PageContext(company, books, books.years[-1], rng, small))
        rows = list(table.rows)
        if table.series and table.series[0].row_name is None and kind not in ("maturities", "leases"):
            rows = list(zip(*rows, strict=True))  # years run down
        cells = {row[0]: [cell_value(cell) for cell in row[1:]] for row in rows[1:]}
        checks: list[tuple[str, list[str]]] = []
        if is_statement:
            checks = [(company.names[t], [company.names[p] for p in parts]) for t, parts in phrases("totals").items()]
        elif kind in ("segments", "regions"):
            names = list(cells)
            checks = [(names[-1], names[:-1])]
        elif kind == "buybacks" and not small:
            *months, total = cells.values()
            assert total[0] == sum(shares for shares, _ in months)
            assert total[1] == pytest.approx(sum(shares * price for shares, price in months) / total[0], abs=0.01)
            num_checked += 1
        elif kind in ("maturities", "leases") and len(cells) > 1:
            *parts, total = cells
            checks = [(total, parts)]
        elif kind in ("maturities", "leases"):
            (row,) = cells.values()
            assert sum(row[:-1]) == pytest.approx(row[-1])
            num_checked += 1
        for total, parts in checks:
            if total in cells and all(part in cells for part in parts):
                for column, value in enumerate(cells[total]):
                    assert sum(cells[part][column] for part in parts) == pytest.approx(value)
                num_checked += 1
    free = kind == "performance" or (kind == "buybacks" and small)
    assert num_checked >= (0 if free else 5 if is_statement else 50)


def test_line_names_are_unique():
    names = [name for names in line_names().values() for name in names]
    assert len(set(names)) == len(names)
    assert not any(set("(),#") & set(name) for name in names)


def test_split_total_parts_sum_to_the_total():
    assert sum(split_total(1001, [1.0, 2.0, 0.7])) == 1001
    assert split_total(5, [1.0]) == [5]
