"""Invented companies: names, habits of reporting, and books over several years that balance exactly.

Revenue less costs gives net income. Every change of a balance-sheet line passes through the cash flow, so the balance
sheet balances and the cash flow ties to the change in cash. Segments and regions sum to revenue, maturities to debt.
"""

from __future__ import annotations

import math
import random
import re
import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources

_HABITS = {
    "cost_of_sales": (0.45, 0.7), "selling": (0.08, 0.16), "research": (0.02, 0.07), "amortization": (0.01, 0.03),
    "interest": (0.03, 0.07), "tax": (0.2, 0.37), "receivables": (0.1, 0.2), "inventories": (0.07, 0.18),
    "other_current": (0.03, 0.07), "property": (0.3, 0.7), "goodwill": (0.2, 0.6), "other_assets": (0.06, 0.15),
    "payables": (0.06, 0.13), "accrued": (0.05, 0.1), "current_debt": (0.02, 0.06), "debt": (0.2, 0.5),
    "other_liabilities": (0.05, 0.15), "cash": (0.1, 0.25), "capital_expenditures": (0.04, 0.1),
    "dividends": (0.15, 0.4), "repurchases": (0.1, 0.5), "shares": (20, 900), "stock_compensation": (0.01, 0.02),
}  # fmt: skip
"""Range of each ratio that a company keeps over its years, mostly to revenue; shares are in millions."""

_CURRENT_ASSETS = ("cash", "receivables", "inventories", "other_current")
_ASSETS = (*_CURRENT_ASSETS, "property", "goodwill", "other_assets")
_CURRENT_LIABILITIES = ("payables", "accrued", "current_debt")


@cache
def phrases(section: str) -> Mapping[str, tuple[str, ...]]:
    """Return the phrases of a section of ``pages.yaml`` or ``questions.yaml`` by key."""
    return _read_phrases()[section]


@cache
def _read_phrases() -> dict[str, dict[str, tuple[str, ...]]]:
    from ruamel.yaml import YAML

    sections = {}
    for name in ("pages.yaml", "questions.yaml"):
        text = resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
        sections.update(YAML(typ="safe", pure=True).load(text))
    return {
        section: {key: tuple(re.split(r" / |\n", joined.strip())) for key, joined in entries.items()}
        for section, entries in sections.items()
    }


def line_names() -> dict[str, tuple[str, ...]]:
    """Return the names that a company can give to each line of its accounts."""
    sections = ("income", "derived", "balance", "cash_flow")
    return {key: names for section in sections for key, names in phrases(section).items()}


@dataclass(frozen=True)
class Company:
    """One invented company.

    Attributes:
        short_name: The name in one word, such as "halbrook".
        name: The name with its legal form, such as "halbrook holdings inc .".
        ticker: The ticker, unique within a seed.
        unit: Scale of the tables in dollars, 1000 or 1000000.
        decimals: Digits after the point in tables, 0 or 1.
        names: The name that this company gives to each line of its accounts.
        newest_first: Whether the newest year is the first column.
        year_end: The last day of its fiscal year, such as "december 31".
        num_years: Number of years of its accounts, 4 to 6.
    """

    short_name: str
    name: str
    ticker: str
    sector: str
    unit: int
    decimals: int
    names: dict[str, str]
    segments: tuple[str, ...]
    regions: tuple[str, ...]
    newest_first: bool
    year_end: str
    first_year: int
    num_years: int

    @property
    def unit_name(self) -> str:
        """The unit of money in the tables, "millions" or "thousands"."""
        return {1_000: "thousands", 1_000_000: "millions"}[self.unit]


