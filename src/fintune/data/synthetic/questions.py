"""Kinds of question: what each needs of a page, its program, its wordings, and how often it is asked."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeAlias

from fintune.data.synthetic.page import Breakdown, Page, Size
from fintune.data.synthetic.query import (
    CHANGES,
    UNITS,
    AnswerForm,
    Draft,
    NoQuestionError,
    Operands,
    Query,
    converted,
    require,
    same_sign,
    unit_of,
)

_CHARGES = frozenset({"impairment", "restructuring", "rent", "advertising", "warranty"})
"""Facts that lowered income."""
_LOWERED = frozenset({"operating_income", "pretax_income", "gross_profit"})
"""Lines of the accounts that these facts lowered."""


def _ask_series(
    query: Query,
    wordings: str,
    program: str,
    *,
    needs: str = "",
    measures: str = "money",
    num_years: int = 2,
    years: str = "drawn",
    form: AnswerForm | None = None,
) -> Draft:
    """Ask about one quantity.

    Args:
        query: The page.
        wordings: Kinds of wording to draw from; the first replaces one that does not fit the numbers.
        program: A template over the numbers of the first year ``a``, the second ``l``, the last but one ``m`` and the
            last ``b``, the series ``x``, and ``n``, the number of years from the first to the last.
        needs: "differ", "same_sign" or "positive" numbers; a "flow" or a "row"; a "larger_unit".
        measures: Measures that the series may have.
        num_years: Years that are drawn, or that the series must have.
        years: Whether the years are "drawn", "from_first" (the first and a later one), or "all" of the series.
        form: How the answer is written; None means as the series is.
    """
    series = query.choose(
        series
        for series in query.source.series
        if len(series.numbers) >= num_years
        and series.measure in measures.split()
        and series.key not in CHANGES
        and (series.when == "flow" or "flow" not in needs)
        and (series.row_name or "row" not in needs)
    )
    chosen: Sequence[int] = sorted(series.numbers)
    if years == "drawn":
        chosen = sorted(query.rng.sample(chosen, num_years))
    elif years == "from_first":
        chosen = (chosen[0], query.rng.choice(chosen[1:]))
    by_slot = {"a": chosen[0], "l": chosen[1], "m": chosen[-2], "b": chosen[-1]}
    numbers = {slot: series.numbers[year] for slot, year in by_slot.items()}
    old, new, unit = numbers["a"], numbers["b"], unit_of(numbers["a"])
    if "larger_unit" in needs:
        unit = UNITS.get(old.scale * 1_000, "") if unit else ""
        require(bool(unit))
    require(old.value != new.value or "differ" not in needs)
    require(same_sign(old, new) or "same_sign" not in needs)
    require(old.value >= 0 or "positive" not in needs)
    kinds = wordings.split()
    wording = query.rng.choice(kinds) if len(kinds) > 1 else kinds[0]
    fits = {
        "increase": new.value > old.value > 0,
        "percent_increase": new.value > old.value > 0,
        "yearly_growth": chosen[-1] == chosen[0] + 1,
        "change_unit": bool(unit),
    }
    wording = wording if fits.get(wording, True) else kinds[0]
    program = "greater(a, b)" if wording == "fell" else program
    form = form or ("percent" if series.measure == "percent" else "number")
    operands: Operands = {**numbers, "x": series, "n": chosen[-1] - chosen[0]}
    return query.draft(wording, program, operands, {**by_slot, "x": series.name, "unit": unit}, form)


def _ask_returns(query: Query) -> Draft:
    """Ask for the difference of the returns of two investments of 100 dollars."""
    indices = [series for series in query.source.series if series.measure == "index"]
    require(len(indices) > 1)
    x, y = query.rng.sample(indices, 2)
    first_year, *later_years = sorted(x.numbers)
    b = query.rng.choice(later_years)
    program = "subtract(divide(subtract(x, 100), 100), divide(subtract(y, 100), 100))"
    slots = {"x": x.name, "y": y.name, "a": first_year, "b": b}
    return query.draft("roi_gap", program, {"x": x.numbers[b], "y": y.numbers[b]}, slots, "percent")


def _ask_pair(query: Query, operation: str) -> Draft:
    """Ask for a sum, difference, ratio or comparison of two quantities of one year."""
    x, y, (b,) = query.pair()
    first, second = x.numbers[b], y.numbers[b]
    first_amount, second_amount = first.value * first.scale, second.value * second.scale
    wording = {"add": "sum_rows", "subtract": "difference"}.get(operation, operation)
    if operation == "divide":
        wording = query.rng.choice(("percent_of", "percent_of", "ratio"))
        if wording == "percent_of" and query.evidence == "both" and abs(first_amount) > abs(second_amount):
            wording = "ratio"
    is_too_large = wording == "percent_of" and abs(first_amount) > abs(second_amount)
    if is_too_large or (operation == "subtract" and first_amount < second_amount):
        x, y, first, second = y, x, second, first
    require(operation != "greater" or first_amount != second_amount)
    scale = second.scale if operation == "divide" else min(first.scale, second.scale)
    return query.draft(
        wording,
        f"{operation}({converted('x', first, scale)}, {converted('y', second, scale)})",
        {"x": first, "y": second},
        {"x": x.name, "y": y.name, "b": b},
        "percent" if wording == "percent_of" else "yes_no" if operation == "greater" else "number",
        asked_unit=UNITS.get(scale, "dollars")
        if first.scale != second.scale and operation in ("add", "subtract")
        else "",
    )


def _ask_pair_change(query: Query, wording: str, program: str) -> Draft:
    """Compare two quantities over two years: in the template ``x`` and ``y`` are later, ``v`` and ``w`` earlier."""
    x, y, (a, b) = query.pair(2)
    require(wording == "growth_gap" or x.numbers[a].scale == y.numbers[a].scale)
    operands = {"v": x.numbers[a], "w": y.numbers[a], "x": x.numbers[b], "y": y.numbers[b]}
    slots = {"x": x.name, "y": y.name, "p": x.name, "t": y.name, "a": a, "b": b}
    return query.draft(wording, program, operands, slots, "percent")


def _ask_part(query: Query, kind: str, program: str) -> Draft:
    """Ask for the share of one part ``p`` of a total ``t``, or for the rest."""
    whole, name = _pick_part(query, query.source.breakdowns)
    operands, wording = {"p": whole.parts[name], "t": whole.total}, _wording_for(kind, whole)
    if whole.wording == "due" and name == "thereafter":
        require(kind == "share")
        wording, name = "share_after", list(whole.parts)[-2]
    slots = {"t": whole.total_name, "p": name, "b": whole.year}
    return query.draft(wording, program, operands, slots, "number" if kind == "rest" else "percent")


def _ask_two_parts(query: Query, kind: str, program: str) -> Draft:
    """Ask for the share, sum, difference, ratio or order of two parts ``p`` and ``q`` of a total ``t``."""
    usable = ("due", "month", "part") if kind == "share_two" else ("due", "month")
    totals = (whole for whole in query.source.breakdowns if whole.wording in usable)
    whole = query.choose(whole for whole in totals if len(whole.parts.keys() - {"thereafter"}) > 1)
    names = [name for name in whole.parts if name != "thereafter"]
    p, q = (names[index] for index in sorted(query.rng.sample(range(len(names)), 2)))
    if kind in ("difference", "ratio", "greater") and whole.parts[p].value < whole.parts[q].value:
        p, q = q, p
    if kind == "greater" and query.rng.random() < 0.5:
        p, q = q, p
    operands = {"p": whole.parts[p], "q": whole.parts[q], "t": whole.total}
    require(same_sign(*operands.values()))
    form: AnswerForm = "percent" if kind == "share_two" else "yes_no" if kind == "greater" else "number"
    slots = {"t": whole.total_name, "p": p, "q": q, "b": whole.year}
    return query.draft(_wording_for(kind, whole), program, operands, slots, form)


def _ask_share_change(query: Query) -> Draft:
    """Ask for the change of a part's share over two years."""
    totals = query.source.breakdowns
    one, name = _pick_part(query, [whole for whole in totals if whole.year is not None])
    same_total = [whole for whole in totals if whole.total_name == one.total_name and whole.year != one.year]
    other = query.choose(whole for whole in same_total if name in whole.parts)
    old, new = sorted((one, other), key=lambda whole: whole.year or 0)
    operands = {"v": old.parts[name], "w": old.total, "x": new.parts[name], "y": new.total}
    require(same_sign(*operands.values()))
    slots = {"p": name, "t": one.total_name, "a": old.year, "b": new.year}
    return query.draft("share_change", "subtract(divide(x, y), divide(v, w))", operands, slots, "percent")


