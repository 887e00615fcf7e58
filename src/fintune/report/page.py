"""The HTML page of a run: one self-contained file, made from what the stages left behind.

:func:`render` is a function of :class:`~fintune.report.run_page.RunPage` alone and reads no file of the run; a part
whose data are missing, since its stage was skipped, is left out.
"""

from __future__ import annotations

from fintune.report.agreement import NEAR_TIE_NATS
from fintune.report.examples import Answer, browser_blocks
from fintune.report.parts import accuracy, confidence, data, guard, made, pairs, replay, training
from fintune.report.run_page import KINDS, RunPage
from fintune.report.templating import fill

FILTERS = (
    ("all", "all"),
    ("wrong", "wrong"),
    ("executable", "wrong but executable"),
    ("invalid", "invalid"),
    ("disagree", "models disagree"),
)


def render(page: RunPage) -> str:
    """The page as HTML."""
    compared = [pairs.pair(page, a, b, agreement) for a, b, agreement in page.agreements]
    trained, prepared = training.context(page.metrics), data.context(page.data)
    sure, guarded = confidence.context(page), guard.context(page.guard)
    replayed = replay.context(page)
    index, pages = ("", "")
    if page.records and page.predictions:
        answers = {
            KINDS.get(kind, kind): {
                id_: Answer.of(prediction, page.verdicts.get(kind, {}).get(id_)) for id_, prediction in by_id.items()
            }
            for kind, by_id in page.predictions.items()
        }
        index, pages = browser_blocks(page.records, answers, page.num_cut)
    present = (
        (page.measured, "accuracy", "Accuracy"),
        (sure, "confidence", "Confidence"),
        (replayed, "replay", "Replay"),
        (compared, "agreement", "Agreement"),
        (trained, "training", "Training"),
        (guarded, "guard", "Guard"),
        (prepared, "data", "Data"),
        (index, "examples", "Examples"),
        (True, "made", "How it was made"),
    )
    changed, unchanged = made.options(page.config)
    return fill(
        "run.html.j2",
        title=f"{page.name} - fintune run",
        page=page,
        hero=accuracy.hero(page),
        chips=made.chips(page),
        parts=[(id_, words) for there, id_, words in present if there],
        measured=[accuracy.row(measured) for measured in page.measured],
        breakdowns=accuracy.breakdowns(page.measured),
        same_n=accuracy.same_n(page.measured),
        decoded=accuracy.decoded(page),
        unended=accuracy.unended(page.measured),
        plot=accuracy.plot(page.measured) if page.measured else "",
        confidence=sure,
        replay=replayed,
        pairs=compared,
        threshold=NEAR_TIE_NATS,
        training=trained,
        guard=guarded,
        data=prepared,
        filters=FILTERS,
        index=index,
        pages=pages,
        changed=changed,
        unchanged=unchanged,
        origin=made.origin(page),
        versions=made.versions(page.made),
    )
