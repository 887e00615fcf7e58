"""Kinds of question over one quantity: each looks for a fitting series and builds question and program, or nothing."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from fintune.data.synthetic.page import Number, Page, Series
from fintune.data.synthetic.programs import Builder
from fintune.data.synthetic.wordings import WORDINGS
from fintune.finqa.program import Reference

AnswerForm = Literal["number", "percent", "yes_no"]
UNITS = {1_000: "thousands", 1_000_000: "millions", 1_000_000_000: "billions"}
# "the average the tax rate"
_DOUBLED_ARTICLE = re.compile(r"\b(average|annual|combined|greatest|highest|lowest|m(?:ax|in)imum|smallest|total) the ")
# Lines that are changes themselves: "the change in the change in cash" is no question.
CHANGES = frozenset({"cash_change", "working_capital", "net_borrowings"})


@dataclass(frozen=True)
class Draft:
    """A question with its program, before it is executed."""

    question: str
    builder: Builder
    answer_form: AnswerForm = "number"


Pool = Sequence[Series]
Kind = Callable[[Page, random.Random], Draft | None]


def put(kind: str, rng: random.Random, **slots: object) -> str:
    """One wording of a kind; those that name the unit only where there is one."""
    fitting = [text for text in WORDINGS[kind] if "{unit}" not in text or slots.get("unit")]
    text = rng.choice(fitting).format(**slots)
    return _DOUBLED_ARTICLE.sub(r"\1 ", text)


def unit_of(number: Number) -> str:
    """What a number of money counts: "millions", or "" for counts and prices."""
    return UNITS.get(number.scale, "")


def same_sign(*numbers: Number) -> bool:
    """Whether no number is 0 and all are on one side of it."""
    return all(n.value > 0 for n in numbers) or all(n.value < 0 for n in numbers)


def pick(pool: Pool, rng: random.Random, num_years: int = 2, measures: Sequence[str] = ("money",)) -> Series | None:
    """A series of enough years."""
    fitting = [s for s in pool if len(s.numbers) >= num_years and s.measure in measures and s.key not in CHANGES]
    return rng.choice(fitting) if fitting else None


def form_of(series: Series) -> AnswerForm:
    """How a sum, difference or average of a series is written."""
    return "percent" if series.measure == "percent" else "number"


def pick_years(series: Series, rng: random.Random, num_years: int = 2) -> list[int]:
    """Years of a series in order."""
    return sorted(rng.sample(series.years, num_years))


ANY = ("money", "percent", "count", "per_share")


def change(pool: Pool, rng: random.Random) -> Draft | None:
    """``subtract(later, earlier)``."""
    series = pick(pool, rng, measures=ANY)
    if series is None:
        return None
    a, b = pick_years(series, rng)
    build, old, new = Builder(), series.numbers[a], series.numbers[b]
    if old.value == new.value:
        return None
    build.do("subtract", new, old)
    kind = rng.choice(("change", "change", "change", "change_unit" if unit_of(new) else "change", "increase"))
    if kind == "increase" and not (new.value > old.value > 0):
        kind = "change"
    return Draft(put(kind, rng, x=series.name, a=a, b=b, unit=unit_of(new)), build, form_of(series))


def percent_change(pool: Pool, rng: random.Random) -> Draft | None:
    """``subtract(later, earlier), divide(#0, earlier)``."""
    series = pick(pool, rng, measures=("money", "money", "count", "per_share"))
    if series is None:
        return None
    a, b = pick_years(series, rng)
    old, new = series.numbers[a], series.numbers[b]
    if not same_sign(old, new) or old.value == new.value:
        return None
    build = Builder()
    build.do("divide", build.do("subtract", new, old), old)
    kind = rng.choice(("percent_change", "percent_change", "percent_change", "percent_increase", "yearly_growth"))
    if (kind == "percent_increase" and not new.value > old.value > 0) or (kind == "yearly_growth" and b != a + 1):
        kind = "percent_change"
    return Draft(put(kind, rng, x=series.name, a=a, b=b), build, "percent")


def yearly_change(pool: Pool, rng: random.Random) -> Draft | None:
    """``subtract(later, earlier), divide(#0, const_3)``."""
    series = pick(pool, rng, 3)
    if series is None:
        return None
    a, b = series.years[0], series.years[-1]
    build = Builder()
    build.do("divide", build.do("subtract", series.numbers[b], series.numbers[a]), b - a)
    return Draft(put("yearly_change", rng, x=series.name, a=a, b=b), build)


def in_billions(pool: Pool, rng: random.Random) -> Draft | None:
    """``subtract(later, earlier), divide(#0, const_1000)``: the change in the next larger unit."""
    series = pick(pool, rng)
    if series is None:
        return None
    a, b = pick_years(series, rng)
    unit = UNITS.get(series.numbers[a].scale * 1_000)
    if unit is None or series.numbers[a].scale == 1:
        return None
    build = Builder()
    build.do("divide", build.do("subtract", series.numbers[b], series.numbers[a]), 1_000)
    return Draft(put("billions", rng, x=series.name, a=a, b=b, unit=unit), build)


def rose(pool: Pool, rng: random.Random) -> Draft | None:
    """``greater(later, earlier)``, or the other way round for a fall."""
    series = pick(pool, rng, measures=ANY)
    if series is None:
        return None
    a, b = pick_years(series, rng)
    old, new = series.numbers[a], series.numbers[b]
    if old.value == new.value or not same_sign(old, new) or old.value < 0:
        return None
    build, kind = Builder(), rng.choice(("rose", "rose", "fell"))
    build.do("greater", *((new, old) if kind == "rose" else (old, new)))
    return Draft(put(kind, rng, x=series.name, a=a, b=b), build, "yes_no")


def ratio_years(pool: Pool, rng: random.Random) -> Draft | None:
    """``divide(later, earlier)``."""
    series = pick(pool, rng, measures=("money", "count"))
    if series is None:
        return None
    a, b = pick_years(series, rng)
    old, new = series.numbers[a], series.numbers[b]
    if not same_sign(old, new):
        return None
    build = Builder()
    build.do("divide", new, old)
    return Draft(put("ratio_years", rng, x=series.name, a=a, b=b), build)


def sum_years(pool: Pool, rng: random.Random, num_years: int = 2) -> Draft | None:
    """``add(earlier, later)``, and a third year."""
    series = pick([s for s in pool if s.when == "flow"], rng, num_years)
    if series is None:
        return None
    years = pick_years(series, rng, num_years)
    build = Builder()
    _add_up([series.numbers[year] for year in years], build)
    kind = {2: "sum_years", 3: "sum_three"}[num_years]
    return Draft(put(kind, rng, x=series.name, a=years[0], m=years[1], b=years[-1]), build)


def average(pool: Pool, rng: random.Random, num_years: int = 2) -> Draft | None:
    """``add(…), divide(#0, const_2)`` over named years."""
    series = pick(pool, rng, num_years, ANY)
    if series is None:
        return None
    years = pick_years(series, rng, num_years)
    numbers = [series.numbers[year] for year in years]
    build = Builder()
    build.do("divide", _add_up(numbers, build), num_years)
    kind = {2: "average_two", 3: "average_three", 4: "average_four"}[num_years]
    slots = {"a": years[0], "l": years[1], "m": years[-2], "b": years[-1], "unit": unit_of(numbers[0])}
    return Draft(put(kind, rng, x=series.name, **slots), build, form_of(series))


def over_row(operation: str) -> Callable[[Pool, random.Random], Draft | None]:
    """A kind that asks a table operation: the average, highest, lowest or sum of all years shown."""

    def make(pool: Pool, rng: random.Random) -> Draft | None:
        fitting = [s for s in pool if s.row_name and (operation != "table_sum" or s.when == "flow")]
        measures = ("money",) if operation == "table_sum" else ("money", "percent", "per_share")
        series = pick(fitting, rng, measures=measures)
        if series is None or (
            operation in ("table_max", "table_min") and next(iter(series.numbers.values())).value < 0
        ):
            return None
        build = Builder()
        build.over_row(operation, series)
        return Draft(put(operation, rng, x=series.name), build, form_of(series))

    return make


def row_range(pool: Pool, rng: random.Random) -> Draft | None:
    """``table_max(row, none), table_min(row, none), subtract(#0, #1)``."""
    series = pick([s for s in pool if s.row_name], rng)
    if series is None:
        return None
    build = Builder()
    build.do("subtract", build.over_row("table_max", series), build.over_row("table_min", series))
    return Draft(put("range", rng, x=series.name), build)


def roi(pool: Pool, rng: random.Random) -> Draft | None:
    """``subtract(end, const_100), divide(#0, const_100)``: 100 dollars were invested in the first year."""
    series = pick(pool, rng, 2, ("index",))
    if series is None:
        return None
    build, a = Builder(), series.years[0]
    b = rng.choice(series.years[1:])
    build.do("divide", build.do("subtract", series.numbers[b], 100), 100)
    return Draft(put("roi", rng, x=series.name, a=a, b=b), build, "percent")


def roi_gap(pool: Pool, rng: random.Random) -> Draft | None:
    """The difference of two returns, in five steps."""
    fitting = [s for s in pool if s.measure == "index"]
    if len(fitting) < 2:
        return None
    x, y = rng.sample(fitting, 2)
    build, b = Builder(), rng.choice(x.years[1:])
    first = build.do("divide", build.do("subtract", x.numbers[b], 100), 100)
    second = build.do("divide", build.do("subtract", y.numbers[b], 100), 100)
    build.do("subtract", first, second)
    return Draft(put("roi_gap", rng, x=x.name, y=y.name, a=x.years[0], b=b), build, "percent")


def _add_up(numbers: Sequence[Number], build: Builder) -> Reference:
    total = build.do("add", numbers[0], numbers[1])
    for number in numbers[2:]:
        total = build.do("add", total, number)
    return total
