"""The figures of one set of predictions for the terminal."""

from __future__ import annotations

from rich.table import Table

from fintune.evaluation.metrics import Score
from fintune.evaluation.statistics import Interval


def headline_table(score: Score, name: str) -> Table:
    """The official figures over the predictions, beside them those over the whole gold file, each with its interval."""
    whole = score.whole_file
    table = _table(name, "predictions", "95 % interval", "whole file", "95 % interval")
    rows = (
        ("execution accuracy", "execution_accuracy", True),
        ("program accuracy", "program_accuracy", True),
        ("invalid", "invalid_rate", False),
    )
    for words, field, over_whole in rows:
        sides = [score, whole] if over_whole else [score]
        cells = [cell for side in sides for cell in (f"{getattr(side, field):.2%}", _span(side, field))]
        table.add_row(words, *cells)
    if score.no_program_rate:
        table.add_row("no program, not invalid", f"{score.no_program_rate:.2%}", "", "", "")
    missing = f"{whole.num_missing} without a prediction" if whole.num_missing else ""
    table.add_row("n", str(score.num_predictions), "", str(whole.num_gold), missing)
    return table


def views_table(score: Score) -> Table:
    """The views that are no official figure."""
    views = score.tolerant
    table = _table("other views, not official", "share", "n")
    for words, value in (
        ("right up to the sign", views.sign_insensitive),
        ("right up to a factor of 100", views.scale_100),
        ("within 1 %", views.within_1_percent),
    ):
        table.add_row(words, f"{value:.2%}", str(score.num_predictions))
    if views.answer_agreement is not None:
        table.add_row("agrees with the annotator's answer", f"{views.answer_agreement:.2%}", str(views.num_with_answer))
    return table


def _span(side: object, field: str) -> str:
    interval: Interval = getattr(side, f"{field}_interval")
    return f"{100 * interval[0]:.1f} to {interval[1]:.1%}"


def _table(*columns: str) -> Table:
    table = Table(*columns, box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    return table
