"""Free and constrained completions of each kind of model side by side, and what a constraint gains and loses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fintune.config import DecodingMode
from fintune.evaluation.statistics import compare_paired
from fintune.report.parts.accuracy import row
from fintune.report.run_page import KINDS, WAYS, Measured, ModeResults, RunPage, colour

_ByWay = Mapping[DecodingMode, Mapping[str, Measured]]


def context(page: RunPage) -> dict[str, Any] | None:
    """What the template prints; None where everything was measured in one way."""
    first = ModeResults(page.config.predict.decoding_modes[0], page.measured, page.predictions, page.verdicts)
    if not page.other_modes:
        return None
    ways = [first, *page.other_modes]
    by_way: _ByWay = {each.way: {measured.kind: measured for measured in each.measured} for each in ways}
    return {
        "first": first.way,
        "titles": [{"way": each.way, "words": WAYS[each.way]} for each in ways],
        "rows": list(_rows(by_way)),
        "differences": [each for other in page.other_modes for each in _differences(first, other)],
    }


def _rows(by_way: _ByWay) -> Iterator[dict[str, Any]]:
    for kind in KINDS:
        cells = [row(measured[kind]) if kind in measured else None for measured in by_way.values()]
        if known := [cell for cell in cells if cell is not None]:
            yield {**{name: known[0][name] for name in ("label", "colour", "num", "megabytes")}, "cells": cells}


def _differences(first: ModeResults, other: ModeResults) -> Iterator[dict[str, Any]]:
    """What the other way changes in each kind of model that was scored in both."""
    before = {measured.kind: measured for measured in first.measured}
    for after in other.measured:
        if after.kind not in before:
            continue
        sides = [{id_: v.exe_correct for id_, v in each.verdicts[after.kind].items()} for each in (first, other)]
        found = compare_paired(*sides)
        low, high = found.interval
        seconds = before[after.kind].predict_seconds
        yield {
            "label": KINDS[after.kind],
            "colour": colour(after.kind),
            "way": other.way,
            "num": f"{found.num_common:,}",
            "points": found.points,
            "interval": f"{100 * low:+.1f} to {100 * high:+.1f}",
            "gained": f"{found.num_gained:,}",
            "lost": f"{found.num_lost:,}",
            "ratio": f"{after.predict_seconds / seconds:.2f}" if seconds else "",
        }
