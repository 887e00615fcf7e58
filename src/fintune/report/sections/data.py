"""The data of a run, from ``prepare/report.json``: counts, drops, lengths, sources, and programs beside FinQA's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

from fintune.data.report import SourceReport, SplitReport
from fintune.report.formatting import Cell, HtmlTable, Row, format_counts
from fintune.report.plots import is_too_small, length_plot, share_plot

Report: TypeAlias = Mapping[str, Any]
"""``fintune.data.report.PrepareReport`` as JSON."""
_SPLITS = ("train", "eval")
_READ_COLUMNS = ("source", "rows", "usable rows by format", "duplicates\ndropped", "dropped for other reasons")
_SOURCE_COLUMNS = (*_READ_COLUMNS, "train", "held out", "licence")
_DUPLICATES = ("exact duplicate", "near duplicate")


def data_section(report: Report) -> dict[str, Any]:
    """Variables of the template of a run's page or of ``inspect``; nothing if ``prepare`` was skipped."""
    if not report:
        return {}
    is_chat = report.get("kind") == "chat"
    plots = {f"{what}s": _length_plot(what, report) for what in ("prompt", "completion")}
    columns = ("", "train", "evaluation")
    counts = list(count_rows(report))
    return {
        **plots,
        "is_chat": is_chat,
        "words": _describe_split(report) if is_chat else _describe_shared_pages(report),
        "restricted": restricted_names(report),
        "counts": HtmlTable("Counts", columns, counts),
        "counts_and_drops": HtmlTable("Counts", columns, [*counts, *_dropped_by_split(report)]),
        "lengths": HtmlTable("Lengths in tokens", columns, list(_length_rows(report))),
        "sources": HtmlTable("Sources", _SOURCE_COLUMNS, source_rows(report), left=(0, 2, 4, 7)),
        "is_few": is_too_small(report["eval"]["prompt_tokens"]["histogram"]),
        "num_evaluated": report["eval"]["num_examples"],
        "limit": report["max_length"],
        "programs": {} if is_chat else {what: _program_plot(what, report) for what in ("steps", "operations")},
        "problems": problems(report),
    }


def _describe_shared_pages(report: Report) -> str:
    number = report["num_shared_pages"]
    if not number:
        return "No page of the evaluation is trained on."
    asks = "question asks" if number == 1 else "questions ask"
    return f"{number:,} evaluation {asks} about a page that is also trained on."


def _describe_split(report: Report) -> str:
    dropped = Counter(report["train"]["dropped"]) + Counter(report["eval"]["dropped"])
    lost = f" The table of sources also counts rows that were dropped later: {format_counts(dropped)}."
    train, held_out = (f"{report[split]['num_examples']:,}" for split in _SPLITS)
    return (
        f"{train} examples are trained on. {held_out} are held out, chosen by a hash of their first question."
        f"{lost if dropped else ''} Conversations have no official verdict, so none is scored."
    )


def count_rows(report: Report) -> Iterator[list[str]]:
    """Yield a name and the numbers of both splits."""
    is_chat = report.get("kind") == "chat"
    splits = [report[name] for name in _SPLITS]

    def row(name: str, *path: str) -> list[str]:
        return [name, *(f"{_at(split, *path):,}" for split in splits)]

    def share(name: str, part: str, total: str, *path: str) -> list[str]:
        numbers = [(_at(split, *path, part), _at(split, *path, total)) for split in splits]
        return [name, *(f"{number:,} of {of:,}" if of else "none known" for number, of in numbers)]

    if not is_chat:  # for conversations, the table of sources has the rows that were read
        yield row("records read", "num_read")
    yield row("conversations" if is_chat else "sampled", "num_sampled")
    yield row("examples", "num_examples")
    if any(split.get("labels") for split in splits):
        yield row("desired answers", "labels", "desired")
        yield row("undesired answers", "labels", "undesired")
    if any(split["num_rows"] != split["num_examples"] for split in splits):
        yield row("token rows", "num_rows")
    yield row("conversations cut to fit" if is_chat else "pages cut to fit", "num_cut_examples")
    yield share("turns cut" if is_chat else "sentences and rows cut", "num_cut_units", "num_units")
    if not is_chat:
        yield share("gold evidence kept", "num_kept", "num_units", "evidence")
    yield row("tokens of prompts", "prompt_tokens", "total")
    yield row("tokens of completions", "completion_tokens", "total")


