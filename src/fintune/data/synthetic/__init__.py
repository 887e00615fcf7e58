"""``builtin:statements``: generated report pages with questions, in the exact FinQA schema.

Invented companies have consistent books. Tables are cut from the books, and facts surround them. Questions, programs
and evidence are of the kinds that FinQA asks. Licence: the package's own; nothing is taken from any data set.
"""

from __future__ import annotations

from fintune.data.synthetic.generate import company_of, generate, split_by_company

__all__ = ["company_of", "generate", "split_by_company"]
