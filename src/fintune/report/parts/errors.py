"""Why predictions are wrong: every error under one of a few kinds, most frequent first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fintune.finqa.constants import TABLE_OPERATIONS
from fintune.finqa.official import split_step, split_steps, str_to_num
from fintune.finqa.program import tokenize
from fintune.finqa.verdict import Verdict
from fintune.report.plots import share_plot
from fintune.report.run_page import percent

SAME_NUMBERS = "right numbers, other steps"
SOME_NUMBERS = "some other numbers"
OTHER_NUMBERS = "other numbers"
OTHER_REASON = "another reason"

_REASONS = (
    ("is no number: ", "table cell is no number"),
    ("is no constant: ", "table cell is no number"),
    ("the table has", "no such table row"),
    ("names no row", "no such table row"),
    ("the row has no cells", "no such table row"),
    ("is no earlier step", "no such earlier step"),
    ("is no number", "operand is no number"),
    ("is no constant", "unknown constant"),
    ("is no operation", "unknown operation"),
    ("division by zero", "division by zero"),
    ("too large", "result too large"),
    ("cannot take", "yes or no as operand"),
    ("is not ')'", "broken form"),
    ("arguments are needed", "broken form"),
    ("'(' ", "broken form"),
    ("no complete step", "no complete step"),
)
"""Parts of the reasons of `fintune.finqa.execute`, in the order in which they are looked for."""

HINTS = {
    "other sign": "wrong only by the sign",
    "100 times off": "a hundred times too large or too small",
    "within 1 %": "at most 1 % away from the gold result",
    SAME_NUMBERS: "what the gold program reads, put together in another way",
    SOME_NUMBERS: "reads a part of what the gold program reads, and other",
    OTHER_NUMBERS: "reads nothing that the gold program reads",
    "no complete step": "the official script sees no step that ends, and calls the program valid",
    "broken form": "not of the form operation(argument, argument)",
}


def kind(verdict: Verdict) -> str:
    """The kind of error of a wrong prediction.

    A wrong result first by what it misses the right one by, then by the numbers and rows that its program reads beside
    those of the gold program, constants and signs aside.
    """
    if verdict.outcome == "wrong_result":
        if verdict.sign_insensitive:
            return "other sign"
        if verdict.scale_100:
            return "100 times off"
        return "within 1 %" if verdict.within_1_percent else _by_numbers(verdict)
    reason = verdict.reason or ""
    if reason.startswith("the result is no number"):
        return "result is no number"
    return next((name for part, name in _REASONS if part in reason), OTHER_REASON)


def _by_numbers(verdict: Verdict) -> str:
    read, gold = _reads(verdict.program), _reads(verdict.gold_program)
    if read == gold:
        return SAME_NUMBERS
    return SOME_NUMBERS if read & gold else OTHER_NUMBERS


def _reads(program: str) -> set[float | str]:
    arguments: set[float | str] = set()
    for raw in split_steps(tokenize(program)[:-1]):
        try:
            operation, *both = split_step(raw.strip())
        except ValueError:  # a gold program that is none
            continue
        for text in both[:1] if operation in TABLE_OPERATIONS else both:
            if "#" not in text and "const" not in text:
                number = None if operation in TABLE_OPERATIONS else str_to_num(text)
                arguments.add(text if number is None else abs(number))
    return arguments


def context(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """What the template prints, or nothing where all are right."""
    groups: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        if not verdict.exe_correct:
            groups.setdefault(kind(verdict), []).append(verdict)
    if not groups:
        return {}
    ordered = sorted(groups.items(), key=lambda group: -len(group[1]))
    number = len(verdicts)
    words = "; ".join(f"{name} {len(group)}" for name, group in ordered)
    return {
        "num": f"{sum(map(len, groups.values())):,}",
        "plot": share_plot(
            "errors-plot",
            f"Errors by kind: {words}",
            {name: len(group) / number for name, group in ordered},
            {},
            f"% of predictions (n = {number:,})",
        ),
        "rows": [
            {
                "name": name,
                "hint": HINTS.get(name, ""),
                "num": f"{len(group):,}",
                "share": percent(len(group) / number),
                "invalid": group[0].invalid,
                "link": f"error:{name}",
            }
            for name, group in ordered
        ],
    }
