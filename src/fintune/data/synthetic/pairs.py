"""Kinds of question over two quantities: of the table, of the text, or one of each, in one unit or two."""

from __future__ import annotations

import random
from collections.abc import Callable

from fintune.data.synthetic.page import Page, Series
from fintune.data.synthetic.programs import Builder
from fintune.data.synthetic.questions import CHANGES, Draft, Pool, put, same_sign, unit_of

PairKind = Callable[[Pool, Pool, random.Random], Draft | None]

# Charges that lowered income, and the lines that they lowered.
_CHARGES = frozenset({"impairment", "restructuring", "rent", "advertising", "warranty"})
_LOWERED = frozenset({"operating_income", "pretax_income", "gross_profit"})
# A question with "total liabilities and equity and …" could be read in two ways.
_UNPAIRED = CHANGES | {"liabilities_and_equity"}


def pick_pair(
    first: Pool, second: Pool, rng: random.Random, num_years: int = 1
) -> tuple[Series, Series, list[int]] | None:
    """Two series of money and years that both have, in order; flows go with flows, stocks with stocks."""
    pairs = [
        (x, y)
        for x in first
        for y in second
        if x.key != y.key
        and not {x.key, y.key} & _UNPAIRED
        and x.measure == y.measure == "money"
        and (x.when == y.when or first is not second)
        and len(set(x.years) & set(y.years)) >= num_years
    ]
    if not pairs:
        return None
    x, y = rng.choice(pairs)
    years = sorted(rng.sample(sorted(set(x.years) & set(y.years)), num_years))
    if not same_sign(*(series.numbers[year] for series in (x, y) for year in years)):
        return None
    return x, y, years


def percent_of(first: Pool, second: Pool, rng: random.Random) -> Draft | None:
    """``divide(x, y)`` of one year."""
    found = pick_pair(first, second, rng)
    if found is None:
        return None
    x, y, (b,) = found
    over, under = x.numbers[b], y.numbers[b]
    kind = rng.choice(("percent_of", "percent_of", "ratio"))
    if kind == "percent_of" and abs(over.value * over.scale) > abs(under.value * under.scale):
        if first is not second:
            kind = "ratio"
        else:
            x, y, over, under = y, x, under, over
    build = Builder()
    build.do("divide", build.in_unit(over, under.scale), under)
    return Draft(put(kind, rng, x=x.name, y=y.name, b=b), build, "percent" if kind == "percent_of" else "number")


def joined(operation: str) -> PairKind:
    """A kind that adds, subtracts or compares two quantities of one year, counted in the second one's unit."""

    def make(first: Pool, second: Pool, rng: random.Random) -> Draft | None:
        found = pick_pair(first, second, rng)
        if found is None:
            return None
        x, y, (b,) = found
        one, other = x.numbers[b], y.numbers[b]
        if operation == "subtract" and one.value * one.scale < other.value * other.scale:
            x, y, one, other = y, x, other, one
        if operation == "greater" and one.value * one.scale == other.value * other.scale:
            return None
        build = Builder()
        scale = min(one.scale, other.scale)
        build.do(operation, build.in_unit(one, scale), build.in_unit(other, scale))
        kind = {"add": "sum_rows", "subtract": "difference", "greater": "greater"}[operation]
        question = put(kind, rng, x=x.name, y=y.name, b=b)
        if one.scale != other.scale and operation != "greater":
            unit = unit_of(other if other.scale == scale else one) or "dollars"
            question = question.rstrip("?") + f" , in {unit}?"
        return Draft(question, build, "yes_no" if operation == "greater" else "number")

    return make


def ratio_change(first: Pool, second: Pool, rng: random.Random) -> Draft | None:
    """``divide(x, y), divide(x, y), subtract(#0, #1)``: the change of a ratio, later less earlier."""
    found = pick_pair(first, second, rng, 2)
    if found is None:
        return None
    x, y, (a, b) = found
    if x.numbers[a].scale != y.numbers[a].scale:
        return None
    build = Builder()
    later = build.do("divide", x.numbers[b], y.numbers[b])
    build.do("subtract", later, build.do("divide", x.numbers[a], y.numbers[a]))
    return Draft(put("share_change", rng, p=x.name, t=y.name, a=a, b=b), build, "percent")


def ratio_growth(first: Pool, second: Pool, rng: random.Random) -> Draft | None:
    """The percentage change of a ratio, in four steps."""
    return _growth_of("divide", "ratio_growth", first, second, rng)


def growth_gap(first: Pool, second: Pool, rng: random.Random) -> Draft | None:
    """The difference of two growth rates, in five steps."""
    found = pick_pair(first, second, rng, 2)
    if found is None:
        return None
    x, y, (a, b) = found
    build = Builder()
    one = build.do("divide", build.do("subtract", x.numbers[b], x.numbers[a]), x.numbers[a])
    other = build.do("divide", build.do("subtract", y.numbers[b], y.numbers[a]), y.numbers[a])
    build.do("subtract", one, other)
    return Draft(put("growth_gap", rng, x=x.name, y=y.name, a=a, b=b), build, "percent")