def _pick_part(query: Query, breakdowns: Iterable[Breakdown]) -> tuple[Breakdown, str]:
    whole = query.choose(breakdowns)
    name = query.choose(whole.parts)
    require(same_sign(whole.parts[name], whole.total))
    return whole, name


def _wording_for(kind: str, whole: Breakdown) -> str:
    return kind if whole.wording == "part" else f"{kind}_{whole.wording}"


def _ask_without_charge(query: Query) -> Draft:
    """Ask what income would have been without a charge."""
    lines = [series for series in query.page.table.series if series.key in _LOWERED]
    charges = [series for series in query.page.text.series if series.key in _CHARGES]
    income, charge, (b,) = query.pair_of(lines, charges)
    program = f"add(y, {converted('x', charge.numbers[b], query.page.table.unit)})"
    slots = {"x": charge.name, "y": income.name, "b": b}
    return query.draft("without_charge", program, {"y": income.numbers[b], "x": charge.numbers[b]}, slots)


def _ask_product(query: Query) -> Draft:
    """Ask for a quantity times a price; for a plain count of shares sometimes in millions, by one step more."""
    product = query.choose(query.source.products)
    program, unit = "multiply(q, p)", unit_of(product.quantity)
    if not unit and query.rng.random() < 0.5:
        program, unit = "divide(multiply(q, p), 1000000)", "millions"
    operands = {"q": product.quantity, "p": product.price}
    return query.draft("product_unit" if unit else "product", program, operands, {"x": product.name, "unit": unit})


