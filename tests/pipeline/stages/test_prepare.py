from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fintune.config import Config
from fintune.config.load import load
from fintune.data.finqa_json import read_finqa
from fintune.data.prepare import page_of
from fintune.data.prepared import read_report, read_tokens
from fintune.data.report import summarize_lengths, warn_about_eval
from fintune.errors import ConfigError, DataError
from fintune.models.chat_template import encode_prompt
from fintune.models.folder import context_tokens
from fintune.models.load import fetch, load_tokenizer
from fintune.pipeline.stages.prepare import prepare
from fintune.records import Example, FinQARecord
from support.paths import ROOT
from support.tiny import patch_json

SHARED = ROOT.parent / "shared" / "finqa"


def record(record_id: str, **qa: Any) -> dict[str, Any]:
    return {
        "id": record_id,
        "pre_text": ["the company grew ."],
        "post_text": [f"note {n} says nothing of interest ." for n in range(30)],
        "table": [["", "2009", "2008"], ["revenue", "$ 12", "10"]],
        "qa": {
            "question": "what was revenue ?",
            "program": "subtract(12, 10)",
            "exe_ans": 2.0,
            "gold_inds": {"table_1": "x", "text_3": "y"},
            **qa,
        },
    }


TRAIN = [
    *(record(f"A/2009/page_{n}.pdf-1") for n in range(4)),
    record("A/2009/page_9.pdf-1", program=""),
    record("A/2009/page_9.pdf-2", question="why " * 500),
]
EVAL = [record("B/2009/page_1.pdf-1"), record("A/2009/page_1.pdf-2", program="greater(12, 10)", exe_ans="yes")]


@pytest.fixture
def config(tmp_path: Path, tiny_model: Path) -> Config:
    for name, rows in (("train", TRAIN), ("eval", EVAL)):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
    files = [f"data.{name}={tmp_path / name}.json" for name in ("train", "eval")]
    return load(None, ["data.source=finqa", *files, f"model.name={tiny_model}", "prompt.max_length=512"]).config


