"""Facts that only the text of a page has: purchases, repurchases, credit lines, headcount, rates, charges."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fintune.data.synthetic.accounts import Accounts
from fintune.data.synthetic.companies import Company, make_short_name
from fintune.data.synthetic.page import Breakdown, Fact, Measure, Number, Product, Rate, Series, When

_WORDS = {1_000: "thousand", 1_000_000: "million", 1_000_000_000: "billion"}


@dataclass(frozen=True)
class Setting:
    """What a fact is made from.

    Attributes:
        place: The number of this fact on its page.
        year: The year that the page reports on.
    """

    company: Company
    books: Accounts
    year: int
    place: int
    rng: random.Random
    small: bool

    def choice(self, *texts: str) -> str:
        """One of some wordings; the first two only on a small page, where the shortest stand first."""
        return self.rng.choice(texts[:2] if self.small else texts)

    def years(self, num_years: int) -> tuple[int, ...]:
        """The newest years in the order in which a sentence lists them, mostly the newest first."""
        years = tuple(self.year - step for step in range(num_years))
        return years if self.rng.random() < 0.6 else years[::-1]

    def amounts(self, low: float, high: float, num_amounts: int = 1) -> tuple[list[Number], list[str]]:
        """Amounts of money between two shares of revenue, as numbers and as the text writes them.

        All in one unit, because a sentence lists them together. Never 0, never two of them equal.
        """
        revenue = self.books.lines["revenue"][self.year] / 10**self.company.decimals * self.company.unit
        base = revenue * self.rng.uniform(low, high)
        scale = max(unit for unit in (1, *_WORDS) if unit <= max(base, 1))
        if scale == 1_000 or (scale == 1_000_000_000 and self.rng.random() < 0.6):
            scale = 1_000_000 if base >= 100_000 else 1
        digits = (
            0
            if scale == 1 or (self.small and base >= 10 * scale)
            else 2
            if base < scale
            else self.rng.choice((0, 1))
            if base >= 20 * scale
            else 1
        )
        texts: list[str] = []
        while len(texts) < num_amounts:
            text = f"{base * self.rng.uniform(0.7, 1.4) / scale:.{digits}f}"
            if float(text) and float(text) not in map(float, texts):
                texts.append(text)
        numbers = [Number(text, scale, fact=self.place) for text in texts]
        word = f" {_WORDS[scale]}" if scale > 1 else ""
        return numbers, [f"$ {text}{word}" for text in texts]

    def part_digits(self, whole: Number) -> int:
        """Digits after the point for a part of an amount: as the amount has, or one more where it is small."""
        digits = len(whole.text.partition(".")[2])
        return max(digits, 1) if whole.scale > 1 and whole.value < 20 else digits

    def number(self, text: str, scale: int = 1) -> Number:
        """A number of this fact's sentence."""
        return Number(text, scale, fact=self.place)


def listed(items: Sequence[str]) -> str:
    """``a , b and c``."""
    return " and ".join((" , ".join(items[:-1]), items[-1])) if len(items) > 1 else items[0]


def _over_years(
    key: str, names: tuple[str, ...], low: float, high: float, *, when: When = "flow"
) -> Callable[[Setting], Fact]:
    """A maker of facts that give one amount for two or three years."""

    def make(at: Setting) -> Fact:
        name = at.rng.choice(names)
        years = at.years(at.rng.choice((2, 2, 3)) if not at.small else 2)
        numbers, texts = at.amounts(low, high, len(years))
        said, labels = listed(texts), listed([str(year) for year in years])
        date = f"{at.company.year_end} , " if when == "stock" else "the years ended december 31 , "
        sentence = at.choice(
            f"{name} was {said} in {labels} .",
            f"{name} was {said} in {labels} , respectively .",
            f"{name} totaled {said} in {labels} , respectively .",
            f"for {date.replace('december 31', at.company.year_end)}{labels} , {name} was {said} , respectively ."
            if when == "flow"
            else f"at {date}{labels} , {name} was {said} , respectively .",
            f"the company recorded {name} of {said} for {labels} , respectively .",
            f"our {name} amounted to approximately {said} in fiscal {labels} , respectively .",
        )
        series = Series(key, name, dict(zip(years, numbers, strict=True)), "money", when)
        return Fact(sentence, (series,))

    return make


