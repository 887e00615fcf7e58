"""Cells as FinQA's tables write them."""

from __future__ import annotations

import random

from fintune.data.synthetic.companies import Company
from fintune.data.synthetic.page import Measure


def corner(company: Company, rng: random.Random, *, small: bool) -> str:
    """The unit, as the first cell of the header says it."""
    unit = company.unit_name
    if small:
        return rng.choice((f"in {unit}", unit))
    return rng.choice((f"( in {unit} )", f"in {unit}", f"{unit} of dollars", f"( $ in {unit} )", f"( {unit} )"))


def figure(value: int, decimals: int) -> str:
    """A value in whole units of ``10 ** -decimals`` as digits."""
    return f"{value / 10**decimals:.{decimals}f}"


def cell(text: str, *, dollar: bool, measure: Measure = "money") -> str:
    """A number as FinQA's tables write it: ``$ 58``, ``$ -32 ( 32 )``, ``23.6% ( 23.6 % )``."""
    if measure == "percent":
        return f"{text} ( {text.replace('%', ' %')} )"
    shown = f"{text} ( {text[1:]} )" if text.startswith("-") else text
    return f"$ {shown}" if dollar else shown
