"""What a page holds before any question: numbers and their positions, series of them, parts of totals, sentences."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from fintune.data.synthetic.company import Accounts, Company

Measure = Literal["money", "percent", "count", "per_share", "index"]
When = Literal["flow", "stock"]
Size = Literal["small", "full"]


@dataclass(frozen=True)
class PageContext:
    """What every part of a page is drawn from; ``year`` is the year that the page reports on."""

    company: Company
    books: Accounts
    year: int
    rng: random.Random
    small: bool


@dataclass(frozen=True)
class PageNumber:
    """A number on the page.

    Attributes:
        text: The number as a program writes it: "5829", "-32", "23.6%".
        scale: Dollars or pieces in a one: 1000000 if the page says millions, 1 for plain counts and prices.
        row: Index of the table row that holds it (0 is the header), or None.
        fact: Index of the fact that holds it among the page's facts, or None.
    """

    text: str
    scale: int = 1
    row: int | None = None
    fact: int | None = None

    @property
    def value(self) -> float:
        """The value that the official evaluator reads."""
        return float(self.text.rstrip("%")) / 100 if self.text.endswith("%") else float(self.text)


@dataclass(frozen=True)
class NumberSeries:
    """One quantity over years.

    Attributes:
        key: The line of the accounts or the kind of fact. A question never joins two series of one key.
        name: The name in a question; for a table row, exactly the row's name.
        numbers: Numbers by year.
        when: Whether the quantity is of a period (flow) or of a date (stock).
        row_name: The row's name if the row is this series and a table operation can name it, else None.
    """

    key: str
    name: str
    numbers: dict[int, PageNumber]
    measure: Measure = "money"
    when: When = "flow"
    row_name: str | None = None


@dataclass(frozen=True)
class Breakdown:
    """A total and its parts.

    Attributes:
        total_name: The name of the total in a question.
        parts: Numbers by the name of the part.
        year: The year of the figures, or None if the parts are years themselves.
        wording: The wordings that fit: "part" (of a total in a year), "due" (payments by year), "month" (of purchases),
            "price" (of a purchase) or "facility" (of a credit line).
    """

    total_name: str
    parts: dict[str, PageNumber]
    total: PageNumber
    year: int | None
    wording: Literal["part", "due", "month", "price", "facility"] = "part"


@dataclass(frozen=True)
class Product:
    """A quantity and a price whose product is asked for, named like "cost of the shares repurchased in 2015"."""

    name: str
    quantity: PageNumber
    price: PageNumber
    year: int


@dataclass(frozen=True)
class Rate:
    """A percentage in the text that applies to the line ``base`` of a table, named like "net sales to one customer"."""

    name: str
    rate: PageNumber
    base: str
    year: int


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What can be asked about a table, a sentence, or the text of a page."""

    series: tuple[NumberSeries, ...] = ()
    breakdowns: tuple[Breakdown, ...] = ()
    products: tuple[Product, ...] = ()
    rates: tuple[Rate, ...] = ()


@dataclass(frozen=True)
class Fact(Contents):
    """A sentence with facts that no table has."""

    sentence: str


@dataclass(frozen=True)
class PageTable(Contents):
    """A table: cells in the FinQA form (row 0 is the header), scale of its money in dollars, and what it shows."""

    rows: tuple[tuple[str, ...], ...]
    unit: int
    title: str


@dataclass(frozen=True)
class Page:
    """A page, ready to be asked about.

    Attributes:
        text: What can be asked about all facts.
        fact_positions: The k of ``text_k`` for each fact.
    """

    year: int
    table: PageTable
    text: Contents
    pre_text: tuple[str, ...]
    post_text: tuple[str, ...]
    fact_positions: tuple[int, ...]