def make_company(seed: int, index: int, *, small: bool) -> Company:
    """Make company number ``index`` of a seed; it does not depend on the others."""
    rng = random.Random(f"company/{seed}/{index}")  # noqa: S311 - not for security
    sectors = phrases("sectors")
    sector = rng.choice(sorted(sectors))
    short_name = make_short_name(rng)
    num_parts = rng.choice((2, 3, 3)) if small else rng.choice((3, 4, 5))
    return Company(
        short_name=short_name,
        name=f"{short_name} {rng.choice(phrases('company')['forms'])}",
        ticker=short_name[:2].upper() + _ticker_code(index, seed),
        sector=sector,
        unit=rng.choice((1_000, *3 * (1_000_000,))),
        decimals=0 if small else rng.choice((0, 0, 0, 1)),
        names={key: rng.choice(names) for key, names in line_names().items()},
        segments=tuple(rng.sample(sectors[sector], num_parts)),
        regions=tuple(rng.sample(phrases("company")["regions"], num_parts)),
        newest_first=rng.random() < 0.6,
        year_end=rng.choice((*3 * ("december 31",), "september 30", "june 30")),
        first_year=rng.randint(1999, 2014),
        num_years=rng.randint(4, 6),
    )


def make_short_name(rng: random.Random) -> str:
    """Invent a company name in one word."""
    words = phrases("company")
    return rng.choice(words["stems"]) + rng.choice(words["endings"])


def _ticker_code(index: int, seed: int) -> str:
    """Write an index as three letters or more; different indices give different codes."""
    letters, block = "", 26**3
    # 7919 has no factor in common with 26, so within a block of 26 ** 3 the codes are shuffled and never repeated.
    index = index // block * block + (index * 7919 + seed) % block
    while index or len(letters) < 3:
        index, digit = divmod(index, 26)
        letters = string.ascii_uppercase[digit] + letters
    return letters


@dataclass(frozen=True)
class Accounts:
    """The books of a company.

    Attributes:
        years: The years in order.
        lines: Value of each line of the accounts by year, in units of ``10 ** -decimals`` of the table unit.
        segments: Revenue of each segment by year.
        regions: Revenue of each region by year.
        shares: Shares outstanding by year, in millions.
    """

    years: tuple[int, ...]
    lines: dict[str, dict[int, int]] = field(default_factory=dict)
    segments: dict[str, dict[int, int]] = field(default_factory=dict)
    regions: dict[str, dict[int, int]] = field(default_factory=dict)
    shares: dict[int, float] = field(default_factory=dict)


def make_accounts(company: Company, rng: random.Random, *, small: bool) -> Accounts:
    """Make the books of a company; a small one has figures of 2 to 4 digits, a full one of 3 to 7."""
    years = tuple(range(company.first_year, company.first_year + company.num_years))
    books = Accounts(years)
    low, high = (600, 6_000) if small else (20_000, 3_000_000) if company.unit == 1_000 else (900, 60_000)
    revenue = 10**company.decimals * math.exp(rng.uniform(math.log(low), math.log(high)))
    habits = {name: rng.uniform(*limits) for name, limits in _HABITS.items()}
    line = _opening(revenue, habits)
    for year in years:
        revenue *= rng.uniform(0.86, 1.24)
        line = _next_year(round(revenue), line, habits, rng)
        for key, value in line.items():
            books.lines.setdefault(key, {})[year] = value
        books.shares[year] = habits["shares"] * rng.uniform(0.95, 1.05)
    for revenues, names in ((books.segments, company.segments), (books.regions, company.regions)):
        weights = [rng.uniform(0.5, 2) for _ in names]
        for year in years:
            weights = [weight * rng.uniform(0.8, 1.25) for weight in weights]
            for name, value in zip(names, split_total(books.lines["revenue"][year], weights), strict=True):
                revenues.setdefault(name, {})[year] = value
    return books


def split_total(total: int, weights: list[float]) -> list[int]:
    """Split a total into whole parts of about these proportions, which sum to it exactly."""
    parts = [round(total * weight / sum(weights)) for weight in weights[:-1]]
    return [*parts, total - sum(parts)]


def _opening(revenue: float, habits: dict[str, float]) -> dict[str, int]:
    """Return the balance sheet before the first year; equity is what the liabilities leave of the assets."""
    liabilities = (*_CURRENT_LIABILITIES, "other_liabilities")
    sheet = {name: round(revenue * habits[name]) for name in (*_ASSETS, *liabilities)}
    sheet["long_term_debt"] = round(revenue * habits["debt"])
    sheet["equity"] = sum(sheet[name] for name in _ASSETS)
    sheet["equity"] -= sum(sheet[name] for name in (*liabilities, "long_term_debt"))
    return sheet


