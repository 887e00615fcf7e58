"""The plots of the pages: matplotlib drawings as one responsive inline SVG each.

matplotlib draws with placeholder colours, which become CSS variables of the page (``--ink``, ``--s1``), so that light
and dark both work. The SVG has a viewBox and scales with its column. Text stays text, in the page's font.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias
from xml.sax.saxutils import escape

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Histogram: TypeAlias = Sequence[tuple[int, int, int]]
"""(from, up to but without, count) of each bin, without gaps."""

WIDTH = 440
"""Width of the drawing in pixels: readable at the 340 pixels of a phone and at the 540 of a desktop column."""
_MAX_WIDTH = 560
_DPI = 72  # matplotlib's SVG unit is the point; at 72 dots per inch a point is a pixel
_MIN_HISTOGRAM_EXAMPLES = 20

_INK, _MUTED, _LINE = "#010203", "#020304", "#030405"
_SERIES = ("#040506", "#050607", "#060708", "#070809", "#08090a", "#090a0b", "#0a0b0c", "#0b0c0d")
_VARIABLES = {_INK: "ink", _MUTED: "muted", _LINE: "line", **{colour: f"s{k}" for k, colour in enumerate(_SERIES)}}
_SETTINGS = {"svg.fonttype": "none", "font.size": 12, "axes.unicode_minus": False, "path.simplify": True}


class Dot(NamedTuple):
    """One row of :func:`dot_plot`: fractions, with ``low`` and ``high`` as the ends of the interval of ``value``.

    ``second`` is drawn as a hollow diamond. ``series`` is the number of the colour, ``--s0`` to ``--s7``.
    """

    label: str
    value: float
    low: float
    high: float
    second: float | None = None
    series: int = 1


class Curve(NamedTuple):
    """One line of a plot: values over optimizer steps, or over another horizontal axis."""

    steps: Sequence[float]
    values: Sequence[float]


def dot_plot(name: str, title: str, rows: Sequence[Dot], axis: str) -> str:
    """Draw values with intervals, one row each, from top to bottom, on a percent axis.

    As in the other plots, ``name`` is unique on the page and prefixes all ids, and ``title`` describes the plot for a
    screen reader.
    """

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for index, row in enumerate(rows):
            colour, value = _SERIES[row.series], 100 * row.value
            axes.plot([100 * row.low, 100 * row.high], [index, index], color=colour, linewidth=3, alpha=0.45)
            axes.plot([value], [index], "o", color=colour, markersize=8)
            if row.second is not None:
                axes.plot([100 * row.second], [index], "D", color=_INK, markersize=5, markerfacecolor="none")
            # Centred over the dot, but not over the row's name.
            offset, side = ((0, 8), "center") if value > 4 else ((-5, 8), "left")
            label = axes.annotate(f"{value:.1f} %", (value, index), offset, textcoords="offset points", ha=side)
            label.set(color=_INK, fontweight="bold")
        axes.set_yticks(range(len(rows)), [row.label for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.75)
        axes.set_xlim(-3, 103)
        axes.set_xticks(range(0, 101, 25))
        axes.set_xlabel(axis)
        _style(axes, grid="x")

    return _svg(name, title, draw, height=56 + 44 * len(rows))


def loss_plot(name: str, title: str, train: Curve, evaluation: Curve, rate: Curve) -> str:
    """Draw training and evaluation loss over steps, with the learning rate below on the same axis.

    The loss axis is logarithmic if the largest loss is more than 20 times the smallest.
    """
    from matplotlib.ticker import LogLocator

    def draw(figure: Figure) -> None:
        loss, below = figure.subplots(2, 1, sharex=True, height_ratios=(3.2, 1))
        if train.steps:
            is_long = len(train.steps) > 60
            width, alpha = (1.0, 0.4) if is_long else (1.8, 1.0)
            loss.plot(train.steps, train.values, color=_SERIES[1], linewidth=width, alpha=alpha)
            if is_long:
                loss.plot(train.steps, moving_average(train.values), color=_SERIES[1], linewidth=2)
        if evaluation.steps:
            loss.plot(evaluation.steps, evaluation.values, "o-", color=_SERIES[4], linewidth=1.8, markersize=5)
        values = [value for value in (*train.values, *evaluation.values) if value > 0]
        is_logarithmic = bool(values) and max(values) > 20 * min(values)
        if is_logarithmic:
            loss.set_yscale("log")
            loss.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            loss.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            loss.yaxis.set_minor_formatter("")
        loss.set_ylabel("loss, nats" + (" (log scale)" if is_logarithmic else ""))
        _style(loss, grid="y")
        below.plot(rate.steps, rate.values, color=_MUTED, linewidth=1.5)
        below.set_ylabel("learning\nrate")
        below.set_ylim(bottom=0)
        below.locator_params(axis="y", nbins=2)
        below.yaxis.set_major_formatter(lambda value, _: f"{value:.0e}".replace("e-0", "e-") if value else "0")
        below.set_xlabel("optimizer step")
        below.xaxis.get_major_locator().set_params(integer=True, nbins=6)
        _style(below, grid="y")

    return _svg(name, title, draw, height=310)


def share_plot(name: str, title: str, shares: Mapping[str, float], reference: Mapping[str, float], axis: str) -> str:
    """Draw shares of named parts as bars, and the shares of a reference as hollow diamonds; all are fractions."""
    labels = [*shares, *(label for label in reference if label not in shares)]

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        rows = list(range(len(labels)))
        axes.barh(rows, [100 * shares.get(label, 0) for label in labels], height=0.58, color=_SERIES[1], alpha=0.75)
        if reference:
            values = [100 * reference.get(label, 0) for label in labels]
            axes.plot(values, rows, "D", color=_INK, markerfacecolor="none", markersize=6, clip_on=False)
        axes.set_yticks(rows, labels)
        axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.set_xlim(0, 105 * max([0.01, *shares.values(), *reference.values()]))
        axes.set_xlabel(axis)
        axes.locator_params(axis="x", nbins=6)
        _style(axes, grid="x")

    return _svg(name, title, draw, height=48 + 24 * len(labels))


def is_too_small(histogram: Histogram) -> bool:
    """Whether a second histogram has too few examples to draw: its spikes would flatten the first."""
    return sum(count for _, _, count in histogram) < _MIN_HISTOGRAM_EXAMPLES


def length_plot(
    name: str,
    title: str,
    histograms: Sequence[Histogram],
    limit: int | None = None,
    axis: str = "tokens of the prompt",
) -> str:
    """Draw histograms of lengths in tokens: the share of the examples per 1, 10, 100, ... tokens.

    Histograms but the first are left out if they are :func:`is_too_small`. ``limit`` is a length that no example
    exceeds, drawn as a dashed line; if it is far from all lengths, an arrow says so and the lengths keep their scale.
    """
    histograms = [*histograms[:1], *(bins for bins in histograms[1:] if not is_too_small(bins))]
    narrowest = min(end - start for bins in histograms for start, end, _ in bins)
    unit = 10 ** round(math.log10(narrowest))
    low, high = min(bins[0][0] for bins in histograms), max(bins[-1][1] for bins in histograms)
    margin = 0.05 * high

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for bins, colour in zip(histograms, (_SERIES[1], _SERIES[4]), strict=False):
            total = sum(count for _, _, count in bins) or 1
            heights = [100 * count / total * unit / (end - start) for start, end, count in bins]
            edges = [bins[0][0], *(end for _, end, _ in bins)]
            axes.stairs(heights, edges, color=colour, fill=True, alpha=0.18)
            axes.stairs(heights, edges, color=colour, linewidth=1.8)
        left, right = (0 if low < high / 2 else max(0, low - margin)), high + margin
        if limit is not None and limit <= 2 * high:
            axes.axvline(limit, color=_MUTED, linewidth=1.2, linestyle="--")
            right = max(right, 1.03 * limit)
        elif limit is not None:
            label = f"limit {limit:,} \u2192"
            axes.annotate(label, (1, 1), xycoords="axes fraction", ha="right", va="top", color=_MUTED)
        axes.set_ylim(bottom=0)
        axes.set_xlim(left, right)
        axes.set_xlabel(axis)
        axes.set_ylabel(f"% of examples\nper {unit:,} tokens" if unit > 1 else "% of examples\nper token")
        axes.locator_params(nbins=5)
        _style(axes, grid="y")

    return _svg(name, title, draw, height=220)


def coverage_plot(name: str, title: str, curves: Sequence[tuple[int, Curve]]) -> str:
    """Draw accuracy over the share of questions that are answered: the colour's number and the curve of fractions."""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for series, curve in curves:
            steps, values = ([100 * value for value in side] for side in (curve.steps, curve.values))
            axes.plot(steps, values, color=_SERIES[series], linewidth=2, drawstyle="steps-post")
            axes.plot(steps[-1:], values[-1:], "o", color=_SERIES[series], markersize=6, clip_on=False)
        axes.set_xlim(0, 100)
        axes.set_ylim(0, 103)
        axes.set_xticks(range(0, 101, 25))
        axes.set_xlabel("questions answered, %")
        axes.set_ylabel("execution accuracy, %")
        _style(axes, grid="y")

    return _svg(name, title, draw, height=250)


