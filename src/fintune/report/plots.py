"""The plots of the pages: what each draws; :mod:`fintune.report.svg` makes it fit for a page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fintune.report import svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FEWEST = 20
"""Examples of a histogram beside another."""


@dataclass(frozen=True)
class Dot:
    """One row of :func:`dot_plot`, all values as fractions.

    Attributes:
        label: Name of the row.
        value: The dot.
        low: Lower end of the interval.
        high: Upper end of the interval.
        second: A second value, drawn as a hollow diamond, or None.
        series: Number of the colour, ``--s0`` to ``--s7``.
    """

    label: str
    value: float
    low: float
    high: float
    second: float | None = None
    series: int = 1


@dataclass(frozen=True)
class Curve:
    """One line of a plot: values over optimiser steps, or over what the plot says."""

    steps: Sequence[float]
    values: Sequence[float]


def dot_plot(name: str, title: str, rows: Sequence[Dot], axis: str) -> str:
    """Values with intervals, one row each, from top to bottom, on a percent axis.

    Args:
        name: Unique on the page; prefix of all ids.
        title: What a screen reader says about the plot.
        rows: The rows.
        axis: Label of the percent axis; say what n is.
    """

    def draw(figure: Figure, wide: bool) -> None:
        axes = figure.add_subplot()
        places = range(len(rows))
        for place, row in zip(places, rows, strict=True):
            colour = svg.SERIES[row.series]
            axes.plot([100 * row.low, 100 * row.high], [place, place], color=colour, linewidth=3, alpha=0.45)
            axes.plot([100 * row.value], [place], "o", color=colour, markersize=9)
            if row.second is not None:
                axes.plot([100 * row.second], [place], "D", color=svg.INK, markersize=5, markerfacecolor="none")
            axes.annotate(
                f"{100 * row.value:.1f} %",
                (100 * row.value, place),
                # Centred over the dot, but not over the row's name.
                xytext=(0 if row.value > 0.04 else -5, 8),
                textcoords="offset points",
                ha="center" if row.value > 0.04 else "left",
                color=svg.INK,
                fontweight="bold",
            )
        axes.set_yticks(list(places), [row.label for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.75)
        axes.set_xlim(-3, 103)
        axes.set_xticks(range(0, 101, 20 if wide else 25))
        axes.set_xlabel(axis)
        svg.plain(axes, grid="x")

    return svg.figure(name, title, draw, height=56 + 44 * len(rows))


def loss_plot(name: str, title: str, train: Curve, evaluated: Curve, rate: Curve) -> str:
    """Training and evaluation loss over steps, with the learning rate below on the same axis.

    The loss axis is logarithmic where the largest loss is more than 20 times the smallest.
    """
    from matplotlib.ticker import LogLocator

    def draw(figure: Figure, wide: bool) -> None:
        loss, below = figure.subplots(2, 1, sharex=True, height_ratios=(3.2, 1))
        if train.steps:
            thin = len(train.steps) > 60
            loss.plot(
                train.steps, train.values, color=svg.SERIES[1], linewidth=1 if thin else 1.8, alpha=0.4 if thin else 1
            )
            if thin:
                loss.plot(train.steps, smooth(train.values), color=svg.SERIES[1], linewidth=2)
        if evaluated.steps:
            loss.plot(evaluated.steps, evaluated.values, "o-", color=svg.SERIES[4], linewidth=1.8, markersize=5)
        values = [value for value in (*train.values, *evaluated.values) if value > 0]
        logarithmic = bool(values) and max(values) > 20 * min(values)
        if logarithmic:
            loss.set_yscale("log")
            loss.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            loss.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            loss.yaxis.set_minor_formatter("")
        loss.set_ylabel("loss, nats" + (" (log scale)" if logarithmic else ""))
        svg.plain(loss, grid="y")
        below.plot(rate.steps, rate.values, color=svg.MUTED, linewidth=1.5)
        below.set_ylabel("learning\nrate")
        below.set_ylim(bottom=0)
        below.locator_params(axis="y", nbins=2)
        below.yaxis.set_major_formatter(lambda value, _: f"{value:.0e}".replace("e-0", "e-") if value else "0")
        below.set_xlabel("optimiser step")
        below.xaxis.get_major_locator().set_params(integer=True, nbins=8 if wide else 5)
        svg.plain(below, grid="y")

    return svg.figure(name, title, draw, height=330)


def share_plot(name: str, title: str, ours: Mapping[str, float], other: Mapping[str, float], axis: str) -> str:
    """Shares of named parts, this run's (bar) beside another's (hollow diamond), as fractions of 1."""
    labels = [*ours, *(label for label in other if label not in ours)]

    def draw(figure: Figure, wide: bool) -> None:
        axes = figure.add_subplot()
        places = list(range(len(labels)))
        axes.barh(places, [100 * ours.get(label, 0) for label in labels], height=0.58, color=svg.SERIES[1], alpha=0.75)
        if other:
            axes.plot(
                [100 * other.get(label, 0) for label in labels],
                places,
                "D",
                color=svg.INK,
                markerfacecolor="none",
                markersize=6,
                clip_on=False,
            )
        axes.set_yticks(places, labels)
        axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.set_xlim(0, 105 * max([0.01, *ours.values(), *other.values()]))
        axes.set_xlabel(axis)
        axes.locator_params(axis="x", nbins=7 if wide else 5)
        svg.plain(axes, grid="x")

    return svg.figure(name, title, draw, height=48 + 24 * len(labels))


def too_few(histogram: Sequence[tuple[int, int, int]]) -> bool:
    """Whether a second histogram would be a few spikes that flatten the first."""
    return sum(count for _, _, count in histogram) < _FEWEST


def length_plot(
    name: str,
    title: str,
    histograms: Sequence[Sequence[tuple[int, int, int]]],
    limit: int | None = None,
    axis: str = "tokens of the prompt",
) -> str:
    """Histograms of lengths in tokens, each as the share of its examples per 1, 10, 100 ... tokens.

    Args:
        name: Unique on the page.
        title: For a screen reader.
        histograms: Lists of (from, up to but without, count), without gaps; coloured ``--s1``, ``--s4``. All but the
            first are left out where they are :func:`too_few`.
        limit: A length that none may pass, drawn as a line.
        axis: What is counted.
    """
    histograms = [*histograms[:1], *(bins for bins in histograms[1:] if not too_few(bins))]
    narrowest = min(end - start for bins in histograms for start, end, _ in bins)
    unit = 10 ** round(math.log10(narrowest))

    def draw(figure: Figure, wide: bool) -> None:
        axes = figure.add_subplot()
        for bins, colour in zip(histograms, (svg.SERIES[1], svg.SERIES[4]), strict=False):
            total = sum(count for _, _, count in bins) or 1
            heights = [100 * count / total * unit / (end - start) for start, end, count in bins]
            edges = [bins[0][0], *(end for _, end, _ in bins)]
            axes.stairs(heights, edges, color=colour, fill=True, alpha=0.18)
            axes.stairs(heights, edges, color=colour, linewidth=1.8)
        if limit is not None:
            axes.axvline(limit, color=svg.MUTED, linewidth=1.2, linestyle="--")
        axes.set_ylim(bottom=0)
        axes.set_xlim(left=0)
        axes.set_xlabel(axis)
        axes.set_ylabel(f"% of examples\nper {unit:,} tokens" if unit > 1 else "% of examples\nper token")
        axes.locator_params(axis="x", nbins=8 if wide else 5)
        axes.locator_params(axis="y", nbins=5)
        svg.plain(axes, grid="y")

    return svg.figure(name, title, draw, height=230)


def coverage_plot(name: str, title: str, curves: Sequence[tuple[str, int, Curve]]) -> str:
    """Accuracy over the share of questions that are answered, both as fractions.

    Args:
        name: Unique on the page.
        title: For a screen reader.
        curves: Label, number of the colour, and the curve, whose ``steps`` are the shares.
    """

    def draw(figure: Figure, wide: bool) -> None:
        axes = figure.add_subplot()
        for _, series, curve in curves:
            steps, values = ([100 * each for each in side] for side in (curve.steps, curve.values))
            axes.plot(steps, values, color=svg.SERIES[series], linewidth=2, drawstyle="steps-post")
            axes.plot(steps[-1:], values[-1:], "o", color=svg.SERIES[series], markersize=6, clip_on=False)
        axes.set_xlim(0, 100)
        axes.set_ylim(0, 103)
        axes.set_xticks(range(0, 101, 20 if wide else 25))
        axes.set_xlabel("questions answered, %")
        axes.set_ylabel("execution accuracy, %")
        svg.plain(axes, grid="y")

    return svg.figure(name, title, draw, height=270)


def smooth(values: Sequence[float]) -> list[float]:
    """Mean over a window around each value, a twentieth of the whole wide and narrower at both ends."""
    half = max(1, len(values) // 40)
    reaches = [min(half, index, len(values) - 1 - index) for index in range(len(values))]
    windows = [values[index - reach : index + reach + 1] for index, reach in enumerate(reaches)]
    return [sum(window) / len(window) for window in windows]
