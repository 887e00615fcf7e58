"""Tables of a page: lines of the books over years, payments by year due, stock performance, shares bought by month."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

from fintune.data.synthetic.company import phrases, split_total
from fintune.data.synthetic.page import (
    Breakdown,
    Measure,
    NumberSeries,
    PageContext,
    PageNumber,
    PageTable,
    Product,
    When,
)

TABLE_WEIGHTS = {
    "income": 5, "balance": 4, "cash_flow": 3, "segments": 4, "regions": 2, "maturities": 3, "leases": 2,
    "performance": 1.5, "buybacks": 1.5,
}  # fmt: skip
"""How often a page shows each kind of table."""

_QUARTERS = {
    "december 31": ("october", "november", "december"),
    "september 30": ("july", "august", "september"),
    "june 30": ("april", "may", "june"),
}

_Lines: TypeAlias = dict[str, Mapping[int, int]]
_Texts: TypeAlias = dict[str, tuple[Measure, dict[int, str]]]


def make_page_table(kind: str, context: PageContext) -> PageTable:
    """Make a table; in a small page it has at most 5 rows and 3 years.

    Args:
        kind: A key of :data:`TABLE_WEIGHTS`.
        context: Its year is the newest in the table, or the one before the first payment due.
    """
    if kind in ("maturities", "leases"):
        return _schedule(kind, context)
    if kind == "performance":
        return _performance(context)
    return _buybacks(context) if kind == "buybacks" else _table_over_years(kind, context)


def _table_over_years(kind: str, context: PageContext) -> PageTable:
    """Lines over years; in a tenth of the full-size tables the years run down."""
    company, books, rng, small = context.company, context.books, context.rng, context.small
    past = [year for year in books.years if year <= context.year]
    if kind in ("segments", "regions"):
        revenues = books.segments if kind == "segments" else books.regions
        lines: _Lines = {name: revenues[name] for name in rng.sample(sorted(revenues), len(revenues))}
        lines["total"] = books.lines["revenue"]
        years = past[-2 if small else -rng.choice((2, 3)) :]
    else:
        lines, years = _statement_lines(kind, past, context)
    columns = years[::-1] if company.newest_first else years
    is_transposed = not small and rng.random() < 0.1
    dollars = rng.choice(("none", "ends") if small else ("none", "ends", "ends", "all"))
    texts: _Texts = {
        key: ("money", {year: _figure(values[year], company.decimals) for year in years})
        for key, values in lines.items()
    }
    if kind == "income" and rng.random() < (0.12 if small else 0.4):
        texts |= _derived_row(rng.choice(("operating_margin", "earnings_per_share")), years, lines, context)
    rows: list[tuple[str, ...]] = [(_corner(context), *_year_labels(columns, context))]
    series: dict[str, NumberSeries] = {}
    for row, (key, (measure, values)) in enumerate(texts.items(), 1):
        dollar = dollars == "all" or (dollars == "ends" and row in (1, len(lines)))
        scale = company.unit if measure == "money" else 1
        position = {year: 1 + columns.index(year) if is_transposed else row for year in years}
        numbers = {year: PageNumber(values[year], scale, position[year]) for year in years}
        name, spoken = _row_name(key, context), _spoken_name(key, context)
        rows.append((name, *(_cell(values[year], dollar=dollar, measure=measure) for year in columns)))
        when: When = "stock" if kind == "balance" else "flow"
        series[key] = NumberSeries(key, spoken, numbers, measure, when, None if is_transposed else name)
    if is_transposed:
        rows = list(zip(*rows, strict=True))
    breakdowns = tuple(part for key in lines for part in _breakdowns(key, series, years, context))
    return PageTable(tuple(rows), company.unit, _title(kind), series=tuple(series.values()), breakdowns=breakdowns)


def _statement_lines(kind: str, past: list[int], context: PageContext) -> tuple[_Lines, list[int]]:
    """Draw the lines that a statement shows, and its years."""
    rng, lines, totals = context.rng, context.books.lines, phrases("totals")
    num_years = min(rng.choice((2, 2, 3) if context.small else (2, 3, 3, 4, 5)), len(past))
    years = past[-num_years:]
    keys_in_order = ("net_income", *phrases(kind)) if kind == "cash_flow" else phrases(kind)
    usable = [key for key in keys_in_order if all(lines[key][year] for year in years)]
    limit = (rng.choice((3, 3, 4)) if num_years == 2 else 2) if context.small else rng.randint(5, 14)
    usable_totals = [key for key in usable if key in totals and set(totals[key]) <= set(usable)]
    keys: set[str] = set()
    if usable_totals and rng.random() < 0.6:
        total = rng.choice(usable_totals)
        keys = {total, *rng.sample(totals[total], min(limit - 1, len(totals[total])))}
    others = [key for key in usable if key not in keys]
    keys |= set(rng.sample(others, min(limit - len(keys), len(others))))
    return {key: lines[key] for key in usable if key in keys}, years


def _derived_row(key: str, years: Sequence[int], lines: _Lines, context: PageContext) -> _Texts:
    """Return a row of percentages or of amounts a share for below the lines, or nothing if it would hold a 0."""
    books, company = context.books, context.company
    if key == "operating_margin" and {"revenue", "operating_income"} <= set(lines):
        return {}  # With both lines in the table, a question for their ratio would have two answers.
    texts = {}
    for year in years:
        if key == "operating_margin":
            texts[year] = f"{100 * books.lines['operating_income'][year] / books.lines['revenue'][year]:.1f}%"
        else:
            income = books.lines["net_income"][year] / 10**company.decimals * company.unit
            texts[year] = f"{income / 1_000_000 / books.shares[year]:.2f}"
    if not all(float(text.rstrip("%")) for text in texts.values()):
        return {}
    return {key: ("percent" if key == "operating_margin" else "per_share", texts)}


def _breakdowns(
    key: str, series: Mapping[str, NumberSeries], years: Sequence[int], context: PageContext
) -> Iterator[Breakdown]:
    """Yield the parts of a total line for each year, if the table shows any."""
    is_revenue = key == "total"
    part_keys = [other for other in series if other != key] if is_revenue else phrases("totals").get(key, ())
    parts = {_row_name(part, context): series[part].numbers for part in part_keys if part in series}
    for year in years if parts else ():
        numbers = {name: part[year] for name, part in parts.items()}
        yield Breakdown(series[key].name, numbers, series[key].numbers[year], year)


def _row_name(key: str, context: PageContext) -> str:
    names = context.company.names
    return f"total {names['revenue'].removeprefix('total ')}" if key == "total" else names.get(key, key)


def _spoken_name(key: str, context: PageContext) -> str:
    """Return the name of a line in a question: a segment's row "coal" is "coal net sales"."""
    if key == "total" or key in context.company.names:
        return _row_name(key, context)
    return f"{key} {context.company.names['revenue'].removeprefix('total ')}"