def _plain(
    key: str, names: tuple[str, ...], low: float, high: float, measure: Measure, when: When, form: str = "{}"
) -> Callable[[Setting], Fact]:
    """A maker of facts that give a count, a rate or an amount a share for two years."""

    def make(at: Setting) -> Fact:
        name = at.rng.choice(names)
        years = at.years(2)
        base = at.rng.uniform(low, min(high, 30 * low) if at.small else high)
        texts = _effective_rates(at, years) if key == "tax_rate" else []
        while len(texts) < 2:
            value = base * at.rng.uniform(0.8, 1.25)
            text = {"count": f"{value:.0f}", "percent": f"{value:.1f}%", "per_share": f"{value:.2f}"}[measure]
            if text not in texts:
                texts.append(text)
        shown = [form.format(f"{text} ( {text[:-1]} % )" if measure == "percent" else text) for text in texts]
        said, labels = listed(shown), listed([str(year) for year in years])
        date = f"at {at.company.year_end} , {labels}" if when == "stock" else f"for {labels}"
        sentence = at.choice(
            f"{name} was {said} in {labels} .",
            f"{name} was {said} in {labels} , respectively .",
            f"{date} , {name} was {said} , respectively .",
            f"the company reported {name} of approximately {said} in {labels} , respectively .",
        )
        numbers = {year: at.number(text) for year, text in zip(years, texts, strict=True)}
        rates: tuple[Rate, ...] = ()
        if key == "tax_rate":
            rates = (Rate("income tax at the effective tax rate", numbers[at.year], "pretax_income", at.year),)
        return Fact(sentence, (Series(key, name, numbers, measure, when),), rates=rates)

    return make


def _effective_rates(at: Setting, years: Sequence[int]) -> list[str]:
    """Tax by income before tax, from the books; none where a year has a loss or both years are alike."""
    tax, income = at.books.lines["income_tax"], at.books.lines["pretax_income"]
    if any(income[year] <= 0 for year in years):
        return []
    texts = [f"{100 * tax[year] / income[year]:.1f}%" for year in years]
    return texts if len(set(texts)) == len(texts) else []


def _acquisition(at: Setting) -> Fact:
    target = make_short_name(at.rng)
    (price,), (said,) = at.amounts(0.05, 0.4)
    part_name = at.rng.choice(("goodwill", "intangible assets", "customer relationships", "property"))
    part = at.number(f"{price.value * at.rng.uniform(0.25, 0.75):.{at.part_digits(price)}f}", price.scale)
    word = said.rpartition(price.text)[2]
    allocated = f"$ {part.text}{word}"
    sentence = at.choice(
        f"we bought {target} for {said} , including {part_name} of {allocated} .",
        f"in {at.year} , we acquired {target} for {said} , of which {allocated} was {part_name} .",
        f"in {at.year} , the company completed the acquisition of {target} for a purchase price of {said} , of which "
        f"{allocated} was allocated to {part_name} .",
        f"during {at.year} we purchased all outstanding shares of {target} for total consideration of {said} in cash ; "
        f"{allocated} of the purchase price was assigned to {part_name} .",
    )
    return Fact(
        sentence,
        (Series("acquisition", f"the purchase price of {target}", {at.year: price}),),
        (Breakdown(f"the purchase price of {target}", {part_name: part}, price, at.year, "price"),),
    )


def _repurchases(at: Setting) -> Fact:
    millions = at.rng.random() < 0.6
    quantity = at.number(f"{at.rng.uniform(0.5, 9):.1f}", 1_000_000) if millions else at.number(
        f"{at.rng.randint(20, 9_800) * 100 + at.rng.randint(0, 99)}"
    )  # fmt: skip
    price = at.number(f"{at.rng.uniform(12, 140):.2f}" if not at.small else f"{at.rng.randint(12, 140)}")
    count = f"{quantity.text} million" if millions else quantity.text
    sentence = at.choice(
        f"in {at.year} we repurchased {count} shares at $ {price.text} per share .",
        f"we bought back {count} shares in {at.year} at an average price of $ {price.text} .",
        f"during {at.year} , the company repurchased {count} shares of its common stock at an average price of "
        f"$ {price.text} per share .",
        f"under the share repurchase program , we purchased approximately {count} shares in {at.year} , at an average "
        f"cost of $ {price.text} per share .",
    )
    name = at.rng.choice(("cost of the shares repurchased", "amount spent on share repurchases"))
    return Fact(sentence, products=(Product(f"{name} in {at.year}", quantity, price, at.year),))


