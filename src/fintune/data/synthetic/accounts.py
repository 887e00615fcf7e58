"""A company's books over its years, in whole table units, so that every identity holds exactly.

Revenue less costs gives net income; every change of a balance-sheet line passes through the cash flow, so the balance
sheet balances and the cash flow ties to the change in cash; segments and regions sum to revenue; maturities to debt.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

from fintune.data.synthetic.companies import Company


@dataclass(frozen=True)
class Accounts:
    """The books.

    Attributes:
        years: Years in order.
        lines: Line of the accounts to year to value, in units of ``10 ** -decimals`` of the table unit.
        segments: Segment to year to revenue.
        regions: Region to year to revenue.
        shares: Year to shares outstanding, in millions.
    """

    years: tuple[int, ...]
    lines: dict[str, dict[int, int]] = field(default_factory=dict)
    segments: dict[str, dict[int, int]] = field(default_factory=dict)
    regions: dict[str, dict[int, int]] = field(default_factory=dict)
    shares: dict[int, float] = field(default_factory=dict)


def make_accounts(company: Company, rng: random.Random, *, small: bool) -> Accounts:
    """The books of a company.

    Args:
        company: Whose.
        rng: Source of chance.
        small: Figures of 2 to 4 digits instead of 3 to 7.
    """
    years = tuple(range(company.first_year, company.first_year + company.num_years))
    books = Accounts(years)
    low, high = (600, 6_000) if small else (20_000, 3_000_000) if company.unit == 1_000 else (900, 60_000)
    scale = 10**company.decimals
    revenue = scale * math.exp(rng.uniform(math.log(low), math.log(high)))
    habits = _habits(rng)
    previous = _opening(revenue, habits)
    for year in years:
        revenue *= rng.uniform(0.86, 1.24)
        previous = _year(round(revenue), previous, habits, rng)
        for key, value in previous.items():
            books.lines.setdefault(key, {})[year] = value
        books.shares[year] = habits["shares"] * rng.uniform(0.95, 1.05)
    for target, names in ((books.segments, company.segments), (books.regions, company.regions)):
        weights = [rng.uniform(0.5, 2) for _ in names]
        for year in years:
            weights = [weight * rng.uniform(0.8, 1.25) for weight in weights]
            for name, value in zip(names, split(books.lines["revenue"][year], weights), strict=True):
                target.setdefault(name, {})[year] = value
    return books


def split(total: int, weights: list[float]) -> list[int]:
    """Whole parts in about these proportions that sum to the total exactly."""
    whole, parts, left = sum(weights), [], total
    for weight in weights[:-1]:
        parts.append(round(total * weight / whole))
        left -= parts[-1]
    return [*parts, left]


def _habits(rng: random.Random) -> dict[str, float]:
    ranges = {
        "cost_of_sales": (0.45, 0.7), "selling": (0.08, 0.16), "research": (0.02, 0.07), "amortization": (0.01, 0.03),
        "interest": (0.03, 0.07), "tax": (0.2, 0.37), "receivables": (0.1, 0.2), "inventories": (0.07, 0.18),
        "other_current": (0.03, 0.07), "property": (0.3, 0.7), "goodwill": (0.2, 0.6), "other_assets": (0.06, 0.15),
        "payables": (0.06, 0.13), "accrued": (0.05, 0.1), "current_debt": (0.02, 0.06), "debt": (0.2, 0.5),
        "other_liabilities": (0.05, 0.15), "cash": (0.1, 0.25), "capital_expenditures": (0.04, 0.1),
        "dividends": (0.15, 0.4), "repurchases": (0.1, 0.5), "shares": (20, 900), "stock_compensation": (0.01, 0.02),
    }  # fmt: skip
    return {name: rng.uniform(low, high) for name, (low, high) in ranges.items()}


def _opening(revenue: float, habits: dict[str, float]) -> dict[str, int]:
    """The balance sheet before the first year; equity is what is left."""
    names = ("cash", "receivables", "inventories", "other_current", "property", "goodwill", "other_assets")
    owed = ("payables", "accrued", "current_debt", "other_liabilities")
    sheet = {name: round(revenue * habits[name]) for name in (*names, *owed)}
    sheet["long_term_debt"] = round(revenue * habits["debt"])
    sheet["equity"] = sum(sheet[name] for name in names) - sum(sheet[name] for name in (*owed, "long_term_debt"))
    return sheet


def _year(revenue: int, before: dict[str, int], habits: dict[str, float], rng: random.Random) -> dict[str, int]:
    """One year's statements from the last balance sheet."""

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

    for name in ("receivables", "inventories", "other_current", "other_assets", "payables", "accrued", "current_debt"):
        line[name] = near(name, revenue)
    line["other_liabilities"] = near("other_liabilities", revenue)
    line["depreciation"] = line["amortization"] + near("capital_expenditures", revenue) * 3 // 4
    line["stock_compensation"] = near("stock_compensation", revenue)
    assets = ("receivables", "inventories", "other_current", "other_assets")
    owed = ("payables", "accrued", "other_liabilities")
    line["working_capital"] = sum(before[n] - line[n] for n in assets) + sum(line[n] - before[n] for n in owed)
    line["operating_cash"] = sum(line[n] for n in ("net_income", "depreciation", "stock_compensation"))
    line["operating_cash"] += line["working_capital"]

    line["capital_expenditures"] = -near("capital_expenditures", revenue, 0.3)
    line["acquisitions"] = -max(1, round(revenue * rng.uniform(0.01, 0.08)))
    line["investing_cash"] = line["capital_expenditures"] + line["acquisitions"]
    # Amortization leaves goodwill and intangibles together, the rest of depreciation leaves property.
    line["goodwill"] = before["goodwill"] - line["acquisitions"] - line["amortization"]
    line["property"] = before["property"] - line["capital_expenditures"] - line["depreciation"] + line["amortization"]

    income = max(line["net_income"], revenue // 40)
    line["dividends"], line["repurchases"] = -near("dividends", income), -near("repurchases", income)
    without = before["cash"] + line["operating_cash"] + line["investing_cash"] + line["dividends"] + line["repurchases"]
    most_repaid = before["long_term_debt"] * 3 // 4 + before["current_debt"] - line["current_debt"]
    line["net_borrowings"] = max(near("cash", revenue, 0.4) - without, -most_repaid)
    line["long_term_debt"] = (
        before["long_term_debt"] + before["current_debt"] + line["net_borrowings"] - line["current_debt"]
    )
    line["financing_cash"] = line["net_borrowings"] + line["dividends"] + line["repurchases"]
    line["cash_change"] = line["operating_cash"] + line["investing_cash"] + line["financing_cash"]
    line["cash_beginning"], line["cash"] = before["cash"], before["cash"] + line["cash_change"]
    line["cash_end"] = line["cash"]
    line["equity"] = before["equity"] + line["net_income"] + line["stock_compensation"]
    line["equity"] += line["dividends"] + line["repurchases"]
    return {**line, **_totals(line)}


def _totals(line: dict[str, int]) -> dict[str, int]:
    current = sum(line[n] for n in ("cash", "receivables", "inventories", "other_current"))
    owed = sum(line[n] for n in ("payables", "accrued", "current_debt"))
    liabilities = owed + line["long_term_debt"] + line["other_liabilities"]
    return {
        "current_assets": current,
        "total_assets": current + line["property"] + line["goodwill"] + line["other_assets"],
        "current_liabilities": owed,
        "total_liabilities": liabilities,
        "liabilities_and_equity": liabilities + line["equity"],
    }
