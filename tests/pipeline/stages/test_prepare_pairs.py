"""Preference pairs through ``prepare``: which rows are pairs, what is kept, cut, dropped and refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fintune.config.load import load
from fintune.data.prepared import read_report
from fintune.data.tokenize_chat import ConversationEncoder
from fintune.errors import ConfigError, DataError
from fintune.finqa.prompt import TooLongError
from fintune.models import chat_template as chat
from fintune.models import load as models
from fintune.pipeline.stages.prepare import prepare
from fintune.records import Message, Pair
from support.command import fintune
from support.pair_rows import pair_rows, write_rows
from support.preference_training import data_options
from support.tiny import make_tokenizer, patch_json

SFT = [{"messages": [{"role": "user", "content": f"view {n}?"}, {"role": "assistant", "content": "long"}]}
       for n in range(3)]  # fmt: skip


def options(tiny_model: Path, *sources: Path, more: tuple[str, ...] = ()) -> list[str]:
    return data_options(tiny_model, *sources, objective="dpo", more=more)


def rows_of(folder: Path, split: str):
    import datasets

    return datasets.load_from_disk(str(folder / "tokens" / split))


def test_pair_rows_have_generation_prompt(tiny_model, tmp_path):
    data = write_rows(tmp_path / "d.jsonl", pair_rows(12))
    facts = prepare(load(None, options(tiny_model, data)).config, {}, tmp_path)
    assert "eval preference pairs" in facts["summary"]
    tokenizer = models.load_tokenizer(models.fetch(str(tiny_model)))
    for split in ("train", "eval"):
        kept = [Pair.model_validate_json(line) for line in (tmp_path / f"{split}.pairs.jsonl").read_text().splitlines()]
        rows = rows_of(tmp_path, split)
        assert [pair.id for pair in kept] == rows["id"]
        for pair, row in zip(kept, rows, strict=True):
            prompt = chat.encode_prompt(tokenizer, pair.messages)
            chosen, rejected = (
                chat.encode_example(tokenizer, pair.messages, answer).input_ids
                for answer in (pair.chosen, pair.rejected)
            )
            assert row["input_ids"] == chosen
            assert row["completion_mask"] == [0] * len(prompt) + [1] * (len(chosen) - len(prompt))
            assert prompt + row["rejected_ids"] == rejected
    tokens = sum(
        len(row["input_ids"]) + row["completion_mask"].index(1) + len(row["rejected_ids"])
        for row in rows_of(tmp_path, "train")
    )
    assert facts["num_train_tokens"] == tokens


def test_rows_without_pair_are_counted_by_format(tiny_model, tmp_path):
    dpo = write_rows(tmp_path / "trader_dpo_data.jsonl", [*pair_rows(12), *SFT])
    sft = write_rows(tmp_path / "trader_sft_data.jsonl", [*SFT, {"prompt": "a?", "completion": "b"}])
    prepare(load(None, options(tiny_model, dpo, sft)).config, {}, tmp_path)
    report = read_report(tmp_path)
    assert [source.dropped for source in report.sources] == [
        {"no pair (messages)": 3},
        {"no pair (messages)": 3, "no pair (prompt_completion)": 1},
    ]
    assert report.train.num_examples + report.eval.num_examples == 12
    assert "dropped 3 no pair (messages)" in "\n".join(report.notes())


def test_data_without_a_pair_is_refused_in_one_line(tiny_model, tmp_path):
    sft = write_rows(tmp_path / "sft.jsonl", SFT)
    (tmp_path / "c.yaml").write_text("", encoding="utf-8")
    done = fintune("run", tmp_path / "c.yaml", *options(tiny_model, sft), f"run.dir={tmp_path}", "--only", "prepare")
    assert done.status == 2
    assert done.err.splitlines()[-1] == (
        f"fintune: {sft}: no preference pair among 3 rows (no pair (messages): 3): a pair has the fields prompt, "
        "chosen and rejected; set train.objective: sft to train on conversations"
    )


def test_pairs_differ_by_rejected_answer(tiny_model, tmp_path):
    rows = pair_rows(8)
    again = [{**rows[0], "rejected": "table_min(net income, none)"}, rows[1]]
    data = write_rows(tmp_path / "d.jsonl", [*rows, *again])
    prepare(load(None, options(tiny_model, data)).config, {}, tmp_path)
    report = read_report(tmp_path)
    assert report.sources[0].dropped == {"exact duplicate": 1}
    assert report.train.num_examples + report.eval.num_examples == 9


def test_pair_loses_oldest_turns_first():
    tokenizer = make_tokenizer()
    system = Message(role="system", content="You are Dana.")
    turns = [Message(role=role, content=f"{role} {n} cash") for n in range(4) for role in ("user", "assistant")]

    def encode(max_length: int):
        encoder = ConversationEncoder(tokenizer, system="", train_on="all", max_length=max_length)
        return encoder.encode_pair("x", [system, *turns], Message(role="assistant", content="sell everything now"))

    whole = encode(1000)
    assert whole.example.num_cut == 0
    assert whole.example.messages == (system, *turns[:-1])
    num_tokens = max(
        len(whole.rows[0].input_ids), whole.rows[0].completion_mask.index(1) + len(whole.rows[0].rejected_ids)
    )
    cut = encode(num_tokens - 1)
    assert cut.example.num_cut == 2
    assert cut.example.messages == (system, *turns[2:-1])
    assert (cut.example.completion, cut.rejected) == (turns[-1].content, "sell everything now")
    (row,) = cut.rows
    assert tokenizer.decode(row.rejected_ids) == "sell everything now<|im_end|>"
    alone = encode(len(chat.encode_example(tokenizer, [system, turns[-2]], "sell everything now").input_ids))
    assert alone.example.messages == (system, turns[-2])
    with pytest.raises(TooLongError):
        encode(20)


def test_a_pair_that_is_too_long_is_dropped_and_counted(tiny_model, tmp_path):
    rows = [*pair_rows(10), {"prompt": "cash?", "chosen": "yes", "rejected": "no " * 300}]
    data = write_rows(tmp_path / "d.jsonl", rows)
    prepare(load(None, [*options(tiny_model, data), "data.duplicates=off"]).config, {}, tmp_path)
    report = read_report(tmp_path)
    assert report.train.dropped.get("too long", 0) + report.eval.dropped.get("too long", 0) == 1
    assert any("d.jsonl, row 11: " in problem for problem in (*report.train.problems, *report.eval.problems))


def test_rejected_answer_with_end_token_is_dropped(tiny_model, tmp_path):
    rows = [*pair_rows(10), {"prompt": "cash?", "chosen": "yes", "rejected": "no<|im_end|>"}]
    data = write_rows(tmp_path / "d.jsonl", rows)
    with pytest.raises(DataError, match=r"d\.jsonl, row 11: rejected: the text contains <\|im_end\|>"):
        prepare(load(None, [*options(tiny_model, data), "data.strict=true"]).config, {}, tmp_path)


def test_other_objective_names_prepared_one(tiny_model, tmp_path):
    data = write_rows(tmp_path / "d.jsonl", pair_rows(12))
    (tmp_path / "c.yaml").write_text("", encoding="utf-8")
    words = ["run", tmp_path / "c.yaml", *options(tiny_model, data), f"run.dir={tmp_path}", "--only", "prepare"]
    assert fintune(*words).status == 0
    done = fintune(*words, "train.objective=sft")
    assert done.status == 2
    assert 'train.objective was "dpo" and is now "sft"' in done.err


def test_longer_answer_of_pair_must_fit_context(tiny_model, tmp_path):
    rows = pair_rows(12)
    rows[4]["rejected"] = "cash " * 60
    data = write_rows(tmp_path / "d.jsonl", rows)
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    patch_json(model / "config.json", max_position_embeddings=90)
    asked = options(model, data, more=("prompt.max_length=256",))
    with pytest.raises(ConfigError, match=r"has \d+ tokens \(id d\.jsonl:5\), but .*model reads at most 90") as told:
        prepare(load(None, asked).config, {}, tmp_path)
    assert 90 < int(str(told.value).split("has ")[1].split()[0]) < 180  # of one answer, not of both
    rows[4]["rejected"] = "cash " * 6
    write_rows(data, rows)  # two answers and the prompt twice are more than the context, each alone is not
    assert max(2 * len(row["input_ids"]) for row in prepared_rows(asked, tmp_path / "ok")) > 90


def prepared_rows(asked, folder):
    folder.mkdir()
    prepare(load(None, asked).config, {}, folder)
    return rows_of(folder, "train")


def test_conversations_have_to_fit_the_models_context(tiny_model, tmp_path):
    data = write_rows(tmp_path / "d.jsonl", SFT)
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    patch_json(model / "config.json", max_position_embeddings=16)
    asked = options(model, data, more=("train.objective=sft",))
    with pytest.raises(ConfigError, match=r"prompt\.max_length is 128 .* reads at most 16"):
        prepare(load(None, asked).config, {}, tmp_path)
