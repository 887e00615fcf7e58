"""Answers with a label through ``prepare``: which objective takes which of them, and what is counted."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from fintune.config.load import load
from fintune.data.prepared import read_report, read_tokens
from fintune.data.tokenize_chat import ConversationEncoder
from fintune.errors import DataError
from fintune.finqa.prompt import TooLongError
from fintune.models import chat_template as chat
from fintune.models import load as models
from fintune.pipeline.stages.prepare import prepare
from fintune.records import Example, LabelledAnswer, Message
from support.command import fintune
from support.labelled_rows import labelled_rows
from support.pair_rows import pair_rows, write_rows
from support.preference_training import data_options
from support.tiny import make_tokenizer


def options(tiny_model: Path, *sources: Path, objective: str = "kto", more: tuple[str, ...] = ()) -> list[str]:
    return data_options(tiny_model, *sources, objective=objective, more=more)


def run_prepare(tmp_path: Path, *words: str):
    (tmp_path / "c.yaml").write_text("", encoding="utf-8")
    return fintune("run", tmp_path / "c.yaml", *words, f"run.dir={tmp_path}", "--only", "prepare")


def table(path: Path, rows: list[dict[str, object]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        out = csv.DictWriter(file, list(rows[0]))
        out.writeheader()
        out.writerows(rows)
    return path


def parquet(path: Path, rows: list[dict[str, object]]) -> Path:
    from datasets import Dataset

    Dataset.from_list(rows).to_parquet(str(path))
    return path


@pytest.mark.parametrize(("name", "write"), [("r.jsonl", write_rows), ("r.csv", table), ("r.parquet", parquet)])
def test_kto_rows_have_label_and_generation_prompt(tiny_model, tmp_path, name, write):
    rows = labelled_rows(8, 4)
    labels = {row["prompt"]: row["label"] for row in rows}
    source = write(tmp_path / name, rows)
    facts = prepare(load(None, options(tiny_model, source)).config, {}, tmp_path)
    report = read_report(tmp_path)
    assert report.sources[0].shapes == {"unpaired_preference": 12}
    found = [report.train.labels, report.eval.labels]
    assert {key: sum(each[key] for each in found) for key in found[0]} == {"desired": 8, "undesired": 4}
    assert facts["num_labels"] == {"train": found[0], "eval": found[1]}
    assert f"{found[0]['desired']} desired, {found[0]['undesired']} undesired answers to train on" in facts["summary"]
    tokenizer = models.load_tokenizer(models.fetch(str(tiny_model)))
    asked = []
    for split in ("train", "eval"):
        lines = (tmp_path / f"{split}.labelled.jsonl").read_text().splitlines()
        for one, row in zip(
            map(LabelledAnswer.model_validate_json, lines), read_tokens(tmp_path, split, 99), strict=True
        ):
            encoded = chat.encode_example(tokenizer, one.messages, one.completion)
            assert (row.id, row.input_ids, row.completion_mask) == (
                one.id,
                encoded.input_ids,
                encoded.completion_mask,
            )
            assert one.label is row.label is labels[one.messages[-1].content]
            asked.append(one.messages[-1].content)
    assert sorted(asked) == sorted(labels)
    assert not list(tmp_path.glob("*.pairs.jsonl"))


def test_pairs_and_labelled_answers_are_learned_from_together(tiny_model, tmp_path):
    data = write_rows(tmp_path / "d.jsonl", [*labelled_rows(6, 2), {"prompt": "a?", "completion": "b"}])
    more = write_rows(tmp_path / "p.jsonl", [{**row, "prompt": f"second: {row['prompt']}"} for row in pair_rows(8)])
    prepare(load(None, options(tiny_model, data, more)).config, {}, tmp_path)
    report = read_report(tmp_path)
    assert [each.dropped for each in report.sources] == [{"no label (prompt_completion)": 1}, {}]
    both = [read_tokens(tmp_path, split, 99) for split in ("train", "eval")]
    kinds = [(row.label, row.rejected_ids is not None) for rows in both for row in rows]
    assert {kind: kinds.count(kind) for kind in kinds} == {(True, False): 6, (False, False): 2, (None, True): 8}
    assert report.train.labels["desired"] + report.eval.labels["desired"] == 6 + 8


def test_sft_trains_desired_answers_and_counts_others(tiny_model, tmp_path):
    data = write_rows(tmp_path / "d.jsonl", labelled_rows(9, 5))
    prepare(load(None, options(tiny_model, data, objective="sft")).config, {}, tmp_path)
    report = read_report(tmp_path)
    assert report.sources[0].dropped == {"labelled false": 5}
    assert report.train.labels == {}
    lines = [line for split in ("train", "eval") for line in (tmp_path / f"{split}.jsonl").read_text().splitlines()]
    answers = [Example.model_validate_json(line).completion for line in lines]
    assert len(answers) == 9
    assert all(answer.startswith("add(") for answer in answers)
    assert {row.label for row in read_tokens(tmp_path, "train", 99)} == {None}


@pytest.mark.parametrize("objective", ["dpo", "orpo"])
def test_pairs_from_labelled_answers_suggest_kto(tiny_model, tmp_path, objective):
    data = write_rows(tmp_path / "d.jsonl", labelled_rows(3, 3))
    done = run_prepare(tmp_path, *options(tiny_model, data, objective=objective))
    assert done.status == 2
    assert done.err.splitlines()[-1] == (
        f"fintune: {data}: no preference pair among 6 rows (no pair (unpaired_preference): 6): each of these rows is "
        "one answer with a label, not a pair; set train.objective: kto to train on them"
    )


@pytest.mark.parametrize(
    ("desired", "undesired", "objective", "told"),
    [
        (6, 0, "kto", "answers to train on are desired, and kto learns from their difference to undesired ones: add"),
        (0, 6, "kto", "answers to train on are undesired, and kto learns from their difference to desired ones: add"),
        (
            0,
            6,
            "sft",
            "no answer labelled true among 6 rows (labelled false: 6): sft trains on answers labelled true",
        ),
    ],
)
def test_labels_that_are_all_alike_are_refused_in_one_line(tiny_model, tmp_path, desired, undesired, objective, told):
    data = write_rows(tmp_path / "d.jsonl", labelled_rows(desired, undesired))
    done = run_prepare(tmp_path, *options(tiny_model, data, objective=objective))
    assert done.status == 2
    assert done.err.splitlines()[-1].startswith(f"fintune: {data}: ")
    assert told in done.err.splitlines()[-1]


def test_kto_without_labels_or_pairs_is_refused(tiny_model, tmp_path):
    data = write_rows(tmp_path / "d.jsonl", [{"prompt": f"{n}?", "completion": f"{n}"} for n in range(3)])
    with pytest.raises(DataError, match="neither a labelled answer nor a preference pair among 3 rows") as raised:
        prepare(load(None, options(tiny_model, data)).config, {}, tmp_path)
    assert "prompt, completion and label (true or false)" in str(raised.value)


def test_broken_labels_name_row_and_stop_strict_run(tiny_model, tmp_path):
    rows = labelled_rows(8, 8)
    rows[2]["label"], rows[5]["label"] = "thumbs up", None
    data = write_rows(tmp_path / "d.jsonl", rows)
    prepare(load(None, options(tiny_model, data)).config, {}, tmp_path)
    report = read_report(tmp_path)
    assert report.sources[0].dropped == {"bad label": 1, "no label": 1}
    assert report.unused_rows[0].startswith(f"{data}, row 3: label: 'thumbs up' is no label: write true for a desired")
    assert report.unused_rows[1].startswith(f"{data}, row 6: label: missing or empty: write true for a desired")
    with pytest.raises(DataError, match="row 3: label"):
        prepare(load(None, [*options(tiny_model, data), "data.strict=true"]).config, {}, tmp_path)


def test_same_answer_with_two_labels_is_kept_twice(tiny_model, tmp_path):
    rows = labelled_rows(10, 10)
    rows += [{**row, "label": not row["label"]} for row in rows[:4]] + rows[4:7]
    data = write_rows(tmp_path / "d.jsonl", rows)
    prepare(load(None, options(tiny_model, data)).config, {}, tmp_path)
    assert read_report(tmp_path).sources[0].dropped == {"exact duplicate": 3}
    held_out, trained = (
        {LabelledAnswer.model_validate_json(line).messages for line in (tmp_path / name).read_text().splitlines()}
        for name in ("eval.labelled.jsonl", "train.labelled.jsonl")
    )
    assert held_out
    assert not held_out & trained


def test_held_out_answers_that_are_all_alike_are_told(tiny_model, tmp_path):
    data = write_rows(tmp_path / "d.jsonl", labelled_rows(10, 2))
    other = write_rows(tmp_path / "e.jsonl", [{"prompt": "what now?", "completion": "hold", "label": True}])
    sources = json.dumps([{"path": str(data), "hold_out": "none"}, {"path": str(other), "hold_out": "all"}])
    prepare(load(None, [*options(tiny_model), f"data.sources={sources}"]).config, {}, tmp_path)
    notes = read_report(tmp_path).notes()
    assert "train: 10 desired, 2 undesired answers" in notes
    assert any(note.startswith("all held-out answers are desired") for note in notes)


def test_labelled_conversation_loses_oldest_turns():
    tokenizer = make_tokenizer()
    turns = [Message(role=role, content=f"{role} {n} cash") for n in range(4) for role in ("user", "assistant")]

    def encode(max_length: int):
        encoder = ConversationEncoder(tokenizer, system="You are Dana.", train_on="all", max_length=max_length)
        return encoder.encode_labelled("x", turns, label=False)

    whole = encode(1000)
    (row,) = whole.rows
    assert (whole.example.num_cut, whole.label, row.label) == (0, False, False)
    trained = [token for token, mask in zip(row.input_ids, row.completion_mask, strict=True) if mask]
    assert tokenizer.decode(trained) == "assistant 3 cash<|im_end|>"
    cut = encode(len(row.input_ids) - 1)
    assert cut.example.num_cut == 2
    assert [each.content for each in cut.example.messages[:2]] == ["You are Dana.", "user 1 cash"]
    with pytest.raises(TooLongError, match="the question and its answer"):
        encode(12)