def _year_labels(columns: Sequence[int], context: PageContext) -> Iterator[str]:
    prefix = "" if context.small or context.rng.random() < 0.7 else f"{context.company.year_end} "
    return (f"{prefix}{year}" for year in columns)


def _schedule(kind: str, context: PageContext) -> PageTable:
    """Payments by year due and their total: one column, or one row in a fifth of the full-size tables."""
    company, lines, year, rng, small = context.company, context.books.lines, context.year, context.rng, context.small
    num_years = rng.choice((2, 3) if small else (3, 5, 5))
    labels = [str(year + step) for step in range(1, num_years + 1)] + ["thereafter"]
    owed = lines["long_term_debt"][year] + lines["current_debt"][year]
    if kind == "leases":
        owed = max(10 * len(labels), round(lines["revenue"][year] * rng.uniform(0.05, 0.3)))
    weights = [rng.uniform(0.3, 1.5) for _ in labels[:-1]] + [rng.uniform(0.5, 4)]
    values = [max(1, value) for value in split_total(owed, weights)]
    title = rng.choice(phrases("schedules")[kind])
    names = [*labels, rng.choice(("total", f"total {title}"))]
    all_dollars = rng.random() < 0.3
    texts = [_figure(value, company.decimals) for value in (*values, sum(values))]
    cells = [_cell(text, dollar=all_dollars or k in (0, len(labels))) for k, text in enumerate(texts)]
    corner = _corner(context)
    heading = rng.choice(("amount", "payments", title))
    if not small and rng.random() < 0.2:
        rows: tuple[tuple[str, ...], ...] = ((corner, *names), (title, *cells))
        positions = [1] * len(texts)
    else:
        rows = ((rng.choice(("year", "")), f"{heading} {corner}".strip()), *zip(names, cells, strict=True))
        positions = list(range(1, len(texts) + 1))
    numbers = [PageNumber(text, company.unit, row) for text, row in zip(texts, positions, strict=True)]
    whole = Breakdown(f"total {title}", dict(zip(labels, numbers, strict=False)), numbers[-1], None, "due")
    owed_now = NumberSeries(kind, whole.total_name, {year: whole.total}, when="stock")
    return PageTable(rows, company.unit, title, series=(owed_now,), breakdowns=(whole,))


