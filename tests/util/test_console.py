from __future__ import annotations

import io
import threading

import pytest
from rich.table import Table

from fintune.util import console as progress


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """Where messages go instead of a file that is no terminal."""
    out = io.StringIO()
    monkeypatch.setattr(progress, "console", progress.make_console(file=out, width=40, highlight=False))
    return out


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    out = io.StringIO()
    shown = progress.make_console(file=out, width=100, force_terminal=True, highlight=False, color_system=None)
    monkeypatch.setattr(progress, "console", shown)
    return out


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that lines go by; set its one element."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_messages_go_to_standard_error() -> None:
    assert progress.console.stderr


def test_without_a_terminal_a_line_comes_now_and_then(written: io.StringIO, clock: list[float]) -> None:
    with progress.bar("train", 50) as shown:
        for step in range(50):
            clock[0] = float(step)
            shown.note(f"loss {step}")
            shown.advance()
    assert written.getvalue().splitlines() == [
        "  train 16/50 loss 15",
        "  train 31/50 loss 30",
        "  train 46/50 loss 45",
    ]


def test_a_resumed_bar_counts_from_where_it_was(written: io.StringIO, clock: list[float]) -> None:
    with progress.bar("predict", 10, done=7) as shown:
        clock[0] = 20.0
        shown.advance()
    assert written.getvalue() == "  predict 8/10\n"


def test_a_slow_step_is_told_of_though_nothing_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "console", progress.make_console(file=io.StringIO()))
    monkeypatch.setattr(progress, "SILENT_SECONDS", 0.01)
    told = threading.Event()
    monkeypatch.setattr(progress, "say", lambda text: (lines.append(text), told.set()))
    lines: list[str] = []
    with progress.bar("predict", 883, slow=True):
        assert told.wait(60)
    assert lines[0] == "predict 0/883"


def test_brackets_are_text_and_a_long_remark_is_one_line(written: io.StringIO) -> None:
    text = "[bold]the end token is [/INST][0m " + "word " * 30
    progress.say(text.strip())
    assert written.getvalue() == f"  {text.strip()}\n"


def test_tracking_gives_every_item_and_shows_nothing_when_quick(written: io.StringIO, clock: list[float]) -> None:
    assert list(progress.track("abc", "read", 3)) == ["a", "b", "c"]
    assert written.getvalue() == ""


def test_bars_appear_below_their_stage_and_vanish(terminal: io.StringIO) -> None:
    with progress.stage("train"):
        with progress.bar("steps", 4) as shown:
            shown.advance(3)
            shown.note("loss 0.5")
            assert progress._live is not None
            progress._live.refresh()
        with progress.bar("save", 2):
            assert progress._live is not None
            assert len(progress._live.tasks) == 2
    drawn = terminal.getvalue()
    assert "train" in drawn
    assert "3/4" in drawn
    assert "loss 0.5" in drawn
    assert progress._live is None


def test_a_bar_without_a_stage_has_an_area_of_its_own(terminal: io.StringIO) -> None:
    assert list(progress.track([1, 2], "read", 2)) == [1, 2]
    assert "read" in terminal.getvalue()
    assert progress._live is None


def test_a_failure_below_a_bar_clears_the_area(terminal: io.StringIO) -> None:
    with pytest.raises(KeyError), progress.stage("train"), progress.bar("steps", 4):
        raise KeyError
    assert progress._live is None
    assert terminal.getvalue().count("\x1b[?25l") == terminal.getvalue().count("\x1b[?25h"), "the cursor is shown again"


def test_a_remark_about_the_data_does_not_steer_the_terminal(written: io.StringIO) -> None:
    progress.say("field \x1b[2J\x9b: [b]unknown[/b]")
    assert written.getvalue() == "  field \\x1b[2J\\x9b: [b]unknown[/b]\n"


def test_a_table_does_not_steer_the_terminal(written: io.StringIO) -> None:
    table = Table("p\x1b[2J", box=None)
    table.add_row("a\u202eb")
    progress.console.print(table)
    assert written.getvalue().split() == ["p\\x1b[2J", "a\\u202eb"]
