"""The HTML page of a run: one self-contained file, made from what the stages left behind.

:func:`render` is a function of :class:`~fintune.report.run_page.RunPage` alone and reads no file of the run; a part
whose data are missing, since its stage was skipped, is left out.
"""

from __future__ import annotations

from fintune.evaluation.agreement import NEAR_TIE_NATS
from fintune.report.examples import Answer, browser_blocks
from fintune.report.parts import accuracy, confidence, data, guard, made, pairs, replay, training, ways
from fintune.report.run_page import RunPage
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
    replayed, measured = replay.context(page), accuracy.in_every_mode(page)
    index, pages = ("", "")
    if page.records and (page.predictions or page.other_modes):
        answers = {
            accuracy.label(kind, way): {
                id_: Answer.of(prediction, verdicts.get(kind, {}).get(id_)) for id_, prediction in by_id.items()
            }
            for way, predictions, verdicts in (
                ("", page.predictions, page.verdicts),
                *((other.way, other.predictions, other.verdicts) for other in page.other_modes),
            )
            for kind, by_id in predictions.items()
        }
        index, pages = browser_blocks(page.records, answers, page.num_cut, len(page.predictions))
    present = (
        (measured, "accuracy", "Accuracy"),
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
        measured=[accuracy.row(each, way) for each, way in measured],
        ways=ways.context(page),
        breakdowns=accuracy.breakdowns(measured),
        same_n=accuracy.same_n([each for each, _ in measured]),
        decoded=accuracy.decoded(page),
        unended=accuracy.unended(measured),
        plot=accuracy.plot(measured) if measured else "",
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
