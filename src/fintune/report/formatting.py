"""What all pages share: names and colours of the kinds of model, numbers as text, HTML tables, and the templates."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fintune import __version__
from fintune.config import GGUF_KINDS, DecodingMode
from fintune.evaluation.metrics import Rates
from fintune.evaluation.statistics import Interval

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
_COLOURS = {
    kind: number for number, kind in enumerate([*_COMMON_KINDS, *(k for k in KIND_LABELS if k not in _COMMON_KINDS)])
}
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
    return _COLOURS[kind] % 8


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


@dataclass(frozen=True)
class Cell:
    """A table cell that is more than its text.

    Attributes:
        text: The text.
        note: A second line in small print.
        swatch: Number of the colour of a dot before the text.
        link: Address of a link around the text.
        style: CSS classes of the text.
        is_code: Whether the text is set in a fixed-width font.
        title: Text that a mouse over the cell shows.
    """

    text: str
    note: str = ""
    swatch: int | None = None
    link: str = ""
    style: str = ""
    is_code: bool = False
    title: str = ""

    def __str__(self) -> str:
        return self.text

    def __html__(self) -> str:
        from markupsafe import escape

        html = str(escape(self.text))
        if self.is_code:
            html = f"<code>{html}</code>"
        if self.link:
            html = f'<a href="{escape(self.link)}">{html}</a>'
        if self.swatch is not None:
            html = f'<span class="swatch" style="--c:var(--s{self.swatch})" aria-hidden="true"></span>{html}'
        if self.style or self.title:
            title = f' title="{escape(self.title)}"' if self.title else ""
            html = f'<span class="{escape(self.style)}"{title}>{html}</span>'
        return html + (f'<br><span class="note plain">{escape(self.note)}</span>' if self.note else "")


@dataclass(frozen=True)
class HtmlTable:
    r"""A table of a page; a template prints it with ``{{ table }}``.

    Attributes:
        label: What a screen reader calls the table.
        columns: Headings, "\n" for a line break; empty for a table of names and values.
        rows: Cells by row; the first cell of a row is its heading. Shorter rows are filled with empty cells.
        numeric: Indices of the columns that are aligned to the right.
        groups: Headings above the columns, each with the number of columns below it.
        footer: Cells of a last row that sums up the others.
    """

    label: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    numeric: Collection[int] = ()
    groups: Sequence[tuple[str, int]] = ()
    footer: Sequence[str] = ()

    def texts(self) -> list[list[str]]:
        """The text of every cell, by row."""
        return [[str(cell) for cell in row] for row in self.rows]

    def __html__(self) -> str:
        from markupsafe import escape

        return (
            f'<div class="scroll" role="region" aria-label="{escape(self.label)}" tabindex="0"><table class="full">\n'
            f"{''.join(self._parts())}</table></div>"
        )

    def _parts(self) -> Iterator[str]:
        from markupsafe import escape

        if self.columns:
            yield "<thead>"
            if self.groups:
                heads = (
                    f'<th scope="colgroup" class="group" colspan="{width}">{escape(name)}</th>'
                    if name
                    else f'<td colspan="{width}"></td>'
                    for name, width in self.groups
                )
                yield f"<tr>{''.join(heads)}</tr>\n"
            heads = (
                f'<th scope="col"{self._class(index)}>{str(escape(name)).replace(chr(10), "<br>")}</th>'
                for index, name in enumerate(self.columns)
            )
            yield f"<tr>{''.join(heads)}</tr></thead>\n"
        yield "<tbody>"
        for row in self.rows:
            yield f"<tr>{self._cells(row)}</tr>\n"
        yield "</tbody>"
        if self.footer:
            yield f"<tfoot><tr>{self._cells(self.footer)}</tr></tfoot>"

    def _cells(self, row: Sequence[str | Cell]) -> str:
        from markupsafe import escape

        filled = [*row, *[""] * (len(self.columns) - len(row))]
        cells = (f"<td{self._class(index)}>{escape(cell)}</td>" for index, cell in enumerate(filled) if index)
        return f'<th scope="row"{self._class(0)}>{escape(filled[0])}</th>{"".join(cells)}'

    def _class(self, index: int) -> str:
        return ' class="num"' if index in self.numeric else ""


def fill_template(template: str, **context: Any) -> str:
    """Fill a template. In HTML, text is escaped; tables, plots and JSON blocks are inserted as they are.

    Args:
        template: A file of ``templates/``.
        context: The variables of the template; a missing one is an error.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    environment = Environment(
        loader=PackageLoader("fintune.report"),
        autoescape=select_autoescape(disabled_extensions=("md.j2",), default=True),
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    return environment.get_template(template).render(version=__version__, **context)
