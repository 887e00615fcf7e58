"""The HTML page of one set of predictions against gold: figures, errors, and every example.

It shares its look, its plots and its example browser with the page of a run (:mod:`fintune.report.page`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fintune.evaluation.metrics import Score
from fintune.finqa.verdict import Verdict
from fintune.records import FinQARecord
from fintune.report.examples import Answer, browser_blocks
from fintune.report.parts import errors, scored
from fintune.report.run_page import percent, span
from fintune.report.templating import fill

MAX_PROBLEMS = 100
"""So many problems of the files are listed; all are counted."""

PREDICTED = "predicted"

_FILTERS = (
    ("all", "all"),
    ("executable", "wrong but executable"),
    ("invalid", "invalid"),
    ("noresult", "no result"),
    ("other", "right by another program"),
)


@dataclass(frozen=True)
class ScorePage:
    """All that the page shows.

    Attributes:
        name: The predictions' file name.
        gold_name: The gold file's.
        score: All figures.
        verdicts: One a prediction, in file order.
        records: The questions of the gold file.
        tokens: The official tokens of each prediction, in the order of ``verdicts``.
        digests: SHA-256 of each file, by its name.
        num_unscored: Rows that are in no figure, by reason.
        problems: One line for each such row, and for each scored with a doubt.
    """

    name: str
    gold_name: str
    score: Score
    verdicts: Sequence[Verdict]
    records: Sequence[FinQARecord]
    tokens: Sequence[Sequence[str]]
    digests: Mapping[str, str] = field(default_factory=dict)
    num_unscored: Mapping[str, int] = field(default_factory=dict)
    problems: Sequence[str] = ()


def render_score(page: ScorePage) -> str:
    """The page as HTML."""
    answers: dict[str, Answer] = {}
    for verdict, tokens in zip(page.verdicts, page.tokens, strict=True):
        # Of several predictions for an id the first is shown, as it is the one that counts over the whole file.
        error = "" if verdict.exe_correct else errors.kind(verdict)
        answers.setdefault(verdict.id, Answer(tokens, verdict.program, verdict, error=error))
    records = [record for record in page.records if record.id in answers]
    index, pages = browser_blocks(records, {PREDICTED: answers}, {})
    outcomes = {verdict.outcome for verdict in page.verdicts}
    found = errors.context(page.verdicts)
    present = (
        (True, "accuracy", "Accuracy"),
        (True, "questions", "By question"),
        (found, "errors", "Errors"),
        (True, "examples", "Examples"),
        (True, "made", "How it was made"),
    )
    return fill(
        "score.html.j2",
        title=f"{page.name} - fintune score",
        page=page,
        number=f"{page.score.num_predictions:,}",
        hero=percent(page.score.execution_accuracy),
        interval=span(page.score.execution_accuracy_interval),
        parts=[(id_, words) for there, id_, words in present if there],
        headline=scored.headline(page.score),
        tolerant=scored.tolerant(page.score),
        plots=scored.plots(page.score),
        breakdowns=scored.breakdowns(page.score),
        errors=found,
        filters=[pair for pair in _FILTERS if pair[0] != "noresult" or "no_result" in outcomes],
        problems=page.problems[:MAX_PROBLEMS],
        index=index,
        pages=pages,
    )