def test_the_folder_holds_examples_gold_and_tokens_that_agree(config: Config, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    facts = prepare(config, {}, folder)
    assert (facts["num_train"], facts["num_eval"]) == (4, 2)
    tokenizer = load_tokenizer(fetch(config.model.name))
    for split, rows in (("train", TRAIN[:4]), ("eval", EVAL)):
        lines = (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        examples = [Example.model_validate_json(line) for line in lines]
        assert [each.id for each in examples] == [row["id"] for row in rows]
        assert [each.completion for each in examples] == [row["qa"]["program"] for row in rows]
        for example, row in zip(examples, read_tokens(folder, split, 99), strict=True):
            ids, mask = row.input_ids, row.completion_mask
            assert row.id == example.id
            prompt = encode_prompt(tokenizer, example.messages)
            assert ids[: len(prompt)] == prompt
            assert mask == [0] * len(prompt) + [1] * (len(ids) - len(prompt))
            assert len(ids) <= 512
    assert read_finqa(folder / "gold.json").records == [FinQARecord.model_validate(row) for row in EVAL]


def test_the_report_counts_drops_cuts_evidence_and_shared_pages(config: Config, tmp_path: Path) -> None:
    prepare(config, {}, tmp_path)
    report = read_report(tmp_path)
    assert report.train.num_read == 5
    assert report.train.num_examples == 4
    assert report.train.dropped == {"no program": 1, "too long": 1}
    assert any("row 5, id A/2009/page_9.pdf-1" in problem for problem in report.train.problems)
    read, encoded = map(json.loads, (tmp_path / "not_used.jsonl").read_text(encoding="utf-8").splitlines())
    assert (read["file"], read["row"], read["id"]) == (str(config.data.train), 5, "A/2009/page_9.pdf-1")
    assert (encoded["file"], encoded["row"], encoded["hint"]) == (
        str(config.data.train),
        None,
        "raise prompt.max_length",
    )
    assert "not used: 2 rows in all; prepare/not_used.jsonl lists each" in "\n".join(report.notes())
    assert report.train.num_cut_examples == 4
    assert report.train.num_units == 4 * 33
    assert report.train.cleaned == {"currency": 4}
    assert report.train.evidence.num_units == 8
    assert 4 <= report.train.evidence.num_kept <= 8
    assert report.num_shared_pages == report.num_shared_questions == 1
    assert report.eval.operations["greater"] == 0.5
    assert report.eval.steps == {"1": 1.0, "2": 0.0, "3": 0.0, "4+": 0.0}
    assert "1 no program" in "\n".join(report.notes())


def test_prepare_warns_if_eval_questions_are_trained(config: Config, tmp_path: Path) -> None:
    facts = prepare(config, {}, tmp_path)
    report = read_report(tmp_path)
    assert "1 of 2 evaluation questions is also trained on" in report.eval_warning
    assert f"WARNING: {report.eval_warning}" in report.notes()
    assert facts["eval_warning"] == report.eval_warning
    assert "1,200 eval examples ask about a page" in warn_about_eval(2000, 0, 1200)
    assert warn_about_eval(2000, 0, 0) == ""


def test_prepare_says_that_a_training_record_stands_in(config: Config, tmp_path: Path) -> None:
    data = config.data.model_copy(update={"train": config.data.eval, "max_eval_samples": 1})
    facts = prepare(config.model_copy(update={"data": data}), {}, tmp_path)
    report = read_report(tmp_path)
    assert report.has_eval_stand_in
    assert report.eval_warning == ""
    assert "no evaluation set" in facts["summary"]
    assert any("one training record stands in" in note for note in report.notes())


def test_the_same_configuration_gives_the_same_bytes(config: Config, tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
        prepare(config, {}, folder)
    names = ["train.jsonl", "eval.jsonl", "gold.json", "report.json"]
    assert [(folders[0] / name).read_bytes() for name in names] == [(folders[1] / name).read_bytes() for name in names]


def test_a_length_at_which_nothing_fits_is_an_error(config: Config, tmp_path: Path) -> None:
    prompt = config.prompt.model_copy(update={"max_length": 64, "system": "word " * 100})
    with pytest.raises(DataError, match=r"none of 5 train records.*raise prompt\.max_length"):
        prepare(config.model_copy(update={"prompt": prompt}), {}, tmp_path)


def test_strict_stops_at_the_first_broken_record(config: Config, tmp_path: Path) -> None:
    data = config.data.model_copy(update={"strict": True})
    with pytest.raises(DataError, match=r"row 5, id A/2009/page_9\.pdf-1"):
        prepare(config.model_copy(update={"data": data}), {}, tmp_path)


def test_lengths_are_summed_up_in_bins_that_hold_them_all() -> None:
    found = summarize_lengths([5, 7, 100, 130])
    assert (found.p50, found.max, found.total) == (7, 130, 242)
    assert sum(number for _, _, number in found.histogram) == 4
    assert found.histogram[0] == (0, 20, 2)
    assert summarize_lengths([3]).histogram == ((3, 4, 1),)


def test_a_page_is_the_id_without_the_question() -> None:
    (row,) = [copy.deepcopy(TRAIN[0])]
    assert page_of(FinQARecord.model_validate(row)) == "A/2009/page_0.pdf"


def test_prepare_imports_no_torch_or_transformers() -> None:
    heavy = "{'torch', 'transformers', 'datasets'} & set(sys.modules)"
    code = f"import sys, fintune.pipeline.stages.prepare, fintune.cli.inspect; sys.exit(bool({heavy}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.skipif(not SHARED.is_dir(), reason="no FinQA files beside the repository")
def test_real_records_are_prepared_with_their_evidence(config: Config, tmp_path: Path) -> None:
    data = config.data.model_copy(
        update={
            "train": SHARED / "train.json.gz",
            "eval": SHARED / "dev.json.gz",
            "max_train_samples": 20,
            "max_eval_samples": 20,
        }
    )
    prompt = config.prompt.model_copy(update={"max_length": 2048})
    prepare(config.model_copy(update={"data": data, "prompt": prompt}), {}, tmp_path)
    report = read_report(tmp_path)
    assert (report.train.num_examples, report.eval.num_examples) == (20, 20)
    assert report.num_shared_pages == 0
    assert report.eval.evidence.num_kept / report.eval.evidence.num_units > 0.9
    counts = list(report.train.cleaned.values())
    assert counts == sorted(counts, reverse=True)
    assert {"percentage", "negative", "apostrophe", "lone stop"} <= set(report.train.cleaned)


def short_sighted(model: Path, folder: Path, context: int, **config: Any) -> Path:
    """The same model with another length of its context."""
    import shutil

    copy = Path(shutil.copytree(model, folder))
    patch_json(copy / "config.json", max_position_embeddings=context, **config)
    return copy


def test_prepare_refuses_rows_beyond_model_context(config: Config, tiny_model: Path, tmp_path: Path) -> None:
    model = short_sighted(tiny_model, tmp_path / "model", 200)
    asked = config.model_copy(update={"model": config.model.model_copy(update={"name": str(model)})})
    folder = tmp_path / "out"
    folder.mkdir()
    with pytest.raises(
        ConfigError, match=r"prompt\.max_length is 512 and the longest row has \d+ tokens \(id "
    ) as told:
        prepare(asked, {}, folder)
    assert str(told.value).endswith("model reads at most 200: set prompt.max_length to 200 or less")
    assert list(folder.iterdir()) == []
    fits = asked.model_copy(update={"prompt": asked.prompt.model_copy(update={"max_length": 200})})
    assert prepare(fits, {}, folder)["num_train"] == 4


@pytest.mark.parametrize(
    ("config", "context"),
    [
        ({"max_position_embeddings": 2048}, 2048),
        ({}, None),
        ({"text_config": {"max_position_embeddings": 77}}, 77),
        ({"max_position_embeddings": 300, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, 300),
        # As in the files of Qwen2.5 with YaRN, and of Llama 3.1.
        (
            {
                "max_position_embeddings": 32768,
                "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
            },
            131072,
        ),
        (
            {
                "max_position_embeddings": 131072,
                "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192},
            },
            131072,
        ),
    ],
)
def test_the_context_is_the_stretched_one(config: dict[str, Any], context: int | None) -> None:
    assert context_tokens(config) == context
