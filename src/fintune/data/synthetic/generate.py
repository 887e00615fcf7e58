"""From companies to FinQA records: lazily, and each company by itself."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator

from fintune.data.synthetic.company import Company, make_accounts, make_company
from fintune.data.synthetic.page import Contents, Fact, Page, PageContext, Size
from fintune.data.synthetic.query import Draft
from fintune.data.synthetic.questions import draw_draft
from fintune.data.synthetic.tables import TABLE_WEIGHTS, make_page_table
from fintune.data.synthetic.text import COMPARABLE_FACTS, FACT_KINDS, draw_filler, draw_lead_in, make_fact
from fintune.errors import DataError
from fintune.finqa.execute import execute
from fintune.finqa.page import page_units
from fintune.records import FinQAQuestion, FinQARecord

_MAX_TRIES = 200
_CLASHES = {
    "cash_flow": {"share_repurchase", "acquisition", "dividend"},
    "leases": {"rent"},
    "buybacks": {"share_repurchase"},
    "maturities": {"notes"},
}
"""Facts about a quantity that this kind of table shows, with another figure."""


def generate(
    num_companies: int, *, pages_per_company: int, questions_per_page: int, seed: int, size: Size
) -> Iterator[FinQARecord]:
    """Make records of invented companies, one company after the other.

    A company depends on the seed and its number alone: more companies, pages or questions change none of the earlier.

    Args:
        num_companies: Number of companies; each has its own ticker.
        pages_per_company: Pages of each company.
        questions_per_page: Questions about each page, all different.
        seed: The source of all chance.
        size: "full" for pages as long as FinQA's, "small" for pages of some hundred tokens.

    Raises:
        DataError: A page has fewer different questions than requested.
    """
    small = size == "small"
    for index in range(num_companies):
        company = make_company(seed, index, small=small)
        books = make_accounts(company, random.Random(f"accounts/{seed}/{index}"), small=small)  # noqa: S311
        page_number = 0
        for position in range(pages_per_company):
            rng = random.Random(f"page/{seed}/{index}/{position}")  # noqa: S311 - not for security
            page_number += rng.randint(1, 40)
            # The kind of table is drawn before the year.
            kind = rng.choices(list(TABLE_WEIGHTS), list(TABLE_WEIGHTS.values()))[0]
            page = make_page(kind, PageContext(company, books, rng.choice(books.years[2:]), rng, small))
            name = f"{company.ticker}/{page.year}/page_{page_number}.pdf"
            yield from _ask(company, page, name, questions_per_page, rng, size)


def make_page(kind: str, context: PageContext) -> Page:
    """Make one page of a company's report: a table, the facts around it, and sentences that no question needs."""
    rng, small = context.rng, context.small
    table = make_page_table(kind, context)
    # One fact beside a large table, one or two beside others, so that small pages are of one length.
    is_large = len(table.rows) * (len(table.rows[0]) - 1) > 8
    num_facts = rng.randint(4, 8) if not small else 1 if is_large else rng.choice((1, 2, 2))
    usable = [name for name in FACT_KINDS if name not in _CLASHES.get(kind, ())]
    first = rng.choice([name for name in usable if name in COMPARABLE_FACTS])
    names = [first, *rng.sample([name for name in usable if name != first], num_facts - 1)]
    rng.shuffle(names)
    facts = [make_fact(name, context, index) for index, name in enumerate(names)]

    sentences: list[Fact | str] = [*facts, *draw_filler(context)]
    rng.shuffle(sentences)
    cut = rng.randint(0, len(sentences))
    if not small:
        sentences.insert(cut, draw_lead_in(context, table.title))
        cut += 1
    positions = {id(item): position for position, item in enumerate(sentences)}
    texts = [item.sentence if isinstance(item, Fact) else item for item in sentences]
    text = Contents(
        series=tuple(item for fact in facts for item in fact.series),
        breakdowns=tuple(item for fact in facts for item in fact.breakdowns),
        products=tuple(item for fact in facts for item in fact.products),
        rates=tuple(item for fact in facts for item in fact.rates),
    )
    fact_positions = tuple(positions[id(fact)] for fact in facts)
    return Page(context.year, table, text, tuple(texts[:cut]), tuple(texts[cut:]), fact_positions)


def _ask(
    company: Company, page: Page, name: str, num_questions: int, rng: random.Random, size: Size
) -> Iterator[FinQARecord]:
    """Yield records of different questions about one page."""
    programs: set[str] = set()
    for _ in range(_MAX_TRIES * num_questions):
        if len(programs) == num_questions:
            return
        draft = draw_draft(page, size, rng)
        if draft is not None and draft.program.text not in programs:
            record = _record(f"{name}-{len(programs) + 1}", page, draft)
            if record is not None:
                programs.add(draft.program.text)
                yield record
    if len(programs) < num_questions:
        raise DataError(
            f"page {name} of {company.name} has only {len(programs)} different questions",
            hint="ask for fewer questions a page and more pages",
        )


def _record(record_id: str, page: Page, draft: Draft) -> FinQARecord | None:
    """Return the record, or None if the program has no result under the official rules."""
    execution = execute(draft.program.tokens, page.table.rows)
    result = execution.result
    if execution.invalid or result == "n/a":
        return None
    answer = result if isinstance(result, str) else f"{result:.2f}".rstrip("0").rstrip(".")
    if draft.answer_form == "percent" and not isinstance(result, str):
        answer = f"{100 * result:.1f}%"
    question = FinQAQuestion(
        question=draft.question,
        program=draft.program.text,
        program_re=draft.program.nested,
        exe_ans=result,
        answer=answer,
    )
    record = FinQARecord(
        id=record_id, pre_text=page.pre_text, post_text=page.post_text, table=page.table.rows, qa=question
    )
    units = {unit.key: unit.text for unit in page_units(record)}
    keys = [
        f"text_{page.fact_positions[number.fact]}" if number.fact is not None else f"table_{number.row}"
        for number in draft.evidence
    ]
    evidence = {key: units[key] for key in dict.fromkeys(keys)}
    return record.model_copy(update={"qa": question.model_copy(update={"gold_inds": evidence})})


def company_of(record_id: str) -> str:
    """Return the ticker of an id ``TICKER/YEAR/page_N.pdf-K``."""
    return record_id.partition("/")[0]


def split_by_company(records: Iterable[FinQARecord], *, num_train: int) -> tuple[list[FinQARecord], list[FinQARecord]]:
    """Split records into those of the first ``num_train`` companies, in the order of the records, and the others."""
    numbers: dict[str, int] = {}
    parts: tuple[list[FinQARecord], list[FinQARecord]] = ([], [])
    for record in records:
        number = numbers.setdefault(company_of(record.id), len(numbers))
        parts[number >= num_train].append(record)
    return parts
