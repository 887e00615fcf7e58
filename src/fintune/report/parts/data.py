"""The data of a run, from ``prepare/report.json``: counts, drops, cuts, lengths, and its programs beside FinQA's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from fintune.report.parts import sources
from fintune.report.plots import length_plot, share_plot, too_few

Row = tuple[str, str, str]
Told = Callable[[Mapping[str, Any]], str]


def context(report: Mapping[str, Any]) -> dict[str, Any]:
    """What the template prints, or nothing where ``prepare`` was skipped.

    Args:
        report: ``fintune.data.report.PrepareReport`` as JSON.
    """
    if not report:
        return {}
    train, evaluated = report["train"], report["eval"]
    prompts = [split["prompt_tokens"] for split in (train, evaluated)]
    shown = {
        "few_evaluated": f"{evaluated['num_examples']:,}" if too_few(prompts[1]["histogram"]) else "",
        "limit": f"{report['max_length']:,}",
        "lengths": length_plot(
            "length-plot",
            f"Prompt lengths: median {prompts[0]['p50']:,} tokens, longest {prompts[0]['max']:,}",
            [prompt["histogram"] for prompt in prompts],
            limit=report["max_length"],
        ),
    }
    if report.get("kind") == "chat":
        return shown | {
            "words": sources.words(report),
            "restricted": sources.restricted(report),
            "sources": sources.table(report),
            "rows": _conversation_rows(train, evaluated),
            "problems": sources.problems(report),
        }
    shared = report["num_shared_pages"]
    words = (
        f"{shared:,} evaluation question{' asks' if shared == 1 else 's ask'} about a page that is also trained on."
        if shared
        else "No page of the evaluation is trained on."
    )
    return shown | {
        "words": words,
        "rows": _rows(train, evaluated),
        "steps": _shares("steps", train["steps"], report["finqa_test_steps"], "% of programs"),
        "operations": _shares("operations", train["operations"], report["finqa_test_operations"], "% of steps"),
        "problems": [*train["problems"], *evaluated["problems"]],
    }


def _shares(what: str, ours: Mapping[str, float], finqa: Mapping[str, float], axis: str) -> str:
    words = ", ".join(f"{name} {share:.1%} (FinQA {finqa.get(name, 0):.1%})" for name, share in ours.items())
    return share_plot(f"{what}-plot", f"Distribution of {what}: {words}", ours, finqa, axis)


def _row(train: Mapping[str, Any], evaluated: Mapping[str, Any], name: str, value: Told) -> Row:
    return name, value(train), value(evaluated)


def _rows(train: Mapping[str, Any], evaluated: Mapping[str, Any]) -> list[Row]:
    row = partial(_row, train, evaluated)
    return [
        row("records read", lambda split: f"{split['num_read']:,}"),
        row("drawn", lambda split: f"{split['num_sampled']:,}"),
        *_dropped(train, evaluated),
        row("examples", lambda split: f"{split['num_examples']:,}"),
        row("pages cut to fit", lambda split: f"{split['num_cut_examples']:,}"),
        row("sentences and rows cut", lambda split: _of(split["num_cut_units"], split["num_units"])),
        row("gold evidence kept", lambda split: _of(split["evidence"]["num_kept"], split["evidence"]["num_units"])),
        *_lengths(train, evaluated),
    ]


def _conversation_rows(train: Mapping[str, Any], evaluated: Mapping[str, Any]) -> list[Row]:
    row = partial(_row, train, evaluated)
    return [
        row("conversations", lambda split: f"{split['num_read']:,}"),
        *_dropped(train, evaluated),
        row("examples", lambda split: f"{split['num_examples']:,}"),
        row("rows of tokens", lambda split: f"{split['num_rows']:,}"),
        row("conversations cut to fit", lambda split: f"{split['num_cut_examples']:,}"),
        row("turns cut", lambda split: _of(split["num_cut_units"], split["num_units"])),
        row("tokens of one pass", lambda split: f"{split['num_row_tokens']:,}"),
        *_lengths(train, evaluated),
    ]


def _dropped(train: Mapping[str, Any], evaluated: Mapping[str, Any]) -> list[Row]:
    reasons = dict.fromkeys([*train["dropped"], *evaluated["dropped"]])
    return [(f"dropped: {name}", _count(train, name), _count(evaluated, name)) for name in reasons]


def _lengths(train: Mapping[str, Any], evaluated: Mapping[str, Any]) -> list[Row]:
    rows = []
    figures = (("median", "p50"), ("95 % within", "p95"), ("longest", "max"))
    for what in ("prompt", "completion"):
        a, b = train[f"{what}_tokens"], evaluated[f"{what}_tokens"]
        rows += [(f"{what} tokens, {name}", f"{a[key]:,}", f"{b[key]:,}") for name, key in figures]
    return rows


def _count(split: Mapping[str, Any], reason: str) -> str:
    return f"{split['dropped'].get(reason, 0):,}"


def _of(number: int, total: int) -> str:
    return f"{number:,} of {total:,}" if total else "none known"
