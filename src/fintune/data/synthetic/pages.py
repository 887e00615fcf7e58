"""Pages: a table, the facts around it, and sentences that no question needs."""

from __future__ import annotations

import random

from fintune.data.synthetic.accounts import Accounts
from fintune.data.synthetic.companies import Company
from fintune.data.synthetic.facts import COMPARABLE, MAKERS, Setting
from fintune.data.synthetic.page import Fact, Page, Size, Table
from fintune.data.synthetic.prose import filler, lead_in
from fintune.data.synthetic.tables import KINDS, make_table

# Facts that would speak of a quantity which this kind of table shows, with another figure.
_CLASHES = {
    "cash_flow": {"share_repurchase", "acquisition", "dividend"},
    "leases": {"rent"},
    "buybacks": {"share_repurchase"},
    "maturities": {"notes"},
}
_WEIGHTS = {
    "income": 5, "balance": 4, "cash_flow": 3, "segments": 4, "regions": 2, "maturities": 3, "leases": 2,
    "performance": 1.5, "buybacks": 1.5,
}  # fmt: skip


def make_page(company: Company, books: Accounts, rng: random.Random, *, size: Size) -> Page:
    """One page of a company's report for one of its years."""
    small = size == "small"
    kind = rng.choices(KINDS, [_WEIGHTS[kind] for kind in KINDS])[0]
    year = rng.choice(books.years[2:])
    table = make_table(kind, company, books, year, rng, small=small)
    num_facts = _num_small_facts(table, rng) if small else rng.randint(4, 8)
    usable = [name for name in MAKERS if name not in _CLASHES.get(kind, ())]
    first = rng.choice([name for name in usable if name in COMPARABLE])
    names = [first, *rng.sample([name for name in usable if name != first], num_facts - 1)]
    rng.shuffle(names)
    facts = tuple(MAKERS[name](Setting(company, books, year, place, rng, small)) for place, name in enumerate(names))
    return _laid_out(Page(year, table, facts, (), ()), company, rng, small=small)


def _num_small_facts(table: Table, rng: random.Random) -> int:
    """One fact beside a large table, one or two beside others: small pages are to be of one length."""
    return 1 if len(table.rows) * (len(table.rows[0]) - 1) > 8 else rng.choice((1, 2, 2))


def _laid_out(page: Page, company: Company, rng: random.Random, *, small: bool) -> Page:
    """The page with its sentences before and after the table; facts stand anywhere, in any order."""
    sentences: list[Fact | str] = list(page.facts)
    sentences += filler(company, page.year, rng, small=small)
    rng.shuffle(sentences)
    cut = rng.randint(0, len(sentences))
    if not small:
        sentences.insert(cut, lead_in(company, page.table.title, page.year, rng))
        cut += 1
    places = {id(item): place for place, item in enumerate(sentences) if isinstance(item, Fact)}
    texts = [item.sentence if isinstance(item, Fact) else item for item in sentences]
    return Page(
        page.year,
        page.table,
        page.facts,
        tuple(texts[:cut]),
        tuple(texts[cut:]),
        tuple(places[id(fact)] for fact in page.facts),
    )
