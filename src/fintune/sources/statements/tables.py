"""Tables in the FinQA form, cut from a company's books: statements, segments, maturities, stock performance."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from fintune.sources.statements.accounts import Accounts, split
from fintune.sources.statements.companies import Company
from fintune.sources.statements.page import Breakdown, Measure, Number, Series, Table, When

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
    "leases": "minimum lease payments", "performance": "stock performance",
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
        return _schedule(kind, company, books, year, rng, small=small)
    if kind == "performance":
        return _performance(company, year, rng, small=small)
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
    return _Grid(company, kind, years, rng, small=small).fill(lines)


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
        self.dollars = rng.choice(("none", "ends")) if small else rng.choice(("none", "ends", "ends", "all"))

    def name(self, key: str) -> str:
        """What the row of a line is called."""
        if key == "total":
            revenue = self.company.names["revenue"]
            return revenue if revenue.startswith("total") else f"total {revenue}"
        return self.company.names.get(key, key)

    def fill(self, lines: Mapping[str, Mapping[int, int]]) -> Table:
        """The table with its series and breakdowns."""
        when: When = "stock" if self.kind == "balance" else "flow"
        rows: list[tuple[str, ...]] = [(corner(self.company, self.rng, small=self.small), *self.header())]
        series: dict[str, Series] = {}
        for key, values in lines.items():
            row = len(rows)
            dollar = self.dollars == "all" or (self.dollars == "ends" and row in (1, len(lines)))
            numbers = {
                year: Number(figure(values[year], self.company.decimals), self.company.unit, row) for year in self.years
            }
            rows.append((self.name(key), *(cell(numbers[year].text, dollar=dollar) for year in self.columns)))
            series[key] = Series(key, self.name(key), numbers, when=when, row_name=self.name(key))
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
            Breakdown(total.name, {part.name: part.numbers[year] for part in shown}, total.numbers[year], year)
            for year in self.years
        ]


def _schedule(kind: str, company: Company, books: Accounts, year: int, rng: random.Random, *, small: bool) -> Table:
    """Payments by year with their total: one column, or one row in a fifth of the full-size tables."""
    num_years = rng.choice((2, 3)) if small else rng.choice((3, 5, 5))
    labels = [str(year + step) for step in range(1, num_years + 1)] + ["thereafter"]
    owed = books.lines["long_term_debt"][year] + books.lines["current_debt"][year]
    if kind == "leases":
        owed = max(10 * len(labels), round(books.lines["revenue"][year] * rng.uniform(0.05, 0.3)))
    weights = [rng.uniform(0.3, 1.5) for _ in labels[:-1]] + [rng.uniform(0.5, 4)]
    values = [max(1, value) for value in split(owed, weights)]
    name = {
        "maturities": ("debt maturities", "long-term debt maturities", "principal payments", "scheduled maturities"),
        "leases": ("minimum lease payments", "operating lease obligations", "future lease payments", "rental payments"),
    }[kind]
    title = rng.choice(name)
    total_name = rng.choice(("total", f"total {title}"))
    dollar_all = rng.random() < 0.3
    texts = [figure(value, company.decimals) for value in (*values, sum(values))]
    names = [*labels, total_name]
    ends = (0, len(texts) - 1)
    cells = [cell(text, dollar=dollar_all or place in ends) for place, text in enumerate(texts)]
    unit = corner(company, rng, small=small)
    amount = rng.choice(("amount", "payments", title))
    if not small and rng.random() < 0.2:
        rows: tuple[tuple[str, ...], ...] = ((unit, *names), (title, *cells))
        places = [1] * len(texts)
    else:
        rows = ((rng.choice(("year", "")), f"{amount} {unit}".strip()), *zip(names, cells, strict=True))
        places = list(range(1, len(texts) + 1))
    numbers = [Number(text, company.unit, row) for text, row in zip(texts, places, strict=True)]
    parts = dict(zip(labels, numbers, strict=False))
    whole = Breakdown(f"total {title}", parts, numbers[-1], None, "due")
    owed_now = Series(kind, whole.total_name, {year: whole.total}, when="stock")
    return Table(rows, company.unit, title, (owed_now,), (whole,))


def _performance(company: Company, year: int, rng: random.Random, *, small: bool) -> Table:
    """What 100 dollars became: the company beside an index or two."""
    num_years = 2 if small else 5
    years = [year - num_years + step for step in range(num_years + 1)]
    names = [company.short_name, "s&p 500", f"{company.sector} index"]
    if not small and rng.random() < 0.4:
        names.append("peer group")
    rows: list[tuple[str, ...]] = [("", *(str(y) if small else f"12/31/{y}" for y in years))]
    series = []
    for name in names[: 2 if small else None]:
        values, value = ["100" if small else "100.00"], 100.0
        for _ in years[1:]:
            value *= rng.uniform(0.75, 1.4)
            values.append(str(round(value)) if small else f"{value:.2f}")
        numbers = {y: Number(text, 1, len(rows)) for y, text in zip(years, values, strict=True)}
        rows.append((name, *(cell(text, dollar=not small) for text in values)))
        series.append(Series(f"index/{name}", name, numbers, "index", "stock", name))
    return Table(tuple(rows), 1, TITLES["performance"], tuple(series))


def corner(company: Company, rng: random.Random, *, small: bool) -> str:
    """The unit, as the first cell of the header says it."""
    unit = company.unit_name
    if small:
        return rng.choice((f"in {unit}", unit))
    return rng.choice((f"( in {unit} )", f"in {unit}", f"{unit} of dollars", f"( $ in {unit} )", f"( {unit} )"))


def figure(value: int, decimals: int) -> str:
    """A value in whole units of ``10 ** -decimals`` as digits."""
    return f"{value / 10**decimals:.{decimals}f}"


def cell(text: str, *, dollar: bool, measure: Measure = "money") -> str:
    """A number as FinQA's tables write it: ``$ 58``, ``$ -32 ( 32 )``, ``23.6% ( 23.6 % )``."""
    if measure == "percent":
        return f"{text} ( {text.replace('%', ' %')} )"
    shown = f"{text} ( {text[1:]} )" if text.startswith("-") else text
    return f"$ {shown}" if dollar else shown
