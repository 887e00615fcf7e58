"""matplotlib drawings as inline SVG: text stays text, and colours are the page's own, so that light and dark both work.

matplotlib draws with placeholder colours, which are then replaced by CSS variables of the page (``--ink``, ``--s1``).
Each plot is drawn twice, for a desk and for a phone; the page's style shows the one that fits.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal
from xml.sax.saxutils import escape

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDE_PIXELS = 560
NARROW_PIXELS = 330
_DPI = 72  # matplotlib's SVG unit is the point; at 72 a point is a pixel of the drawing

INK, MUTED, LINE = "#010203", "#020304", "#030405"
SERIES = ("#040506", "#050607", "#060708", "#070809", "#08090a", "#090a0b", "#0a0b0c", "#0b0c0d")
_VARIABLES: Mapping[str, str] = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    LINE: "var(--line)",
    **{colour: f"var(--s{index})" for index, colour in enumerate(SERIES)},
}


def plain(axes: Axes, *, grid: Literal["x", "y"]) -> None:
    """Axes without a frame, in the page's colours, with lines across one way."""
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(LINE)
    axes.tick_params(color=LINE, labelcolor=INK, length=0, which="both")
    axes.xaxis.label.set_color(MUTED)
    axes.yaxis.label.set_color(MUTED)
    axes.grid(axis=grid, color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_facecolor("none")


def figure(name: str, title: str, draw: Callable[[Any, bool], None], *, height: float) -> str:
    """The drawing in both widths.

    Args:
        name: Prefix of all ids.
        title: Text for a screen reader.
        draw: Draws into a matplotlib figure; told whether it is the wide one.
        height: In pixels.
    """
    wide = _svg(f"{name}-wide", title, draw, WIDE_PIXELS, height)
    narrow = _svg(f"{name}-narrow", title, draw, NARROW_PIXELS, height)
    return f'<div class="plot wide">{wide}</div><div class="plot narrow">{narrow}</div>'


def _svg(name: str, title: str, draw: Callable[[Any, bool], None], width: float, height: float) -> str:
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    look = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.size": 12,
        "axes.unicode_minus": False,
        "path.simplify": True,
    }
    with mpl.rc_context(look):
        figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI, layout="constrained")
        figure.patch.set_visible(False)
        FigureCanvasSVG(figure)
        draw(figure, width >= WIDE_PIXELS)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return clean(out.getvalue(), name, title)


def clean(svg: str, name: str, title: str) -> str:
    """Make matplotlib's SVG fit for a page: no prologue, unique ids, CSS colours, a title, the page's font.

    Args:
        svg: The file as matplotlib writes it.
        name: Prefix of all ids.
        title: Text for a screen reader.
    """
    svg = svg[svg.index("<svg") :]
    # matplotlib's style sheet would hold for the whole page; the page's own has the same rule for its plots.
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    # The page's font in matplotlib's size; older versions write `font: 700 12px 'DejaVu Sans', ...` in one.
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    svg = re.sub(r"font: (?:(\d{3}|bold) )?([\d.]+)px [^;\"]*", _font, svg)
    svg = re.sub(r"\n\s*", "\n", svg)
    head = f'<svg role="img" aria-labelledby="{name}-title"'
    end = svg.index(">") + 1
    size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
    assert size is not None, "matplotlib writes a viewBox"
    width = math.ceil(float(size[1]))
    opening = f'{head} viewBox="{size[0][9:-1]}" style="max-width:{width}px">'
    return f'{opening}<title id="{name}-title">{escape(title)}</title>{svg[end:].strip()}'


def _font(found: re.Match[str]) -> str:
    weight = f"; font-weight: {found[1]}" if found[1] else ""
    return f"font-size: {found[2]}px{weight}"
