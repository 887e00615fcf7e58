from __future__ import annotations

import re
from functools import cache
from xml.etree import ElementTree

import pytest

from fintune.report.plots import (
    WIDTH,
    Curve,
    Dot,
    dot_plot,
    is_too_small,
    length_plot,
    loss_plot,
    moving_average,
    share_plot,
)

STEPS = list(range(1, 101))


@cache
def drawn() -> dict[str, str]:
    rate = Curve(STEPS, [1e-4 * (1 - step / 101) for step in STEPS])
    loss = Curve(STEPS, [3 / step for step in STEPS])
    return {
        "dots": dot_plot(
            "dots", "Accuracy <of> all", [Dot("base", 0.0, 0.0, 0.02), Dot("Q4", 0.6, 0.5, 0.7, 0.5, 4)], "n = 9"
        ),
        "loss": loss_plot("loss", "Loss", loss, Curve([50, 100], [0.4, 0.3]), rate),
        "short": loss_plot("short", "Loss", Curve([1], [2.0]), Curve([], []), Curve([], [])),
        "shares": share_plot("shares", "Steps", {"1": 0.5, "2": 0.5}, {"1": 0.6, "3": 0.4}, "% of programs"),
        "empty": share_plot("empty", "Steps", {"1": 0.0}, {}, "% of programs"),
        "lengths": length_plot("lengths", "Lengths", [[(0, 100, 3), (100, 200, 7)], [(0, 50, 1)]], limit=512),
    }


@pytest.fixture(scope="module", params=["dots", "loss", "short", "shares", "empty", "lengths"])
def plot(request) -> str:
    return drawn()[request.param]


def test_plot_is_one_well_formed_svg_that_scales(plot):
    root = ElementTree.fromstring(f"<div>{plot.replace('xlink:href', 'href')}</div>")
    assert [child.get("class") for child in root] == ["plot"]
    [svg] = root.iter("svg")
    assert float(svg.get("viewBox").split()[2]) == WIDTH
    assert (svg.get("width"), svg.get("height")) == (None, None)


def test_colours_are_the_pages_own(plot):
    assert not re.findall(r"#[0-9a-fA-F]{6}\b", plot)
    assert "var(--ink)" in plot


def test_text_stays_text_in_the_pages_font(plot):
    assert "<text" in plot
    assert "font-family" not in plot


def test_ids_are_unique_and_every_reference_has_its_target(plot):
    ids = re.findall(r'\bid="([^"]+)"', plot)
    assert len(ids) == len(set(ids))
    references = re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"|aria-labelledby="([^"]+)"', plot)
    assert {next(filter(None, found)) for found in references} <= set(ids)


def test_nothing_of_a_plot_reaches_beyond_it(plot):
    assert "<style" not in plot
    assert "http" not in plot


def test_the_title_is_escaped_and_names_the_picture():
    assert plots_title(drawn()["dots"]) == "Accuracy &lt;of&gt; all"


def plots_title(plot: str) -> str:
    return re.search(r"<title[^>]*>(.*?)</title>", plot)[1]


def test_two_drawings_of_the_same_are_the_same():
    again = share_plot("shares", "Steps", {"1": 0.5, "2": 0.5}, {"1": 0.6, "3": 0.4}, "% of programs")
    assert again == drawn()["shares"]


def test_loss_plot_is_logarithmic_for_a_large_range():
    assert "log scale" in drawn()["loss"]
    assert "log scale" not in drawn()["short"]


def test_smoothing_keeps_length_ends_and_straight_lines():
    line = [float(step) for step in STEPS]
    assert moving_average(line) == pytest.approx(line)
    bumpy = [float(step % 2) for step in STEPS]
    assert len(moving_average(bumpy)) == len(bumpy)
    assert max(moving_average(bumpy)[5:-5]) < 0.7
    assert moving_average([4.0]) == [4.0]


def test_length_plot_leaves_out_a_small_second_histogram():
    train = [(start, start + 100, 10) for start in range(0, 1000, 100)]
    alone = length_plot("lengths", "Lengths", [train])
    few = length_plot("lengths", "Lengths", [train, [(700, 800, 19)]])
    many = length_plot("lengths", "Lengths", [train, [(700, 800, 20)]])
    assert is_too_small([(700, 800, 19)])
    assert few == alone != many
