"""Whether every form of the model is still the trained model: token by token, and answer by answer."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any

from fintune.evaluation.agreement import Difference, ModelAgreement, compare_predictions
from fintune.report.formatting import Cell, HtmlTable, Row, format_percent, kind_cell, kind_label
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
    accuracies = {results.kind: format_percent(results.figures.execution_accuracy) for results in run.scored}
    limits: Mapping[str, float] = run.replay.get("min_same_share") or {}
    has_accuracy = bool(accuracies.keys() & replayed.keys())
    rows: list[Row] = []
    for kind, figures in replayed.items():
        is_reference = kind in _REFERENCES
        rows.append(
            [
                kind_cell(kind),
                "reference" if is_reference else _format_kl(figures["mean_kl"]),
                Cell("" if is_reference else format_percent(figures["same_best_token_share"]), style="strong"),
                f"{figures['perplexity']:.4f}",
                *([accuracies.get("adapter" if is_reference else kind, "")] if has_accuracy else []),
            ]
        )
    columns = ["model", "mean KL\ndivergence, nats", "same best\ntoken", "perplexity"]
    columns += ["execution\naccuracy"] if has_accuracy else []
    shares = sorted(set(limits.values()), reverse=True)
    return {
        "num_positions": run.replay.get("num_positions", 0),
        "num_examples": run.replay.get("num_examples", 0),
        "reference": run.replay.get("reference", "base + adapter"),
        "limits": ", ".join(
            f"{format_percent(share)} for {' and '.join(kind_label(kind) for kind in limits if limits[kind] == share)}"
            for share in shares
        ),
        "has_base": "base" in replayed,
        "table": HtmlTable("Agreement of the exports", columns, rows),
    }


def _format_kl(nats: float) -> str:
    if nats < _SMALLEST_KL:
        return "< 0.000001"
    return f"{nats:.6f}" if nats < 0.001 else f"{nats:.4f}"


def agreement_section(run: RunData) -> dict[str, Any]:
    """Variables of the template; nothing without two trained kinds, or if tokens were sampled: samples differ."""
    trained = [results for results in run.first_mode if results.kind != "base"]
    if run.config.predict.strategy != "greedy" or len(trained) < 2:
        return {}
    rows: list[Row] = []
    pairs = []
    for first, second in combinations(trained, 2):
        agreement = compare_predictions(
            list(first.predictions.values()),
            list(second.predictions.values()),
            verdicts_a=first.correct,
            verdicts_b=second.correct,
        )
        counts = (
            agreement.num_common,
            agreement.num_same_completion,
            agreement.num_same_program,
            agreement.num_same_verdict if agreement.num_scored else None,
            len(agreement.program_differences),
            len(agreement.program_differences) - len(agreement.unexplained),
        )
        name = f"{first.label} and {second.label}"
        rows.append([Cell(name, style="nowrap"), *("" if count is None else f"{count:,}" for count in counts)])
        if agreement.differences:
            pairs.append(_differences(run, name, first.label, second.label, agreement))
    names = ("same\ncompletion", "same\nprogram", "same\nverdict", "programs\nthat differ", "of them from\na near-tie")
    return {"table": HtmlTable("Agreement of the copies", ("pair", "n", *names), rows), "pairs": pairs}


def _differences(run: RunData, name: str, first: str, second: str, agreement: ModelAgreement) -> dict[str, Any]:
    # Changed programs first: readers look for them.
    ordered = sorted(agreement.differences, key=lambda difference: difference.same_program)
    listed = ordered[:MAX_LISTED]
    of = f" of {len(ordered)}" if len(listed) < len(ordered) else ""
    noun = "completion that differs" if len(ordered) == 1 else "completions that differ"
    columns = ("example", "first differing\ntoken", first, "gap, nats", second, "gap, nats", "verdict")
    rows = [_difference_row(run, difference) for difference in listed]
    table = HtmlTable(f"Differences between {name}", columns, rows, left=(0, 2, 4, 6))
    return {"title": f"{name}: {len(listed)}{of} {noun}", "table": table}


def _difference_row(run: RunData, difference: Difference) -> Row:
    words = {True: "near-tie", False: "clear gap", None: "gap not known"}[difference.near_tie]
    if difference.same_program:
        words += ", same program"
    if None not in (difference.correct_a, difference.correct_b) and difference.correct_a != difference.correct_b:
        words += ", right became wrong" if difference.correct_a else ", wrong became right"
    return [
        Cell(difference.id, link=f"#example:{difference.id}"),
        "" if difference.position is None else f"{difference.position + 1}",
        Cell(_token(run, difference.token_a), style="code"),
        _gap(difference.margin_a),
        Cell(_token(run, difference.token_b), style="code"),
        _gap(difference.margin_b),
        Cell(words, style="nowrap"),
    ]


def _token(run: RunData, token: int | None) -> str:
    if token is None:
        return "(ended)"
    return run.token_names.get(token, f"token {token}").replace(" ", "\u2423").replace("\n", "\u21b5")


def _gap(margin: float | None) -> str:
    return "?" if margin is None else f"{margin:.4f}" if margin < 1 else f"{margin:.2f}"
