"""KTO on answers without a partner: what it learns and leaves alone, how labels weigh, resumed runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fintune.config import Config
from fintune.data.prepared import read_tokens
from fintune.errors import ConfigError
from fintune.models import chat_template as chat
from fintune.models import load as models
from fintune.pipeline.stages.prepare import prepare
from fintune.pipeline.stages.train import train
from fintune.records import LabelledAnswer
from support.labelled_rows import labelled_rows
from support.pair_rows import pair_rows, write_rows
from support.preference_training import check_that_an_interrupted_run_equals_the_uninterrupted_one, lines, training

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("answers") / "feedback.jsonl", labelled_rows(12, 36))


def options(model: Path, data: Path, *more: str) -> Config:
    return training(model, data, "kto", *more)


@pytest.fixture(scope="module")
def answers(data, tiny_model, tmp_path_factory) -> Path:
    """Prepared answers; look, do not touch."""
    folder = tmp_path_factory.mktemp("prepare")
    prepare(options(tiny_model, data), {}, folder)
    return folder


def logp(model, tokenizer, one: LabelledAnswer) -> float:
    """Log-probability of an answer, by a plain forward pass."""
    encoded = chat.encode_example(tokenizer, one.messages, one.completion)
    with torch.no_grad():
        scores = model(torch.tensor([encoded.input_ids])).logits[0, :-1].log_softmax(-1)
    taken = scores.gather(1, torch.tensor(encoded.input_ids[1:])[:, None])[:, 0]
    return float(taken[torch.tensor(encoded.completion_mask[1:]) == 1].sum())


def test_kto_figures_are_those_of_the_saved_adapter(tiny_model, data, answers, tmp_path, capsys):
    from peft import PeftModel

    from fintune.util.console import quiet_libraries

    facts = train(options(tiny_model, data, "train.eval_steps=6"), {"prepare": answers}, tmp_path)
    trained = [row.label for row in read_tokens(answers, "train", 99)]
    ratio = trained.count(False) / trained.count(True)
    assert (facts["num_desired"], facts["num_undesired"]) == (trained.count(True), trained.count(False))
    assert (facts["desirable_weight"], facts["undesirable_weight"]) == (pytest.approx(ratio, rel=1e-5), 1.0)
    assert "undesired answers of weight 1, together 1.00 to 1" in capsys.readouterr().err

    held_out = [
        LabelledAnswer.model_validate_json(line) for line in (answers / "eval.labelled.jsonl").read_text().splitlines()
    ]
    ref = models.fetch(str(tiny_model))
    tokenizer, base = models.load_tokenizer(ref), models.load_model(ref, dtype="float32", device="cpu")
    before = [logp(base, tokenizer, one) for one in held_out]
    with quiet_libraries():
        adapted = PeftModel.from_pretrained(base, tmp_path / "adapter")
    rewards = [0.1 * (logp(adapted, tokenizer, one) - old) for one, old in zip(held_out, before, strict=True)]
    with adapted.disable_adapter():
        assert [logp(adapted, tokenizer, one) for one in held_out] == before
    desired = [reward for reward, one in zip(rewards, held_out, strict=True) if one.label]
    undesired = [reward for reward, one in zip(rewards, held_out, strict=True) if not one.label]
    (line,) = (line for line in lines(tmp_path) if "eval_loss" in line)
    assert line["eval_rewards/chosen"] == pytest.approx(sum(desired) / len(desired), rel=1e-3)
    assert line["eval_rewards/rejected"] == pytest.approx(sum(undesired) / len(undesired), rel=1e-3)
    assert line["eval_rewards/margins"] == pytest.approx(
        line["eval_rewards/chosen"] - line["eval_rewards/rejected"], rel=1e-6
    )
    assert line["eval_rewards/chosen_right"] == sum(reward > 0 for reward in desired) / len(desired)
    assert line["eval_rewards/rejected_right"] == sum(reward < 0 for reward in undesired) / len(undesired)
    assert facts["eval_reward_margin"] == line["eval_rewards/margins"] > 0
    assert facts["eval_desired_right"] == line["eval_rewards/chosen_right"]
    assert "of the undesired answers below the reference" in facts["summary"]
    assert "rewards/accuracies" not in str(lines(tmp_path))


def test_kto_first_loss_is_that_of_equal_models(tiny_model, data, answers, tmp_path):
    found = {}
    for name, more in {"plain": (1.0, 1.0), "weighed": (3.0, 0.5)}.items():
        (tmp_path / name).mkdir()
        set_weights = (f"train.desirable_weight={more[0]}", f"train.undesirable_weight={more[1]}", "train.max_steps=1")
        train(options(tiny_model, data, *set_weights), {"prepare": answers}, tmp_path / name)
        (found[name],) = lines(tmp_path / name)
    assert found["plain"]["loss"] == pytest.approx(0.5, rel=1e-6)
    possible = [0.5 * (3.0 * num + 0.5 * (4 - num)) / 4 for num in range(5)]
    assert min(abs(found["weighed"]["loss"] - each) for each in possible) < 1e-6
    assert abs(found["weighed"]["loss"] - 0.5) > 1e-3


def test_interrupted_run_equals_the_uninterrupted_one(tiny_model, data, answers, tmp_path, monkeypatch):
    asked = options(tiny_model, data, "train.save_steps=2", "train.eval_steps=2", "train.select_checkpoint=best_loss")
    check_that_an_interrupted_run_equals_the_uninterrupted_one(asked, answers, tmp_path, monkeypatch)


def test_held_out_answers_do_not_depend_on_the_batch(tiny_model, data, answers, tmp_path):
    found = []
    for size in (3, 8):
        folder = tmp_path / str(size)
        folder.mkdir()
        more = (
            "train.max_steps=1",
            "train.eval_steps=1",
            f"train.per_device_train_batch_size={size}",
            "train.learning_rate=1e-12",
        )
        train(options(tiny_model, data, *more), {"prepare": answers}, folder)
        (line,) = (line for line in lines(folder) if "eval_loss" in line)
        found.append(line)
    for name in ("eval_logps/chosen", "eval_logps/rejected", "eval_loss"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-5)


def test_pairs_and_unpaired_answers_train_together(tiny_model, data, tmp_path):
    pairs = write_rows(tmp_path / "p.jsonl", [{**row, "prompt": f"second {row['prompt']}"} for row in pair_rows(12)])
    asked = options(
        tiny_model,
        data,
        f"data.sources={json.dumps([str(data), str(pairs)])}",
        *("train.max_steps=3", "train.eval_steps=3"),
    )
    (tmp_path / "prepare").mkdir()
    (tmp_path / "train").mkdir()
    prepared = prepare(asked, {}, tmp_path / "prepare")
    facts = train(asked, {"prepare": tmp_path / "prepare"}, tmp_path / "train")
    assert (facts["num_desired"], facts["num_undesired"]) == tuple(prepared["num_labels"]["train"].values())
    assert facts["num_desired"] + facts["num_undesired"] > facts["num_examples"]
    (line,) = (line for line in lines(tmp_path / "train") if "eval_loss" in line)
    assert line["eval_rewards/margins"] > 0


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (["train.objective=dpo", "train.desirable_weight=2"], "train.desirable_weight belongs to train.objective: kto"),
        (
            ["train.objective=sft", "train.undesirable_weight=2"],
            "train.undesirable_weight belongs to train.objective: kto",
        ),
        (["train.desirable_weight=0"], "train.desirable_weight"),
        (["data.source=builtin:statements", "data.sources=[]"], r"labelled answers \(prompt, completion, label\)"),
        (["train.per_device_train_batch_size=1"], "set train.per_device_train_batch_size to 2 or more"),
    ],
)
def test_unfitting_options_are_refused(tiny_model, data, changed, told):
    with pytest.raises(ConfigError, match=told) as raised:
        options(tiny_model, data, *changed)
    assert "\n" not in str(raised.value)