def total_growth(first: Pool, second: Pool, rng: random.Random) -> Draft | None:
    """The percentage change of a sum, in four steps."""
    return _growth_of("add", "total_growth", first, second, rng)


def _growth_of(operation: str, wording: str, first: Pool, second: Pool, rng: random.Random) -> Draft | None:
    """The percentage change of what ``operation`` makes of two lines."""
    found = pick_pair(first, second, rng, 2)
    if found is None:
        return None
    x, y, (a, b) = found
    if x.numbers[a].scale != y.numbers[a].scale:
        return None
    build = Builder()
    later = build.do(operation, x.numbers[b], y.numbers[b])
    earlier = build.do(operation, x.numbers[a], y.numbers[a])
    build.do("divide", build.do("subtract", later, earlier), earlier)
    return Draft(put(wording, rng, x=x.name, y=y.name, a=a, b=b), build, "percent")


def without_charge(page: Page, rng: random.Random) -> Draft | None:
    """``add(income, charge)``: what income would have been."""
    charges = [s for s in page.text_series if s.key in _CHARGES]
    found = pick_pair([s for s in page.table.series if s.key in _LOWERED], charges, rng)
    if found is None:
        return None
    income, charge, (b,) = found
    build = Builder()
    build.do("add", income.numbers[b], build.in_unit(charge.numbers[b], page.table.unit))
    return Draft(put("without_charge", rng, x=charge.name, y=income.name, b=b), build)


def product(page: Page, rng: random.Random, *, in_table: bool) -> Draft | None:
    """``multiply(quantity, price)``; plain counts of shares sometimes in millions, by one step more."""
    found = page.table.products if in_table else [item for fact in page.facts for item in fact.products]
    if not found:
        return None
    item = rng.choice(found)
    build = Builder()
    result = build.do("multiply", item.quantity, item.price)
    unit = unit_of(item.quantity)
    if not unit and rng.random() < 0.5:
        build.do("divide", result, 1_000_000)
        unit = "millions"
    return Draft(put("product_unit" if unit else "product", rng, x=item.name, unit=unit), build)


def product_share(page: Page, rng: random.Random) -> Draft | None:
    """A quantity times a price as a part of a table's line."""
    found = [(item, s) for fact in page.facts for item in fact.products for s in page.table.series]
    found = [(item, s) for item, s in found if s.measure == "money" and item.year in s.numbers]
    if not found:
        return None
    item, series = rng.choice(found)
    under = series.numbers[item.year]
    if under.value <= 0:
        return None
    build = Builder()
    result = build.do("multiply", item.quantity, item.price)
    if item.quantity.scale > under.scale:
        result = build.do("multiply", result, item.quantity.scale // under.scale)
    elif item.quantity.scale < under.scale:
        result = build.do("divide", result, under.scale // item.quantity.scale)
    build.do("divide", result, under)
    return Draft(put("product_share", rng, x=item.name, y=f"{series.name} in {item.year}"), build, "percent")


def rate(page: Page, rng: random.Random) -> Draft | None:
    """``multiply(line, rate%)``, or what is left of the line."""
    keys = {series.key: series for series in page.table.series}
    found = [r for fact in page.facts for r in fact.rates if r.base in keys and r.year in keys[r.base].numbers]
    if not found or "income_tax" in keys:
        return None
    item = rng.choice(found)
    base = keys[item.base]
    number = base.numbers[item.year]
    if number.value <= 0:
        return None
    build = Builder()
    part = build.do("multiply", number, item.rate)
    if rng.random() < 0.3:
        build.do("subtract", number, part)
        return Draft(put("rate_rest", rng, x=item.name, y=base.name, b=item.year), build)
    return Draft(put("rate", rng, x=item.name, b=item.year, unit=unit_of(number)), build)


def per_piece(page: Page, rng: random.Random) -> Draft | None:
    """``multiply(line, const_1000000), divide(#0, count)``: dollars of a line for each employee or store."""
    counts = [s for s in page.text_series if s.measure == "count"]
    found = [(x, y, b) for x in counts for y in page.table.series if y.measure == "money" for b in y.years]
    found = [(x, y, b) for x, y, b in found if b in x.numbers and y.numbers[b].value > 0]
    if not found:
        return None
    x, y, b = rng.choice(found)
    build = Builder()
    build.do("divide", build.in_unit(y.numbers[b], 1), x.numbers[b])
    name = x.key.removesuffix("s")
    return Draft(put("per_piece", rng, x=name, y=y.name, b=b), build)
