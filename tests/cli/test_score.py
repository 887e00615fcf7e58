from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from fintune.cli.score import print_score
from fintune.errors import FintuneError
from support.command import fintune
from support.scored_files import text_row, write_gold, write_rows


@pytest.fixture
def gold(tmp_path: Path) -> Path:
    return write_gold(tmp_path)


def test_score_writes_json_and_csv(tmp_path: Path, gold: Path) -> None:
    rows = [text_row("a"), {"id": "b", "program": "divide(1, 0)"}, {"id": "c", "program": ""}]
    print_score(write_rows(tmp_path, rows), gold, csv=tmp_path / "s.csv", json=tmp_path / "s.json", strict=True)
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
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gold.json", "predictions.json", "s.csv", "s.json"]


def test_score_refuses_an_output_without_folder(tmp_path: Path, gold: Path) -> None:
    with pytest.raises(FintuneError, match="its folder does not exist"):
        print_score(tmp_path / "nowhere.json", gold, json=tmp_path / "no" / "s.json")


@pytest.mark.parametrize("target", ["csv", "json", "html"])
@pytest.mark.parametrize("source", ["gold.json", "p.json"])
def test_score_refuses_to_overwrite_an_input(tmp_path: Path, gold: Path, target: str, source: str) -> None:
    path = write_rows(tmp_path, [text_row("a")])
    path.rename(tmp_path / "p.json")
    before = (tmp_path / source).read_bytes()
    with pytest.raises(FintuneError, match="is read, and would be overwritten"):
        print_score(tmp_path / "p.json", gold, **{target: tmp_path / source})
    assert (tmp_path / source).read_bytes() == before


def test_score_writes_half_a_surrogate_pair(tmp_path: Path, gold: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text('[{"id": "a", "predicted": ["add(", "\\ud800", "2", ")", "EOF"]}]')
    places = {kind: tmp_path / f"s.{kind}" for kind in ("csv", "json", "html")}
    print_score(path, gold, **places)
    assert "ud800" in places["csv"].read_text()
    assert json.loads(places["json"].read_text())["invalid_rate"] == 1
    assert "ud800" in places["html"].read_text()


def test_score_of_several_files_is_one_table(tmp_path: Path, gold: Path) -> None:
    (tmp_path / "one.json").write_text(json.dumps([text_row("a"), text_row("b"), text_row("c")]))
    (tmp_path / "two.json").write_text(
        json.dumps([text_row("a"), {"id": "b", "program": ""}, {"id": "z", "program": "x"}])
    )
    words = ["--predictions", f"good={tmp_path / 'one.json'}", "--predictions", tmp_path / "two.json"]
    done = fintune("score", *words, "--gold", gold)
    assert done.status == 0
    rows = [line.split() for line in done.out.splitlines()]
    assert (rows[1][:3], rows[2][:3]) == (["good", "3", "100.00%"], [str(tmp_path / "two.json"), "2", "50.00%"])
    assert "two.json: not scored: 1 unknown id" in done.err


def test_score_of_two_decoding_modes_shows_differences(tmp_path: Path, gold: Path) -> None:
    free = [text_row("a"), {"id": "b", "program": ""}, {"id": "c", "program": ""}]
    kept = [{**text_row(name), "seconds": 1.5} for name in "abc"]
    for name, rows in (("free", free), ("kept", kept)):
        (tmp_path / name).write_text(json.dumps(rows))
    named = {"LoRA": "free", "DoRA": "free", "LoRA+page": "kept"}
    words = [word for name, file in named.items() for word in ("--predictions", f"{name}={tmp_path / file}")]
    done = fintune("score", *words, "--gold", gold)
    assert done.status == 0
    lines = [line.split() for line in done.out.splitlines()]
    assert lines[0][:3] == ["predictions", "decoding", "n"]
    rows = [line for line in lines if line[:1] in (["LoRA"], ["DoRA"])]
    assert rows[0][:4] == ["LoRA", "plain", "3", "33.33%"]
    assert rows[0][-3:] == ["33.33%", "0.00%", "66.67%"], "program, invalid, no program; no seconds are known"
    assert rows[1][:4] == ["LoRA", "page", "3", "100.00%"]
    assert rows[1][-3:] == ["0.00%", "0.00%", "4.5"]
    assert rows[2] == ["DoRA", *rows[0][1:]]
    assert ["page", "against", "plain", "answers", "times", "the"] in lines
    assert rows[3][:3] == ["LoRA", "3", "+66.7"]
    assert rows[3][-2:] == ["2", "0"], "gained and lost; the times are not known in both ways"
    assert len(rows) == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--predictions", "x=P", "--predictions", "x=P"], "two files of predictions are called x"),
        (["--predictions", "P", "--predictions", "x=P", "--html", "p.html"], "take one file of predictions"),
        (["--predictions", "P", "--predictions", "x=no.json"], "no.json: no such file"),
    ],
)
def test_score_refuses_what_no_table_can_hold(tmp_path: Path, gold: Path, words: list[str], message: str) -> None:
    path = write_rows(tmp_path, [text_row("a")])
    done = fintune("score", *(word.replace("P", str(path)) for word in words), "--gold", gold)
    assert (done.status, done.err.count("\n")) == (2, 1)
    assert message in done.err


def test_score_escapes_formulas_and_names(tmp_path):
    name = '=HYPERLINK("http://x.test")'
    qa = {"question": "?", "program": "add(1, 2)", "exe_ans": 3.0}
    gold = [{"id": name, "pre_text": ["1 2 ."], "post_text": [], "table": [["", "a"]], "qa": qa}]
    (tmp_path / "gold.json").write_text(json.dumps(gold))
    predictions = tmp_path / "p\x1b[2J\u202e.json"
    predictions.write_text(json.dumps([{"id": name, "program": "add(1, 2)"}, {"id": "other", "program": "add(1, 2)"}]))
    words = ("score", "--predictions", predictions, "--gold", tmp_path / "gold.json", "--csv", tmp_path / "out.csv")
    done = fintune(*words, "--escape-formulas")
    assert done.status == 0
    assert not {"\x1b", "\u202e"} & {*done.out, *done.err}
    with (tmp_path / "out.csv").open(newline="") as file:
        assert [row["id"] for row in csv.DictReader(file)] == [f"'{name}"]