def _ask_product_share(query: Query) -> Draft:
    """Ask for a quantity times a price as a part of a line of the table."""
    lines = [series for series in query.page.table.series if series.measure == "money"]
    products = query.page.text.products
    product, line = query.choose((item, line) for item in products for line in lines if item.year in line.numbers)
    number = line.numbers[product.year]
    require(number.value > 0)
    program = f"divide({converted('multiply(q, p)', product.quantity, number.scale)}, y)"
    operands = {"q": product.quantity, "p": product.price, "y": number}
    slots = {"x": product.name, "y": f"{line.name} in {product.year}"}
    return query.draft("product_share", program, operands, slots, "percent")


def _ask_rate(query: Query) -> Draft:
    """Ask for a percentage of a line, or for the line without it."""
    lines = {series.key: series for series in query.page.table.series}
    require("income_tax" not in lines)
    rates = [rate for rate in query.page.text.rates if rate.base in lines]
    rate = query.choose(rate for rate in rates if rate.year in lines[rate.base].numbers)
    number = lines[rate.base].numbers[rate.year]
    require(number.value > 0)
    is_rest = query.rng.random() < 0.3
    wording, program = ("rate_rest", "subtract(y, multiply(y, r))") if is_rest else ("rate", "multiply(y, r)")
    slots = {"x": rate.name, "y": lines[rate.base].name, "b": rate.year, "unit": unit_of(number)}
    return query.draft(wording, program, {"y": number, "r": rate.rate}, slots)


