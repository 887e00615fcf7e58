"""What all pages share: names and colours of the kinds of model, numbers as text, tables, and the templates."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias

from fintune import __version__
from fintune.config import GGUF_KINDS, DecodingMode
from fintune.evaluation.metrics import Rates, Score
from fintune.evaluation.statistics import Interval, PairedComparison

if TYPE_CHECKING:
    from jinja2 import Environment

KIND_LABELS: Mapping[str, str] = {
    "base": "base",
    "adapter": "adapter",
    "adapter_4bit": "adapter, 4 bits",
    "merged": "merged",
    "merged_4bit": "merged, 4 bits",
    **{kind: f"GGUF {kind}" for kind in GGUF_KINDS},
    "endpoint": "served",
}
"""Label of each kind of model, in the order base, adapter, merged, GGUF."""
_COMMON_KINDS = ("base", "adapter", "adapter_4bit", "merged", "merged_4bit", "F16", "Q4_K_M", "endpoint")
MODE_LABELS: Mapping[DecodingMode, str] = {
    "none": "free",
    "general": "programs only",
    "page": "only programs of the page's numbers and rows",
}
"""Description of each decoding mode."""


def kind_label(kind: str, mode: str = "") -> str:
    """Label of a kind of model, with its decoding mode if there is one: ``merged, page``."""
    label = KIND_LABELS.get(kind, kind)
    return f"{label}, {mode}" if mode else label


def kind_colour(kind: str) -> int:
    """Number of a kind's colour, ``--s0`` to ``--s7``. Kinds that are rarely measured share a colour with another."""
    return sorted(KIND_LABELS, key=lambda name: name not in _COMMON_KINDS).index(kind) % 8


def format_percent(value: float) -> str:
    """Format a fraction as ``62.5 %``, with a space that does not break."""
    return f"{100 * value:.1f}\u00a0%"


def format_interval(interval: Interval) -> str:
    """Format an interval of fractions in percent: ``58.1–66.7``."""
    return f"{100 * interval[0]:.1f}\u2013{100 * interval[1]:.1f}"


def format_invalid(score: Rates) -> str:
    """Format the invalid rate, and the share without a program if there is one: ``0.0 % + 100.0 % no program``."""
    no_program = f" + {format_percent(score.no_program_rate)} no program" if score.no_program_rate else ""
    return f"{format_percent(score.invalid_rate)}{no_program}"


def format_seconds(seconds: float) -> str:
    """Format seconds with one decimal below 10, else as a whole number."""
    return f"{seconds:,.0f}" if seconds >= 10 else f"{seconds:.1f}"


def format_counts(counts: Mapping[str, int]) -> str:
    """Format counts by name: ``12 messages, 3 question answer``."""
    return ", ".join(f"{number:,} {name.replace('_', ' ')}" for name, number in counts.items())


def paired_cells(compared: PairedComparison) -> list[str]:
    """Common questions, difference and its interval in percentage points, answers gained, answers lost."""
    low, high = compared.interval
    counts = (compared.num_gained, compared.num_lost)
    interval = f"{100 * low:+.1f} to {100 * high:+.1f}"
    return [f"{compared.num_common:,}", compared.points, interval, *(f"{count:,}" for count in counts)]


def tolerant_views(score: Score) -> list[tuple[str, str, float, int]]:
    """Name, meaning, share and n of the views that are no official figure."""
    views, number = score.tolerant, score.num_predictions
    rows = [
        ("right up to the sign", "correct, or with the other sign", views.sign_insensitive, number),
        ("right up to a factor of 100", "correct, or 100 times too large or small", views.scale_100, number),
        ("within 1 %", "correct, or at most 1 % away from the gold result", views.within_1_percent, number),
    ]
    if views.answer_agreement is not None:
        agrees, meaning = "agrees with the annotator's answer", "compared if the free text is one number, yes or no"
        rows.append((agrees, meaning, views.answer_agreement, views.num_with_answer))
    return rows


@dataclass(frozen=True)
class Cell:
    """A table cell that is more than its text.

    Attributes:
        text: The text.
        note: A second line in small print.
        swatch: Number of the colour of a dot before the text.
        link: Address of a link around the text.
        style: CSS classes of the text; ``code`` sets it in a fixed-width font.
        title: Text that a mouse over the cell shows.
    """

    text: str
    note: str = ""
    swatch: int | None = None
    link: str = ""
    style: str = ""
    title: str = ""

    def __str__(self) -> str:
        return self.text


Row: TypeAlias = Sequence["str | Cell"]


def kind_cell(kind: str) -> Cell:
    """The heading of a kind of model's row: its label after a dot of its colour."""
    return Cell(kind_label(kind), swatch=kind_colour(kind) if kind in KIND_LABELS else None, style="nowrap")


@dataclass(frozen=True)
class HtmlTable:
    r"""A table of a page; a template prints it with ``{{ table }}``, and nothing if it has no rows.

    Attributes:
        label: What a screen reader calls the table.
        columns: Headings, "\n" for a line break; empty for a table of names and values.
        rows: Cells by row; the first cell of a row is its heading. Shorter rows are filled with empty cells.
        left: Indices of the columns that are aligned to the left; the others hold numbers.
        footer: Cells of a last row that sums up the others.
    """

    label: str
    columns: Sequence[str]
    rows: Sequence[Row]
    left: Collection[int] = (0,)
    footer: Row = ()

    def __bool__(self) -> bool:
        return bool(self.rows)

    def texts(self) -> list[list[str]]:
        """The text of every cell, by row."""
        return [[str(cell) for cell in row] for row in self.rows]

    def __html__(self) -> str:
        return _environment().get_template("table.html.j2").render(table=self) if self else ""


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    environment = Environment(
        loader=PackageLoader("fintune.report"),
        autoescape=select_autoescape(disabled_extensions=("md.j2",), default=True),
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    environment.globals["version"] = __version__
    environment.filters |= {"percent": format_percent, "interval": format_interval, "comma": "{:,}".format}
    return environment


def fill_template(template: str, **context: Any) -> str:
    """Fill a file of ``templates/``. HTML is escaped, but tables are not. A missing variable is an error."""
    return _environment().get_template(template).render(**context)
