"""What the models' own confidence is worth: accuracy when the least certain answers are withheld."""

from __future__ import annotations

from typing import Any

from fintune.evaluation.statistics import accuracy_at, accuracy_by_coverage
from fintune.report.plots import Curve, coverage_plot
from fintune.report.run_page import KINDS, RunPage, colour, percent

COVERAGES = (1.0, 0.8, 0.5, 0.2)
"""Shares of the questions that are answered, as columns."""


def context(page: RunPage) -> dict[str, Any]:
    """What the template prints; nothing where no kind of model has a confidence for each of its scored answers."""
    curves = {}
    for kind, verdicts in page.verdicts.items():
        predictions = page.predictions.get(kind, {})
        answers = [
            (confidence, verdict.exe_correct)
            for id_, verdict in verdicts.items()
            if id_ in predictions and (confidence := predictions[id_].confidence) is not None
        ]
        if answers and len(answers) == len(verdicts):
            curves[kind] = accuracy_by_coverage(answers)
    if not curves:
        return {}
    rows = [
        {
            "label": KINDS[kind],
            "colour": colour(kind),
            "n": f"{len(curve):,}",
            "cells": [percent(accuracy_at(curve, coverage)) for coverage in COVERAGES],
        }
        for kind, curve in curves.items()
    ]
    drawn = [
        (
            KINDS[kind],
            colour(kind),
            Curve([(k + 1) / len(curve) for k in range(len(curve))], curve),
        )
        for kind, curve in curves.items()
    ]
    words = "; ".join(f"{KINDS[kind]} {percent(accuracy_at(curve, 0.5))}" for kind, curve in curves.items())
    return {
        "columns": [f"{100 * coverage:.0f} %" for coverage in COVERAGES],
        "rows": rows,
        "plot": coverage_plot("confidence-plot", f"Accuracy of the more confident half of the answers: {words}", drawn),
        "voted": page.config.predict.strategy == "vote",
        "num_candidates": page.config.predict.num_candidates,
    }