def _ask_per_piece(query: Query) -> Draft:
    """Ask for the dollars of a line for each employee or store."""
    counts = [series for series in query.page.text.series if series.measure == "count"]
    lines = [series for series in query.page.table.series if series.measure == "money"]
    pairs = ((x, y, b) for x in counts for y in lines for b in sorted(y.numbers) if b in x.numbers)
    x, y, b = query.choose((x, y, b) for x, y, b in pairs if y.numbers[b].value > 0)
    slots = {"x": x.key.removesuffix("s"), "y": y.name, "b": b}
    program = f"divide({converted('y', y.numbers[b], 1)}, x)"
    return query.draft("per_piece", program, {"x": x.numbers[b], "y": y.numbers[b]}, slots)


_Maker: TypeAlias = Callable[[Query], Draft]
_Weights: TypeAlias = float | tuple[float, ...]
_ALL, _SHOWN = "money percent count per_share", "money percent per_share"


def _series(wordings: str, program: str, **options: Any) -> _Maker:
    return partial(_ask_series, wordings=wordings, program=program, **options)


def _kind(make: Callable[..., Draft], *arguments: str) -> _Maker:
    return lambda query: make(query, *arguments)


_CATALOGUE: tuple[tuple[str, str, _Weights, _Maker], ...] = (
    ("table text", "1", 14, _series(
        "change change change change_unit increase", "subtract(b, a)", needs="differ", measures=_ALL
    )),
    ("table text", "1", 32, _kind(_ask_part, "share", "divide(p, t)")),
    ("table text", "1", 3, _kind(_ask_part, "rest", "subtract(t, p)")),
    ("table text", "1", 2, _series("sum_years", "add(a, b)", needs="flow")),
    ("table text", "1", 2, _series("ratio_years", "divide(b, a)", needs="same_sign", measures="money count")),
    ("table text", "1", 0.8, _series(
        "rose rose fell", "greater(b, a)", needs="differ same_sign positive", measures=_ALL, form="yes_no"
    )),
    ("table text", "2", 24, _series(
        "percent_change percent_change percent_change percent_increase yearly_growth", "divide(subtract(b, a), a)",
        needs="differ same_sign", measures="money count per_share", form="percent",
    )),
    ("table text", "2", 3, _series("average_two", "divide(add(a, b), 2)", measures=_ALL)),
    ("table text", "2", 2, _series("sum_three", "add(add(a, l), b)", needs="flow", num_years=3)),
    ("table text", "2", 1, _series("billions", "divide(subtract(b, a), 1000)", needs="larger_unit")),
    ("table text", "2", 1, _series("yearly_change", "divide(subtract(b, a), n)", num_years=3, years="all")),
    ("table text", "2", 2, _kind(_ask_part, "share_rest", "divide(subtract(t, p), t)")),
    ("table text", "3", 3, _series("average_three", "divide(add(add(a, l), b), 3)", measures=_ALL, num_years=3)),
    ("table text", "4", 1, _series("average_four", "divide(add(add(add(a, l), m), b), 4)", measures=_ALL, num_years=4)),
    ("table", "1", 4.5, _series("table_average", "table_average(x)", needs="row", measures=_SHOWN, years="all")),
    ("table", "1", 2.4, _series("table_max", "table_max(x)", needs="row positive", measures=_SHOWN, years="all")),
    ("table", "1", 1.8, _series("table_min", "table_min(x)", needs="row positive", measures=_SHOWN, years="all")),
    ("table", "1", 4.0, _series("table_sum", "table_sum(x)", needs="row flow", years="all")),
    ("table", "3", 0.6, _series("range", "subtract(table_max(x), table_min(x))", needs="row", years="all")),
    ("table", "2", 6, _series(
        "roi", "divide(subtract(b, 100), 100)", measures="index", years="from_first", form="percent"
    )),
    ("table", "4", 2, _ask_returns),
    ("table", "2", 5.0, _kind(_ask_two_parts, "share_two", "divide(add(p, q), t)")),
    ("table", "1", 4.0, _kind(_ask_two_parts, "sum", "add(p, q)")),
    ("table", "1", 2.0, _kind(_ask_two_parts, "difference", "subtract(p, q)")),
    ("table", "1", 1.0, _kind(_ask_two_parts, "ratio", "divide(p, q)")),
    ("table", "1", 0.4, _kind(_ask_two_parts, "greater", "greater(p, q)")),
    ("table", "3", 2, _ask_share_change),
    ("table text both", "1 2", (12 * 0.6, 12 * 0.4, 12), _kind(_ask_pair, "divide")),
    ("table text both", "1 2", (5 * 0.6, 5 * 0.4, 5), _kind(_ask_pair, "add")),
    ("table text both", "1 2", (3 * 0.6, 3 * 0.4, 3), _kind(_ask_pair, "subtract")),
    ("table text both", "1 2", (0.8 * 0.6, 0.8 * 0.4, 0.8), _kind(_ask_pair, "greater")),
    ("table text both", "3", 1, _kind(_ask_pair_change, "share_change", "subtract(divide(x, y), divide(v, w))")),
    ("table text both", "4", 0.7, _kind(
        _ask_pair_change, "ratio_growth", "divide(subtract(divide(x, y), divide(v, w)), divide(v, w))"
    )),
    ("table text both", "4", 1.5, _kind(
        _ask_pair_change, "growth_gap", "subtract(divide(subtract(x, v), v), divide(subtract(y, w), w))"
    )),
    ("table text both", "4", 0.7, _kind(
        _ask_pair_change, "total_growth", "divide(subtract(add(x, y), add(v, w)), add(v, w))"
    )),
    ("both", "1 2", 2, _ask_without_charge),
    ("both", "1 2", 45, _ask_rate),
    ("both", "2 3", 12, _ask_product_share),
    ("both", "2", 6, _ask_per_piece),
    ("text", "1 2", 30, _ask_product),
    ("table", "1 2", 40, _ask_product),
)  # fmt: skip
"""Evidence, numbers of steps (4 means 4 and more), weight among the kinds of this evidence and length, and maker."""

