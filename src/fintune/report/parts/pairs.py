"""Agreement of the copies, pair by pair."""

from __future__ import annotations

from typing import Any

from fintune.evaluation.agreement import Agreement, Difference
from fintune.report.run_page import KINDS, RunPage

MAX_LISTED = 300
"""Differences of one pair that the page lists; it says so where there are more."""


def pair(page: RunPage, a: str, b: str, agreement: Agreement) -> dict[str, Any]:
    """One pair as the template prints it."""
    changed = agreement.program_differences
    # Changed programs first: they are what a reader looks for.
    ordered = sorted(agreement.differences, key=lambda difference: difference.same_program)
    return {
        "a": KINDS[a],
        "b": KINDS[b],
        "n": f"{agreement.num_common:,}",
        "completion": f"{agreement.num_same_completion:,}",
        "program": f"{agreement.num_same_program:,}",
        "verdict": f"{agreement.num_same_verdict:,}" if agreement.num_scored else "",
        "differ": f"{len(changed):,}",
        "ties": f"{sum(difference.near_tie is True for difference in changed):,}",
        "rows": [_difference(page, difference) for difference in ordered[:MAX_LISTED]],
        "listed_of": len(ordered),
    }


def _difference(page: RunPage, difference: Difference) -> dict[str, str]:
    words = {True: "near-tie", False: "clear gap", None: "gap not known"}[difference.near_tie]
    if difference.same_program:
        words += ", same program"
    verdict = {(True, False): "right became wrong", (False, True): "wrong became right"}
    words += "".join(
        f", {phrase}" for key, phrase in verdict.items() if key == (difference.correct_a, difference.correct_b)
    )
    return {
        "id": difference.id,
        "position": "" if difference.position is None else f"{difference.position + 1}",
        "token_a": _token(page, difference.token_a),
        "token_b": _token(page, difference.token_b),
        "margin_a": _margin(difference.margin_a),
        "margin_b": _margin(difference.margin_b),
        "words": words,
    }


def _token(page: RunPage, token: int | None) -> str:
    if token is None:
        return "(ended)"
    return page.token_names.get(token, f"token {token}").replace(" ", "\u2423").replace("\n", "\u21b5")


def _margin(margin: float | None) -> str:
    return "?" if margin is None else f"{margin:.4f}" if margin < 1 else f"{margin:.2f}"
