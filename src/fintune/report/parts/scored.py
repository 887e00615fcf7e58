"""The figures of one set of predictions: the official ones, other views under their own names, and by question."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fintune.evaluation.metrics import Rates, Score
from fintune.report.parts.accuracy import GROUPS, group_name
from fintune.report.plots import Dot, dot_plot
from fintune.report.run_page import percent, span, told_invalid


def headline(score: Score) -> list[dict[str, str]]:
    """The official figures over the predictions, and beside them over the whole gold file."""
    whole = score.whole_file
    return [
        {
            "name": "execution accuracy",
            "value": percent(score.execution_accuracy),
            "interval": span(score.execution_accuracy_interval),
            "whole": percent(whole.execution_accuracy),
            "whole_interval": span(whole.execution_accuracy_interval),
        },
        {
            "name": "program accuracy",
            "value": percent(score.program_accuracy),
            "interval": span(score.program_accuracy_interval),
            "whole": percent(whole.program_accuracy),
            "whole_interval": span(whole.program_accuracy_interval),
        },
        {
            "name": "invalid",
            "value": told_invalid(score),
            "interval": span(score.invalid_rate_interval),
            "whole": "",
            "whole_interval": "",
        },
    ]


def tolerant(score: Score) -> list[tuple[str, str, str, str]]:
    """Views that are no official figure: name, value, n, meaning."""
    views = score.tolerant
    number = f"{score.num_predictions:,}"
    rows = [
        ("sign-insensitive", percent(views.sign_insensitive), number, "correct, or with the other sign"),
        ("times or divided by 100", percent(views.scale_100), number, "correct, or 100 times too large or small"),
        ("within 1 %", percent(views.within_1_percent), number, "correct, or at most 1 % of the gold result away"),
    ]
    if views.answer_agreement is not None:
        meaning = "agrees with the annotator's free text, where that is one number, yes or no"
        rows.append(("agrees with answer", percent(views.answer_agreement), f"{views.num_with_answer:,}", meaning))
    return rows


def plots(score: Score) -> list[tuple[str, str]]:
    """Accuracy by steps and by operation: the plot, and its caption."""
    steps = {f"{number} step{'s' if number != 1 else ''}": rates for number, rates in score.by_num_steps.items()}
    operations = dict(sorted(score.by_operation.items(), key=lambda group: -group[1].num_predictions))
    return [
        (_plot("steps-plot", "steps of the gold program", steps), "By steps of the gold program."),
        (
            _plot("operations-plot", "operation in the gold program", operations),
            "By operation in the gold program; one with two operations counts under both.",
        ),
    ]


def _plot(name: str, what: str, groups: Mapping[str, Rates]) -> str:
    rows = [
        Dot(
            f"{group} ({rates.num_predictions:,})",
            rates.execution_accuracy,
            *rates.execution_accuracy_interval,
            rates.program_accuracy,
        )
        for group, rates in groups.items()
    ]
    words = "; ".join(f"{row.label} {percent(row.value)}" for row in rows)
    return dot_plot(name, f"Execution accuracy by {what}: {words}", rows, "execution accuracy, % (n in brackets)")


def breakdowns(score: Score) -> list[dict[str, Any]]:
    """All figures by kind of question, a table each."""
    return [
        {
            "name": name,
            "rows": [
                {
                    "name": group_name(key),
                    "n": f"{rates.num_predictions:,}",
                    "exe": percent(rates.execution_accuracy),
                    "interval": span(rates.execution_accuracy_interval),
                    "program": percent(rates.program_accuracy),
                    "invalid": percent(rates.invalid_rate),
                }
                for key, rates in getattr(score, attribute).items()
            ],
        }
        for name, attribute in GROUPS
    ]
