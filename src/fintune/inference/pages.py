"""In which order questions are asked: those about one page one behind the other, so that it is computed once."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager

from fintune.errors import PromptError
from fintune.finqa.identity import page_content
from fintune.records import FinQARecord


def page_order(records: Sequence[FinQARecord]) -> list[int]:
    """Places of records, those about one page together; FinQA's files have them far apart.

    Returns:
        Pages in the order of their first question, the questions of a page in their own order.
    """
    first: dict[Hashable, int] = {}
    places = [first.setdefault(page_content(each), at) for at, each in enumerate(records)]
    return sorted(range(len(records)), key=lambda at: (places[at], at))


@contextmanager
def prompts_named(records: Sequence[FinQARecord]) -> Iterator[None]:
    """Within it, an engine that cannot take a prompt names its question.

    Args:
        records: One a prompt, in the order of the prompts.

    Raises:
        ModelError: In place of :class:`fintune.errors.PromptError`.
    """
    try:
        yield
    except PromptError as error:
        raise error.of(records[error.number - 1].id) from None
