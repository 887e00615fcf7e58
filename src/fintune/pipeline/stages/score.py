"""Score predicted programs against a FinQA file: the official verdicts, and more beside them.

``fintune score --predictions P --gold G [--csv F] [--json F] [--html F]``; no configuration and no torch. As a step of
a run it reads ``predict/KIND/predictions.jsonl`` and ``prepare/gold.json``, writes ``score.json`` and ``score.csv``.
"""

from __future__ import annotations

import csv as csv_module
import io
import json as json_module
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fintune.config import Config
from fintune.data.finqa_json import WITHOUT_STRICT, read_finqa
from fintune.data.predictions import PredictedProgram, read_predictions
from fintune.errors import DataError
from fintune.evaluation.metrics import Score, ScoreFile
from fintune.evaluation.metrics import score as score_predictions
from fintune.finqa.verdict import Verdict
from fintune.manifest import Facts
from fintune.records import FinQARecord
from fintune.report.score_page import ScorePage, render_score
from fintune.util.files import check_outputs, sha256_file, write_output


@dataclass(frozen=True)
class ScoreRun:
    """What scoring gave.

    Attributes:
        score: All figures.
        verdicts: One a scored prediction, in file order.
        problems: One line for each row that was not scored, or scored with a doubt (a duplicate id).
        num_unscored: Rows that are in no figure, by reason. Those of a known id are missing in the whole-file figures.
        seconds: Time of all scored completions; None where not every row tells its own.
    """

    score: Score
    verdicts: list[Verdict]
    problems: list[str]
    num_unscored: Mapping[str, int]
    seconds: float | None = None

    @property
    def right(self) -> dict[str, bool]:
        """Whether the program executes to the gold result, by id; of several predictions for one the first counts."""
        return {verdict.id: verdict.exe_correct for verdict in reversed(self.verdicts)}


def score(config: Config, inputs: Mapping[str, Path], folder: Path, *, kind: str) -> Facts:
    """Score the predictions of one kind of model in one way, ``merged`` or ``merged+example``, as a step of a run."""
    done = score_files(
        inputs[f"predict/{kind}"] / "predictions.jsonl",
        inputs["prepare"] / "gold.json",
        csv=folder / "score.csv",
        json=folder / "score.json",
        strict=True,
    )
    figures = done.score
    none = f", no program {figures.no_program_rate:.2%}" if figures.no_program_rate else ""
    return {
        "summary": f"execution {figures.execution_accuracy:.2%}, program {figures.program_accuracy:.2%}, "
        f"invalid {figures.invalid_rate:.2%}{none} of {figures.num_predictions}",
        "num_predictions": figures.num_predictions,
        "execution_accuracy": figures.execution_accuracy,
        "program_accuracy": figures.program_accuracy,
        "invalid_rate": figures.invalid_rate,
    }


