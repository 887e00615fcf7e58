"""Trader data and Investopedia rows through the stage: folder, report, notes, summary, and training on it."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from fintune.config.load import load
from fintune.data.prepared import read_report, read_tokens
from fintune.errors import DataError
from fintune.pipeline.stages.prepare import prepare
from fintune.pipeline.steps import build_steps
from fintune.records import Example, Pair
from support.command import fintune

PERSONA = "You are Dana, a trader."


def trader_data(folder: Path) -> Path:
    """Generated rows in the shapes of the trader sets and of Investopedia's table."""
    folder.mkdir()
    sft = [
        {
            "messages": [
                {"role": "system", "content": PERSONA},
                {"role": "user", "content": f"view on rates in week {n}?"},
                {"role": "assistant", "content": f"long {n} lots"},
                {"role": "user", "content": "and the stop?"},
                {"role": "assistant", "content": f"{n} points lower"},
            ]
        }
        for n in range(12)
    ]
    dpo = [{"prompt": f"size trade {n}?", "chosen": f"risk {n} bp", "rejected": "all in"} for n in range(8)]
    for name, rows in (("trader_sft_data", sft), ("trader_dpo_data", [*dpo, {"prompt": "x", "chosen": ""}])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with (folder / "investopedia.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["Topic", "Title", "Context", "Question", "Answer"])
        table.writerows(["Bonds", "Yield", f"page {n}", f"what is {n}?", f"it is {n}"] for n in range(10))
    return folder


@pytest.fixture
def options(tmp_path, tiny_model) -> list[str]:
    data = trader_data(tmp_path / "data")
    sources = [
        {"path": str(data / "trader_*.jsonl"), "license": "MIT"},
        {"path": str(data / "investopedia.csv"), "license": "CC-BY-NC-4.0"},
    ]
    return [
        "data.source=chat",
        f"data.sources={json.dumps(sources)}",
        "data.eval_share=0.2",
        "prompt.max_length=256",
        f"model.name={tiny_model}",
        f"run.dir={tmp_path / 'runs'}",
    ]


def test_prepared_chat_folder_has_all_formats(options, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    facts = prepare(load(None, options).config, {}, folder)
    assert facts["num_train"] + facts["num_eval"] == 30
    made = {
        name: [Example.model_validate_json(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "eval")
    }
    for name, examples in made.items():
        rows = read_tokens(folder, name, 99)
        assert [row.id for row in rows] == [example.id for example in examples]
        assert all(sum(row.completion_mask) > 0 for row in rows)
        assert all(len(row.input_ids) == len(row.completion_mask) for row in rows)
    pairs = [
        Pair.model_validate_json(line)
        for path in sorted(folder.glob("*.pairs.jsonl"))
        for line in path.read_text().splitlines()
    ]
    assert len(pairs) == 8
    assert {pair.rejected for pair in pairs} == {"all in"}
    assert json.loads((folder / "gold.json").read_text()) == []
    assert any(example.messages[-1].content.startswith("Context: page") for example in made["train"])


def test_report_names_formats_drops_and_licence(options, tmp_path):
    facts = prepare(load(None, options).config, {}, tmp_path)
    csv_path = tmp_path / "data" / "investopedia.csv"
    assert f"not for commercial use: {csv_path} (CC-BY-NC-4.0)" in facts["summary"]
    assert sorted(facts["licences"].values()) == ["CC-BY-NC-4.0", "MIT"]
    report = read_report(tmp_path)
    assert report.kind == "chat"
    assert [source.shapes for source in report.sources] == [{"messages": 12, "preference": 8}, {"question_answer": 10}]
    notes = "\n".join(report.notes())
    assert "21 rows: 12 messages, 8 preference; dropped 1" in notes
    assert "trader_dpo_data.jsonl, row 9: " in notes


def test_long_conversations_are_cut_and_counted(options, tmp_path):
    whole = load(None, options).config
    prepare(whole, {}, tmp_path)
    longest = read_report(tmp_path).train.prompt_tokens.max
    again = tmp_path / "again"
    again.mkdir()
    prepare(load(None, [*options, f"prompt.max_length={max(longest - 5, 64)}"]).config, {}, again)
    assert read_report(again).train.num_cut_examples > 0
    assert "conversations cut to fit" in "\n".join(read_report(again).notes())


def test_prepare_holds_out_next_if_first_is_too_long(tiny_model, tmp_path):
    rows = [{"question": f"what is {n} ?", "answer": f"it is {n}"} for n in range(6)]
    file, folder = tmp_path / "rows.jsonl", tmp_path / "out"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options = ["data.source=chat", f"data.sources={json.dumps([{'path': str(file)}])}", f"model.name={tiny_model}"]
    config = load(None, options).config
    folder.mkdir()
    prepare(config, {}, folder)
    held = Example.model_validate_json((folder / "eval.jsonl").read_text(encoding="utf-8")).messages[-1].content
    for row in rows:
        row["answer"] *= 5_000 if row["question"] == held else 1
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    again = tmp_path / "again"
    again.mkdir()
    prepare(config, {}, again)
    report = read_report(again)
    assert (report.train.num_examples, report.eval.num_examples) == (4, 1)
    assert (report.train.dropped, report.eval.dropped) == ({}, {"too long": 1})
    with pytest.raises(DataError, match="the first answer ends after token"):
        prepare(load(None, [*options, "data.strict=true"]).config, {}, again)


def test_nothing_is_predicted_or_scored_without_gold(options):
    names = [step.name for step in build_steps(load(None, options).config)]
    assert names == ["preflight", "prepare", "train", "guard", "merge", "export", "replay", "report"]


def test_chat_run_trains_reports_and_is_up_to_date(options, tmp_path):
    (tmp_path / "c.yaml").write_text(
        "train: {max_steps: 2, per_device_train_batch_size: 2, eval_steps: 1}\n", encoding="utf-8"
    )
    skip = ["--skip", "merge", "--skip", "export"]
    done = fintune("run", tmp_path / "c.yaml", *options, *skip)
    assert done.status == 0, done.err
    lines = [json.loads(line) for line in (tmp_path / "runs/c/train/metrics.jsonl").read_text().splitlines()]
    assert any("eval_loss" in line for line in lines)
    assert "investopedia.csv" in (tmp_path / "runs/c/report/index.html").read_text()
    before = (tmp_path / "runs/c/train/manifest.json").read_bytes()
    assert fintune("run", tmp_path / "c.yaml", *options, *skip).status == 0
    assert (tmp_path / "runs/c/train/manifest.json").read_bytes() == before
    with (tmp_path / "data" / "trader_sft_data.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"prompt": "new?", "completion": "yes"}\n')
    changed = fintune("run", tmp_path / "c.yaml", *options, *skip)
    assert changed.status == 2


def test_inspect_shows_a_conversation_with_its_trained_turns(options, tmp_path):
    (tmp_path / "c.yaml").write_text("", encoding="utf-8")
    done = fintune("inspect", tmp_path / "c.yaml", *options, "--examples", 1)
    assert done.status == 0, done.err
    assert "long" in done.out
    assert "FinQA test" not in done.out


def test_strict_stops_run_at_first_row_with_hint(options, tmp_path):
    (tmp_path / "c.yaml").write_text("", encoding="utf-8")
    for verb in ("run", "prepare"):
        done = fintune(verb, tmp_path / "c.yaml", *options, "--strict")
        assert done.status == 2
        assert "trader_dpo_data.jsonl, row 9: " in done.err
        assert "leave out --strict" in done.err
    assert not (tmp_path / "runs" / "c" / "prepare").exists()


def broken_rows(tmp_path, tiny_model, *, num_empty: int = 30) -> list[str]:
    """Options for ten good rows, so many without an answer, and three that cannot be encoded."""
    rows = [{"question": f"what is {n} ?", "answer": f"it is {n}"} for n in range(10)]
    rows += [{"question": f"and {n} ?", "answer": ""} for n in range(num_empty)]
    rows += [{"title": "cash", "question": "cash ?", "answer": "yes<|im_end|>"}]
    rows += [{"messages": [{"role": "user", "content": "debt ?<|im_end|>"}, {"role": "assistant", "content": "no"}]}]
    rows += [{"question": "loss ?", "answer": "no " * 5_000}]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    entry = {"path": str(file), "hold_out": "none", "weight": 2}
    (tmp_path / "eval.jsonl").write_text('{"question": "rate ?", "answer": "3"}\n', encoding="utf-8")
    sources = json.dumps([entry, {"path": str(tmp_path / "eval.jsonl"), "hold_out": "all"}])
    return ["data.source=chat", f"data.sources={sources}", f"model.name={tiny_model}", f"run.dir={tmp_path}"]


def test_not_used_lists_row_field_and_hint(tmp_path, tiny_model):
    (tmp_path / "c.yaml").write_text("", encoding="utf-8")
    options = broken_rows(tmp_path, tiny_model)
    done = fintune("prepare", tmp_path / "c.yaml", *options)
    assert done.status == 0, done.err
    listed = [json.loads(line) for line in (tmp_path / "c/prepare/not_used.jsonl").read_text("utf-8").splitlines()]
    assert [row["row"] for row in listed] == list(range(11, 44)), "each once, also where a weight repeats it"
    assert {row["file"] for row in listed} == {str(tmp_path / "rows.jsonl")}
    assert [row["field"] for row in listed] == ["answer"] * 31 + ["messages[0].content", ""]
    assert listed[0]["reason"] == "missing or empty"
    assert {row["hint"] for row in listed[-3:]} == {"remove it from the data", "raise prompt.max_length"}
    assert "not used: 33 rows in all; prepare/not_used.jsonl lists each" in done.err
    told = f"{tmp_path / 'rows.jsonl'}, row 41: answer: the text contains <|im_end|>, a special token of the model"
    assert f"not used: {told}: remove it from the data" in done.err
    assert "dropped 30 no answer, 2 special token" in done.err
    assert "train: dropped 2 too long; the first: " in done.err
    done = fintune("inspect", tmp_path / "c.yaml", *options, "--html", tmp_path / "page.html")
    assert "12 more" in done.out
    assert "12 more" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_nothing_is_listed_where_all_was_used(options, tmp_path):
    config = load(None, [*options, f"data.sources=[{{path: {tmp_path / 'data' / 'investopedia.csv'}}}]"]).config
    prepare(config, {}, tmp_path)
    assert not (tmp_path / "not_used.jsonl").exists()
    assert "in all" not in "\n".join(read_report(tmp_path).notes())


def test_end_token_stops_strict_run_with_row_and_hint(tmp_path, tiny_model):
    options = broken_rows(tmp_path, tiny_model, num_empty=0)
    with pytest.raises(DataError) as caught:
        prepare(load(None, [*options, "data.strict=true"]).config, {}, tmp_path)
    assert f"{tmp_path / 'rows.jsonl'}, row 11: answer: the text contains <|im_end|>" in str(caught.value)
    assert "leave out --strict" in str(caught.value)
