from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fintune
from fintune.errors import DataError
from fintune.evaluation.scoring import score_predictions
from fintune.records import FinQARecord, Prediction
from support.official import SHARED, needs_shared
from support.paths import ROOT
from support.scored_files import PROGRAMS, gold_row, official_row, run_row, text_row, write_gold, write_rows


@pytest.fixture
def gold(tmp_path: Path) -> Path:
    return write_gold(tmp_path)


@pytest.mark.parametrize("form", [official_row, text_row, run_row])
@pytest.mark.parametrize("lines", [False, True])
@pytest.mark.parametrize("zipped", [False, True])
def test_score_reads_every_form_of_predictions(
    tmp_path: Path, gold: Path, form: Callable[[str], dict[str, Any]], lines: bool, zipped: bool
) -> None:
    rows = [form(name) for name in PROGRAMS]
    data = ("\n".join(map(json.dumps, rows)) + "\n" if lines else json.dumps(rows)).encode()
    path = tmp_path / "anything"
    path.write_bytes(gzip.compress(data) if zipped else data)
    done = score_predictions(path, gold, strict=True)
    assert (done.score.num_predictions, done.score.execution_accuracy, done.score.program_accuracy) == (3, 1.0, 1.0)
    assert done.problems == []


@pytest.mark.parametrize(
    ("bad", "message", "reason"),
    [
        ({"id": "zzz", "program": "add(1, 2)"}, "row 2, id zzz: the gold file has no such id", "unknown id"),
        ({"id": "b"}, "row 2, id b: no program", "no program"),
        ({"id": "b", "program": None}, "row 2, id b: no program", "no program"),
        ({"id": "b", "predicted": ["add(", 1]}, "row 2, id b: 'predicted' is neither", "bad program"),
        ({"program": "add(1, 2)"}, "row 2: no id", "no id"),
        ("add(1, 2)", "row 2: not a JSON object", "not an object"),
    ],
)
def test_score_names_a_bad_row_and_scores_the_others(
    tmp_path: Path, gold: Path, bad: object, message: str, reason: str
) -> None:
    path = write_rows(tmp_path, [text_row("a"), bad, text_row("c")])
    done = score_predictions(path, gold)
    assert (done.score.num_predictions, done.score.execution_accuracy) == (2, 1.0)
    assert done.score.whole_file.execution_accuracy == 2 / 3
    assert done.num_unscored == {reason: 1}
    [problem] = done.problems
    assert problem.startswith(f"{path}, {message}")
    with pytest.raises(DataError, match=message) as caught:
        score_predictions(path, gold, strict=True)
    assert caught.value.row == 2


def test_score_counts_and_names_a_duplicate_id(tmp_path: Path, gold: Path) -> None:
    path = write_rows(tmp_path, [text_row("a"), {"id": "a", "program": "add(1, 1)"}])
    done = score_predictions(path, gold)
    assert (done.score.num_predictions, done.score.num_duplicates, done.score.execution_accuracy) == (2, 1, 0.5)
    assert done.num_unscored == {}
    assert "row 2, id a: the same id as row 1" in done.problems[0]
    with pytest.raises(DataError, match="the same id as row 1"):
        score_predictions(path, gold, strict=True)


def test_score_reads_a_truncated_list_up_to_its_end(tmp_path: Path, gold: Path) -> None:
    path = tmp_path / "cut.json"
    path.write_text(json.dumps([text_row("a"), text_row("b"), text_row("c")])[:-5])
    done = score_predictions(path, gold)
    assert done.score.num_predictions == 2
    assert done.problems == [f"{path}, row 3: truncated JSON: the list breaks off here"]
    with pytest.raises(DataError, match="row 3: truncated JSON"):
        score_predictions(path, gold, strict=True)


def test_score_names_the_row_with_a_wrong_comma(tmp_path: Path, gold: Path) -> None:
    path = tmp_path / "comma.json"
    path.write_text(f"[{json.dumps(text_row('a'))},,{json.dumps(text_row('b'))}]")
    done = score_predictions(path, gold)
    assert done.score.num_predictions == 1
    assert "row 2: not JSON" in done.problems[0]


def test_score_names_a_truncated_last_line(tmp_path: Path, gold: Path) -> None:
    path = tmp_path / "cut.jsonl"
    path.write_text(f"{json.dumps(text_row('a'))}\nno json\n{json.dumps(text_row('b'))[:-3]}")
    done = score_predictions(path, gold)
    assert done.score.num_predictions == 1
    assert "row 2: not JSON" in done.problems[0]
    assert "row 3: truncated line" in done.problems[1]


