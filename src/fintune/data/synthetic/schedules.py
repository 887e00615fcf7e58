"""Tables that are no lines over years: payments by year due, stock performance, shares bought by month."""

from __future__ import annotations

import random

from fintune.data.synthetic.accounts import Accounts, split
from fintune.data.synthetic.cells import cell, corner, figure
from fintune.data.synthetic.companies import Company
from fintune.data.synthetic.page import Breakdown, Number, Product, Series, Table

_QUARTERS = {
    "december 31": ("october", "november", "december"),
    "september 30": ("july", "august", "september"),
    "june 30": ("april", "may", "june"),
}


def schedule(kind: str, company: Company, books: Accounts, year: int, rng: random.Random, *, small: bool) -> Table:
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


def performance(company: Company, year: int, rng: random.Random, *, small: bool) -> Table:
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
    return Table(tuple(rows), 1, "stock performance", tuple(series))


def buybacks(company: Company, year: int, rng: random.Random, *, small: bool) -> Table:
    """Shares bought in each month of the last quarter, with the average price; small tables have no total."""
    months = _QUARTERS[company.year_end]
    count_name, price_name = rng.choice(
        (("shares purchased", "average price"), ("number of shares", "price per share"))
        if small
        else (
            ("total number of shares purchased", "average price paid per share"),
            ("shares purchased", "average price per share"),
            ("number of shares repurchased", "average cost per share"),
        )
    )
    counts = [rng.randint(110, 9_990) if small else rng.randint(20_000, 3_000_000) for _ in months]
    base = rng.uniform(12, 140)
    corner_text = rng.choice(("", "month") if small else ("", "period", "month"))
    rows: list[tuple[str, ...]] = [(corner_text, count_name, price_name)]
    quantities, products = {}, []
    for month, count in zip(months, counts, strict=True):
        price = f"{base * rng.uniform(0.9, 1.1):.{0 if small else 2}f}"
        quantities[month] = Number(str(count), 1, len(rows))
        name = f"{rng.choice(('cost of the', 'amount paid for the'))} shares purchased in {month}"
        products.append(Product(name, quantities[month], Number(price, 1, len(rows)), year))
        rows.append((month, str(count), cell(price, dollar=not small)))
    breakdowns: tuple[Breakdown, ...] = ()
    if not small:
        average = sum(p.quantity.value * p.price.value for p in products) / sum(counts)
        total = Number(str(sum(counts)), 1, len(rows))
        rows.append(("total", total.text, cell(f"{average:.2f}", dollar=True)))
        breakdowns = (Breakdown("the total number of shares purchased", quantities, total, year, "month"),)
    return Table(tuple(rows), 1, "purchases of common stock", (), breakdowns, tuple(products))
