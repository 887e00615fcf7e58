"""Tables for the terminal: the plan and options of a run, and scores."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from fintune.config import split_kind_and_mode
from fintune.config.load import DEFAULT, Loaded, display_values
from fintune.evaluation.scoring import read_score, read_verdicts
from fintune.evaluation.statistics import Interval, compare_paired
from fintune.manifest import Slot
from fintune.report.formatting import paired_cells, tolerant_views

if TYPE_CHECKING:
    from fintune.evaluation.metrics import Rates, Score


def plain_table(*columns: str, left: Iterable[str] = ()) -> Table:
    """Make a table without lines; all columns but the first and those of ``left`` are aligned to the right."""
    table = Table(*columns, box=None, pad_edge=False)
    for column, name in zip(table.columns[1:], columns[1:], strict=True):
        column.justify = "left" if name in left else "right"
        column.no_wrap = name in left
    return table


def plan_table(lines: Sequence[tuple[str, str, Sequence[str]]]) -> Table:
    """What a run would do: name of the stage, action, and the stages that it reads."""
    table = Table("stage", "action", "reads", box=None, pad_edge=False)
    for name, action, inputs in lines:
        style = "dim" if action.startswith(("up to date", "skipped")) else ""
        table.add_row(name, action, ", ".join(inputs) if len(inputs) < 4 else "all of them", style=style)
    return table


def config_table(loaded: Loaded, only: Collection[str] | None = None) -> Table:
    """Make a table of the options (of the dotted keys ``only``, or all), their values and where they were set."""
    table = Table("option", "value", "set in", box=None, pad_edge=False)
    for column in table.columns:
        column.overflow = "fold"  # a truncated value or path would be useless
    for key, value in display_values(loaded.config).items():
        if only is None or key in only:
            origin = loaded.origin.get(key, DEFAULT)
            table.add_row(key, json.dumps(value), origin, style="dim" if origin == DEFAULT else "")
    return table


@dataclass(frozen=True)
class ScoredSet:
    """One set of predictions: official figures, verdicts on the execution by id, and the time of all completions."""

    score: Rates
    correct: Mapping[str, bool]
    seconds: float | None


def read_scored(run: Path, names: Iterable[str]) -> dict[str, ScoredSet]:
    """Read ``score/NAME`` and ``predict/NAME`` of a run, where NAME is ``merged`` or, with a mode, ``merged+page``.

    Raises:
        ArtifactError: A file is missing or cannot be read.
    """
    scored = {}
    for name in names:
        folder = run / "score" / name
        manifest = Slot(run, f"predict/{name}").manifest()
        correct = {id_: verdict.exe_correct for id_, verdict in read_verdicts(folder / "score.csv").items()}
        seconds = manifest.facts.get("predict_seconds") if manifest is not None else None
        scored[name] = ScoredSet(read_score(folder / "score.json"), correct, seconds)
    return scored


def score_tables(scored: Mapping[str, ScoredSet], what: str, first: str = "plain") -> list[Table]:
    """Official figures by kind of model, or by kind and decoding mode (``merged+page``).

    If a kind was measured in two modes, each row names its mode (``first`` for a name without one), and a table of
    differences follows for each mode but the first.
    """
    kinds: dict[str, dict[str, ScoredSet]] = {}
    for name, one in scored.items():
        kind, mode = split_kind_and_mode(name)
        kinds.setdefault(kind, {})[mode] = one
    if len(kinds) == len(scored):
        return [_score_table(what, [((name,), one) for name, one in scored.items()])]
    modes = sorted({mode: None for by_mode in kinds.values() for mode in by_mode}, key=bool)  # "" first
    titles = {mode: mode or first for mode in modes}
    rows = [((kind, titles[mode]), kinds[kind][mode]) for kind in kinds for mode in modes if mode in kinds[kind]]
    differences = (_difference_table(kinds, mode, modes[0], what, titles) for mode in modes[1:])
    return [_score_table(what, rows), *(table for table in differences if table.row_count)]


def _score_table(what: str, rows: Sequence[tuple[tuple[str, ...], ScoredSet]]) -> Table:
    """One row for each name, or for each name and mode and then with the seconds."""
    has_modes = any(len(names) > 1 for names, _ in rows)
    has_no_program = any(one.score.no_program_rate for _, one in rows)
    columns = [what, *(["decoding"] if has_modes else []), "n", "execution accuracy", "95 % interval"]
    columns += ["program accuracy", "invalid", *(["no program"] if has_no_program else [])]
    table = plain_table(*columns, *(["seconds"] if has_modes else []), left=("decoding",))
    for names, one in rows:
        score = one.score
        cells = [str(score.num_predictions), f"{score.execution_accuracy:.2%}"]
        cells += [_format_range(score.execution_accuracy_interval), f"{score.program_accuracy:.2%}"]
        cells += [f"{score.invalid_rate:.2%}", *([f"{score.no_program_rate:.2%}"] if has_no_program else [])]
        seconds = "" if one.seconds is None else f"{one.seconds:.1f}"
        table.add_row(*names, *cells, *([seconds] if has_modes else []))
    return table


def _format_range(interval: Interval) -> str:
    return f"{100 * interval[0]:.1f} to {interval[1]:.1%}"


def _difference_table(
    kinds: Mapping[str, Mapping[str, ScoredSet]], mode: str, first: str, what: str, titles: Mapping[str, str]
) -> Table:
    heading = f"{titles[mode]} against {titles[first]}\n{what}"
    heads = ("\nn", "\npoints", "\n95 % interval", "answers\ngained", "\nlost", "times the\nseconds")
    table = plain_table(heading, *heads)
    for kind, by_mode in kinds.items():
        if mode in by_mode and first in by_mode:
            before, after = by_mode[first], by_mode[mode]
            ratio = f"{after.seconds / before.seconds:.2f}" if before.seconds and after.seconds is not None else ""
            table.add_row(kind, *paired_cells(compare_paired(before.correct, after.correct)), ratio)
    return table


def headline_table(score: Score, name: str) -> Table:
    """The official figures over the predictions and over the whole gold file, each with its interval."""
    whole = score.whole_file
    table = plain_table(name, "predictions", "95 % interval", "whole file", "95 % interval")
    for field in ("execution_accuracy", "program_accuracy"):
        sides = [(getattr(side, field), getattr(side, f"{field}_interval")) for side in (score, whole)]
        cells = [cell for share, interval in sides for cell in (f"{share:.2%}", _format_range(interval))]
        table.add_row(field.replace("_", " "), *cells)
    table.add_row("invalid", f"{score.invalid_rate:.2%}", _format_range(score.invalid_rate_interval))
    if score.no_program_rate:
        table.add_row("no program, not invalid", f"{score.no_program_rate:.2%}", "", "", "")
    missing = f"{whole.num_missing} without a prediction" if whole.num_missing else ""
    table.add_row("n", str(score.num_predictions), "", str(whole.num_gold), missing)
    return table


def views_table(score: Score) -> Table:
    """The views that are no official figure."""
    table = plain_table("other views, not official", "share", "n")
    for name, _, share, number in tolerant_views(score):
        table.add_row(name, f"{share:.2%}", str(number))
    return table
