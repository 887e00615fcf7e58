"""The stage ``score``: official verdicts on the predictions of one kind of model.

Reads ``predict/KIND/predictions.jsonl`` and ``prepare/gold.json``, writes ``score.json`` and ``score.csv``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fintune.config import Config
from fintune.evaluation.scoring import score_predictions
from fintune.manifest import Facts
from fintune.util import files


def score(config: Config, inputs: Mapping[str, Path], folder: Path, *, kind: str) -> Facts:
    """Score the predictions of one kind of model, such as ``merged``; with a decoding mode ``merged+page``."""
    predictions, gold = inputs[f"predict/{kind}"] / "predictions.jsonl", inputs["prepare"] / "gold.json"
    result = score_predictions(predictions, gold, strict=True)
    files.write_output(folder / "score.csv", result.to_csv())
    files.write_output(folder / "score.json", result.to_json())
    figures = result.score
    report = inputs["prepare"] / "report.json"
    # Why the evaluation says little about new questions, if it does.
    warning = files.read_json(report).get("eval_warning") if report.is_file() else None
    caution = f"; caution: {warning}" if warning else ""
    no_program = f", no program {figures.no_program_rate:.2%}" if figures.no_program_rate else ""
    return {
        "summary": f"execution {figures.execution_accuracy:.2%}, program {figures.program_accuracy:.2%}, "
        f"invalid {figures.invalid_rate:.2%}{no_program} of {figures.num_predictions}{caution}",
        "num_predictions": figures.num_predictions,
        "execution_accuracy": figures.execution_accuracy,
        "program_accuracy": figures.program_accuracy,
        "invalid_rate": figures.invalid_rate,
    }