def moving_average(values: Sequence[float]) -> list[float]:
    """Average over a window around each value. It is a twentieth of the whole, and narrower at both ends."""
    half = max(1, len(values) // 40)
    reaches = [min(half, index, len(values) - 1 - index) for index in range(len(values))]
    windows = [values[index - reach : index + reach + 1] for index, reach in enumerate(reaches)]
    return [sum(window) / len(window) for window in windows]


def _style(axes: Axes, *, grid: Literal["x", "y"]) -> None:
    """Axes without a frame, in the page's colours, with grid lines in one direction."""
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_LINE)
    axes.tick_params(color=_LINE, labelcolor=_INK, length=0, which="both")
    axes.xaxis.label.set_color(_MUTED)
    axes.yaxis.label.set_color(_MUTED)
    axes.grid(axis=grid, color=_LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_facecolor("none")


def _svg(name: str, title: str, draw: Callable[[Figure], None], *, height: float) -> str:
    """Draw into a figure of this height in pixels, and make matplotlib's SVG fit for a page."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with mpl.rc_context({**_SETTINGS, "svg.hashsalt": name}):
        figure = Figure(figsize=(WIDTH / _DPI, height / _DPI), dpi=_DPI, layout="constrained")
        figure.patch.set_visible(False)
        FigureCanvasSVG(figure)
        draw(figure)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return f'<div class="plot">{_adapt(file.getvalue(), name, title)}</div>'


def _adapt(svg: str, name: str, title: str) -> str:
    """Drop matplotlib's prologue and style sheet, make ids unique, and set CSS colours, a title and the page's font."""
    svg = svg[svg.index("<svg") :]
    # matplotlib's style sheet would apply to the whole page; the page's own has the same rule for its plots.
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable})")
    # Keep the size and drop the font; older versions write `font: 700 12px 'DejaVu Sans', ...` as one property.
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    svg = re.sub(r"font: (\d{3}|bold) ([\d.]+)px [^;\"]*", r"font-size: \2px; font-weight: \1", svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    svg = re.sub(r"\n\s*", "\n", svg)
    view = re.search(r'viewBox="[^"]+"', svg)
    assert view is not None, "matplotlib writes a viewBox"
    body = svg[svg.index(">") + 1 :].strip()
    opening = f'<svg role="img" aria-labelledby="{name}-title" {view[0]} style="max-width:{_MAX_WIDTH}px">'
    return f'{opening}<title id="{name}-title">{escape(title)}</title>{body}'
