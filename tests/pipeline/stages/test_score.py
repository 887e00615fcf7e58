import csv
import gzip
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fintune.config import Config
from fintune.errors import DataError, FintuneError
from fintune.pipeline.stages.score import score, score_files
from fintune.records import Prediction
from support.command import fintune
from support.paths import ROOT

SHARED = ROOT.parent / "shared" / "finqa"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/finqa beside the repository")

PROGRAMS = {"a": "add(1, 2)", "b": "divide(1, 4)", "c": "greater(1, 2)"}
ANSWERS: dict[str, float | str] = {"a": 3.0, "b": 0.25, "c": "no"}


@pytest.fixture
def gold(tmp_path: Path) -> Path:
    path = tmp_path / "gold.json"
    path.write_text(json.dumps([_gold(name) for name in PROGRAMS]))
    return path


def _gold(name: str) -> dict[str, Any]:
    qa = {"question": "what?", "program": PROGRAMS[name], "exe_ans": ANSWERS[name]}
    return {"id": name, "pre_text": ["x"], "post_text": [], "table": [["", "y"], ["r", "1"]], "qa": qa}


def _official(name: str) -> dict[str, Any]:
    operation, arguments = PROGRAMS[name][:-1].split("(")
    return {"id": name, "predicted": [f"{operation}(", *arguments.split(", "), ")", "EOF"]}


def _text(name: str) -> dict[str, Any]:
    return {"id": name, "program": PROGRAMS[name]}


def _ours(name: str) -> dict[str, Any]:
    program = PROGRAMS[name]
    return Prediction(
        id=name, text=program, program=program, finish_reason="stop", seconds=1, num_prompt_tokens=9
    ).model_dump(mode="json")


@pytest.mark.parametrize("form", [_official, _text, _ours])
@pytest.mark.parametrize("lines", [False, True])
@pytest.mark.parametrize("zipped", [False, True])
def test_every_form_of_predictions_is_read(
    tmp_path: Path, gold: Path, form: Callable[[str], dict[str, Any]], lines: bool, zipped: bool
) -> None:
    rows = [form(name) for name in PROGRAMS]
    data = ("\n".join(map(json.dumps, rows)) + "\n" if lines else json.dumps(rows)).encode()
    path = tmp_path / "anything"
    path.write_bytes(gzip.compress(data) if zipped else data)
    done = score_files(path, gold, csv=None, json=None, strict=True)
    assert (done.score.num_predictions, done.score.execution_accuracy, done.score.program_accuracy) == (3, 1.0, 1.0)
    assert done.problems == []


def _predictions(tmp_path: Path, rows: list[Any]) -> Path:
    path = tmp_path / "predictions.json"
    path.write_text(json.dumps(rows))
    return path


