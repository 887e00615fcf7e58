"""The loss curve and the speed of training, from ``metrics.jsonl``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fintune.evaluation.statistics import summarize_losses
from fintune.report.plots import Curve, loss_plot

_COMPLETED = "Mean negative log-likelihood of the completion's tokens; the prompt is not trained on."
_COMPARED = (
    "Preference loss of pairs of answers. A margin is the reward of the chosen answer less that of the rejected one; "
    "a pair is ranked right where it is positive."
)
_LABELLED = (
    "Preference loss of single answers, desired and undesired ones. A reward is beta times the log-probability that an "
    "answer has gained over the model before training; a margin is the mean of the desired answers less that of the "
    "undesired ones."
)


def context(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the template prints, or nothing where there was no training.

    Args:
        lines: Objects with ``step`` and any of ``loss``, ``learning_rate``, ``eval_loss``, and ``tokens`` and
            ``seconds`` since the start of training.
    """
    train, evaluated, rate = (_curve(lines, key) for key in ("loss", "eval_loss", "learning_rate"))
    if not train.steps:
        return {}
    timed = [line for line in lines if line.get("seconds") and line.get("tokens")]
    rows = [("optimiser steps", f"{train.steps[-1]:,}")]
    if timed:
        tokens, seconds = timed[-1]["tokens"], timed[-1]["seconds"]
        rows += [
            ("tokens seen", f"{tokens:,}"),
            ("seconds", f"{seconds:,.0f}" if seconds >= 10 else f"{seconds:.1f}"),
            ("tokens a second", f"{tokens / seconds:,.0f}"),
        ]
    legend = [("s1", "training loss" + (", with its moving average" if len(train.steps) > 60 else ""))]
    if evaluated.steps:
        rows.append(("last evaluation loss", f"{evaluated.values[-1]:.4f}"))
        best = min(zip(evaluated.values, evaluated.steps, strict=True))
        rows.append(("lowest evaluation loss", f"{best[0]:.4f} at step {best[1]:,}"))
        right = _curve(lines, "eval_accuracy")
        if right.steps:
            highest = max(zip(right.values, (-step for step in right.steps), strict=True))
            rows.append(("highest execution accuracy", f"{highest[0]:.1%} at step {-highest[1]:,}"))
        legend.append(("s4", "evaluation loss"))
    ends = summarize_losses(train.values)
    of = f"{ends.num} logged" if ends.num > 1 else "logged one"
    rows += [(f"mean loss, first {of}", f"{ends.first:.3f}"), (f"mean loss, last {of}", f"{ends.last:.3f}")]
    rows += _preference_rows(lines)
    if rate.steps:
        rows.append(("peak learning rate", f"{max(rate.values):.2g}"))
    words = _told(train)
    # The trainer of labelled answers alone logs an estimate of the divergence.
    labelled = any("kl" in line for line in lines)
    compared = any("rewards/margins" in line for line in lines)
    return {
        "words": _LABELLED if labelled else _COMPARED if compared else _COMPLETED,
        "plot": loss_plot("loss-plot", words, train, evaluated, rate),
        "legend": legend,
        "rows": rows,
    }


def _told(train: Curve) -> str:
    """The curve in words; figures that round to the same are neither a rise nor a fall."""
    ends = summarize_losses(train.values)
    first, last = f"{ends.first:.3f}", f"{ends.last:.3f}"
    means = f", means of {ends.num} logged losses" if ends.num > 1 else ""
    if first == last:
        return f"Loss {first} at first and at last, {train.steps[-1]:,} steps{means}"
    went = "fell" if float(last) < float(first) else "rose"
    return f"Loss {went} from {first} to {last} in {train.steps[-1]:,} steps{means}"


def _preference_rows(lines: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Margins between chosen and rejected answers, where there was preference training."""
    rows = []
    alone = [_curve(lines, f"eval_rewards/{name}_right") for name in ("chosen", "rejected")]
    held_out = "held-out pairs" if not any(curve.steps for curve in alone) else "held-out answers"
    for prefix, where in (("", "training"), ("eval_", held_out)):
        margins, right = (_curve(lines, f"{prefix}rewards/{name}").values for name in ("margins", "accuracies"))
        if margins:
            rows.append((f"reward margin, {where}", f"{margins[0]:.3f} at first, {margins[-1]:.3f} at last"))
        if right:
            rows.append((f"ranked right, {where}", f"{right[0]:.1%} at first, {right[-1]:.1%} at last"))
    for words, curve in zip(("desired above", "undesired below"), alone, strict=True):
        if curve.values:
            told = f"{curve.values[0]:.1%} at first, {curve.values[-1]:.1%} at last"
            rows.append((f"{words} the reference, {held_out}", told))
    return rows


def _curve(lines: Sequence[Mapping[str, Any]], key: str) -> Curve:
    found = [(line["step"], line[key]) for line in lines if isinstance(line.get(key), (int, float))]
    return Curve([step for step, _ in found], [value for _, value in found])
