"""The page of ``fintune inspect``: counts, lengths and tokenized examples in one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fintune.report.formatting import HtmlTable, fill_template
from fintune.report.sections.data import (
    SOURCE_COLUMNS,
    Report,
    count_rows,
    dropped_rows,
    length_plots,
    length_rows,
    problems,
    program_plot,
    restricted_names,
    source_rows,
)

_PROGRAM_PLOTS = (("steps", "Steps of a program"), ("operations", "Operations"))


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
    is_chat = report["kind"] == "chat"
    dropped, sources = dropped_rows(report), source_rows(report)
    is_few, lengths = length_plots(report)
    titles = {
        "counts": "Counts",
        **({"sources": "Sources"} if sources else {}),
        **({"dropped": "Dropped rows"} if dropped else {}),
        "lengths": "Token lengths",
        **({} if is_chat else {"programs": "Programs"}),
        **({"examples": "Examples"} if page.examples else {}),
    }
    number = num_more(report)
    columns = ("", "train", "evaluation")
    return fill_template(
        "inspect.html.j2",
        title=f"{page.name} - fintune inspect",
        page=page,
        num_examples=[f"{report[split]['num_examples']:,}" for split in ("train", "eval")],
        facts=[("model", page.model), ("data", page.data), ("limit", f"{report['max_length']:,} tokens")],
        titles=titles,
        counts=HtmlTable("Counts", columns, list(count_rows(report)), numeric=(1, 2)),
        sources=HtmlTable("Sources", SOURCE_COLUMNS, sources, numeric=(1, 3, 5, 6)) if sources else "",
        restricted=restricted_names(report),
        left_out=left_out(report),
        dropped=HtmlTable("Dropped rows", ("reason", "split or source", "rows"), dropped, numeric=(2,))
        if dropped
        else "",
        problems=problems(report),
        num_more=f"{number:,}" if number else "",
        prompts=lengths["prompt"],
        completions=lengths["completion"],
        is_few=is_few,
        lengths=HtmlTable("Lengths in tokens", columns, list(length_rows(report)), numeric=(1, 2)),
        programs=[] if is_chat else [(program_plot(what, report), words) for what, words in _PROGRAM_PLOTS],
    )


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


def num_more(report: Report) -> int:
    """Number of unusable rows beyond those of `problems`."""
    return max(int(report["num_unused"]) - len(problems(report)), 0)