def _at(split: Report, *path: str) -> Any:
    value: Any = split
    for key in path:
        value = value.get(key, 0)
    return value


def _length_rows(report: Report) -> Iterator[list[str]]:
    for what in ("prompt", "completion"):
        for name, key in (("mean", "mean"), ("median", "p50"), ("95th percentile", "p95"), ("longest", "max")):
            yield [f"{what} tokens, {name}", *(f"{report[split][f'{what}_tokens'][key]:,}" for split in _SPLITS)]


def dropped_rows(report: Report) -> list[list[str]]:
    """Rows that were dropped while reading and while encoding: reason, source or split, number."""
    groups = [(source["path"], source["dropped"]) for source in report["sources"]]
    groups += [("train", report["train"]["dropped"]), ("evaluation", report["eval"]["dropped"])]
    return [[reason, name, f"{number:,}"] for name, reasons in groups for reason, number in reasons.items()]


def _dropped_by_split(report: Report) -> Iterator[list[str]]:
    dropped = [report[split]["dropped"] for split in _SPLITS]
    for reason in dict.fromkeys([*dropped[0], *dropped[1]]):
        yield [f"dropped: {reason}", *(f"{reasons.get(reason, 0):,}" for reasons in dropped)]


def problems(report: Report) -> list[str]:
    """The first rows that could not be used, with the reason."""
    splits = (("train", report["train"]), ("evaluation", report["eval"]))
    lines = (f"{name}: {problem}" for name, split in splits for problem in split["problems"])
    return [*report.get("unused_rows", ()), *lines]


def num_more(report: Report) -> int:
    """Number of unusable rows beyond those of `problems`."""
    return max(int(report["num_unused"]) - len(problems(report)), 0)


def left_out(report: Report) -> list[str]:
    """What was read, what was not, and what the chat template made necessary, one line each."""
    lines = []
    for entry in report["sources"]:
        source = SourceReport.model_validate(entry)
        lines += [source.read_columns()] if source.columns else []
        if source.num_trailing:
            lines.append(f"{source.path}: {source.num_trailing:,} turns after the last trained answer left out")
        lines += source.remarks()
    for name in _SPLITS:
        lines += SplitReport.model_validate(report[name]).describe_renderings(name)
    return lines


def _length_plot(what: str, report: Report) -> str:
    lengths = [report[split][f"{what}_tokens"] for split in _SPLITS]
    title = f"Lengths of {what}s: median {lengths[0]['p50']:,} tokens, longest {lengths[0]['max']:,}"
    limit = report["max_length"] if what == "prompt" else None
    histograms = [length["histogram"] for length in lengths]
    return length_plot(f"{what}-plot", title, histograms, limit=limit, axis=f"tokens of the {what}")


def _program_plot(what: str, report: Report) -> str:
    """Draw the distribution of ``steps`` or ``operations`` beside that of FinQA's test set."""
    ours, finqa = report["train"][what], report[f"finqa_test_{what}"]
    words = ", ".join(f"{name} {share:.1%} (FinQA {finqa.get(name, 0):.1%})" for name, share in ours.items())
    axis = "% of programs" if what == "steps" else "% of steps"
    return share_plot(f"{what}-plot", f"Distribution of {what}: {words}", ours, finqa, axis)


def restricted_names(report: Report) -> list[str]:
    """The sources that forbid commercial use, with their licences."""
    restricted = [source for source in report["sources"] if source["licence"]["non_commercial"]]
    return list(dict.fromkeys(f"{source['path']} ({source['licence']['name']})" for source in restricted))


def source_rows(report: Report) -> list[Row]:
    """One row of 8 cells for each source, and one of 3 cells for each of its files if it has several."""
    rows: list[Row] = []
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
            files = source["files"].items()
            rows += [
                [Cell(name, style="muted"), "", format_counts(shapes) or "no usable row"] for name, shapes in files
            ]
    return rows
