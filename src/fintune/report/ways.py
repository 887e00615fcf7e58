"""One kind of model measured in several ways, for the terminal: a column group a way, and what each gains and loses.

Predictions are named as the steps of a run are: ``merged`` is the first way, ``merged+page`` another.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from fintune.config import split_kind_and_mode
from fintune.evaluation.metrics import Rates
from fintune.evaluation.scoring import read_score, read_verdicts
from fintune.evaluation.statistics import PairedComparison, compare_paired
from fintune.manifest import Slot
from fintune.report.tables import score_table

_FIGURES = ("execution", "95 % interval", "program", "invalid", "seconds")


@dataclass(frozen=True)
class Scored:
    """One set of predictions.

    Attributes:
        score: Official figures.
        right: Whether the program executes to the gold result, by id.
        seconds: Time of all completions; None where it is not known.
    """

    score: Rates
    right: Mapping[str, bool]
    seconds: float | None


def read_scored(run: Path, names: Iterable[str]) -> dict[str, Scored]:
    """What a run's ``score/NAME`` and ``predict/NAME`` hold.

    Args:
        run: The run's folder.
        names: ``merged``, ``merged+page``.

    Raises:
        ArtifactError: A file that is missing or cannot be read.
    """
    found = {}
    for name in names:
        folder = run / "score" / name
        verdicts = read_verdicts(folder / "score.csv")
        manifest = Slot(run, f"predict/{name}").manifest()
        seconds = manifest.facts.get("predict_seconds") if manifest is not None else None
        right = {id_: verdict.exe_correct for id_, verdict in verdicts.items()}
        found[name] = Scored(read_score(folder / "score.json"), right, seconds)
    return found


def score_tables(scored: Mapping[str, Scored], what: str, first: str = "plain") -> list[Table]:
    """Official figures, a row a kind of model.

    Args:
        scored: By name.
        what: What the names name.
        first: What the way of a plain name is called.

    Returns:
        One table with a row each where no kind is there in two ways. Else one with a column group for each way, and one
        for each way but the first with the difference that it makes.
    """
    kinds: dict[str, dict[str, Scored]] = {}
    for name, each in scored.items():
        kind, way = split_kind_and_mode(name)
        kinds.setdefault(kind, {})[way] = each
    if all(len(by_way) == 1 for by_way in kinds.values()):
        return [score_table({name: each.score for name, each in scored.items()}, what)]
    ways = sorted(dict.fromkeys(way for by_way in kinds.values() for way in by_way), key=bool)  # the plain names first
    titles = {way: way or first for way in ways}
    differences = (_differences(kinds, way, ways[0], what, titles) for way in ways[1:])
    return [_side_by_side(kinds, ways, what, titles), *(table for table in differences if table.row_count)]


def _side_by_side(
    kinds: Mapping[str, Mapping[str, Scored]], ways: Sequence[str], what: str, titles: Mapping[str, str]
) -> Table:
    headers = [f"{titles[way] if place == 0 else ''}\n{name}" for way in ways for place, name in enumerate(_FIGURES)]
    table = _table(f"\n{what}", "\nn", *headers)
    for kind, by_way in kinds.items():
        numbers = dict.fromkeys(str(each.score.num_predictions) for each in by_way.values())
        cells = [cell for way in ways for cell in _figures(by_way.get(way))]
        table.add_row(kind, ", ".join(numbers), *cells)
    return table


def _figures(scored: Scored | None) -> list[str]:
    if scored is None:
        return [""] * len(_FIGURES)
    score = scored.score
    low, high = score.execution_accuracy_interval
    return [
        f"{score.execution_accuracy:.2%}",
        f"{100 * low:.1f} to {high:.1%}",
        f"{score.program_accuracy:.2%}",
        f"{score.invalid_rate:.2%}" + (f" + {score.no_program_rate:.2%} no program" if score.no_program_rate else ""),
        "" if scored.seconds is None else f"{scored.seconds:.1f}",
    ]


def _differences(
    kinds: Mapping[str, Mapping[str, Scored]], way: str, first: str, what: str, titles: Mapping[str, str]
) -> Table:
    heading = f"{titles[way]} against {titles[first]}"
    table = _table(
        f"{heading}\n{what}", "\nn", "\npoints", "\n95 % interval", "answers\ngained", "\nlost", "times the\nseconds"
    )
    for kind, by_way in kinds.items():
        if way in by_way and first in by_way:
            before, after = by_way[first], by_way[way]
            table.add_row(kind, *_difference_cells(compare_paired(before.right, after.right)), _ratio(before, after))
    return table


def _difference_cells(found: PairedComparison) -> list[str]:
    """Common questions, difference and its interval in percentage points, answers gained and lost."""
    low, high = found.interval
    interval = f"{100 * low:+.1f} to {100 * high:+.1f}"
    return [str(found.num_common), found.points, interval, str(found.num_gained), str(found.num_lost)]


def _ratio(before: Scored, after: Scored) -> str:
    return f"{after.seconds / before.seconds:.2f}" if before.seconds and after.seconds is not None else ""


def _table(*columns: str) -> Table:
    table = Table(*columns, box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    return table
