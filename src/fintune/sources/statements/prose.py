"""Sentences that no question needs."""

from __future__ import annotations

import random

from fintune.sources.statements.companies import Company


def filler(company: Company, year: int, rng: random.Random, *, small: bool) -> list[str]:
    """Sentences for one page in random order: none or one on a small page."""
    del year
    pool = [
        f"{company.short_name} reports in {company.unit_name} .",
        "demand was stable .",
        "prior years were not restated .",
        "competition remains strong .",
    ]
    return rng.sample(pool, rng.choice((0, 0, 1))) if small else rng.sample(pool, 4)
