"""The data of a run, from ``prepare/report.json``: counts, drops, lengths, sources, and programs beside FinQA's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

from fintune.report.formatting import Cell, HtmlTable, format_counts
from fintune.report.plots import is_too_small, length_plot, share_plot

Report: TypeAlias = Mapping[str, Any]
"""``fintune.data.report.PrepareReport`` as JSON."""
_DUPLICATES = ("exact duplicate", "near duplicate")


def data_section(report: Report) -> dict[str, Any]:
    """Variables of the template; nothing if ``prepare`` was skipped."""
    if not report:
        return {}
    train, evaluation = report["train"], report["eval"]
    prompts = [split["prompt_tokens"] for split in (train, evaluation)]
    is_chat = report.get("kind") == "chat"
    rows = list(_chat_rows(report) if is_chat else _program_rows(report))
    problems = [*train["problems"], *evaluation["problems"]]
    section = {
        "few_evaluated": f"{evaluation['num_examples']:,}" if is_too_small(prompts[1]["histogram"]) else "",
        "limit": f"{report['max_length']:,}",
        "lengths": length_plot(
            "length-plot",
            f"Prompt lengths: median {prompts[0]['p50']:,} tokens, longest {prompts[0]['max']:,}",
            [prompt["histogram"] for prompt in prompts],
            limit=report["max_length"],
        ),
        "table": HtmlTable("Counts", ("", "train", "evaluation"), rows, numeric=(1, 2)),
        "row_name": "rows" if is_chat else "records",
        "problems": problems,
    }
    if is_chat:
        return section | {
            "words": _describe_split(report),
            "restricted": restricted_sentence(report),
            "sources": _sources_table(report),
            "steps": "",
            "operations": "",
            "problems": [*report["unused_rows"], *problems],
        }
    return section | {
        "words": _describe_shared_pages(report),
        "restricted": "",
        "sources": "",
        "steps": _shares("steps", report, "% of programs"),
        "operations": _shares("operations", report, "% of steps"),
    }


def trained_questions_warning(report: Report) -> str:
    """Warn that evaluation questions were also trained on, "" if none were: the accuracy is then too high."""
    number = report.get("num_shared_questions", 0) if report else 0
    if not number:
        return ""
    total = report["eval"]["num_examples"]
    return (
        f"{number:,} of {total:,} evaluation questions were also trained on. Expect a lower accuracy on new questions."
    )


def _describe_shared_pages(report: Report) -> str:
    number = report["num_shared_pages"]
    if not number:
        return "No page of the evaluation is trained on."
    asks = "question asks" if number == 1 else "questions ask"
    return f"{number:,} evaluation {asks} about a page that is also trained on."


def _shares(what: str, report: Report, axis: str) -> str:
    ours, finqa = report["train"][what], report[f"finqa_test_{what}"]
    words = ", ".join(f"{name} {share:.1%} (FinQA {finqa.get(name, 0):.1%})" for name, share in ours.items())
    return share_plot(f"{what}-plot", f"Distribution of {what}: {words}", ours, finqa, axis)


def _row(report: Report, name: str, value: Callable[[Report], str]) -> tuple[str, str, str]:
    return name, value(report["train"]), value(report["eval"])


def _count(key: str) -> Callable[[Report], str]:
    return lambda split: f"{split[key]:,}"


def _part(key: str, total: str) -> Callable[[Report], str]:
    return lambda split: f"{split[key]:,} of {split[total]:,}" if split[total] else "none known"


def _program_rows(report: Report) -> Iterator[tuple[str, str, str]]:
    yield _row(report, "records read", _count("num_read"))
    yield _row(report, "sampled", _count("num_sampled"))
    yield from _dropped_rows(report)
    yield _row(report, "examples", _count("num_examples"))
    yield _row(report, "pages cut to fit", _count("num_cut_examples"))
    yield _row(report, "sentences and rows cut", _part("num_cut_units", "num_units"))
    yield _row(report, "gold evidence kept", lambda split: _part("num_kept", "num_units")(split["evidence"]))
    yield from _length_rows(report)


def _chat_rows(report: Report) -> Iterator[tuple[str, str, str]]:
    yield _row(report, "conversations", _count("num_read"))
    yield from _dropped_rows(report)
    yield _row(report, "examples", _count("num_examples"))
    yield _row(report, "token rows", _count("num_rows"))
    yield _row(report, "conversations cut to fit", _count("num_cut_examples"))
    yield _row(report, "turns cut", _part("num_cut_units", "num_units"))
    yield _row(report, "tokens per epoch", _count("num_row_tokens"))
    yield from _length_rows(report)


def _dropped_rows(report: Report) -> Iterator[tuple[str, str, str]]:
    for reason in dict.fromkeys([*report["train"]["dropped"], *report["eval"]["dropped"]]):
        train, evaluation = (report[split]["dropped"].get(reason, 0) for split in ("train", "eval"))
        yield f"dropped: {reason}", f"{train:,}", f"{evaluation:,}"


def _length_rows(report: Report) -> Iterator[tuple[str, str, str]]:
    for what in ("prompt", "completion"):
        for name, key in (("median", "p50"), ("95th percentile", "p95"), ("longest", "max")):
            train, evaluation = (report[split][f"{what}_tokens"][key] for split in ("train", "eval"))
            yield f"{what} tokens, {name}", f"{train:,}", f"{evaluation:,}"


def _describe_split(report: Report) -> str:
    """Say how the conversations were split."""
    train, held_out = report["train"], report["eval"]
    dropped = Counter(train["dropped"]) + Counter(held_out["dropped"])
    lost = (
        f" The table of sources also counts rows that were dropped later: {format_counts(dropped)}." if dropped else ""
    )
    return (
        f"{train['num_examples']:,} examples are trained on. {held_out['num_examples']:,} are held out, chosen by a "
        f"hash of their first question.{lost} Conversations have no official verdict, so none is scored."
    )


def restricted_names(report: Report) -> list[str]:
    """The sources that forbid commercial use, with their licences."""
    restricted = [source for source in report["sources"] if source["licence"]["non_commercial"]]
    return list(dict.fromkeys(f"{source['path']} ({source['licence']['name']})" for source in restricted))


def restricted_sentence(report: Report) -> str:
    """Say that sources forbid commercial use, "" if none does."""
    names = ", ".join(restricted_names(report))
    return f"Not for commercial use, like every model that is trained on it: {names}." if names else ""


def _sources_table(report: Report) -> HtmlTable:
    """One row for each source, and one for each of its files if it has several."""
    rows: list[list[str | Cell]] = []
    for source in report["sources"]:
        dropped, licence = source["dropped"], source["licence"]
        others = {reason: number for reason, number in dropped.items() if reason not in _DUPLICATES}
        rows.append(
            [
                source["path"],
                f"{source['num_rows']:,}",
                format_counts(source["shapes"]),
                f"{sum(dropped.get(reason, 0) for reason in _DUPLICATES):,}",
                format_counts(others) or "none",
                f"{source['num_train']:,}" + (f" × {source['weight']:g}" if source["weight"] != 1 else ""),
                f"{source['num_eval']:,}",
                f"{licence['name']}{', not for commercial use' if licence['non_commercial'] else ''}",
            ]
        )
        if len(source["files"]) > 1:
            rows += [
                [Cell(name, style="muted"), "", format_counts(shapes) or "no usable row"]
                for name, shapes in source["files"].items()
            ]
    columns = (
        "source",
        "rows",
        "formats",
        "duplicates\ndropped",
        "dropped for other reasons",
        "train",
        "held out",
        "licence",
    )
    return HtmlTable("Sources", columns, rows, numeric=(1, 3, 5, 6))
