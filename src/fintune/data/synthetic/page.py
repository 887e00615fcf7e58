"""What a page holds, before any question: numbers and where they stand, series of them, parts of totals, sentences."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Measure = Literal["money", "percent", "count", "per_share", "index"]
When = Literal["flow", "stock"]
Size = Literal["small", "full"]


@dataclass(frozen=True)
class Number:
    """A number as it stands on the page.

    Attributes:
        text: As a program writes it: "5829", "-32", "23.6%".
        scale: What a one of it stands for: 1000000 where the page says millions, 1 for plain counts and prices.
        row: Table row that holds it (0 is the header), or None.
        fact: Sentence that holds it, counted among the page's facts, or None.
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
class Series:
    """One quantity over years.

    Attributes:
        key: Line of the accounts or kind of fact; a question never joins two series of one key.
        name: What a question calls it; for a table row its exact name.
        numbers: Year to number, in order of years.
        row_name: The row's name where the whole row is this series and a table operation can name it, else None.
    """

    key: str
    name: str
    numbers: dict[int, Number]
    measure: Measure = "money"
    when: When = "flow"
    row_name: str | None = None

    @property
    def years(self) -> tuple[int, ...]:
        """Years that have a number, in order."""
        return tuple(sorted(self.numbers))


@dataclass(frozen=True)
class Breakdown:
    """Parts and their total.

    Attributes:
        total_name: What a question calls the total.
        parts: Part's name to number; never all of them negative and positive mixed.
        year: The year that the figures belong to, or None where the parts are years themselves.
        wording: Which templates fit: "part" (of a total in a year), "due" (payments by year), "month" (of purchases),
            "price" (of a purchase).
    """

    total_name: str
    parts: dict[str, Number]
    total: Number
    year: int | None
    wording: Literal["part", "due", "month", "price", "facility"] = "part"


@dataclass(frozen=True)
class Product:
    """A quantity and a price in one sentence, whose product is asked for.

    Attributes:
        name: What a question calls the product: "cost of the shares repurchased in 2015".
    """

    name: str
    quantity: Number
    price: Number
    year: int


@dataclass(frozen=True)
class Rate:
    """A percentage in the text that applies to a line of the table.

    Attributes:
        name: What the product is: "net sales to the largest customer".
        base: Line of the accounts that it applies to.
    """

    name: str
    rate: Number
    base: str
    year: int


@dataclass(frozen=True)
class Fact:
    """A sentence that only the text has, and what can be asked of it."""

    sentence: str
    series: tuple[Series, ...] = ()
    breakdowns: tuple[Breakdown, ...] = ()
    products: tuple[Product, ...] = ()
    rates: tuple[Rate, ...] = ()


@dataclass(frozen=True)
class Table:
    """A table with what its cells mean.

    Attributes:
        rows: Cells in the FinQA form, row 0 is the header.
        unit: Scale of its money in dollars.
        title: What the table shows, for the sentence before it.
    """

    rows: tuple[tuple[str, ...], ...]
    unit: int
    title: str
    series: tuple[Series, ...] = ()
    breakdowns: tuple[Breakdown, ...] = ()
    products: tuple[Product, ...] = ()


@dataclass(frozen=True)
class Page:
    """A page, ready to be asked about.

    Attributes:
        fact_places: For each fact the k of its ``text_k``.
    """

    year: int
    table: Table
    facts: tuple[Fact, ...]
    pre_text: tuple[str, ...]
    post_text: tuple[str, ...]
    fact_places: tuple[int, ...] = field(default=())

    @property
    def text_series(self) -> tuple[Series, ...]:
        """Series of all facts."""
        return tuple(series for fact in self.facts for series in fact.series)