def _next_year(revenue: int, before: dict[str, int], habits: dict[str, float], rng: random.Random) -> dict[str, int]:
    """Return all lines of a year, from its revenue and the balance sheet of the year before."""

    def near(name: str, base: float, spread: float = 0.2) -> int:
        return max(1, round(base * habits[name] * rng.uniform(1 - spread, 1 + spread)))

    line = {"revenue": revenue, "cost_of_sales": near("cost_of_sales", revenue, 0.07)}
    line["gross_profit"] = revenue - line["cost_of_sales"]
    for name in ("selling", "research", "amortization"):
        line[name] = near(name, revenue)
    line["operating_expenses"] = line["selling"] + line["research"] + line["amortization"]
    line["operating_income"] = line["gross_profit"] - line["operating_expenses"]
    line["interest_expense"] = near("interest", before["long_term_debt"] + before["current_debt"])
    line["pretax_income"] = line["operating_income"] - line["interest_expense"]
    line["income_tax"] = round(line["pretax_income"] * habits["tax"] * rng.uniform(0.85, 1.15))
    line["net_income"] = line["pretax_income"] - line["income_tax"]

    for name in ("receivables", "inventories", "other_current", "other_assets", *_CURRENT_LIABILITIES):
        line[name] = near(name, revenue)
    line["other_liabilities"] = near("other_liabilities", revenue)
    line["depreciation"] = line["amortization"] + near("capital_expenditures", revenue) * 3 // 4
    line["stock_compensation"] = near("stock_compensation", revenue)
    assets = ("receivables", "inventories", "other_current", "other_assets")
    liabilities = ("payables", "accrued", "other_liabilities")
    line["working_capital"] = sum(before[name] - line[name] for name in assets)
    line["working_capital"] += sum(line[name] - before[name] for name in liabilities)
    line["operating_cash"] = line["net_income"] + line["depreciation"] + line["stock_compensation"]
    line["operating_cash"] += line["working_capital"]

    line["capital_expenditures"] = -near("capital_expenditures", revenue, 0.3)
    line["acquisitions"] = -max(1, round(revenue * rng.uniform(0.01, 0.08)))
    line["investing_cash"] = line["capital_expenditures"] + line["acquisitions"]
    # Amortization lowers goodwill and intangibles together; the rest of depreciation lowers property.
    line["goodwill"] = before["goodwill"] - line["acquisitions"] - line["amortization"]
    line["property"] = before["property"] - line["capital_expenditures"] - line["depreciation"] + line["amortization"]

    income = max(line["net_income"], revenue // 40)
    line["dividends"], line["repurchases"] = -near("dividends", income), -near("repurchases", income)
    paid_out = line["dividends"] + line["repurchases"]
    debt_before = before["long_term_debt"] + before["current_debt"]
    unfinanced_cash = before["cash"] + line["operating_cash"] + line["investing_cash"] + paid_out
    most_repaid = before["long_term_debt"] * 3 // 4 + before["current_debt"] - line["current_debt"]
    line["net_borrowings"] = max(near("cash", revenue, 0.4) - unfinanced_cash, -most_repaid)
    line["long_term_debt"] = debt_before + line["net_borrowings"] - line["current_debt"]
    line["financing_cash"] = line["net_borrowings"] + paid_out
    line["cash_change"] = line["operating_cash"] + line["investing_cash"] + line["financing_cash"]
    line["cash_beginning"], line["cash"] = before["cash"], before["cash"] + line["cash_change"]
    line["cash_end"] = line["cash"]
    line["equity"] = before["equity"] + line["net_income"] + line["stock_compensation"] + paid_out

    line["current_assets"] = sum(line[name] for name in _CURRENT_ASSETS)
    line["total_assets"] = sum(line[name] for name in _ASSETS)
    line["current_liabilities"] = sum(line[name] for name in _CURRENT_LIABILITIES)
    debts = line["long_term_debt"] + line["other_liabilities"]
    line["total_liabilities"] = line["current_liabilities"] + debts
    line["liabilities_and_equity"] = line["total_liabilities"] + line["equity"]
    return line