def score_files(
    predictions: Path,
    gold: Path,
    *,
    csv: Path | None = None,
    json: Path | None = None,
    html: Path | None = None,
    strict: bool = False,
) -> ScoreRun:
    """Score a file of predictions.

    Args:
        predictions: Any form that `fintune.data.predictions` reads.
        gold: FinQA JSON, plain or gzip.
        csv: Write one row a prediction here.
        json: Write all figures here.
        html: Write the page of figures, plots and examples here.
        strict: Refuse a file with a duplicate id, an unknown id, or a row without id or program.

    Raises:
        DataError: A file cannot be read, nothing in it can be scored, or ``strict`` and a row is wrong.
        FintuneError: ``csv``, ``json`` or ``html`` cannot be written, is one of the files that are read, or another of
            these three.
    """
    check_outputs((csv, json, html), inputs=(predictions, gold))
    read_gold = read_finqa(gold, strict=strict, instead=WITHOUT_STRICT)
    found = read_predictions(predictions)
    usable, doubts, num_unknown = _known(predictions, found.predictions, read_gold.records)
    problems = [*found.problems, *doubts]
    problems.sort(key=lambda problem: problem.row or 0)
    if strict and problems:
        num_more = len(problems) - 1
        more = f"; {num_more} more row{'s' if num_more > 1 else ''} to mend" if num_more else ""
        problems[0].hint = f"mend the file, or score without --strict what can be scored{more}"
        raise problems[0]
    if not usable:
        raise DataError(
            "no prediction has an id of the gold file",
            path=predictions,
            hint=f"{gold} holds ids like {read_gold.records[0].id}",
        )
    figures, verdicts = score_predictions(read_gold.records, [(row.id, row.tokens) for row in usable])
    num_unscored = Counter(found.unusable)
    if num_unknown:
        num_unscored["unknown id"] = num_unknown
    lines = [*read_gold.problems, *map(str, problems), *_remarks(gold, figures, verdicts)]
    seconds = [row.seconds for row in usable if row.seconds is not None]
    done = ScoreRun(
        figures, verdicts, lines, dict(num_unscored), seconds=sum(seconds) if len(seconds) == len(usable) else None
    )
    if csv is not None:
        write_output(csv, csv_text(verdicts))
    if json is not None:
        write_output(json, json_text(done))
    if html is not None:
        page = ScorePage(
            predictions.name,
            gold.name,
            figures,
            verdicts,
            read_gold.records,
            [row.tokens for row in usable],
            {path.name: sha256_file(path) for path in (predictions, gold)},
            done.num_unscored,
            lines,
        )
        write_output(html, render_score(page))
    return done


def json_text(done: ScoreRun) -> str:
    """All figures as JSON: num_predictions and the three official fractions first."""
    file = ScoreFile(**dict(done.score), num_unscored=dict(done.num_unscored), problems=tuple(done.problems))
    return json_module.dumps(file.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"


def csv_text(verdicts: Iterable[Verdict]) -> str:
    """One row a prediction: the fields of `Verdict`, flags as 0 and 1; unknown is empty."""
    columns = list(Verdict.model_fields)
    file = io.StringIO()
    writer = csv_module.writer(file, lineterminator="\n")
    writer.writerow(columns)
    for verdict in verdicts:
        writer.writerow([_cell(getattr(verdict, name)) for name in columns])
    return file.getvalue()


def _cell(value: object) -> object:
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, tuple):
        return " ".join(value)
    return value


def _known(
    path: Path, rows: Sequence[PredictedProgram], gold: Sequence[FinQARecord]
) -> tuple[list[PredictedProgram], list[DataError], int]:
    """Rows whose id is in the gold file, what is wrong with rows, and how many ids are not in it."""
    ids = {record.id for record in gold}
    usable: list[PredictedProgram] = []
    doubts: list[DataError] = []
    first: dict[str, int] = {}
    for row in rows:
        if row.id not in ids:
            doubts.append(
                DataError("the gold file has no such id; not scored", path=path, row=row.row, record_id=row.id)
            )
            continue
        usable.append(row)
        if row.id in first:
            why = f"the same id as row {first[row.id]}; scored again, as officially"
            doubts.append(DataError(why, path=path, row=row.row, record_id=row.id))
        first.setdefault(row.id, row.row)
    return usable, doubts, len(rows) - len(usable)


def _remarks(gold: Path, figures: Score, verdicts: Sequence[Verdict]) -> list[str]:
    lines: list[str] = []
    if number := figures.num_gold_not_comparable:
        none = "it cannot" if number == 1 else "none of them can"
        lines.append(
            f"{gold}: the gold program of {_predictions(number)} is not a valid program, so {none} be program-correct"
        )
    if number := figures.num_equality_raised:
        equal = "equals the gold program but executes" if number == 1 else "equal the gold program but execute"
        first = next(verdict.id for verdict in verdicts if verdict.equality_raised)
        lines.append(
            f"{gold}: {_predictions(number)} {equal} to another result, at which the official script stops; "
            f"counted as program-correct and execution-incorrect, first id {first}"
        )
    return lines


def _predictions(number: int) -> str:
    return f"{number} prediction{'s' if number > 1 else ''}"
