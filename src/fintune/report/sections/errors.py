"""Why predictions are wrong: every error under one of a few kinds, most frequent first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from fintune.finqa.official import split_step, split_steps, str_to_num
from fintune.finqa.program import TABLE_OPERATIONS, tokenize
from fintune.finqa.verdict import Verdict
from fintune.report.formatting import Cell, HtmlTable, Row, format_percent
from fintune.report.plots import share_plot

SAME_NUMBERS = "right numbers, other steps"
SOME_NUMBERS = "some other numbers"
OTHER_NUMBERS = "other numbers"
OTHER_REASON = "another reason"

_REASONS = (
    ("is not a number: ", "table cell is no number"),
    ("is not a constant: ", "table cell is no number"),
    ("the table has", "no such table row"),
    ("names no row", "no such table row"),
    ("the row has no cells", "no such table row"),
    ("is not an earlier step", "no such earlier step"),
    ("is not a number", "operand is no number"),
    ("is not a constant", "unknown constant"),
    ("is not an operation", "unknown operation"),
    ("division by zero", "division by zero"),
    ("too large", "result too large"),
    ("cannot take", "yes or no as operand"),
    ("is not ')'", "broken form"),
    ("arguments are needed", "broken form"),
    ("'('", "broken form"),
    ("no complete step", "no complete step"),
)
"""Parts of the reasons of `fintune.finqa.execute`, in the order of the search."""

HINTS = {
    "other sign": "only the sign is wrong",
    "100 times off": "a hundred times too large or too small",
    "within 1 %": "at most 1 % away from the gold result",
    SAME_NUMBERS: "reads what the gold program reads, and combines it in another way",
    SOME_NUMBERS: "reads some of what the gold program reads, and other numbers",
    OTHER_NUMBERS: "reads nothing that the gold program reads",
    "no complete step": "no step ends; the official script calls such a program valid",
    "broken form": "not of the form operation(argument, argument)",
}


def error_kind(verdict: Verdict) -> str:
    """Return the kind of error of a wrong prediction.

    A wrong result is grouped by its distance from the right one, then by the numbers and rows that its program reads
    compared with those of the gold program, constants and signs aside.
    """
    if verdict.outcome == "wrong_result":
        if verdict.sign_insensitive:
            return "other sign"
        if verdict.scale_100:
            return "100 times off"
        if verdict.within_1_percent:
            return "within 1 %"
        operands, gold = _operands(verdict.program), _operands(verdict.gold_program)
        return SAME_NUMBERS if operands == gold else SOME_NUMBERS if operands & gold else OTHER_NUMBERS
    reason = verdict.reason or ""
    if reason.startswith("the result is not a number"):
        return "result is no number"
    return next((name for part, name in _REASONS if part in reason), OTHER_REASON)


def _operands(program: str) -> set[float | str]:
    """The numbers without their sign, and the rows, that a program reads; constants are left out."""
    operands: set[float | str] = set()
    for raw in split_steps(tokenize(program)[:-1]):
        try:
            operation, *arguments = split_step(raw.strip())
        except ValueError:  # a gold program outside the language
            continue
        for text in arguments[:1] if operation in TABLE_OPERATIONS else arguments:
            if "#" not in text and "const" not in text:
                number = None if operation in TABLE_OPERATIONS else str_to_num(text)
                operands.add(text if number is None else abs(number))
    return operands


def errors_section(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Variables of the template; nothing if all predictions are right."""
    groups: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        if not verdict.exe_correct:
            groups.setdefault(error_kind(verdict), []).append(verdict)
    if not groups:
        return {}
    ordered = sorted(groups.items(), key=lambda group: -len(group[1]))
    number = len(verdicts)
    words = "; ".join(f"{name} {len(group)}" for name, group in ordered)
    rows: list[Row] = [
        [
            Cell(f"{name} (invalid)" if group[0].invalid else name, note=HINTS.get(name, "")),
            f"{len(group):,}",
            format_percent(len(group) / number),
            Cell("show", link=f"#{quote(f'error:{name}')}", title=f"Examples of {name}"),
        ]
        for name, group in ordered
    ]
    return {
        "num": sum(map(len, groups.values())),
        "plot": share_plot(
            "errors-plot",
            f"Errors by kind: {words}",
            {name: len(group) / number for name, group in ordered},
            {},
            f"% of predictions (n = {number:,})",
        ),
        "table": HtmlTable("Errors by kind", ("kind", "n", "share", "examples"), rows),
    }
