"""From companies to FinQA records: lazily, and every company by itself."""

from __future__ import annotations

import random
from collections.abc import Iterator

from fintune.data.synthetic.accounts import make_accounts
from fintune.data.synthetic.companies import Company, make_company
from fintune.data.synthetic.menu import draw_draft, draw_kind
from fintune.data.synthetic.page import Page, Size
from fintune.data.synthetic.pages import make_page
from fintune.data.synthetic.questions import Draft
from fintune.errors import DataError
from fintune.finqa.execute import execute
from fintune.finqa.page import page_units
from fintune.records import FinQAQuestion, FinQARecord

_MAX_TRIES = 200


def generate(
    num_companies: int, *, pages_per_company: int, questions_per_page: int, seed: int, size: Size
) -> Iterator[FinQARecord]:
    """Make records of invented companies, one company after the other.

    A company depends on the seed and its number alone: more companies, pages or questions change none of the earlier.

    Args:
        num_companies: Companies, each with a ticker of its own.
        pages_per_company: Pages of each company.
        questions_per_page: Questions of each page, all different.
        seed: Source of all chance.
        size: "full" for pages as long as FinQA's, "small" for pages of some hundred tokens.

    Raises:
        DataError: A page has fewer different questions than were asked for.
    """
    for index in range(num_companies):
        yield from company_records(
            index, pages_per_company=pages_per_company, questions_per_page=questions_per_page, seed=seed, size=size
        )


def company_records(
    index: int, *, pages_per_company: int, questions_per_page: int, seed: int, size: Size
) -> Iterator[FinQARecord]:
    """The records of company ``index``; arguments as of :func:`generate`."""
    small = size == "small"
    company = make_company(seed, index, small=small)
    books = make_accounts(company, random.Random(f"accounts/{seed}/{index}"), small=small)  # noqa: S311
    page_number = 0
    for place in range(pages_per_company):
        rng = random.Random(f"page/{seed}/{index}/{place}")  # noqa: S311 - not for security
        page_number += rng.randint(1, 40)
        page = make_page(company, books, rng, size=size)
        name = f"{company.ticker}/{page.year}/page_{page_number}.pdf"
        yield from _ask(company, page, name, questions_per_page, rng, size)


def _ask(
    company: Company, page: Page, name: str, num_questions: int, rng: random.Random, size: Size
) -> Iterator[FinQARecord]:
    """Different questions on one page."""
    asked: set[str] = set()
    num_done = 0
    for _ in range(_MAX_TRIES * num_questions):
        if num_done == num_questions:
            return
        draft = draw_draft(page, *draw_kind(rng, size), rng)
        if draft is None or draft.builder.program.text in asked:
            continue
        record = _record(f"{name}-{num_done + 1}", page, draft)
        if record is None:
            continue
        asked.add(draft.builder.program.text)
        num_done += 1
        yield record
    if num_done < num_questions:
        raise DataError(
            f"page {name} of {company.name} has only {num_done} different questions",
            hint="ask for fewer questions a page and more pages",
        )


def _record(record_id: str, page: Page, draft: Draft) -> FinQARecord | None:
    """The record, or None where the program has no result under the official rules."""
    program = draft.builder.program
    execution = execute(program.tokens, page.table.rows)
    if execution.invalid or execution.result == "n/a":
        return None
    question = FinQAQuestion(
        question=draft.question,
        program=program.text,
        program_re=program.nested,
        exe_ans=execution.result,
        answer=_answer(execution.result, draft),
    )
    record = FinQARecord(
        id=record_id, pre_text=page.pre_text, post_text=page.post_text, table=page.table.rows, qa=question
    )
    units = {unit.key: unit.text for unit in page_units(record)}
    keys = [f"table_{row}" for row in draft.builder.rows]
    for number in draft.builder.numbers:
        if number.row is not None:
            keys.append(f"table_{number.row}")
        elif number.fact is not None:
            keys.append(f"text_{page.fact_places[number.fact]}")
    evidence = {key: units[key] for key in dict.fromkeys(keys)}
    return record.model_copy(update={"qa": question.model_copy(update={"gold_inds": evidence})})


def _answer(result: float | str, draft: Draft) -> str:
    """The answer as a person would write it."""
    if isinstance(result, str):
        return result
    if draft.answer_form == "percent":
        return f"{100 * result:.1f}%"
    return f"{result:.2f}".rstrip("0").rstrip(".")