@pytest.mark.parametrize("lines", [False, True])
def test_score_reads_a_truncated_gzip_file_up_to_its_end(tmp_path: Path, gold: Path, lines: bool) -> None:
    rows = [{**text_row("a"), "noise": str(number**9)} for number in range(4000)]
    data = gzip.compress(("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows)).encode())
    path = tmp_path / "cut.gz"
    path.write_bytes(data[: len(data) // 2])
    done = score_predictions(path, gold)
    assert 1000 < done.score.num_predictions < 3000
    assert "truncated gzip file" in done.problems[-1]
    assert f"row {done.score.num_predictions + 1}: " in done.problems[-1]
    with pytest.raises(DataError):
        score_predictions(path, gold, strict=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b" \n", "the file is empty"),
        (b"[]", "there are no predictions"),
        (b"id,program\n", "neither a JSON list nor JSON lines"),
        (b'[{"id": "a"}]', "no row can be scored; the first problem: .*row 1, id a: no program"),
        (b'[{"id": "z", "program": ""}]', "no prediction has an id of the gold file"),
        (b"\x1f\x8b\x08", "truncated gzip file"),
        (b"[\xff]", "not UTF-8"),
    ],
)
def test_score_refuses_a_file_without_a_usable_row(tmp_path: Path, gold: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"bad\.json.*{message}|{message}"):
        score_predictions(path, gold)


def test_score_names_a_missing_file(tmp_path: Path, gold: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.json: no such file"):
        score_predictions(tmp_path / "nowhere.json", gold)


def test_score_strict_hint_names_the_flag(tmp_path: Path, gold: Path) -> None:
    gold.write_text(json.dumps([gold_row("a"), {"id": "b"}]))
    with pytest.raises(DataError) as caught:
        score_predictions(write_rows(tmp_path, [text_row("a")]), gold, strict=True)
    assert "leave out --strict" in str(caught.value)


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (1, "1 prediction equals the gold program but executes to another result, at which the official script stops"),
        (2, "2 predictions equal the gold program but execute to another result, at which the official script stops"),
    ],
)
def test_score_reports_an_event_of_the_official_script(tmp_path: Path, gold: Path, number: int, told: str) -> None:
    path = write_rows(tmp_path, [{"id": "a", "program": "subtract(1, 1), divide(2, #0), add(1, 2)"}] * number)
    done = score_predictions(path, gold)
    assert done.score.program_accuracy == 1.0
    assert done.score.execution_accuracy == 0.0
    expected = f"{gold}: {told}; counted as program-correct and execution-incorrect, first id a"
    assert expected in done.problems


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (1, "of 1 prediction is not a valid program, so it cannot be program-correct"),
        (2, "of 2 predictions is not a valid program, so none of them can be program-correct"),
    ],
)
def test_score_reports_a_gold_program_that_is_none(tmp_path: Path, gold: Path, number: int, told: str) -> None:
    rows = json.loads(gold.read_text())
    next(row for row in rows if row["id"] == "a")["qa"]["program"] = "add(1)"
    gold.write_text(json.dumps(rows))
    done = score_predictions(write_rows(tmp_path, [text_row("a")] * number), gold)
    assert f"{gold}: the gold program {told}" in done.problems


@needs_shared
def test_score_of_gold_is_1_without_torch_or_sympy(tmp_path: Path) -> None:
    with gzip.open(SHARED / "dev.json.gz", "rt") as file:
        rows = [{"id": record["id"], "program": record["qa"]["program"]} for record in json.load(file)]
    path = write_rows(tmp_path, rows)
    code = (
        "import sys; from pathlib import Path; from fintune.evaluation.scoring import score_predictions; "
        "done = score_predictions(Path(sys.argv[1]), Path(sys.argv[2])); "
        "assert done.score.execution_accuracy == done.score.program_accuracy == 1.0; "
        "assert done.score.num_predictions == 883; "
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'sympy'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code, str(path), str(SHARED / "dev.json.gz")], check=True)


ROWS = [text_row("a"), {"id": "b", "predicted": ["divide(", "1", "0", ")", "EOF"]}]


@pytest.mark.parametrize("as_records", [False, True])
def test_public_score_takes_rows_from_memory(as_records: bool) -> None:
    gold = [gold_row(name) for name in PROGRAMS]
    result = fintune.score(ROWS, [FinQARecord.model_validate(row) for row in gold] if as_records else gold)
    assert (result.num_predictions, result.execution_accuracy, result.program_accuracy) == (2, 0.5, 0.5)
    assert result.invalid_rate == 0.5
    assert result.correct == {"a": True, "b": False}
    assert result.score.whole_file.num_missing == 1
    assert repr(result).startswith("ScoreResult(num_predictions=2, execution_accuracy=0.5")


def test_public_score_takes_programs_by_id(gold: Path) -> None:
    result = fintune.score(PROGRAMS, str(gold))
    assert (result.num_predictions, result.execution_accuracy) == (3, 1.0)


def test_public_score_takes_predictions_of_a_run(gold: Path) -> None:
    result = fintune.score([Prediction.model_validate(run_row("a"))], gold)
    assert (result.num_predictions, result.seconds) == (1, 1.0)


@pytest.mark.parametrize(
    ("predictions", "gold_rows", "row"),
    [
        ([], [gold_row("a")], None),
        ([{"id": "z", "program": "add(1, 2)"}], [gold_row("a")], None),
        ([text_row("a")], [], None),
        ([text_row("a")], [gold_row("a"), {"id": "b"}], 2),
        ([text_row("a")], [gold_row("a"), gold_row("a")], 2),
    ],
)
def test_public_score_refuses_rows_it_cannot_score(predictions: Any, gold_rows: Any, row: int | None) -> None:
    with pytest.raises(DataError) as caught:
        fintune.score(predictions, gold_rows)
    assert caught.value.row == row


def test_public_score_needs_no_torch() -> None:
    code = "import sys, fintune; fintune.score; assert not {'torch', 'transformers', 'sympy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_package_has_no_other_public_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'scores'"):
        fintune.scores  # noqa: B018


def test_docs_example_of_rows_in_memory_runs() -> None:
    blocks = (ROOT / "docs" / "scoring.md").read_text(encoding="utf-8").split("```python\n")[1:]
    [in_memory] = [block.split("```")[0] for block in blocks if "table =" in block]
    subprocess.run([sys.executable, "-c", in_memory], check=True)
