"""Sentences of a page: facts that only the text has, filler that no question needs, and the line before the table."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fintune.data.synthetic.company import make_short_name, phrases
from fintune.data.synthetic.page import (
    Breakdown,
    Fact,
    Measure,
    NumberSeries,
    PageContext,
    PageNumber,
    Product,
    Rate,
    When,
)

_SCALE_WORDS = {1_000: "thousand", 1_000_000: "million", 1_000_000_000: "billion"}

_SERIES_FACTS: dict[str, tuple[Measure, When, float, float]] = {
    "rent": ("money", "flow", 0.01, 0.05), "advertising": ("money", "flow", 0.01, 0.06),
    "impairment": ("money", "flow", 0.01, 0.08), "restructuring": ("money", "flow", 0.01, 0.06),
    "pension": ("money", "flow", 0.01, 0.05), "warranty": ("money", "flow", 0.005, 0.03),
    "backlog": ("money", "stock", 0.3, 1.5), "unrecognized_tax": ("money", "stock", 0.02, 0.1),
    "employees": ("count", "stock", 120, 40_000), "stores": ("count", "stock", 30, 4_000),
    "tax_rate": ("percent", "flow", 20, 38), "dividend": ("per_share", "flow", 0.2, 4),
}  # fmt: skip
"""Measure and range of the facts that give one quantity for two or three years; money is a share of revenue."""


def make_fact(kind: str, context: PageContext, index: int) -> Fact:
    """Make fact number ``index`` of a page; the kinds are those of :data:`FACT_KINDS`."""
    if kind in _SINGLE_FACTS:
        return _SINGLE_FACTS[kind](context, index)
    measure, when, low, high = _SERIES_FACTS[kind]
    rng, small = context.rng, context.small
    name = rng.choice(phrases("fact_names")[kind])
    if measure == "money":
        years = _draw_years(context, 2 if small else rng.choice((2, 2, 3)))
        numbers = _draw_amounts(context, index, low, high, len(years))
        values, wording, date = [_dollars(number) for number in numbers], "amounts", f"amounts_{when}"
    else:
        years = _draw_years(context, 2)
        base = rng.uniform(low, min(high, 30 * low) if small else high)
        texts = _effective_tax_rates(context, years) if kind == "tax_rate" else []
        while len(texts) < 2:
            value = base * rng.uniform(0.8, 1.25)
            text = {"count": f"{value:.0f}", "percent": f"{value:.1f}%", "per_share": f"{value:.2f}"}[measure]
            if text not in texts:
                texts.append(text)
        numbers = [PageNumber(text, fact=index) for text in texts]
        values = [_percent(text) if measure == "percent" else text for text in texts]
        values, wording, date = [f"$ {text}" if measure == "per_share" else text for text in values], "figures", when
    slots = {"end": context.company.year_end, "years": _listed([str(year) for year in years])}
    date = phrases("dates")[date][0].format(**slots)
    sentence = _draw_sentence(wording, context, name=name, values=_listed(values), date=date, years=slots["years"])
    by_year = dict(zip(years, numbers, strict=True))
    rates: tuple[Rate, ...] = ()
    if kind == "tax_rate":
        rates = (Rate("income tax at the effective tax rate", by_year[context.year], "pretax_income", context.year),)
    return Fact(sentence, series=(NumberSeries(kind, name, by_year, measure, when),), rates=rates)


def _draw_sentence(kind: str, context: PageContext, **slots: object) -> str:
    """Draw a wording of a fact; on a small page only one of the first two, which are the shortest."""
    wordings = phrases("facts")[kind]
    text = context.rng.choice(wordings[:2] if context.small else wordings)
    return text.format(year=context.year, end=context.company.year_end, **slots)


def _draw_years(context: PageContext, num_years: int) -> tuple[int, ...]:
    """Return the newest years in the order in which a sentence lists them, mostly the newest first."""
    years = tuple(context.year - step for step in range(num_years))
    return years if context.rng.random() < 0.6 else years[::-1]


def _draw_amounts(context: PageContext, index: int, low: float, high: float, num_amounts: int = 1) -> list[PageNumber]:
    """Draw amounts of money between two shares of revenue, in one unit because a sentence lists them together.

    None is 0, and no two are equal.
    """
    company, rng = context.company, context.rng
    revenue = context.books.lines["revenue"][context.year] / 10**company.decimals * company.unit
    base = revenue * rng.uniform(low, high)
    scale = max(unit for unit in (1, *_SCALE_WORDS) if unit <= max(base, 1))
    if scale == 1_000 or (scale == 1_000_000_000 and rng.random() < 0.6):
        scale = 1_000_000 if base >= 100_000 else 1
    if scale == 1 or (context.small and base >= 10 * scale):
        digits = 0
    elif base < scale:
        digits = 2
    else:
        digits = rng.choice((0, 1)) if base >= 20 * scale else 1
    texts: list[str] = []
    while len(texts) < num_amounts:
        text = f"{base * rng.uniform(0.7, 1.4) / scale:.{digits}f}"
        if float(text) and float(text) not in map(float, texts):
            texts.append(text)
    return [PageNumber(text, scale, fact=index) for text in texts]


def _draw_part(whole: PageNumber, low: float, high: float, context: PageContext) -> PageNumber:
    """Draw a part of an amount, with as many digits after the point; a small amount has at least one."""
    digits = len(whole.text.partition(".")[2])
    digits = max(digits, 1) if whole.scale > 1 and whole.value < 20 else digits
    return PageNumber(f"{whole.value * context.rng.uniform(low, high):.{digits}f}", whole.scale, fact=whole.fact)


def _effective_tax_rates(context: PageContext, years: Sequence[int]) -> list[str]:
    """Return tax by income before tax from the books, or nothing if a year has a loss or both rates are equal."""
    tax, income = context.books.lines["income_tax"], context.books.lines["pretax_income"]
    if any(income[year] <= 0 for year in years):
        return []
    texts = [f"{100 * tax[year] / income[year]:.1f}%" for year in years]
    return texts if len(set(texts)) == len(texts) else []


def _acquisition(context: PageContext, index: int) -> Fact:
    target = make_short_name(context.rng)
    (price,) = _draw_amounts(context, index, 0.05, 0.4)
    part_name = context.rng.choice(phrases("fact_names")["acquired"])
    part = _draw_part(price, 0.25, 0.75, context)
    slots = {"target": target, "amount": _dollars(price), "part": _dollars(part), "part_name": part_name}
    name = f"the purchase price of {target}"
    return Fact(
        _draw_sentence("acquisition", context, **slots),
        series=(NumberSeries("acquisition", name, {context.year: price}),),
        breakdowns=(Breakdown(name, {part_name: part}, price, context.year, "price"),),
    )


def _share_repurchase(context: PageContext, index: int) -> Fact:
    rng, year = context.rng, context.year
    if rng.random() < 0.6:
        quantity = PageNumber(f"{rng.uniform(0.5, 9):.1f}", 1_000_000, fact=index)
    else:
        quantity = PageNumber(f"{rng.randint(20, 9_800) * 100 + rng.randint(0, 99)}", fact=index)
    price = PageNumber(str(rng.randint(12, 140)) if context.small else f"{rng.uniform(12, 140):.2f}", fact=index)
    count = f"{quantity.text} million" if quantity.scale > 1 else quantity.text
    sentence = _draw_sentence("share_repurchase", context, count=count, price=price.text)
    name = f"{rng.choice(phrases('fact_names')['share_repurchase'])} in {year}"
    return Fact(sentence, products=(Product(name, quantity, price, year),))


def _facility(context: PageContext, index: int) -> Fact:
    (size,) = _draw_amounts(context, index, 0.15, 0.6)
    drawn = _draw_part(size, 0.15, 0.7, context)
    maturity = context.year + context.rng.randint(2, 5)
    sentence = _draw_sentence("facility", context, used=_dollars(drawn), amount=_dollars(size), maturity=maturity)
    whole = Breakdown("the credit facility", {"drawn": drawn}, size, context.year, "facility")
    return Fact(sentence, breakdowns=(whole,))


def _notes(context: PageContext, index: int) -> Fact:
    (principal,) = _draw_amounts(context, index, 0.1, 0.4)
    rate = PageNumber(f"{context.rng.uniform(2, 8.5):.1f}%", fact=index)
    sentence = _draw_sentence("notes", context, amount=_dollars(principal), rate=_percent(rate.text))
    name = f"annual interest on the notes issued in {context.year}"
    return Fact(sentence, products=(Product(name, principal, rate, context.year),))


def _customer(context: PageContext, index: int) -> Fact:
    rate = PageNumber(f"{context.rng.randint(5, 38)}%", fact=index)
    customer = context.rng.choice(phrases("fact_names")["customer"])
    revenue = context.company.names["revenue"]
    sentence = _draw_sentence("customer", context, customer=customer, rate=_percent(rate.text), revenue=revenue)
    return Fact(sentence, rates=(Rate(f"{revenue} from {customer}", rate, "revenue", context.year),))


_SINGLE_FACTS: dict[str, Callable[[PageContext, int], Fact]] = {
    "acquisition": _acquisition,
    "share_repurchase": _share_repurchase,
    "facility": _facility,
    "notes": _notes,
    "customer": _customer,
}

FACT_KINDS = (*_SINGLE_FACTS, *_SERIES_FACTS)

COMPARABLE_FACTS = {"customer", "tax_rate", *(kind for kind, row in _SERIES_FACTS.items() if row[0] == "money")}
"""Facts that can be compared with a line of a table."""


def _listed(items: Sequence[str]) -> str:
    """Join items as ``a , b and c``."""
    return " and ".join((" , ".join(items[:-1]), items[-1])) if len(items) > 1 else items[0]


def _dollars(number: PageNumber) -> str:
    return f"$ {number.text} {_SCALE_WORDS[number.scale]}" if number.scale > 1 else f"$ {number.text}"


def _percent(text: str) -> str:
    """Write a percentage twice, as FinQA's texts do."""
    return f"{text} ( {text[:-1]} % )"


