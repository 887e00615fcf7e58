"""The HTML page of one set of predictions against gold: figures, errors, and every example.

It shares its style, plots and example browser with the page of a run (:mod:`fintune.report.run_page`).
"""

from __future__ import annotations

from collections.abc import Mapping

from fintune.evaluation.metrics import Score
from fintune.evaluation.scoring import ScoreResult
from fintune.report.browser import BrowserAnswer, browser_blocks
from fintune.report.formatting import (
    Cell,
    HtmlTable,
    Row,
    fill_template,
    format_interval,
    format_invalid,
    format_percent,
    tolerant_views,
)
from fintune.report.sections.accuracy import GROUPS, accuracy_plot, group_label
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
    errors, score = errors_section(result.verdicts), result.score
    views: list[Row] = [
        [Cell(view, note=meaning), format_percent(share), f"{number:,}"]
        for view, meaning, share, number in tolerant_views(score)
    ]
    files: list[Row] = [[file, Cell(digest, style="code")] for file, digest in (digests or {}).items()]
    return fill_template(
        "score.html.j2",
        title=f"{name} - fintune score",
        name=name,
        gold_name=gold_name,
        score=score,
        titles={
            "accuracy": "Accuracy",
            "questions": "By question",
            **({"errors": "Errors"} if errors else {}),
            "examples": "Examples",
            "provenance": "Provenance",
        },
        official=_official_table(score),
        tolerant=HtmlTable("Other views", ("view", "share", "n"), views),
        plots=[_plot(score, "steps"), _plot(score, "operations")],
        breakdowns=[_breakdown(score, group, attribute) for group, attribute in GROUPS],
        errors=errors,
        filters=[pair for pair in _FILTERS if pair[0] != "noresult" or "no_result" in score.outcomes],
        files=HtmlTable("Files", ("file", "SHA-256"), files, left=(0, 1)),
        num_unscored=result.num_unscored,
        problems=result.problems[:MAX_PROBLEMS],
        num_problems=len(result.problems),
        index=index,
        pages=pages,
    )


def _official_table(score: Score) -> HtmlTable:
    """The official figures over the predictions, and beside them over the whole gold file."""
    whole = score.whole_file
    rows: list[Row] = []
    for field in ("execution_accuracy", "program_accuracy"):
        sides = [(getattr(side, field), getattr(side, f"{field}_interval")) for side in (score, whole)]
        cells = (Cell(format_percent(share), note=format_interval(interval)) for share, interval in sides)
        rows.append([field.replace("_", " "), *cells])
    rows.append(["invalid", Cell(format_invalid(score), note=format_interval(score.invalid_rate_interval)), ""])
    rows.append(["n", f"{score.num_predictions:,}", f"{whole.num_gold:,}"])
    return HtmlTable("Official figures", ("", "of the\npredictions", "of the\nwhole file"), rows)


def _plot(score: Score, what: str) -> str:
    """Draw accuracy by ``steps`` or by ``operations``, the most frequent operation first."""
    if what == "steps":
        groups = {f"{number} step{'s' if number != 1 else ''}": rates for number, rates in score.by_num_steps.items()}
        words = " by steps of the gold program"
    else:
        groups = dict(sorted(score.by_operation.items(), key=lambda group: -group[1].num_predictions))
        words = " by operation in the gold program"
    rows = [(f"{group} ({rates.num_predictions:,})", rates, 1) for group, rates in groups.items()]
    return accuracy_plot(f"{what}-plot", words, rows, "execution accuracy, % (n in brackets)")


def _breakdown(score: Score, name: str, attribute: str) -> HtmlTable:
    """All figures by group of questions."""
    rows: list[Row] = [
        [
            group_label(key),
            f"{rates.num_predictions:,}",
            Cell(format_percent(rates.execution_accuracy), style="strong"),
            format_interval(rates.execution_accuracy_interval),
            format_percent(rates.program_accuracy),
            format_percent(rates.invalid_rate),
        ]
        for key, rates in getattr(score, attribute).items()
    ]
    columns = (name, "n", "execution\naccuracy", "95 % interval", "program\naccuracy", "invalid")
    return HtmlTable(f"By {name}", columns, rows)
