"""The figures and examples of ``fintune inspect``, as rows for the terminal and as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fintune.report.formatting import HtmlTable, fill_template, format_counts
from fintune.report.plots import is_too_small, length_plot, share_plot
from fintune.report.sections.data import Report, restricted_names

_SPLITS = (("train", "train"), ("eval", "evaluation"))
SOURCE_COLUMNS = ("source", "rows", "usable rows by format", "train", "held out", "licence")


@dataclass(frozen=True)
class Piece:
    """A run of tokens that are all trained or all not.

    Attributes:
        text: The text of the tokens.
        trained: Whether the loss includes them.
        special: Whether it is a special token of the template.
    """

    text: str
    trained: bool
    special: bool


@dataclass(frozen=True)
class Shown:
    """One tokenized example.

    Attributes:
        id: The example's id.
        num_tokens: Number of tokens.
        num_trained: Number of tokens in the loss.
        pieces: The tokens in order.
        rejected: The rejected answer of a preference pair, which follows the same prompt.
        label: Whether a single answer is desired; None without labels.
    """

    id: str
    num_tokens: int
    num_trained: int
    pieces: Sequence[Piece]
    rejected: Sequence[Piece] = ()
    label: bool | None = None

    @property
    def counts(self) -> str:
        """Number of tokens and of trained tokens, and the label if there is one."""
        label = {None: "", True: ", desired", False: ", undesired"}[self.label]
        return f"{self.num_tokens:,} tokens, {self.num_trained:,} trained{label}"


@dataclass(frozen=True)
class InspectPage:
    """The content of the page.

    Attributes:
        name: The run's name.
        origin: Where the examples come from.
        model: The model whose tokenizer is used.
        data: The option ``data.source``.
        report: Counts and figures.
        examples: Some examples of the training split.
    """

    name: str
    origin: str
    model: str
    data: str
    report: Report
    examples: Sequence[Shown]


def render_inspect(page: InspectPage) -> str:
    """Render the page as HTML."""
    report = page.report
    splits = [report[key] for key, _ in _SPLITS]
    is_chat = report["kind"] == "chat"
    dropped_rows, source_rows = dropped(report), sources(report)
    titles = {
        "counts": "Counts",
        **({"sources": "Sources"} if source_rows else {}),
        **({"dropped": "Dropped rows"} if dropped_rows else {}),
        "lengths": "Token lengths",
        **({} if is_chat else {"programs": "Programs"}),
        **({"examples": "Examples"} if page.examples else {}),
    }
    number = num_more(report)
    return fill_template(
        "inspect.html.j2",
        title=f"{page.name} - fintune inspect",
        page=page,
        num_examples=[f"{split['num_examples']:,}" for split in splits],
        facts=[("model", page.model), ("data", page.data), ("limit", f"{report['max_length']:,} tokens")],
        titles=titles,
        counts=HtmlTable("Counts", ("", "train", "evaluation"), list(counts(report)), numeric=(1, 2)),
        sources=HtmlTable("Sources", SOURCE_COLUMNS, source_rows, numeric=(1, 3, 4)) if source_rows else "",
        restricted=restricted_names(report),
        left_out=left_out(report),
        dropped=HtmlTable("Dropped rows by reason", ("reason", "split or source", "rows"), dropped_rows, numeric=(2,))
        if dropped_rows
        else "",
        problems=problems(report),
        num_more=f"{number:,}" if number else "",
        prompts=_length_plot("prompt", splits, report["max_length"]),
        completions=_length_plot("completion", splits, None),
        is_too_small=is_too_small(splits[1]["prompt_tokens"]["histogram"]),
        lengths=HtmlTable(
            "Lengths in tokens",
            ("tokens of a", "train", "evaluation"),
            [row for what in ("prompt", "completion") for row in _length_rows(what, splits)],
            numeric=(1, 2),
        ),
        programs=[] if is_chat else _program_plots(report),
    )


def counts(report: Report) -> Iterator[tuple[str, str, str]]:
    """Yield a name and the number of each split."""
    is_chat = report["kind"] == "chat"
    splits = [report[key] for key, _ in _SPLITS]

    def row(name: str, key: str) -> tuple[str, str, str]:
        first, second = (f"{split[key]:,}" for split in splits)
        return name, first, second

    if not is_chat:  # for conversations, the table of sources has the rows that were read
        yield row("records read", "num_read")
    yield row("conversations" if is_chat else "sampled", "num_sampled")
    yield row("examples", "num_examples")
    if any(split["labels"] for split in splits):
        for label in ("desired", "undesired"):
            first, second = (f"{split['labels'].get(label, 0):,}" for split in splits)
            yield f"{label} answers", first, second
    if any(split["num_rows"] != split["num_examples"] for split in splits):
        yield row("token rows", "num_rows")
    yield row("conversations cut to fit" if is_chat else "pages cut to fit", "num_cut_examples")
    cut = [f"{split['num_cut_units']:,} of {split['num_units']:,}" for split in splits]
    yield "turns cut" if is_chat else "sentences and rows cut", cut[0], cut[1]
    if not is_chat:
        kept = [split["evidence"] for split in splits]
        shares = [f"{k['num_kept']:,} of {k['num_units']:,}" if k["num_units"] else "not known" for k in kept]
        yield "evidence kept", shares[0], shares[1]
    for what in ("prompt", "completion"):
        totals = [f"{split[f'{what}_tokens']['total']:,}" for split in splits]
        yield f"tokens of {what}s", totals[0], totals[1]


def dropped(report: Report) -> list[tuple[str, str, str]]:
    """Rows that were dropped while reading and while encoding: reason, source or split, number."""
    groups = [(source["path"], source["dropped"]) for source in report["sources"]]
    groups += [(name, report[key]["dropped"]) for key, name in _SPLITS]
    return [(reason, name, f"{number:,}") for name, reasons in groups for reason, number in reasons.items()]


def sources(report: Report) -> list[tuple[str, str, str, str, str, str]]:
    """The rows below `SOURCE_COLUMNS`; none without sources."""
    return [
        (
            source["path"],
            f"{source['num_rows']:,}",
            format_counts(source["shapes"]),
            f"{source['num_train']:,}" + (f" × {source['weight']:g}" if source["weight"] != 1 else ""),
            f"{source['num_eval']:,}",
            source["licence"]["name"],
        )
        for source in report["sources"]
    ]


def left_out(report: Report) -> list[str]:
    """Parts of rows that were left out, one line each."""
    lines = []
    for source in report["sources"]:
        if number := source.get("num_trailing"):
            lines.append(f"{source['path']}: {number:,} turns without an answer left out")
        if number := source.get("num_thoughts"):
            lines.append(f"{source['path']}: {number:,} thoughts in a separate field left out")
        if source.get("unread"):
            lines.append(f"{source['path']}: {source['unread']}")
    return lines


def restricted(report: Report) -> list[str]:
    """The sources that forbid commercial use, with their licences."""
    return restricted_names(report)


def problems(report: Report) -> list[str]:
    """The first rows that could not be used, with the reason."""
    lines = (f"{name}: {problem}" for key, name in _SPLITS for problem in report[key]["problems"])
    return [*report["unused_rows"], *lines]


def num_more(report: Report) -> int:
    """Number of unusable rows beyond those of `problems`."""
    return max(int(report["num_unused"]) - len(problems(report)), 0)


def _length_plot(what: str, splits: Sequence[Report], limit: int | None) -> str:
    lengths = [split[f"{what}_tokens"] for split in splits]
    title = f"Lengths of {what}s: median {lengths[0]['p50']:,} tokens, longest {lengths[0]['max']:,}"
    histograms = [length["histogram"] for length in lengths]
    return length_plot(f"{what}-plot", title, histograms, limit=limit, axis=f"tokens of the {what}")


def _length_rows(what: str, splits: Sequence[Report]) -> Iterator[tuple[str, str, str]]:
    first, second = (split[f"{what}_tokens"] for split in splits)
    for name, key in (("mean", "mean"), ("median", "p50"), ("95th percentile", "p95"), ("longest", "max")):
        yield f"{what}, {name}", f"{first[key]:,}", f"{second[key]:,}"


def _program_plots(report: Report) -> list[tuple[str, str]]:
    """The plots of steps and operations, each with its caption."""
    parts: tuple[tuple[str, str, str], ...] = (
        ("steps", "steps of a program", "% of programs"),
        ("operations", "operations", "% of steps"),
    )
    plots: list[tuple[str, str]] = []
    for key, words, axis in parts:
        shares: Any = report["train"][key]
        reference: Any = report[f"finqa_test_{key}"]
        plots.append((share_plot(f"{key}-plot", f"Distribution of {words}", shares, reference, axis), words))
    return plots
