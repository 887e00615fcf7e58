"""The data of a run, from ``prepare/report.json``: counts, drops, lengths, sources, and programs beside FinQA's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

from fintune.report.formatting import Cell, HtmlTable, format_counts
from fintune.report.plots import is_too_small, length_plot, share_plot

Report: TypeAlias = Mapping[str, Any]
"""``fintune.data.report.PrepareReport`` as JSON."""
Row: TypeAlias = tuple[str, str, str]
SOURCE_COLUMNS = (
    "source",
    "rows",
    "usable rows by format",
    "duplicates\ndropped",
    "dropped for other reasons",
    "train",
    "held out",
    "licence",
)
_DUPLICATES = ("exact duplicate", "near duplicate")


def data_section(report: Report) -> dict[str, Any]:
    """Variables of the run page's template; nothing if ``prepare`` was skipped."""
    if not report:
        return {}
    is_chat = report.get("kind") == "chat"
    is_few, lengths = length_plots(report)
    rows = [*count_rows(report), *_dropped_by_split(report), *length_rows(report)]
    return {
        "words": _describe_split(report) if is_chat else _describe_shared_pages(report),
        "restricted": restricted_sentence(report) if is_chat else "",
        "sources": HtmlTable("Sources", SOURCE_COLUMNS, source_rows(report), numeric=(1, 3, 5, 6)) if is_chat else "",
        "few_evaluated": f"{report['eval']['num_examples']:,}" if is_few else "",
        "limit": f"{report['max_length']:,}",
        "lengths": lengths["prompt"],
        "table": HtmlTable("Counts", ("", "train", "evaluation"), rows, numeric=(1, 2)),
        "steps": "" if is_chat else program_plot("steps", report),
        "operations": "" if is_chat else program_plot("operations", report),
        "row_name": "rows" if is_chat else "records",
        "problems": problems(report),
    }


def _describe_shared_pages(report: Report) -> str:
    number = report["num_shared_pages"]
    if not number:
        return "No page of the evaluation is trained on."
    asks = "question asks" if number == 1 else "questions ask"
    return f"{number:,} evaluation {asks} about a page that is also trained on."


def count_rows(report: Report) -> Iterator[Row]:
    """Yield a name and the numbers of both splits."""
    is_chat = report.get("kind") == "chat"
    splits = [report[key] for key in ("train", "eval")]

    def row(name: str, value: Callable[[Report], str]) -> Row:
        return name, value(splits[0]), value(splits[1])

    if not is_chat:  # for conversations, the table of sources has the rows that were read
        yield row("records read", _count("num_read"))
    yield row("conversations" if is_chat else "sampled", _count("num_sampled"))
    yield row("examples", _count("num_examples"))
    if any(split.get("labels") for split in splits):
        for label in ("desired", "undesired"):
            yield row(f"{label} answers", lambda split, label=label: f"{split['labels'].get(label, 0):,}")  # type: ignore[misc]
    if any(split["num_rows"] != split["num_examples"] for split in splits):
        yield row("token rows", _count("num_rows"))
    yield row("conversations cut to fit" if is_chat else "pages cut to fit", _count("num_cut_examples"))
    yield row("turns cut" if is_chat else "sentences and rows cut", _part("num_cut_units", "num_units"))
    if not is_chat:
        yield row("gold evidence kept", lambda split: _part("num_kept", "num_units")(split["evidence"]))
    for what in ("prompt", "completion"):
        yield row(f"tokens of {what}s", lambda split, what=what: f"{split[f'{what}_tokens']['total']:,}")  # type: ignore[misc]


def length_rows(report: Report) -> Iterator[Row]:
    """Yield a figure about the lengths of prompts or completions, and its values in both splits."""
    for what in ("prompt", "completion"):
        for name, key in (("mean", "mean"), ("median", "p50"), ("95th percentile", "p95"), ("longest", "max")):
            train, evaluation = (report[split][f"{what}_tokens"][key] for split in ("train", "eval"))
            yield f"{what} tokens, {name}", f"{train:,}", f"{evaluation:,}"


def dropped_rows(report: Report) -> list[Row]:
    """Rows that were dropped while reading and while encoding: reason, source or split, number."""
    groups = [(source["path"], source["dropped"]) for source in report["sources"]]
    groups += [("train", report["train"]["dropped"]), ("evaluation", report["eval"]["dropped"])]
    return [(reason, name, f"{number:,}") for name, reasons in groups for reason, number in reasons.items()]


def _dropped_by_split(report: Report) -> Iterator[Row]:
    for reason in dict.fromkeys([*report["train"]["dropped"], *report["eval"]["dropped"]]):
        train, evaluation = (report[split]["dropped"].get(reason, 0) for split in ("train", "eval"))
        yield f"dropped: {reason}", f"{train:,}", f"{evaluation:,}"


def problems(report: Report) -> list[str]:
    """The first rows that could not be used, with the reason."""
    splits = (("train", report["train"]), ("evaluation", report["eval"]))
    lines = (f"{name}: {problem}" for name, split in splits for problem in split["problems"])
    return [*report.get("unused_rows", ()), *lines]


def length_plots(report: Report) -> tuple[bool, dict[str, str]]:
    """Draw the lengths of prompts and completions; also say whether the evaluation has too few examples to draw."""
    plots = {}
    for what, limit in (("prompt", report["max_length"]), ("completion", None)):
        lengths = [report[split][f"{what}_tokens"] for split in ("train", "eval")]
        title = f"Lengths of {what}s: median {lengths[0]['p50']:,} tokens, longest {lengths[0]['max']:,}"
        histograms = [length["histogram"] for length in lengths]
        plots[what] = length_plot(f"{what}-plot", title, histograms, limit=limit, axis=f"tokens of the {what}")
    return is_too_small(report["eval"]["prompt_tokens"]["histogram"]), plots


def program_plot(what: str, report: Report) -> str:
    """Draw the distribution of ``steps`` or ``operations`` beside that of FinQA's test set."""
    ours, finqa = report["train"][what], report[f"finqa_test_{what}"]
    words = ", ".join(f"{name} {share:.1%} (FinQA {finqa.get(name, 0):.1%})" for name, share in ours.items())
    axis = "% of programs" if what == "steps" else "% of steps"
    return share_plot(f"{what}-plot", f"Distribution of {what}: {words}", ours, finqa, axis)


def _count(key: str) -> Callable[[Report], str]:
    return lambda split: f"{split[key]:,}"


def _part(key: str, total: str) -> Callable[[Report], str]:
    return lambda split: f"{split[key]:,} of {split[total]:,}" if split[total] else "none known"


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


def source_rows(report: Report) -> list[list[str | Cell]]:
    """The rows below `SOURCE_COLUMNS`: one for each source, and one for each of its files if it has several."""
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
    return rows
