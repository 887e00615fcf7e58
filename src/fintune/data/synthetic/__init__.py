"""``builtin:statements``: generated report pages with questions, in the exact FinQA schema.

Invented companies with consistent books; tables cut from them and facts around them; questions, programs and evidence
of the kinds that FinQA asks. Licence: the package's own; nothing is taken from any data set.
"""

from __future__ import annotations

from fintune.data.synthetic.generate import company_records, generate
from fintune.data.synthetic.split import company_of, split_by_company

__all__ = ["company_of", "company_records", "generate", "split_by_company"]
