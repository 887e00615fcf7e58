"""Which kind of question is asked how often: FinQA's mixture of evidence, steps and operations."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from fintune.data.synthetic import pairs, parts, questions
from fintune.data.synthetic.page import Breakdown, Page, Size
from fintune.data.synthetic.questions import Draft, Kind, Pool


@dataclass(frozen=True)
class Entry:
    """One kind of question.

    Attributes:
        evidence: "table", "text" or "both".
        steps: Numbers of steps that its programs can have; 4 stands for 4 and more.
        weight: How often it is taken among the entries of its evidence and number of steps.
    """

    evidence: str
    steps: tuple[int, ...]
    weight: float
    make: Kind


# How often a question has this evidence and this many steps. The dev split of FinQA has 61 / 23 / 17 per cent of
# table, text and both; 1 to 4 steps are 57, 36, 5 and 2.5 per cent of its test split. Where a page has no such question
# another is drawn: the weights make up for it, more on small pages.
MIXTURES: dict[Size, dict[tuple[str, int], float]] = {
    "full": {
        ("table", 1): 35, ("table", 2): 20.5, ("table", 3): 3.6, ("table", 4): 1.5,
        ("text", 1): 14, ("text", 2): 7.0, ("text", 3): 1.4, ("text", 4): 0.5,
        ("both", 1): 12, ("both", 2): 6.2, ("both", 3): 1.6, ("both", 4): 0.6,
    },
    "small": {
        ("table", 1): 30, ("table", 2): 19, ("table", 3): 3.5, ("table", 4): 1.5,
        ("text", 1): 15, ("text", 2): 9.0, ("text", 3): 1.5, ("text", 4): 0.6,
        ("both", 1): 19, ("both", 2): 14.0, ("both", 3): 5.0, ("both", 4): 1.4,
    },
}  # fmt: skip


def _over(evidence: str, make: Callable[[Pool, random.Random], Draft | None]) -> Kind:
    """A kind over one series, of the table or of the text."""
    return lambda page, rng: make(page.table.series if evidence == "table" else page.text_series, rng)


def _of_pair(evidence: str, make: pairs.PairKind) -> Kind:
    """A kind over two series: both of the table, both of the text, or one of each."""

    def kind(page: Page, rng: random.Random) -> Draft | None:
        table, text = page.table.series, page.text_series
        first, second = {"table": (table, table), "text": (text, text), "both": (text, table)}[evidence]
        return make(first, second, rng)

    return kind


def _of_total(evidence: str, make: Callable[[Page, random.Random, Sequence[Breakdown]], Draft | None]) -> Kind:
    """A kind over the parts of a total."""

    def kind(page: Page, rng: random.Random) -> Draft | None:
        in_text = [breakdown for fact in page.facts for breakdown in fact.breakdowns]
        return make(page, rng, page.table.breakdowns if evidence == "table" else in_text)

    return kind


def _entries() -> tuple[Entry, ...]:
    q, p = questions, pairs
    entries: list[Entry] = []

    def add(evidence: str, steps: int | tuple[int, ...], weight: float, make: Kind) -> None:
        entries.append(Entry(evidence, (steps,) if isinstance(steps, int) else steps, weight, make))

    for evidence in ("table", "text"):
        over, total = partial(_over, evidence), partial(_of_total, evidence)
        add(evidence, 1, 14, over(q.change))
        add(evidence, 1, 32, total(parts.share))
        add(evidence, 1, 3, total(parts.rest))
        add(evidence, 1, 2, over(q.sum_years))
        add(evidence, 1, 2, over(q.ratio_years))
        add(evidence, 1, 0.8, over(q.rose))
        add(evidence, 2, 24, over(q.percent_change))
        add(evidence, 2, 3, over(q.average))
        add(evidence, 2, 2, over(partial(q.sum_years, num_years=3)))
        add(evidence, 2, 1, over(q.in_billions))
        add(evidence, 2, 1, over(q.yearly_change))
        add(evidence, 2, 2, total(parts.share_rest))
        add(evidence, 3, 3, over(partial(q.average, num_years=3)))
        add(evidence, 4, 1, over(partial(q.average, num_years=4)))
    for operation, weight in (("average", 4.5), ("max", 2.4), ("min", 1.8), ("sum", 4.0)):
        add("table", 1, weight, _over("table", q.over_row(f"table_{operation}")))
    add("table", 3, 0.6, _over("table", q.row_range))
    add("table", 2, 6, _over("table", q.roi))
    add("table", 4, 2, _over("table", q.roi_gap))
    for kind, steps, weight in (("share_two", 2, 5.0), ("sum", 1, 4.0), ("difference", 1, 2.0), ("ratio", 1, 1.0)):
        add("table", steps, weight, _of_total("table", parts.two_parts(kind)))
    add("table", 1, 0.4, _of_total("table", parts.two_parts("greater")))
    add("table", 3, 2, _of_total("table", parts.share_change))
    for evidence in ("table", "text", "both"):
        pair = partial(_of_pair, evidence)
        weight = {"table": 0.6, "text": 0.4, "both": 1}[evidence]
        add(evidence, (1, 2), 12 * weight, pair(p.percent_of))
        add(evidence, (1, 2), 5 * weight, pair(p.joined("add")))
        add(evidence, (1, 2), 3 * weight, pair(p.joined("subtract")))
        add(evidence, (1, 2), 0.8 * weight, pair(p.joined("greater")))
        add(evidence, 3, 1, pair(p.ratio_change))
        add(evidence, 4, 0.7, pair(p.ratio_growth))
        add(evidence, 4, 1.5, pair(p.growth_gap))
        add(evidence, 4, 0.7, pair(p.total_growth))
    add("both", (1, 2), 2, p.without_charge)
    add("both", (1, 2), 45, p.rate)
    add("both", (2, 3), 12, p.product_share)
    add("both", 2, 6, p.per_piece)
    add("text", (1, 2), 30, partial(p.product, in_table=False))
    add("table", (1, 2), 40, partial(p.product, in_table=True))
    return tuple(entries)


ENTRIES = _entries()


def draw_kind(rng: random.Random, size: Size) -> tuple[str, int]:
    """Evidence and number of steps (4 for 4 and more) for the next question."""
    mixture = MIXTURES[size]
    return rng.choices(list(mixture), list(mixture.values()))[0]


def draw_draft(page: Page, evidence: str, num_steps: int, rng: random.Random) -> Draft | None:
    """A question of this evidence and number of steps, or None where the page has none."""
    fitting = [entry for entry in ENTRIES if entry.evidence == evidence and num_steps in entry.steps]
    while fitting:
        entry = rng.choices(fitting, [entry.weight for entry in fitting])[0]
        for _ in range(4):
            draft = entry.make(page, rng)
            if draft is not None and min(len(draft.builder.steps), 4) == num_steps:
                return draft
        fitting.remove(entry)
    return None
