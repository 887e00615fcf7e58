"""Tables of lines over years, cut from a company's books: statements, segments, regions."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from fintune.data.synthetic.accounts import Accounts
from fintune.data.synthetic.cells import cell, corner, figure
from fintune.data.synthetic.companies import Company
from fintune.data.synthetic.page import Breakdown, Measure, Number, Series, Table, When
from fintune.data.synthetic.schedules import buybacks, performance, schedule

# Statement to its lines in order.
STATEMENTS: dict[str, tuple[str, ...]] = {
    "income": (
        "revenue", "cost_of_sales", "gross_profit", "selling", "research", "amortization", "operating_expenses",
        "operating_income", "interest_expense", "pretax_income", "income_tax", "net_income",
    ),
    "balance": (
        "cash", "receivables", "inventories", "other_current", "current_assets", "property", "goodwill", "other_assets",
        "total_assets", "payables", "accrued", "current_debt", "current_liabilities", "long_term_debt",
        "other_liabilities", "total_liabilities", "equity", "liabilities_and_equity",
    ),
    "cash_flow": (
        "net_income", "depreciation", "stock_compensation", "working_capital", "operating_cash", "capital_expenditures",
        "acquisitions", "investing_cash", "net_borrowings", "dividends", "repurchases", "financing_cash", "cash_change",
        "cash_beginning", "cash_end",
    ),
}  # fmt: skip
TOTALS: dict[str, tuple[str, ...]] = {
    "operating_expenses": ("selling", "research", "amortization"),
    "current_assets": ("cash", "receivables", "inventories", "other_current"),
    "total_assets": ("current_assets", "property", "goodwill", "other_assets"),
    "current_liabilities": ("payables", "accrued", "current_debt"),
    "total_liabilities": ("current_liabilities", "long_term_debt", "other_liabilities"),
    "liabilities_and_equity": ("total_liabilities", "equity"),
    "investing_cash": ("capital_expenditures", "acquisitions"),
}
TITLES = {
    "income": "results of operations", "balance": "financial position", "cash_flow": "cash flows",
    "segments": "revenue by segment", "regions": "revenue by region", "maturities": "debt maturities",
    "leases": "minimum lease payments", "performance": "stock performance", "buybacks": "purchases of common stock",
}  # fmt: skip
KINDS = tuple(TITLES)


def make_table(kind: str, company: Company, books: Accounts, year: int, rng: random.Random, *, small: bool) -> Table:
    """A table of one kind as of one year.

    Args:
        kind: One of :data:`KINDS`.
        company: Whose.
        books: Its books.
        year: The year that is reported on, the newest in the table.
        rng: Source of chance.
        small: At most 4 rows and 3 years.
    """
    if kind in ("maturities", "leases"):
        return schedule(kind, company, books, year, rng, small=small)
    if kind == "performance":
        return performance(company, year, rng, small=small)
    if kind == "buybacks":
        return buybacks(company, year, rng, small=small)
    past = [other for other in books.years if other <= year]
    if kind in STATEMENTS:
        lines, num_years = _statement_lines(kind, books, past, rng, small=small)
    else:
        source = books.segments if kind == "segments" else books.regions
        names = rng.sample(sorted(source), len(source))
        lines = {name: source[name] for name in names}
        lines["total"] = books.lines["revenue"]
        num_years = 2 if small else rng.choice((2, 3))
    years = past[-num_years:]
    grid = _Grid(company, kind, years, rng, small=small)
    if kind == "income" and rng.random() < (0.12 if small else 0.4):
        grid.derive(books, rng.choice(("operating_margin", "earnings_per_share")), lines)
    return grid.fill(lines)


def _statement_lines(
    kind: str, books: Accounts, past: Sequence[int], rng: random.Random, *, small: bool
) -> tuple[dict[str, Mapping[int, int]], int]:
    """Which lines a statement shows, and for how many years."""
    num_years = rng.choice((2, 2, 3)) if small else rng.choice((2, 3, 3, 4, 5))
    num_years = min(num_years, len(past))
    usable = [key for key in STATEMENTS[kind] if all(books.lines[key][year] for year in past[-num_years:])]
    limit = (rng.choice((3, 3, 4)) if num_years == 2 else 2) if small else rng.randint(5, 14)
    totals = [key for key in usable if key in TOTALS and set(TOTALS[key]) <= set(usable)]
    keys: set[str] = set()
    if totals and rng.random() < 0.6:
        total = rng.choice(totals)
        keys = {total, *rng.sample(TOTALS[total], min(limit - 1, len(TOTALS[total])))}
    rest = [key for key in usable if key not in keys]
    keys |= set(rng.sample(rest, min(limit - len(keys), len(rest))))
    return {key: books.lines[key] for key in usable if key in keys}, num_years


class _Grid:
    """Lines over years as FinQA cells."""

    def __init__(self, company: Company, kind: str, years: Sequence[int], rng: random.Random, *, small: bool) -> None:
        self.company, self.kind, self.years, self.rng, self.small = company, kind, tuple(years), rng, small
        self.columns = tuple(reversed(self.years)) if company.newest_first else self.years
        self.derived: dict[str, tuple[Measure, dict[int, str]]] = {}
        self.across = not small and rng.random() < 0.1
        self.dollars = rng.choice(("none", "ends")) if small else rng.choice(("none", "ends", "ends", "all"))

    def name(self, key: str) -> str:
        """What the row of a line is called."""
        if key == "total":
            revenue = self.company.names["revenue"]
            return revenue if revenue.startswith("total") else f"total {revenue}"
        return self.company.names.get(key, key)

    def spoken(self, key: str) -> str:
        """What a question calls a line: a segment's row "coal" is "coal net sales"."""
        if key == "total" or key in self.company.names:
            return self.name(key)
        return f"{key} {self.company.names['revenue'].removeprefix('total ')}"

    def derive(self, books: Accounts, key: str, lines: Mapping[str, object]) -> None:
        """Add a row of percentages or amounts a share below the lines.

        The margin only where the table lacks one of its two lines: with both, a question for the ratio of the two would
        have two answers.
        """
        if key == "operating_margin" and {"revenue", "operating_income"} <= set(lines):
            return
        texts = {}
        for year in self.years:
            if key == "operating_margin":
                texts[year] = f"{100 * books.lines['operating_income'][year] / books.lines['revenue'][year]:.1f}%"
            else:
                income = books.lines["net_income"][year] / 10**self.company.decimals * self.company.unit
                texts[year] = f"{income / 1_000_000 / books.shares[year]:.2f}"
        if all(float(text.rstrip("%")) for text in texts.values()):
            self.derived[key] = ("percent" if key == "operating_margin" else "per_share", texts)

    def fill(self, lines: Mapping[str, Mapping[int, int]]) -> Table:
        """The table with its series and breakdowns; in a tenth of the full-size ones the years run down."""
        when: When = "stock" if self.kind == "balance" else "flow"
        texts: dict[str, tuple[Measure, dict[int, str]]] = {
            key: ("money", {year: figure(values[year], self.company.decimals) for year in self.years})
            for key, values in lines.items()
        }
        texts |= self.derived
        head = (corner(self.company, self.rng, small=self.small), *self.header())
        rows: list[tuple[str, ...]] = [head]
        series: dict[str, Series] = {}
        for row, (key, (measure, values)) in enumerate(texts.items(), 1):
            dollar = self.dollars == "all" or (self.dollars == "ends" and row in (1, len(lines)))
            scale = self.company.unit if measure == "money" else 1
            numbers = {
                year: Number(values[year], scale, 1 + self.columns.index(year) if self.across else row)
                for year in self.years
            }
            cells = (cell(values[year], dollar=dollar, measure=measure) for year in self.columns)
            rows.append((self.name(key), *cells))
            row_name = None if self.across else self.name(key)
            series[key] = Series(key, self.spoken(key), numbers, measure, when, row_name)
        if self.across:
            rows = list(zip(*rows, strict=True))
        breakdowns = tuple(part for key in lines for part in self.breakdowns(key, series))
        return Table(tuple(rows), self.company.unit, TITLES[self.kind], tuple(series.values()), breakdowns)

    def header(self) -> tuple[str, ...]:
        """Labels of the year columns."""
        if self.small or self.rng.random() < 0.7:
            return tuple(str(year) for year in self.columns)
        return tuple(f"{self.company.year_end} {year}" for year in self.columns)

    def breakdowns(self, key: str, series: Mapping[str, Series]) -> list[Breakdown]:
        """Parts of a total line, for each year."""
        parts = [other for other in series if other != "total"] if key == "total" else TOTALS.get(key, ())
        shown = [series[part] for part in parts if part in series]
        if not shown:
            return []
        total = series[key]
        return [
            Breakdown(total.name, {self.name(p.key): p.numbers[year] for p in shown}, total.numbers[year], year)
            for year in self.years
        ]
