"""The HTML page of a run: one self-contained file.

:func:`render_run` depends on :class:`~fintune.report.run_data.RunData` alone and reads no file of the run. A section is
left out if its stage was skipped.
"""

from __future__ import annotations

from fintune.evaluation.agreement import NEAR_TIE_NATS
from fintune.report.browser import BrowserAnswer, browser_blocks
from fintune.report.formatting import fill_template, kind_label
from fintune.report.run_data import RunData
from fintune.report.sections.accuracy import accuracy_section, confidence_section, headline
from fintune.report.sections.agreement import agreement_section, replay_section
from fintune.report.sections.data import data_section
from fintune.report.sections.provenance import header_facts, provenance_section
from fintune.report.sections.training import regression_section, training_section

FILTERS = (
    ("all", "all"),
    ("wrong", "wrong"),
    ("executable", "wrong but executable"),
    ("invalid", "invalid"),
    ("disagree", "models disagree"),
)


def render_run(run: RunData) -> str:
    """Render the page as HTML."""
    index, pages = _browser(run)
    sections = {
        "accuracy": accuracy_section(run),
        "confidence": confidence_section(run),
        "replay": replay_section(run),
        "agreement": agreement_section(run),
        "training": training_section(run.metrics),
        "guard": regression_section(run.guard),
        "data": data_section(run.data),
    }
    titles = {
        **{name: name.capitalize() for name, section in sections.items() if section},
        **({"guard": "Regression check"} if sections["guard"] else {}),
        **({"examples": "Examples"} if index else {}),
        "provenance": "Provenance",
    }
    return fill_template(
        "run.html.j2",
        title=f"{run.name} - fintune run",
        name=run.name,
        headline=headline(run),
        warning=run.data.get("eval_warning", "") if run.measured else "",
        facts=header_facts(run),
        titles=titles,
        **sections,
        provenance=provenance_section(run),
        near_tie_nats=NEAR_TIE_NATS,
        filters=FILTERS,
        index=index,
        pages=pages,
    )


def _browser(run: RunData) -> tuple[str, str]:
    """The two JSON blocks of the example browser, "" without records or predictions."""
    if not run.records or not (run.predictions or run.other_modes):
        return "", ""
    modes = [("", run.predictions, run.verdicts)]
    modes += [(other.mode, other.predictions, other.verdicts) for other in run.other_modes]
    answers = {
        kind_label(kind, mode): {
            id_: BrowserAnswer.from_prediction(prediction, verdicts.get(kind, {}).get(id_))
            for id_, prediction in by_id.items()
        }
        for mode, predictions, verdicts in modes
        for kind, by_id in predictions.items()
    }
    return browser_blocks(run.records, answers, run.num_cut, len(run.predictions))
