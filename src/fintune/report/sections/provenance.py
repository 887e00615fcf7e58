"""Provenance of a run: options, stages, seed, commit, machine and versions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fintune import __version__
from fintune.config import Config
from fintune.config.load import display_values, fields, flat
from fintune.report.formatting import Cell, HtmlTable
from fintune.report.run_data import Provenance, RunData
from fintune.util.text import format_duration

_METHODS: Mapping[tuple[str, str], str] = {
    ("lora", "none"): "LoRA",
    ("lora", "nf4"): "QLoRA",
    ("dora", "none"): "DoRA",
    ("dora", "nf4"): "QDoRA",
}


def training_method(kind: str, quantization: str) -> str:
    """Name of a training method: ``LoRA``, ``QLoRA``, ``DoRA``, ``QDoRA`` or ``full fine-tuning``.

    Args:
        kind: The option ``adapter.kind``.
        quantization: The option ``model.quantization``.
    """
    return _METHODS.get((kind, quantization), "full fine-tuning")


def header_facts(run: RunData) -> list[tuple[str, str]]:
    """Names and values of the facts below the headline."""
    config = run.config
    facts = [("model", config.model.name), ("data", config.data.source)]
    if run.metrics:
        method = training_method(config.adapter.kind, config.model.quantization)
        facts.append(("method", method if config.adapter.kind == "full" else f"{method}, r = {config.adapter.r}"))
    facts.append(("seed", str(config.run.seed)))
    if run.provenance:
        facts.append(("time", format_duration(sum(stage.seconds for stage in run.provenance))))
        machine = run.provenance[-1].machine
        memory = f"{machine.get('cores', '?')} cores, {machine.get('memory_gib', '?')} GiB"
        facts.append(("machine", machine.get("gpu") or memory))
    return facts


def provenance_section(run: RunData) -> dict[str, Any]:
    """Variables of the template."""
    changed, unchanged = _options(run.config)
    return {
        "stages": _stages_table(run.provenance) if run.provenance else "",
        "origin": HtmlTable("Origin", (), _origin(run)),
        "changed": HtmlTable("Changed options", ("option", "value", "default"), changed) if changed else "",
        "num_unchanged": len(unchanged),
        "unchanged": HtmlTable("Options at their defaults", ("option", "value"), unchanged),
        "versions": HtmlTable("Package versions", (), _versions(run.provenance)),
    }


def _stages_table(stages: Sequence[Provenance]) -> HtmlTable:
    rows: list[list[str | Cell]] = [
        [
            stage.step,
            f"{stage.seconds:.1f}",
            f"{stage.peak_memory_bytes / 1e9:.2f} GB",
            Cell(stage.finished[:16].replace("T", " "), style="nowrap", title=f"fingerprint {stage.fingerprint}"),
        ]
        for stage in stages
    ]
    seconds = sum(stage.seconds for stage in stages)
    peak = max(stage.peak_memory_bytes for stage in stages)
    footer = ("together", f"{seconds:.1f}", f"{peak / 1e9:.2f} GB", "sum; largest")
    return HtmlTable(
        "Stages", ("stage", "seconds", "peak memory", "finished (UTC)"), rows, numeric=(1, 2), footer=footer
    )


def _options(config: Config) -> tuple[list[list[str | Cell]], list[list[str | Cell]]]:
    """Options that differ from the default (key, value, default), and the others (key, value)."""
    defaults = {}
    for key, option in fields():
        default = option.get_default(call_default_factory=True)
        defaults[key] = json.loads(json.dumps(default, default=str))
    shown = display_values(config)
    changed: list[list[str | Cell]] = []
    unchanged: list[list[str | Cell]] = []
    for key, value in flat(config).items():
        name = Cell(key, is_code=True)
        if value == defaults[key]:
            unchanged.append([name, Cell(_as_text(value), style="mono")])
        else:
            default = Cell(_as_text(defaults[key]), style="mono muted")
            changed.append([name, Cell(_as_text(shown[key]), style="mono changed"), default])
    return changed, unchanged


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


def _origin(run: RunData) -> list[list[str | Cell]]:
    commits = dict.fromkeys(stage.commit for stage in run.provenance if stage.commit)
    seeds = dict.fromkeys(str(stage.seed) for stage in run.provenance)
    rows = [("fintune", __version__), ("base model", run.config.model.name)]
    rows.append(("seed", ", ".join(seeds) or str(run.config.run.seed)))
    if commits:
        note = " (+: with uncommitted changes)" if any(commit.endswith("+") for commit in commits) else ""
        rows.append(("commit", ", ".join(commits) + note))
    template = run.data.get("template_hash")
    if isinstance(template, str):
        rows.append(("chat template", template[:16]))
    if run.provenance:
        rows += [(name.replace("_gib", ", GiB"), value) for name, value in run.provenance[-1].machine.items()]
    return [[name, Cell(value, style="mono")] for name, value in rows]


def _versions(stages: Sequence[Provenance]) -> list[list[str | Cell]]:
    """Each package with its version; all versions if stages used different ones."""
    versions: dict[str, dict[str, None]] = {}
    for stage in stages:
        for name, version in stage.versions.items():
            versions.setdefault(name, {})[version] = None
    return [[name, Cell(", ".join(found), style="mono")] for name, found in versions.items()]