def test_the_json_starts_with_the_headline_and_the_csv_has_a_row_a_prediction(tmp_path: Path, gold: Path) -> None:
    rows = [_text("a"), {"id": "b", "program": "divide(1, 0)"}, {"id": "c", "program": ""}]
    done = score_files(
        _predictions(tmp_path, rows), gold, csv=tmp_path / "s.csv", json=tmp_path / "s.json", strict=True
    )
    figures = json.loads((tmp_path / "s.json").read_text())
    assert list(figures)[:4] == ["num_predictions", "execution_accuracy", "program_accuracy", "invalid_rate"]
    assert [figures[name] for name in list(figures)[:4]] == [3, 1 / 3, 1 / 3, 1 / 3]
    assert figures["whole_file"]["num_gold"] == 3
    with (tmp_path / "s.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    assert list(written[0])[:5] == ["id", "exe_correct", "program_correct", "invalid", "result"]
    assert [list(row.values())[:5] for row in written] == [
        ["a", "1", "1", "0", "3.0"],
        ["b", "0", "0", "1", "n/a"],
        ["c", "0", "0", "0", "n/a"],
    ]
    assert len(done.verdicts) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gold.json", "predictions.json", "s.csv", "s.json"]


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
def test_a_bad_row_is_named_and_the_rest_is_scored_unless_strict(
    tmp_path: Path, gold: Path, bad: object, message: str, reason: str
) -> None:
    path = _predictions(tmp_path, [_text("a"), bad, _text("c")])
    done = score_files(path, gold)
    assert (done.score.num_predictions, done.score.execution_accuracy) == (2, 1.0)
    assert done.score.whole_file.execution_accuracy == 2 / 3
    assert done.num_unscored == {reason: 1}
    [problem] = done.problems
    assert problem.startswith(f"{path}, {message}")
    with pytest.raises(DataError, match=message) as caught:
        score_files(path, gold, strict=True)
    assert caught.value.row == 2


def test_a_second_prediction_for_an_id_is_scored_and_named_unless_strict(tmp_path: Path, gold: Path) -> None:
    path = _predictions(tmp_path, [_text("a"), {"id": "a", "program": "add(1, 1)"}])
    done = score_files(path, gold)
    assert (done.score.num_predictions, done.score.num_duplicates, done.score.execution_accuracy) == (2, 1, 0.5)
    assert done.num_unscored == {}
    assert "row 2, id a: the same id as row 1" in done.problems[0]
    with pytest.raises(DataError, match="the same id as row 1"):
        score_files(path, gold, strict=True)


def test_a_truncated_list_is_scored_up_to_where_it_breaks_off(tmp_path: Path, gold: Path) -> None:
    path = tmp_path / "cut.json"
    path.write_text(json.dumps([_text("a"), _text("b"), _text("c")])[:-5])
    done = score_files(path, gold)
    assert done.score.num_predictions == 2
    assert done.problems == [f"{path}, row 3: truncated JSON: the list breaks off here"]
    with pytest.raises(DataError, match="row 3: truncated JSON"):
        score_files(path, gold, strict=True)


def test_a_list_with_a_wrong_comma_is_no_clean_file(tmp_path: Path, gold: Path) -> None:
    path = tmp_path / "comma.json"
    path.write_text(f"[{json.dumps(_text('a'))},,{json.dumps(_text('b'))}]")
    done = score_files(path, gold)
    assert done.score.num_predictions == 1
    assert "row 2: not JSON" in done.problems[0]


def test_a_truncated_last_line_is_named(tmp_path: Path, gold: Path) -> None:
    path = tmp_path / "cut.jsonl"
    path.write_text(f"{json.dumps(_text('a'))}\nno json\n{json.dumps(_text('b'))[:-3]}")
    done = score_files(path, gold)
    assert done.score.num_predictions == 1
    assert "row 2: not JSON" in done.problems[0]
    assert "row 3: truncated line" in done.problems[1]


@pytest.mark.parametrize("lines", [False, True])
def test_a_truncated_gzip_file_is_scored_up_to_where_it_breaks_off(tmp_path: Path, gold: Path, lines: bool) -> None:
    rows = [{**_text("a"), "noise": str(number**9)} for number in range(4000)]
    data = gzip.compress(("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows)).encode())
    path = tmp_path / "cut.gz"
    path.write_bytes(data[: len(data) // 2])
    done = score_files(path, gold)
    assert 1000 < done.score.num_predictions < 3000
    assert "truncated gzip file" in done.problems[-1]
    assert f"row {done.score.num_predictions + 1}: " in done.problems[-1]
    with pytest.raises(DataError):
        score_files(path, gold, strict=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b" \n", "the file is empty"),
        (b"[]", "holds no predictions"),
        (b"id,program\n", "neither a JSON list nor JSON lines"),
        (b'[{"id": "a"}]', "no row can be scored; the first problem: .*row 1, id a: no program"),
        (b'[{"id": "z", "program": ""}]', "no prediction has an id of the gold file"),
        (b"\x1f\x8b\x08", "truncated gzip file"),
        (b"[\xff]", "not UTF-8"),
    ],
)
def test_a_file_without_a_usable_row_is_refused_with_its_name(
    tmp_path: Path, gold: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"bad\.json.*{message}|{message}"):
        score_files(path, gold)


def test_a_missing_file_is_named(tmp_path: Path, gold: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.json: no such file"):
        score_files(tmp_path / "nowhere.json", gold)


def test_a_target_without_folder_is_refused_before_any_work(tmp_path: Path, gold: Path) -> None:
    with pytest.raises(FintuneError, match="its folder does not exist"):
        score_files(tmp_path / "nowhere.json", gold, json=tmp_path / "no" / "s.json")


@pytest.mark.parametrize("target", ["csv", "json", "html"])
@pytest.mark.parametrize("source", ["gold.json", "p.json"])
def test_no_file_that_is_read_is_overwritten(tmp_path: Path, gold: Path, target: str, source: str) -> None:
    path = _predictions(tmp_path, [_text("a")])
    path.rename(tmp_path / "p.json")
    before = (tmp_path / source).read_bytes()
    with pytest.raises(FintuneError, match="is read, and would be overwritten"):
        score_files(tmp_path / "p.json", gold, **{target: tmp_path / source})
    assert (tmp_path / source).read_bytes() == before


def test_half_a_surrogate_pair_in_a_prediction_is_no_obstacle(tmp_path: Path, gold: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text('[{"id": "a", "predicted": ["add(", "\\ud800", "2", ")", "EOF"]}]')
    places = {kind: tmp_path / f"s.{kind}" for kind in ("csv", "json", "html")}
    done = score_files(path, gold, **places)
    assert done.score.invalid_rate == 1
    assert "ud800" in places["csv"].read_text()
    assert json.loads(places["json"].read_text())["num_predictions"] == 1
    assert "ud800" in places["html"].read_text()


def test_strict_names_the_way_out_that_the_command_has(tmp_path: Path, gold: Path) -> None:
    gold.write_text(json.dumps([_gold("a"), {"id": "b"}]))
    with pytest.raises(DataError) as caught:
        score_files(_predictions(tmp_path, [_text("a")]), gold, strict=True)
    assert "leave out --strict" in str(caught.value)


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (1, "1 prediction equals the gold program but executes to another result, at which the official script stops"),
        (2, "2 predictions equal the gold program but execute to another result, at which the official script stops"),
    ],
)
def test_an_event_of_the_official_script_is_told(tmp_path: Path, gold: Path, number: int, told: str) -> None:
    path = _predictions(tmp_path, [{"id": "a", "program": "subtract(1, 1), divide(2, #0), add(1, 2)"}] * number)
    done = score_files(path, gold)
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
def test_a_gold_program_that_is_none_is_told(tmp_path: Path, gold: Path, number: int, told: str) -> None:
    rows = json.loads(gold.read_text())
    next(row for row in rows if row["id"] == "a")["qa"]["program"] = "add(1)"
    gold.write_text(json.dumps(rows))
    done = score_files(_predictions(tmp_path, [_text("a")] * number), gold)
    assert f"{gold}: the gold program {told}" in done.problems


def test_as_a_step_it_reads_the_run_and_writes_both_files(tmp_path: Path, gold: Path) -> None:
    folder = tmp_path / "score"
    folder.mkdir()
    (tmp_path / "predictions.jsonl").write_text("".join(json.dumps(_ours(name)) + "\n" for name in PROGRAMS))
    facts = score(Config(), {"prepare": tmp_path, "predict/base": tmp_path}, folder, kind="base")
    assert (facts["num_predictions"], facts["execution_accuracy"]) == (3, 1.0)
    assert sorted(path.name for path in folder.iterdir()) == ["score.csv", "score.json"]


@needs_shared
def test_gold_as_predictions_scores_all_without_torch_or_sympy(tmp_path: Path) -> None:
    with gzip.open(SHARED / "dev.json.gz", "rt") as file:
        rows = [{"id": record["id"], "program": record["qa"]["program"]} for record in json.load(file)]
    path = _predictions(tmp_path, rows)
    code = (
        "import sys; from pathlib import Path; from fintune.pipeline.stages.score import score_files; "
        "done = score_files(Path(sys.argv[1]), Path(sys.argv[2])); "
        "assert done.score.execution_accuracy == done.score.program_accuracy == 1.0; "
        "assert done.score.num_predictions == 883; "
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'sympy'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code, str(path), str(SHARED / "dev.json.gz")], check=True)


def test_several_files_of_predictions_give_one_table_a_row_each(tmp_path: Path, gold: Path) -> None:
    (tmp_path / "one.json").write_text(json.dumps([_text("a"), _text("b"), _text("c")]))
    (tmp_path / "two.json").write_text(
        json.dumps([_text("a"), {"id": "b", "program": ""}, {"id": "z", "program": "x"}])
    )
    words = ["--predictions", f"good={tmp_path / 'one.json'}", "--predictions", tmp_path / "two.json"]
    done = fintune("score", *words, "--gold", gold)
    assert done.status == 0
    rows = [line.split() for line in done.out.splitlines()]
    assert (rows[1][:3], rows[2][:3]) == (["good", "3", "100.00%"], [str(tmp_path / "two.json"), "2", "50.00%"])
    assert "two.json: not scored: 1 unknown id" in done.err


def test_files_named_as_the_ways_of_a_kind_stand_in_column_groups(tmp_path: Path, gold: Path) -> None:
    free = [_text("a"), {"id": "b", "program": ""}, {"id": "c", "program": ""}]
    kept = [{**_text(name), "seconds": 1.5} for name in "abc"]
    for name, rows in (("free", free), ("kept", kept)):
        (tmp_path / name).write_text(json.dumps(rows))
    named = {"LoRA": "free", "DoRA": "free", "LoRA+example": "kept"}
    words = [word for name, file in named.items() for word in ("--predictions", f"{name}={tmp_path / file}")]
    done = fintune("score", *words, "--gold", gold)
    assert done.status == 0
    lines = [line.split() for line in done.out.splitlines()]
    assert lines[0] == ["plain", "example"]
    rows = [line for line in lines if line[:1] in (["LoRA"], ["DoRA"])]
    assert rows[0][:3] == ["LoRA", "3", "33.33%"]
    assert rows[0][-6:] == ["43.9", "to", "100.0%", "100.00%", "0.00%", "4.5"]
    assert rows[0][7:12] == ["0.00%", "+", "66.67%", "no", "program"]
    assert rows[1] == ["DoRA", "3", *rows[0][2:12]], "no column of a way that was not measured"
    assert ["example", "against", "plain", "answers", "times", "the"] in lines
    assert rows[2][:3] == ["LoRA", "3", "+66.7"]
    assert rows[2][-2:] == ["2", "0"], "gained and lost; the times are not known in both ways"
    assert len(rows) == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--predictions", "x=P", "--predictions", "x=P"], "two files of predictions are called x"),
        (["--predictions", "P", "--predictions", "x=P", "--html", "p.html"], "are of one file of predictions"),
        (["--predictions", "P", "--predictions", "x=no.json"], "no.json: no such file"),
    ],
)
def test_several_files_that_cannot_stand_in_one_table_are_one_line(
    tmp_path: Path, gold: Path, words: list[str], message: str
) -> None:
    path = _predictions(tmp_path, [_text("a")])
    done = fintune("score", *(word.replace("P", str(path)) for word in words), "--gold", gold)
    assert (done.status, done.err.count("\n")) == (2, 1)
    assert message in done.err


def test_the_line_of_the_stage_tells_completions_without_a_program(tmp_path: Path, gold: Path) -> None:
    for name in ("predict", "prepare", "score"):
        (tmp_path / name).mkdir()
    shutil.copy(gold, tmp_path / "prepare" / "gold.json")
    rows = [_text("a"), {"id": "b", "program": ""}, {"id": "c", "program": ""}]
    (tmp_path / "predict" / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    inputs = {"predict/base": tmp_path / "predict", "prepare": tmp_path / "prepare"}
    facts = score(Config(), inputs, tmp_path / "score", kind="base")
    assert facts["summary"].endswith(", invalid 0.00%, no program 66.67% of 3")