def _performance(context: PageContext) -> PageTable:
    """What 100 dollars in the company became, beside one to three indices."""
    company, year, rng, small = context.company, context.year, context.rng, context.small
    years = range(year - (2 if small else 5), year + 1)
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
        numbers = {y: PageNumber(text, 1, len(rows)) for y, text in zip(years, values, strict=True)}
        rows.append((name, *(_cell(text, dollar=not small) for text in values)))
        series.append(NumberSeries(f"index/{name}", name, numbers, "index", "stock", name))
    return PageTable(tuple(rows), 1, _title("performance"), series=tuple(series))


def _buybacks(context: PageContext) -> PageTable:
    """Shares bought in each month of the last quarter and the average price; small tables have no total."""
    rng, small = context.rng, context.small
    months = _QUARTERS[context.company.year_end]
    headings = rng.choice(phrases("buybacks")["small" if small else "full"]).split(" , ")
    counts = [rng.randint(110, 9_990) if small else rng.randint(20_000, 3_000_000) for _ in months]
    base = rng.uniform(12, 140)
    rows: list[tuple[str, ...]] = [(rng.choice(("", "month") if small else ("", "period", "month")), *headings)]
    products = []
    for month, count in zip(months, counts, strict=True):
        price = f"{base * rng.uniform(0.9, 1.1):.{0 if small else 2}f}"
        quantity, price_number = PageNumber(str(count), 1, len(rows)), PageNumber(price, 1, len(rows))
        name = f"{rng.choice(('cost of the', 'amount paid for the'))} shares purchased in {month}"
        products.append(Product(name, quantity, price_number, context.year))
        rows.append((month, str(count), _cell(price, dollar=not small)))
    breakdowns: tuple[Breakdown, ...] = ()
    if not small:
        average = sum(product.quantity.value * product.price.value for product in products) / sum(counts)
        total = PageNumber(str(sum(counts)), 1, len(rows))
        rows.append(("total", total.text, _cell(f"{average:.2f}", dollar=True)))
        quantities = {month: product.quantity for month, product in zip(months, products, strict=True)}
        breakdowns = (Breakdown("the total number of shares purchased", quantities, total, context.year, "month"),)
    return PageTable(tuple(rows), 1, _title("buybacks"), breakdowns=breakdowns, products=tuple(products))


def _title(kind: str) -> str:
    return phrases("titles")[kind][0]


def _corner(context: PageContext) -> str:
    """Draw the first cell of the header, which names the unit."""
    corners = phrases("corners")["small" if context.small else "full"]
    return context.rng.choice(corners).format(unit=context.company.unit_name)


def _figure(value: int, decimals: int) -> str:
    """Write a value in units of ``10 ** -decimals`` as digits."""
    return f"{value / 10**decimals:.{decimals}f}"


def _cell(text: str, *, dollar: bool, measure: Measure = "money") -> str:
    """Write a number as FinQA's tables do: ``$ 58``, ``$ -32 ( 32 )``, ``23.6% ( 23.6 % )``."""
    if measure == "percent":
        return f"{text} ( {text.replace('%', ' %')} )"
    cell = f"{text} ( {text[1:]} )" if text.startswith("-") else text
    return f"$ {cell}" if dollar else cell