def draw_filler(context: PageContext) -> list[str]:
    """Draw different sentences in random order: none or one for a small page, 10 to 24 for a full one.

    Their figures are about things that no fact and no line of the accounts names, so a question stays clear.
    """
    texts = phrases("filler")["short" if context.small else "long"]
    num_texts = context.rng.choice((0, 0, 1)) if context.small else context.rng.randint(10, 24)
    return [text.format_map(_FillerSlots(context)) for text in context.rng.sample(texts, num_texts)]


def draw_lead_in(context: PageContext, title: str) -> str:
    """Draw the sentence right before a table."""
    company, text = context.company, context.rng.choice(phrases("filler")["lead_in"])
    return text.format(title=title, unit=company.unit_name, end=company.year_end, y=context.year, name=company.name)


class _FillerSlots(dict[str, str]):
    """Values for the slots of a filler sentence; a number is drawn whenever a slot is filled."""

    def __init__(self, context: PageContext) -> None:
        self.rng, company, year = context.rng, context.company, context.year
        site, other_site = self.rng.sample(phrases("company")["places"], 2)
        segment, other_segment = self.rng.sample(company.segments, 2)
        names = {"company": company.short_name, "ticker": company.ticker.lower(), "unit": company.unit_name}
        years = {"y": str(year), "p": str(year - 1), "q": str(year - 2), "f": str(year + 1)}
        super().__init__(names, end=company.year_end, s=segment, s2=other_segment, g=site, g2=other_site, **years)
        self.most_millions = 400 if company.unit == 1_000_000 else 9

    def __missing__(self, key: str) -> str:
        percent = _percent(f"{self.rng.uniform(0.5, 30):.1f}%")
        if key == "m":
            return f"$ {self.rng.uniform(0.2, 1) * self.most_millions:.1f} million"
        if key == "b":
            return self.rng.choice(("25", "50", "100"))
        if key == "x":
            return f"{self.rng.uniform(2.5, 4.5):.1f}"
        limits = {"n": (101, 9_999), "d": (12, 30), "d2": (31, 45), "d3": (2, 9)}
        return str(self.rng.randint(*limits[key])) if key in limits else percent
