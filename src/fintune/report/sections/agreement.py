"""Whether every form of the model is still the trained model: token by token, and answer by answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fintune.evaluation.agreement import Difference, ModelAgreement
from fintune.report.formatting import KIND_LABELS, Cell, HtmlTable, format_percent, kind_colour
from fintune.report.run_data import RunData

MAX_LISTED = 300
"""Number of differences of a pair that the page lists. The page says so if there are more."""
_REFERENCES = ("adapter", "trained")
_SMALLEST_KL = 1e-6
"""Divergence in nats below which single precision has no meaning."""


def replay_section(run: RunData) -> dict[str, Any]:
    """Variables of the template; nothing without a replay."""
    replayed: Mapping[str, Mapping[str, float]] = run.replay.get("replayed") or {}
    if not replayed:
        return {}
    accuracies = {measured.kind: format_percent(measured.score.execution_accuracy) for measured in run.measured}
    limits: Mapping[str, float] = run.replay.get("min_same_share") or {}
    has_accuracy = any(kind in accuracies for kind in replayed)
    rows: list[list[str | Cell]] = [
        [
            Cell(_label(kind), swatch=kind_colour(kind) if kind in KIND_LABELS else None, style="nowrap"),
            "reference" if kind in _REFERENCES else _format_kl(figures["mean_kl"]),
            Cell("" if kind in _REFERENCES else format_percent(figures["same_best_token_share"]), style="strong"),
            f"{figures['perplexity']:.4f}",
            *([accuracies.get("adapter" if kind in _REFERENCES else kind, "")] if has_accuracy else []),
        ]
        for kind, figures in replayed.items()
    ]
    columns = ["model", "mean KL\ndivergence, nats", "same best\ntoken", "perplexity"]
    columns += ["execution\naccuracy"] if has_accuracy else []
    return {
        "num_positions": f"{run.replay.get('num_positions', 0):,}",
        "num_examples": f"{run.replay.get('num_examples', 0):,}",
        "reference": run.replay.get("reference", "base + adapter"),
        "limits": ", ".join(
            f"{format_percent(share)} for {' and '.join(_label(kind) for kind in limits if limits[kind] == share)}"
            for share in sorted(set(limits.values()), reverse=True)
        ),
        "has_base": "base" in replayed,
        "table": HtmlTable("Agreement of the exports", columns, rows, numeric=range(1, len(columns))),
    }


def _label(kind: str) -> str:
    return KIND_LABELS.get(kind, kind if kind in _REFERENCES else f"GGUF {kind}")


def _format_kl(nats: float) -> str:
    if nats < _SMALLEST_KL:
        return "< 0.000001"
    return f"{nats:.6f}" if nats < 0.001 else f"{nats:.4f}"


def agreement_section(run: RunData) -> dict[str, Any]:
    """Variables of the template; nothing without two trained kinds."""
    compared = run.agreements
    if not compared:
        return {}
    names = ("same\ncompletion", "same\nprogram", "same\nverdict", "programs\nthat differ", "of them from\na near-tie")
    rows: list[list[str | Cell]] = [
        [
            Cell(_pair(first, second), style="nowrap"),
            f"{agreement.num_common:,}",
            f"{agreement.num_same_completion:,}",
            f"{agreement.num_same_program:,}",
            f"{agreement.num_same_verdict:,}" if agreement.num_scored else "",
            f"{len(agreement.program_differences):,}",
            f"{sum(difference.near_tie is True for difference in agreement.program_differences):,}",
        ]
        for first, second, agreement in compared
    ]
    return {
        "table": HtmlTable("Agreement of the copies", ("pair", "n", *names), rows, numeric=range(1, 7)),
        "pairs": [
            _differences(run, first, second, agreement)
            for first, second, agreement in compared
            if agreement.differences
        ],
    }


def _pair(first: str, second: str) -> str:
    return f"{KIND_LABELS[first]} and {KIND_LABELS[second]}"


def _differences(run: RunData, first: str, second: str, agreement: ModelAgreement) -> dict[str, Any]:
    # Changed programs first: readers look for them.
    ordered = sorted(agreement.differences, key=lambda difference: difference.same_program)
    listed = ordered[:MAX_LISTED]
    of = f" of {len(ordered)}" if len(listed) < len(ordered) else ""
    noun = "completion that differs" if len(ordered) == 1 else "completions that differ"
    columns = (
        "example",
        "first differing\ntoken",
        KIND_LABELS[first],
        "gap, nats",
        KIND_LABELS[second],
        "gap, nats",
        "verdict",
    )
    return {
        "title": f"{_pair(first, second)}: {len(listed)}{of} {noun}",
        "table": HtmlTable(
            f"Differences between {_pair(first, second)}",
            columns,
            [_difference_row(run, difference) for difference in listed],
            numeric=(1, 3, 5),
        ),
    }


def _difference_row(run: RunData, difference: Difference) -> list[str | Cell]:
    words = {True: "near-tie", False: "clear gap", None: "gap not known"}[difference.near_tie]
    if difference.same_program:
        words += ", same program"
    if difference.correct_a is not None and difference.correct_b is not None:
        if difference.correct_a and not difference.correct_b:
            words += ", right became wrong"
        elif difference.correct_b and not difference.correct_a:
            words += ", wrong became right"
    return [
        Cell(difference.id, link=f"#example:{difference.id}"),
        "" if difference.position is None else f"{difference.position + 1}",
        Cell(_token(run, difference.token_a), is_code=True, style="nowrap"),
        _gap(difference.margin_a),
        Cell(_token(run, difference.token_b), is_code=True, style="nowrap"),
        _gap(difference.margin_b),
        Cell(words, style="nowrap"),
    ]


def _token(run: RunData, token: int | None) -> str:
    if token is None:
        return "(ended)"
    return run.token_names.get(token, f"token {token}").replace(" ", "\u2423").replace("\n", "\u21b5")


def _gap(margin: float | None) -> str:
    return "?" if margin is None else f"{margin:.4f}" if margin < 1 else f"{margin:.2f}"
