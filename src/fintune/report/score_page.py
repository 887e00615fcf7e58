"""The HTML page of one set of predictions against gold: figures, errors, and every example.

It shares its style, plots and example browser with the page of a run (:mod:`fintune.report.run_page`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fintune.evaluation.metrics import Rates, Score
from fintune.evaluation.scoring import ScoreResult
from fintune.report.browser import BrowserAnswer, browser_blocks
from fintune.report.formatting import (
    Cell,
    HtmlTable,
    fill_template,
    format_interval,
    format_invalid,
    format_percent,
)
from fintune.report.plots import Dot, dot_plot
from fintune.report.sections.accuracy import GROUPS, group_label
from fintune.report.sections.errors import error_kind, errors_section

MAX_PROBLEMS = 100
"""Number of problems of the files that the page lists. It counts all."""

_FILTERS = (
    ("all", "all"),
    ("executable", "wrong but executable"),
    ("invalid", "invalid"),
    ("noresult", "no result"),
    ("other", "right by another program"),
)


def render_score(result: ScoreResult, name: str, gold_name: str, digests: Mapping[str, str] | None = None) -> str:
    """Render the page as HTML.

    Args:
        result: The score.
        name: What the predictions are called.
        gold_name: What the gold file is called.
        digests: SHA-256 of each file, by its name.
    """
    answers: dict[str, BrowserAnswer] = {}
    for verdict, tokens in zip(result.verdicts, result.tokens, strict=True):
        # Of several predictions for an id the page shows the first, which counts over the whole file.
        error = "" if verdict.exe_correct else error_kind(verdict)
        answers.setdefault(verdict.id, BrowserAnswer(tokens, verdict.program, verdict, error=error))
    records = [record for record in result.records if record.id in answers]
    index, pages = browser_blocks(records, {"predicted": answers}, {})
    outcomes = {verdict.outcome for verdict in result.verdicts}
    errors = errors_section(result.verdicts)
    score = result.score
    return fill_template(
        "score.html.j2",
        title=f"{name} - fintune score",
        name=name,
        gold_name=gold_name,
        score=score,
        num_predictions=f"{score.num_predictions:,}",
        accuracy=format_percent(score.execution_accuracy),
        interval=format_interval(score.execution_accuracy_interval),
        titles={
            "accuracy": "Accuracy",
            "questions": "By question",
            **({"errors": "Errors"} if errors else {}),
            "examples": "Examples",
            "provenance": "Provenance",
        },
        official=_official_table(score),
        tolerant=_tolerant_table(score),
        plots=_plots(score),
        breakdowns=_breakdowns(score),
        errors=errors,
        filters=[pair for pair in _FILTERS if pair[0] != "noresult" or "no_result" in outcomes],
        files=HtmlTable(
            "Files",
            ("file", "SHA-256"),
            [[file, Cell(digest, is_code=True)] for file, digest in (digests or {}).items()],
        ),
        num_unscored=result.num_unscored,
        problems=result.problems[:MAX_PROBLEMS],
        num_problems=len(result.problems),
        index=index,
        pages=pages,
    )


def _official_table(score: Score) -> HtmlTable:
    """The official figures over the predictions, and beside them over the whole gold file."""
    whole = score.whole_file
    rows: list[list[str | Cell]] = [
        [
            name,
            Cell(format_percent(getattr(score, field)), note=format_interval(getattr(score, f"{field}_interval"))),
            Cell(format_percent(getattr(whole, field)), note=format_interval(getattr(whole, f"{field}_interval"))),
        ]
        for name, field in (
            ("execution accuracy", "execution_accuracy"),
            ("program accuracy", "program_accuracy"),
        )
    ]
    rows.append(["invalid", Cell(format_invalid(score), note=format_interval(score.invalid_rate_interval)), ""])
    rows.append(["n", f"{score.num_predictions:,}", f"{whole.num_gold:,}"])
    columns = ("", "of the\npredictions", "of the\nwhole file")
    return HtmlTable("Official figures", columns, rows, numeric=(1, 2))


def _tolerant_table(score: Score) -> HtmlTable:
    """The views that are no official figure."""
    views = score.tolerant
    number = f"{score.num_predictions:,}"
    rows: list[list[str | Cell]] = [
        [Cell(name, note=meaning), format_percent(value), number]
        for name, value, meaning in (
            ("sign-insensitive", views.sign_insensitive, "correct, or with the other sign"),
            ("times or divided by 100", views.scale_100, "correct, or 100 times too large or small"),
            ("within 1 %", views.within_1_percent, "correct, or at most 1 % away from the gold result"),
        )
    ]
    if views.answer_agreement is not None:
        meaning = "agrees with the annotator's free text, if that is one number, yes or no"
        share = format_percent(views.answer_agreement)
        rows.append([Cell("agrees with answer", note=meaning), share, f"{views.num_with_answer:,}"])
    return HtmlTable("Other views", ("view", "share", "n"), rows, numeric=(1, 2))


def _plots(score: Score) -> list[tuple[str, str]]:
    """Accuracy by steps and by operation: the plot and its caption."""
    steps = {f"{number} step{'s' if number != 1 else ''}": rates for number, rates in score.by_num_steps.items()}
    operations = dict(sorted(score.by_operation.items(), key=lambda group: -group[1].num_predictions))
    return [
        (_plot("steps-plot", "steps of the gold program", steps), "By steps of the gold program."),
        (
            _plot("operations-plot", "operation in the gold program", operations),
            "By operation in the gold program. A program with two operations counts under both.",
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
    words = "; ".join(f"{row.label} {format_percent(row.value)}" for row in rows)
    return dot_plot(name, f"Execution accuracy by {what}: {words}", rows, "execution accuracy, % (n in brackets)")


def _breakdowns(score: Score) -> Sequence[HtmlTable]:
    """All figures by group of questions."""
    names = ("n", "execution\naccuracy", "95 % interval", "program\naccuracy", "invalid")
    return [
        HtmlTable(
            f"By {name}",
            (name, *names),
            [
                [
                    group_label(key),
                    f"{rates.num_predictions:,}",
                    Cell(format_percent(rates.execution_accuracy), style="strong"),
                    format_interval(rates.execution_accuracy_interval),
                    format_percent(rates.program_accuracy),
                    format_percent(rates.invalid_rate),
                ]
                for key, rates in getattr(score, attribute).items()
            ],
            numeric=range(1, 6),
        )
        for name, attribute in GROUPS
    ]
