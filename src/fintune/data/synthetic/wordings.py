"""How questions are put: many wordings for each kind, after the manner of FinQA's annotators.

``{x}`` and ``{y}`` are quantities, ``{p}`` and ``{q}`` parts of the total ``{t}``, ``{a}`` the earlier and ``{b}`` the
later year (or the only one), ``{l}`` and ``{m}`` years between, ``{unit}`` is "millions" or another.
"""

from __future__ import annotations

from fintune.data.synthetic.wordings_parts import PARTS
from fintune.data.synthetic.wordings_quantities import QUANTITIES

WORDINGS = {**QUANTITIES, **PARTS}
"""Kind -> its wordings."""