_MIXTURES: dict[Size, dict[str, tuple[float, ...]]] = {
    "full": {"table": (35, 20.5, 3.6, 1.5), "text": (14, 7.0, 1.4, 0.5), "both": (12, 6.2, 1.6, 0.6)},
    "small": {"table": (30, 19, 3.5, 1.5), "text": (15, 9.0, 1.5, 0.6), "both": (19, 14.0, 5.0, 1.4)},
}
"""How often a question has this evidence and 1, 2, 3 or more steps.

FinQA's dev split has 61 / 23 / 17 % of table, text and both; 1 to 4 steps are 57, 36, 5 and 2.5 % of its test split.
If a page has no such question, another is drawn. The weights make up for it, more on small pages.
"""


def draw_draft(page: Page, size: Size, rng: random.Random) -> Draft | None:
    """Draw evidence and length, and a question of these; None if the page has no such question."""
    mixture = _MIXTURES[size]
    lengths = [(evidence, num_steps) for evidence in mixture for num_steps in (1, 2, 3, 4)]
    evidence, num_steps = rng.choices(lengths, [weight for weights in mixture.values() for weight in weights])[0]
    kinds: list[tuple[float, _Maker]] = []
    for evidences, steps, weights, make in _CATALOGUE:
        if evidence in evidences.split() and str(num_steps) in steps.split():
            position = evidences.split().index(evidence)
            kinds.append((weights[position] if isinstance(weights, tuple) else weights, make))
    query = Query(page, evidence, rng)
    while kinds:
        kind = rng.choices(kinds, [weight for weight, _ in kinds])[0]
        for _ in range(4):
            try:
                draft = kind[1](query)
            except NoQuestionError:
                continue
            if min(len(draft.program.steps), 4) == num_steps:
                return draft
        kinds.remove(kind)
    return None
