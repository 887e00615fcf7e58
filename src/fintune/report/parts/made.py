"""How a run was made: options, origin, versions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from fintune import __version__
from fintune.config import Config
from fintune.config.load import fields, flat, told
from fintune.report.run_page import Made, RunPage


def chips(page: RunPage) -> list[tuple[str, str]]:
    """The facts in the header."""
    found = [("model", page.config.model.name), ("data", page.config.data.source), ("seed", str(page.config.run.seed))]
    if page.made:
        found.append(("time", _duration(sum(made.seconds for made in page.made))))
        machine = page.made[-1].machine
        where = machine.get("gpu") or f"{machine.get('cores', '?')} cores, {machine.get('memory_gib', '?')} GiB"
        found.append(("machine", where))
    return found


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def options(config: Config) -> tuple[list[tuple[str, str, str]], list[tuple[str, str]]]:
    """Options that differ from the default (key, value, default), and the others (key, value)."""
    values = flat(config)
    defaults = {}
    for key, option in fields():
        default = option.get_default(call_default_factory=True)
        defaults[key] = json.loads(json.dumps(default, default=str))
    shown = told(config)
    changed = [(key, _text(shown[key]), _text(defaults[key])) for key, v in values.items() if v != defaults[key]]
    return changed, [(key, _text(value)) for key, value in values.items() if value == defaults[key]]


def _text(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


def origin(page: RunPage) -> list[tuple[str, str]]:
    """Where it comes from: model, seed, commit, template, machine."""
    commits = dict.fromkeys(made.commit for made in page.made if made.commit)
    seeds = dict.fromkeys(str(made.seed) for made in page.made)
    rows = [("fintune", __version__), ("base model", page.config.model.name)]
    rows.append(("seed", ", ".join(seeds) or str(page.config.run.seed)))
    if commits:
        note = " (+: files were changed)" if any(commit.endswith("+") for commit in commits) else ""
        rows.append(("commit", ", ".join(commits) + note))
    template = page.data.get("template_hash")
    if isinstance(template, str):
        rows.append(("chat template", template[:16]))
    if page.made:
        rows += [(name.replace("_gib", ", GiB"), value) for name, value in page.made[-1].machine.items()]
    return rows


def versions(made: Sequence[Made]) -> list[tuple[str, str]]:
    """Each package with its version, or its versions where stages had different ones."""
    found: dict[str, dict[str, None]] = {}
    for stage in made:
        for name, version in stage.versions.items():
            found.setdefault(name, {})[version] = None
    return [(name, ", ".join(ones)) for name, ones in found.items()]
