"""The headline: accuracy of every form of the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fintune.config import GGUF_KINDS
from fintune.report.parts import unscored
from fintune.report.plots import Dot, dot_plot
from fintune.report.run_page import KINDS, Measured, RunPage, colour, percent, span, told_invalid

GROUPS = (
    ("steps of the gold program", "by_num_steps"),
    ("operation in the gold program", "by_operation"),
    ("where the evidence stands", "by_evidence"),
    ("type of question", "by_question_type"),
)
"""Kinds of question by name, with the attribute of a score that has their figures."""
_QUANTISED = tuple(kind for kind in GGUF_KINDS if kind.startswith("Q"))


def hero(page: RunPage) -> dict[str, str]:
    """The one sentence on top: before, after, and what ships."""
    by_kind = {measured.kind: measured for measured in page.measured}
    after = by_kind.get("adapter") or next((m for m in page.measured if m.kind != "base"), None)
    before = by_kind.get("base")
    if after is None and before is None:
        return unscored.hero(page)
    words = f"execution accuracy on {same_n(page.measured) or 'the'} evaluation questions"
    if after is None or before is None:
        only = after or before
        assert only is not None
        return {"before": percent(only.score.execution_accuracy), "after": "", "words": f"{words} ({KINDS[only.kind]})"}
    smallest = by_kind.get("Q4_K_M") or next((by_kind[kind] for kind in reversed(_QUANTISED) if kind in by_kind), None)
    tail = ""
    if smallest is not None and smallest is not after:
        size = f" in {smallest.weights_bytes / 1e6:.0f} MB" if smallest.weights_bytes else ""
        tail = f"; {percent(smallest.score.execution_accuracy)} as the {smallest.kind} file that ships{size}"
    return {
        "before": percent(before.score.execution_accuracy),
        "after": percent(after.score.execution_accuracy),
        "words": f"{words}, before and after training{tail}",
    }


def decoded(page: RunPage) -> str:
    """How tokens were chosen, where it was not the usual way: such figures stand beside no others."""
    options = page.config.predict
    way = options.decoding_modes[0]
    kept = {
        "none": "",
        "general": "Completions were kept to the program language.",
        "page": "Completions were kept to programs of the numbers and rows on their page.",
    }
    chosen = {
        "greedy": "",
        "sample": "Tokens were drawn.",
        "execution_guided": f"Of {options.num_candidates} candidates the most probable one that runs was taken.",
        "vote": f"{options.num_candidates} drawn programs voted on the result.",
    }
    return f"{kept[way]} {chosen[options.strategy]}".strip()


def label(kind: str, way: str = "") -> str:
    """Name of a kind of model, with the way of its completions where that is not the first: ``merged, example``."""
    return f"{KINDS.get(kind, kind)}, {way}" if way else KINDS.get(kind, kind)


def in_every_mode(page: RunPage) -> list[tuple[Measured, str]]:
    """Each kind of model in the order of the chain, with its way; "" is the first."""
    ways = [("", page.measured), *((other.way, other.measured) for other in page.other_modes)]
    found = [(each, way) for way, measured in ways for each in measured]
    return sorted(found, key=lambda each: list(KINDS).index(each[0].kind))


def row(measured: Measured, way: str = "") -> dict[str, Any]:
    """One row of the table, as text."""
    return {
        "label": label(measured.kind, way),
        "colour": colour(measured.kind),
        "exe": percent(measured.score.execution_accuracy),
        "interval": span(measured.score.execution_accuracy_interval),
        "program": percent(measured.score.program_accuracy),
        "invalid": told_invalid(measured.score),
        "num": f"{measured.score.num_predictions:,}",
        "seconds": f"{measured.predict_seconds:,.0f}"
        if measured.predict_seconds >= 10
        else f"{measured.predict_seconds:.1f}",
        "megabytes": "" if measured.weights_bytes is None else f"{measured.weights_bytes / 1e6:,.1f}",
    }


def same_n(measured: Sequence[Measured]) -> str:
    """N where it is the same for all, else nothing."""
    numbers = {m.score.num_predictions for m in measured}
    return f"{numbers.pop():,}" if len(numbers) == 1 else ""


def unended(measured: Sequence[tuple[Measured, str]]) -> str:
    """A sentence about completions that reached the token limit, or nothing; each kind comes with its way."""
    ended = [f"{label(m.kind, way)} {m.num_unended}" for m, way in measured if m.num_unended]
    return f"Completions cut off at the token limit: {', '.join(ended)}." if ended else ""


def plot(measured: Sequence[tuple[Measured, str]]) -> str:
    """Dots and intervals; each kind comes with its way."""
    rows = [
        Dot(
            label(m.kind, way).replace("GGUF ", ""),
            m.score.execution_accuracy,
            *m.score.execution_accuracy_interval,
            m.score.program_accuracy,
            colour(m.kind),
        )
        for m, way in measured
    ]
    number = same_n([m for m, _ in measured])
    words = "; ".join(f"{row.label} {percent(row.value)}" for row in rows)
    return dot_plot(
        "accuracy-plot",
        f"Execution accuracy: {words}",
        rows,
        f"execution accuracy, %{f' (n = {number})' if number else ''}",
    )


def group_name(key: int | str) -> str:
    """A group's name for people."""
    return str(key).replace("yes_no", "yes or no")


def breakdowns(measured: Sequence[tuple[Measured, str]]) -> list[dict[str, Any]]:
    """Execution accuracy by kind of question, one table each: groups in rows, kinds of model and ways in columns."""
    if not measured:
        return []
    tables = []
    for name, attribute in GROUPS:
        groups = [getattr(m.score, attribute) for m, _ in measured]
        keys = sorted({key for group in groups for key in group})
        rows = [
            {
                "name": group_name(key),
                "n": max(group[key].num_predictions for group in groups if key in group),
                "cells": [percent(group[key].execution_accuracy) if key in group else "" for group in groups],
            }
            for key in keys
        ]
        tables.append({"name": name, "rows": rows})
    return tables
