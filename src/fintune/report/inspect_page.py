"""The page of ``fintune inspect``: counts, lengths and tokenized examples in one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fintune.report.formatting import HtmlTable, fill_template
from fintune.report.sections.data import Report, data_section, dropped_rows, left_out, num_more


@dataclass(frozen=True)
class Piece:
    """A run of tokens that the loss includes (``trained``) or does not; ``special`` is a token of the template."""

    text: str
    trained: bool
    special: bool


@dataclass(frozen=True)
class Shown:
    """One tokenized example: the number of its tokens and of those in the loss, and its pieces in order.

    ``rejected`` is the rejected answer of a preference pair, which follows the same prompt. ``label`` is whether a
    single answer is desired; None without labels.
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
    """The run's name, where the examples come from, ``model.name``, ``data.source``, the figures, and some examples."""

    name: str
    origin: str
    model: str
    data: str
    report: Report
    examples: Sequence[Shown]


def render_inspect(page: InspectPage) -> str:
    """Render the page as HTML."""
    dropped = HtmlTable("Dropped rows", ("reason", "split or source", "rows"), dropped_rows(page.report), left=(0, 1))
    data = data_section(page.report)
    titles = {
        "counts": ("Counts", True),
        "sources": ("Sources", data["sources"]),
        "dropped": ("Dropped rows", dropped),
        "lengths": ("Token lengths", True),
        "programs": ("Programs", not data["is_chat"]),
        "examples": ("Examples", page.examples),
    }
    return fill_template(
        "inspect.html.j2",
        title=f"{page.name} - fintune inspect",
        titles={id_: words for id_, (words, is_shown) in titles.items() if is_shown},
        page=page,
        data=data,
        dropped=dropped,
        left_out=left_out(page.report),
        num_more=num_more(page.report),
    )
