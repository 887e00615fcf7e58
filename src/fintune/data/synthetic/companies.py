"""Invented companies: name, ticker, sector, and the habits by which each writes its reports."""

from __future__ import annotations

import random
import string
from dataclasses import dataclass

# Ways to name a line of the accounts. A name stands under one key only, so that no table of a company holds it twice;
# none has a bracket or a comma, which the program language cannot express.
SYNONYMS: dict[str, tuple[str, ...]] = {
    "revenue": ("net sales", "net revenue", "revenues", "sales", "total net revenue", "total net sales", "revenue"),
    "cost_of_sales": ("cost of sales", "cost of goods sold", "cost of revenue", "cost of products sold"),
    "gross_profit": ("gross profit", "gross margin"),
    "selling": ("selling and administrative expenses", "selling expenses", "marketing and administration", "sg&a"),
    "research": ("research and development", "product development", "research expenses"),
    "amortization": ("amortization of intangibles", "amortization expense", "intangible amortization"),
    "operating_expenses": ("operating expenses", "total operating expenses", "total expenses"),
    "operating_income": ("operating income", "operating profit", "income from operations", "operating earnings"),
    "interest_expense": ("interest expense", "interest cost", "net interest expense"),
    "pretax_income": ("income before taxes", "pretax income", "earnings before income taxes", "income before tax"),
    "income_tax": ("provision for income taxes", "income tax expense", "income taxes"),
    "net_income": ("net income", "net earnings"),
    "operating_margin": ("operating margin", "operating income margin", "operating profit margin"),
    "earnings_per_share": ("diluted earnings per share", "earnings per share", "diluted eps"),
    "cash": ("cash and cash equivalents", "cash and equivalents"),
    "receivables": ("accounts receivable", "receivables", "trade receivables", "receivables net"),
    "inventories": ("inventories", "inventory"),
    "other_current": ("other current assets", "prepaid expenses", "prepaid and other assets"),
    "current_assets": ("total current assets",),
    "property": ("property and equipment", "plant and equipment", "net property"),
    "goodwill": ("goodwill",),
    "other_assets": ("other assets", "other noncurrent assets", "deferred tax assets"),
    "total_assets": ("total assets",),
    "payables": ("accounts payable", "trade payables", "payables"),
    "accrued": ("accrued liabilities", "accrued expenses", "accrued compensation"),
    "current_debt": ("short-term debt", "current portion of debt", "notes payable", "short-term borrowings"),
    "current_liabilities": ("total current liabilities",),
    "long_term_debt": ("long-term debt", "long-term borrowings", "senior notes"),
    "other_liabilities": ("other liabilities", "pension liabilities", "deferred income taxes"),
    "total_liabilities": ("total liabilities",),
    "equity": ("shareholders equity", "total equity", "stockholders equity"),
    "liabilities_and_equity": ("total liabilities and equity",),
    "depreciation": ("depreciation and amortization", "depreciation"),
    "stock_compensation": ("stock-based compensation", "share-based compensation"),
    "working_capital": ("changes in working capital", "working capital changes", "change in operating assets"),
    "operating_cash": ("cash from operating activities", "operating cash flow", "cash provided by operations"),
    "capital_expenditures": ("capital expenditures", "purchases of property", "additions to property"),
    "acquisitions": ("acquisitions of businesses", "acquisitions", "business acquisitions"),
    "investing_cash": ("cash used in investing activities", "investing activities"),
    "net_borrowings": ("net borrowings", "net change in debt", "debt proceeds net of repayments"),
    "dividends": ("dividends paid", "cash dividends", "dividends to shareholders"),
    "repurchases": ("share repurchases", "repurchases of common stock", "purchases of treasury stock"),
    "financing_cash": ("cash from financing activities", "financing activities"),
    "cash_change": ("net change in cash", "net increase in cash", "change in cash and equivalents"),
    "cash_beginning": ("cash at beginning of year", "cash beginning of period"),
    "cash_end": ("cash at end of year", "cash end of period"),
}

