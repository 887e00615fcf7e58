"""The HTML page of a run: one self-contained file.

:func:`render_run` depends on :class:`~fintune.report.run_data.RunData` alone and reads no file of the run. A section is
left out if its stage was skipped.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from fintune import __version__
from fintune.config import Config
from fintune.config.load import display_values, fields, flat
from fintune.evaluation.agreement import NEAR_TIE_NATS
from fintune.manifest import Manifest
from fintune.report.browser import BrowserAnswer, browser_blocks
from fintune.report.formatting import Cell, HtmlTable, Row, fill_template
from fintune.report.run_data import RunData
from fintune.report.sections.accuracy import accuracy_section, confidence_section, headline
from fintune.report.sections.agreement import agreement_section, replay_section
from fintune.report.sections.data import data_section
from fintune.report.sections.training import regression_section, training_method, training_section
from fintune.util.text import format_duration

FILTERS = (
    ("all", "all"),
    ("wrong", "wrong"),
    ("executable", "wrong but executable"),
    ("invalid", "invalid"),
    ("disagree", "models disagree"),
)


def render_run(run: RunData) -> str:
    """Render the page as HTML."""
    name = run.config.run.name
    index, pages = _browser(run)
    sections = {
        "accuracy": accuracy_section(run),
        "confidence": confidence_section(run),
        "replay": replay_section(run),
        "agreement": agreement_section(run),
        "training": training_section(run.metrics),
        "guard": regression_section(run.guard),
        "data": data_section(run.data),
        "examples": bool(index),
        "provenance": _provenance(run),
    }
    return fill_template(
        "run.html.j2",
        title=f"{name} - fintune run",
        name=name,
        headline=headline(run),
        warning=run.data.get("eval_warning", "") if run.scored else "",
        facts=_facts(run),
        titles={
            id_: "Regression check" if id_ == "guard" else id_.capitalize()
            for id_, section in sections.items()
            if section
        },
        **sections,
        near_tie_nats=NEAR_TIE_NATS,
        filters=FILTERS,
        index=index,
        pages=pages,
    )


def _browser(run: RunData) -> tuple[str, str]:
    """The two JSON blocks of the example browser, "" without records or predictions."""
    if not run.records or not run.results:
        return "", ""
    answers = {
        results.label: {
            id_: BrowserAnswer.from_prediction(prediction, results.verdicts.get(id_))
            for id_, prediction in results.predictions.items()
        }
        for results in run.results
    }
    return browser_blocks(run.records, answers, run.num_cut, len(run.first_mode))


def _facts(run: RunData) -> list[tuple[str, str]]:
    """Names and values of the facts below the headline."""
    config = run.config
    facts = [("model", config.model.name), ("data", config.data.source)]
    if run.metrics:
        method = training_method(config.adapter.kind, config.model.quantization)
        facts.append(("method", method if config.adapter.kind == "full" else f"{method}, r = {config.adapter.r}"))
    facts.append(("seed", str(config.run.seed)))
    if run.manifests:
        *_, last = run.manifests.values()
        memory = f"{last.machine.get('cores', '?')} cores, {last.machine.get('memory_gib', '?')} GiB"
        facts.append(("time", format_duration(sum(manifest.seconds for manifest in run.manifests.values()))))
        facts.append(("machine", last.machine.get("gpu") or memory))
    return facts


def _provenance(run: RunData) -> dict[str, Any]:
    changed, unchanged = _options(run.config)
    used = [manifest.versions for manifest in run.manifests.values()]
    names = dict.fromkeys(name for versions in used for name in versions)
    versions = [(name, _distinct(versions.get(name) for versions in used)) for name in names]
    return {
        "stages": _stages_table(run.manifests),
        "origin": _facts_table("Origin", _origin(run)),
        "changed": HtmlTable("Changed options", ("option", "value", "default"), changed, (0, 1, 2)),
        "unchanged": HtmlTable("Options at their defaults", ("option", "value"), unchanged, (0, 1)),
        "versions": _facts_table("Package versions", versions),
    }


def _facts_table(label: str, facts: Iterable[tuple[str, str]]) -> HtmlTable:
    return HtmlTable(label, (), [[name, Cell(text, style="mono")] for name, text in facts], (0, 1))


def _distinct(values: Iterable[object]) -> str:
    return ", ".join(dict.fromkeys(str(value) for value in values if value is not None))


def _stages_table(manifests: Mapping[str, Manifest]) -> HtmlTable:
    rows: list[Row] = []
    for step, manifest in manifests.items():
        finished = manifest.finished[:16].replace("T", " ")
        memory = f"{manifest.peak_memory_bytes / 1e9:.2f} GB"
        title = f"fingerprint {manifest.fingerprint}"
        rows.append([step, f"{manifest.seconds:.1f}", memory, Cell(finished, style="nowrap", title=title)])
    seconds = sum(manifest.seconds for manifest in manifests.values())
    peak = max((manifest.peak_memory_bytes for manifest in manifests.values()), default=0)
    footer = ("together", f"{seconds:.1f}", f"{peak / 1e9:.2f} GB", "sum; largest")
    columns = ("stage", "seconds", "peak\nmemory", "finished (UTC)")
    return HtmlTable("Stages", columns, rows, left=(0, 3), footer=footer)


def _options(config: Config) -> tuple[list[Row], list[Row]]:
    """Options that differ from the default (key, value, default), and the others (key, value)."""
    defaults = {key: option.get_default(call_default_factory=True) for key, option in fields()}
    shown = display_values(config)
    changed: list[Row] = []
    unchanged: list[Row] = []
    for key, value in flat(config).items():
        name, default = Cell(key, style="code"), json.loads(json.dumps(defaults[key], default=str))
        if value == default:
            unchanged.append([name, Cell(_as_text(value), style="mono")])
        else:
            cells = Cell(_as_text(shown[key]), style="mono changed"), Cell(_as_text(default), style="mono muted")
            changed.append([name, *cells])
    return changed, unchanged


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


def _origin(run: RunData) -> list[tuple[str, str]]:
    manifests = list(run.manifests.values())
    commits = _distinct(manifest.commit for manifest in manifests)
    seeds = _distinct(manifest.seed for manifest in manifests) or str(run.config.run.seed)
    rows = [("fintune", __version__), ("base model", run.config.model.name), ("seed", seeds)]
    if commits:
        rows.append(("commit", commits + (" (+: with uncommitted changes)" if "+" in commits else "")))
    if template := run.data.get("template_hash"):
        rows.append(("chat template", template[:16]))
    if manifests:
        rows += [(name.replace("_gib", ", GiB"), value) for name, value in manifests[-1].machine.items()]
    return rows