def _facility(at: Setting) -> Fact:
    (size,), (said,) = at.amounts(0.15, 0.6)
    drawn = at.number(f"{size.value * at.rng.uniform(0.15, 0.7):.{at.part_digits(size)}f}", size.scale)
    word = said.rpartition(size.text)[2]
    used = f"$ {drawn.text}{word}"
    sentence = at.choice(
        f"{used} was drawn on the {said} credit facility .",
        f"the credit facility is {said} , of which {used} was outstanding .",
        f"at {at.company.year_end} , {at.year} , the company had borrowings of {used} under its {said} revolving "
        f"credit facility .",
        f"we have a {said} unsecured revolving credit facility that matures in {at.year + at.rng.randint(2, 5)} ; "
        f"{used} was outstanding at the end of {at.year} .",
    )
    return Fact(sentence, breakdowns=(Breakdown("the credit facility", {"drawn": drawn}, size, at.year, "facility"),))


def _notes(at: Setting) -> Fact:
    (amount,), (said,) = at.amounts(0.1, 0.4)
    rate = at.number(f"{at.rng.uniform(2, 8.5):.1f}%")
    shown = f"{rate.text} ( {rate.text[:-1]} % )"
    sentence = at.choice(
        f"in {at.year} we issued {said} of {shown} notes .",
        f"we sold {said} of notes at {shown} interest in {at.year} .",
        f"in {at.year} , the company issued {said} of senior notes that bear interest at {shown} a year .",
    )
    name = f"annual interest on the notes issued in {at.year}"
    return Fact(sentence, products=(Product(name, amount, rate, at.year),))


def _customer(at: Setting) -> Fact:
    rate = at.number(f"{at.rng.randint(5, 38)}%")
    shown = f"{rate.text} ( {rate.text[:-1]} % )"
    where = at.rng.choice(("our largest customer", "the u.s. government", "one distributor"))
    revenue = at.company.names["revenue"]
    sentence = at.choice(
        f"{where} was {shown} of {revenue} in {at.year} .",
        f"{where} made up {shown} of {revenue} in {at.year} .",
        f"in {at.year} , {where} accounted for approximately {shown} of {revenue} .",
        f"{where} represented {shown} of our consolidated {revenue} for the year ended {at.company.year_end} , "
        f"{at.year} .",
    )
    return Fact(sentence, rates=(Rate(f"{revenue} from {where}", rate, "revenue", at.year),))


# Facts that can be set against a line of a table.
COMPARABLE = (
    "advertising", "backlog", "customer", "impairment", "pension", "rent", "restructuring", "tax_rate",
    "unrecognized_tax", "warranty",
)  # fmt: skip

MAKERS: dict[str, Callable[[Setting], Fact]] = {
    "acquisition": _acquisition,
    "share_repurchase": _repurchases,
    "facility": _facility,
    "notes": _notes,
    "customer": _customer,
    "rent": _over_years("rent", ("rent expense", "rental expense", "lease cost"), 0.01, 0.05),
    "advertising": _over_years("advertising", ("advertising expense", "advertising cost"), 0.01, 0.06),
    "impairment": _over_years("impairment", ("the impairment charge", "impairment of assets"), 0.01, 0.08),
    "restructuring": _over_years("restructuring", ("restructuring expense", "severance cost"), 0.01, 0.06),
    "pension": _over_years("pension", ("pension expense", "pension cost"), 0.01, 0.05),
    "warranty": _over_years("warranty", ("warranty expense", "warranty cost"), 0.005, 0.03),
    "backlog": _over_years("backlog", ("order backlog", "backlog"), 0.3, 1.5, when="stock"),
    "unrecognized_tax": _over_years("unrecognized_tax", ("the unrecognized tax liability",), 0.02, 0.1, when="stock"),
    "employees": _plain("employees", ("the number of employees", "headcount"), 120, 40_000, "count", "stock"),
    "stores": _plain("stores", ("the number of stores", "the store count"), 30, 4_000, "count", "stock"),
    "tax_rate": _plain("tax_rate", ("the effective tax rate", "the income tax rate"), 20, 38, "percent", "flow"),
    "dividend": _plain("dividend", ("the dividend per share",), 0.2, 4, "per_share", "flow", "$ {}"),
}  # fmt: skip