SECTORS: dict[str, tuple[str, ...]] = {
    "technology": ("software", "hardware", "services", "cloud", "licensing", "networking", "storage", "security"),
    "consumer": ("beverages", "snacks", "household products", "beauty", "pet care", "frozen foods", "apparel"),
    "industrial": ("aerospace", "automation", "filtration", "packaging", "fasteners", "power systems", "coatings"),
    "energy": ("exploration", "refining", "pipelines", "chemicals", "retail fuel", "renewables", "gas storage"),
    "health": ("devices", "diagnostics", "pharmaceuticals", "vaccines", "animal health", "consumer health"),
    "transport": ("agricultural", "automotive", "coal", "intermodal", "industrial products", "forest products"),
    "media": ("broadcasting", "publishing", "advertising", "subscriptions", "film", "music", "events"),
    "financial": ("asset management", "brokerage", "insurance", "custody", "lending", "payments", "advisory"),
}
REGIONS = (
    "north america", "united states", "europe", "asia pacific", "latin america", "middle east", "africa", "canada",
    "united kingdom", "japan", "china", "australia", "germany", "brazil", "india",
)  # fmt: skip

_STEMS = (
    "hal", "brook", "ver", "nor", "cal", "mer", "ald", "tor", "win", "pem", "gran", "sten", "lor", "ash", "kes", "dun",
    "ply", "fair", "ron", "bel", "car", "wex", "thorn", "mar", "oak", "pell", "quin", "ral", "sil", "tam", "vance",
)  # fmt: skip
_ENDS = ("ton", "ford", "wick", "dale", "more", "field", "ley", "mont", "by", "ham", "stead", "gate", "well", "ridge")
_FORMS = ("inc .", "corporation", "company", "holdings inc .", "group", "industries inc .", "plc", "international")


@dataclass(frozen=True)
class Company:
    """One invented company.

    Attributes:
        index: Its number, from 0; with the seed it decides everything else.
        short_name: "halbrook".
        name: With the legal form, "halbrook holdings inc .".
        ticker: Unique within a seed.
        unit: Scale of the tables in dollars, 1000 or 1000000.
        decimals: Digits after the point in tables, 0 or 1.
        names: Line of the accounts to the name that this company gives it.
        segments: Names of its segments.
        regions: Names of its regions.
        newest_first: Order of the year columns.
        year_end: "december 31".
        first_year: First year of its accounts.
        num_years: Number of years of its accounts, 4 to 6.
    """

    index: int
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
        """What the tables count money in: "millions" or "thousands"."""
        return {1_000: "thousands", 1_000_000: "millions"}[self.unit]


def make_company(seed: int, index: int, *, small: bool) -> Company:
    """Company ``index`` of ``seed``; no other company has a part in it."""
    rng = random.Random(f"company/{seed}/{index}")  # noqa: S311 - not for security
    sector = rng.choice(sorted(SECTORS))
    short_name = make_short_name(rng)
    num_parts = rng.choice((2, 3, 3)) if small else rng.choice((3, 4, 5))
    return Company(
        index=index,
        short_name=short_name,
        name=f"{short_name} {rng.choice(_FORMS)}",
        ticker=short_name[:2].upper() + _code(index, seed),
        sector=sector,
        unit=rng.choice((1_000, *3 * (1_000_000,))),
        decimals=0 if small else rng.choice((0, 0, 0, 1)),
        names={key: rng.choice(names) for key, names in SYNONYMS.items()},
        segments=tuple(rng.sample(SECTORS[sector], num_parts)),
        regions=tuple(rng.sample(REGIONS, num_parts)),
        newest_first=rng.random() < 0.6,
        year_end=rng.choice(("december 31", "december 31", "december 31", "september 30", "june 30")),
        first_year=rng.randint(1999, 2014),
        num_years=rng.randint(4, 6),
    )


def make_short_name(rng: random.Random) -> str:
    """An invented name in one word."""
    return rng.choice(_STEMS) + rng.choice(_ENDS)


def _code(index: int, seed: int) -> str:
    """An index as three letters or more; different indices give different codes."""
    letters, block = "", 26**3
    # 7919 has no factor in common with 26: within a block of 26 ** 3 the codes are shuffled, never doubled.
    index = index // block * block + (index * 7919 + seed) % block
    while index or len(letters) < 3:
        index, digit = divmod(index, 26)
        letters = string.ascii_uppercase[digit] + letters
    return letters
