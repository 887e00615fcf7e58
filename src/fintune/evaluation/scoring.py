"""Score predictions against gold records, from files or from memory, and read scores back.

`score_predictions` is the public ``fintune.score``. It needs neither a configuration nor torch.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from pydantic import ValidationError

from fintune.data.finqa_json import WITHOUT_STRICT, read_finqa
from fintune.data.predictions import PredictedProgram, PredictionFile, collect_predictions, read_predictions
from fintune.errors import ArtifactError, DataError
from fintune.evaluation.metrics import Score, compute_scores
from fintune.finqa.verdict import OfficialVerdict, Verdict
from fintune.records import FinQARecord, Prediction
from fintune.util.text import first_line

Predictions: TypeAlias = Path | str | Mapping[str, str] | Iterable[Prediction | Mapping[str, object]]
Gold: TypeAlias = Path | str | Iterable[FinQARecord | Mapping[str, object]]


class ScoreFile(Score):
    """The content of a ``score.json``: the figures, the number of rows in no figure by reason, and all problems."""

    num_unscored: dict[str, int]
    problems: tuple[str, ...]


@dataclass(frozen=True, repr=False)
class ScoreResult:
    """The score of one set of predictions.

    Attributes:
        score: All figures; see `fintune.evaluation.metrics.Score`.
        verdicts: One verdict for each scored prediction, in their order.
        problems: One line for each row that was not scored, or scored with a doubt (a duplicate id).
        num_unscored: Number of rows that are in no figure, by reason. In the whole-file figures they count as missing.
        seconds: Time of all scored completions; None unless every row has its time.
        records: The gold records.
        tokens: The official tokens of each scored prediction, in the order of ``verdicts``.
    """

    score: Score
    verdicts: Sequence[Verdict]
    problems: Sequence[str] = ()
    num_unscored: Mapping[str, int] = field(default_factory=dict)
    seconds: float | None = None
    records: Sequence[FinQARecord] = ()
    tokens: Sequence[Sequence[str]] = ()

    def __repr__(self) -> str:
        figures = ("num_predictions", "execution_accuracy", "program_accuracy", "invalid_rate")
        return f"ScoreResult({', '.join(f'{name}={getattr(self, name):.4g}' for name in figures)})"

    @property
    def num_predictions(self) -> int:
        """Number of scored predictions, the denominator of the official figures."""
        return self.score.num_predictions

    @property
    def execution_accuracy(self) -> float:
        """Fraction of the predictions that execute to exactly the gold result."""
        return self.score.execution_accuracy

    @property
    def program_accuracy(self) -> float:
        """Fraction of the predictions whose program equals the gold program."""
        return self.score.program_accuracy

    @property
    def invalid_rate(self) -> float:
        """Fraction of the predictions whose program does not run."""
        return self.score.invalid_rate

    @property
    def correct(self) -> dict[str, bool]:
        """Whether the program executes to the gold result, by id; of several predictions for an id the first counts."""
        return {verdict.id: verdict.exe_correct for verdict in reversed(self.verdicts)}

    def to_json(self) -> str:
        """Return all figures as JSON, the number of predictions and the three official fractions first."""
        file = ScoreFile(**dict(self.score), num_unscored=dict(self.num_unscored), problems=tuple(self.problems))
        return json.dumps(file.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"

    def to_csv(self, *, escape_formulas: bool = False) -> str:
        """Return one row for each prediction: the fields of `Verdict`, flags as 0 and 1, unknown values empty.

        With ``escape_formulas`` an apostrophe comes before a text that a spreadsheet would take for a formula.
        """
        columns = list(Verdict.model_fields)
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        for verdict in self.verdicts:
            cells = [_csv_cell(getattr(verdict, name)) for name in columns]
            writer.writerow([f"'{cell}" if escape_formulas and _is_formula(cell) else cell for cell in cells])
        return file.getvalue()


def score_predictions(predictions: Predictions, gold: Gold, *, strict: bool = False) -> ScoreResult:
    """Score predicted programs against FinQA records, with the official verdicts.

    Args:
        predictions: A file that `fintune.data.predictions` reads; or rows ``{"id": ..., "program": "add(1, 2)"}`` or
            ``{"id": ..., "predicted": ["add(", "1", "2", ")", "EOF"]}``; or a mapping from id to program.
        gold: A FinQA file (JSON or JSON lines, plain or gzip), or its records.
        strict: Refuse duplicate ids, unknown ids, and rows without id or program.

    Raises:
        DataError: A file cannot be read, nothing can be scored, or ``strict`` is set and a row is wrong.
    """
    gold_path = Path(gold) if isinstance(gold, str | Path) else None
    if gold_path is not None:
        read_gold = read_finqa(gold_path, strict=strict, instead=WITHOUT_STRICT)
        records, gold_problems = read_gold.records, read_gold.problems
    else:
        assert not isinstance(gold, str | Path)
        records, gold_problems = _records(gold), []
    file = _read(predictions)
    usable, doubts, num_unknown = _with_known_id(file, records)
    problems = sorted([*file.problems, *doubts], key=lambda problem: problem.row or 0)
    if strict and problems:
        num_more = len(problems) - 1
        more = f"; {num_more} more row{'s' if num_more > 1 else ''} to fix" if num_more else ""
        problems[0].hint = f"fix the row, or score the other rows without --strict{more}"
        raise problems[0]
    if not usable:
        raise DataError(
            "no prediction has an id of the gold file",
            path=file.path,
            hint=f"{gold_path or 'gold'} has ids such as {records[0].id}",
        )
    score, verdicts = compute_scores(records, [(row.id, row.tokens) for row in usable])
    num_unscored = Counter(file.unusable)
    if num_unknown:
        num_unscored["unknown id"] = num_unknown
    seconds = [row.seconds for row in usable if row.seconds is not None]
    return ScoreResult(
        score,
        verdicts,
        problems=[*gold_problems, *map(str, problems), *_remarks(gold_path or "gold", score, verdicts)],
        num_unscored=dict(num_unscored),
        seconds=sum(seconds) if len(seconds) == len(usable) else None,
        records=records,
        tokens=[row.tokens for row in usable],
    )


def read_score(path: Path) -> ScoreFile:
    """Read a ``score.json``.

    Raises:
        ArtifactError: The file is missing or has another form.
    """
    try:
        return ScoreFile.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise _unreadable(path, error) from None


def read_verdicts(path: Path) -> dict[str, OfficialVerdict]:
    """Read the verdicts of a ``score.csv``, by id.

    Raises:
        ArtifactError: The file is missing or has another form.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return {
                row["id"]: OfficialVerdict.model_validate({name: row[name] for name in OfficialVerdict.model_fields})
                for row in csv.DictReader(file)
            }
    except (OSError, ValueError, csv.Error, KeyError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> ArtifactError:
    message, hint = f"{path} cannot be read ({first_line(error)})", f"--redo score/{path.parent.name} reruns it"
    return ArtifactError(message, hint=hint)


def _read(predictions: Predictions) -> PredictionFile:
    if isinstance(predictions, str | Path):
        return read_predictions(Path(predictions))
    if isinstance(predictions, Mapping):
        return collect_predictions({"id": id_, "program": program} for id_, program in predictions.items())
    return collect_predictions(
        row.model_dump(mode="json") if isinstance(row, Prediction) else row for row in predictions
    )


def _records(gold: Iterable[FinQARecord | Mapping[str, object]]) -> list[FinQARecord]:
    records: dict[str, FinQARecord] = {}
    for row, item in enumerate(gold, start=1):
        try:
            record = item if isinstance(item, FinQARecord) else FinQARecord.model_validate(item)
        except ValidationError as error:
            raise DataError(f"no FinQA record ({first_line(error)})", row=row) from None
        if record.id in records:
            raise DataError("a second gold record with this id", row=row, record_id=record.id)
        records[record.id] = record
    if not records:
        raise DataError("there are no gold records to score against")
    return list(records.values())


def _with_known_id(
    file: PredictionFile, records: Sequence[FinQARecord]
) -> tuple[list[PredictedProgram], list[DataError], int]:
    """Return the rows whose id is in the gold file, the doubts about rows, and the number of unknown ids."""
    ids = {record.id for record in records}
    first_rows = {row.id: row.row for row in reversed(file.predictions)}
    doubts = []
    for row in file.predictions:
        doubt = ""
        if row.id not in ids:
            doubt = "the gold file has no such id; not scored"
        elif row.row != first_rows[row.id]:
            doubt = f"the same id as row {first_rows[row.id]}; scored again, as the official script does"
        if doubt:
            doubts.append(DataError(doubt, path=file.path, row=row.row, record_id=row.id))
    usable = [row for row in file.predictions if row.id in ids]
    return usable, doubts, len(file.predictions) - len(usable)


def _remarks(gold: Path | str, score: Score, verdicts: Sequence[Verdict]) -> list[str]:
    lines: list[str] = []
    if number := score.num_gold_not_comparable:
        which = "1 prediction" if number == 1 else f"{number} predictions"
        none = "it cannot" if number == 1 else "none of them can"
        lines.append(f"{gold}: the gold program of {which} is not a valid program, so {none} be program-correct")
    if raised := [verdict.id for verdict in verdicts if verdict.equality_raised]:
        who = f"{len(raised)} predictions equal the gold program but execute"
        lines.append(
            f"{gold}: {'1 prediction equals the gold program but executes' if len(raised) == 1 else who} to another "
            "result, at which the official script stops; counted as program-correct and execution-incorrect, first id "
            f"{raised[0]}"
        )
    return lines


def _is_formula(cell: object) -> bool:
    return isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r"))


def _csv_cell(value: object) -> object:
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, tuple):
        return " ".join(value)
    return value
