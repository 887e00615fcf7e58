"""The guard's figures, from ``guard.json``: fixed prompts before and after training."""

from __future__ import annotations

from collections.abc import Mapping
from math import exp
from typing import Any

NAMES = {"finance": "finance questions", "statements": "FinQA pages, with programs"}


def context(report: Mapping[str, Any]) -> dict[str, Any]:
    """What the template prints, or nothing where there was no guard.

    Args:
        report: ``fintune.pipeline.stages.guard.GuardReport`` as JSON.
    """
    if not report:
        return {}
    by_id = {each["id"]: each for each in report["prompts"]}
    lost = [by_id[id_]["question"] for id_ in report["lost"]]
    worse = [
        {
            "question": by_id[id_]["question"],
            "before": _nats(by_id[id_]["before"]),
            "after": _nats(by_id[id_]["after"]),
        }
        for id_ in report["worse"]
    ]
    return {
        "words": f"{len(worse)} of {len(by_id)} prompts got worse by more than {report['threshold']:g} nats a token."
        if worse
        else f"No prompt of {len(by_id)} got worse by more than {report['threshold']:g} nats a token.",
        "rows": [_row(group) for group in report["groups"]],
        "worse": worse,
        "lost": lost,
    }


def _row(group: Mapping[str, Any]) -> dict[str, str]:
    before, after, asked = group["before"], group["after"], group["right_before"] is not None
    known = before is not None and after is not None
    return {
        "name": NAMES.get(group["name"], group["name"]),
        "n": f"{group['num_prompts']:,}",
        "before": _nats(before),
        "after": _nats(after),
        "perplexity": f"{exp(before):.1f} \u2192 {exp(after):.1f}" if known and max(before, after) < 50 else "",
        "right": f"{group['right_before']} \u2192 {group['right_after']}" if asked else "",
    }


def _nats(value: float | None) -> str:
    return "not a number" if value is None else f"{value:.3f}"
