"""DPO, ORPO and KTO on pairs: what they learn and leave alone, resumed runs, combinations that are refused."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest

from fintune.errors import ArtifactError, ConfigError, FintuneError
from fintune.models import chat_template as chat
from fintune.models import load as models
from fintune.pipeline.stages.prepare import prepare
from fintune.pipeline.stages.train import train
from fintune.records import Pair
from support.pair_rows import pair_rows, write_rows
from support.paths import ROOT
from support.preference_training import check_that_an_interrupted_run_equals_the_uninterrupted_one, lines, weights
from support.preference_training import training as options
from support.prepared_rows import prepared

torch = pytest.importorskip("torch")
OBJECTIVES = ("dpo", "orpo", "kto")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("pairs") / "trader_dpo_data.jsonl", pair_rows(40))


@pytest.fixture(scope="module")
def pairs(data, tiny_model, tmp_path_factory) -> Path:
    """Prepared pairs; look, do not touch."""
    folder = tmp_path_factory.mktemp("prepare")
    prepare(options(tiny_model, data, "dpo"), {}, folder)
    return folder


def margin(model, tokenizer, pair: Pair) -> float:
    """Log-probability of the chosen answer less that of the rejected one, by a plain forward pass."""

    def logp(answer: str) -> float:
        encoded = chat.encode_example(tokenizer, pair.messages, answer)
        with torch.no_grad():
            scores = model(torch.tensor([encoded.input_ids])).logits[0, :-1].log_softmax(-1)
        taken = scores.gather(1, torch.tensor(encoded.input_ids[1:])[:, None])[:, 0]
        return float(taken[torch.tensor(encoded.completion_mask[1:]) == 1].sum())

    return logp(pair.chosen) - logp(pair.rejected)


def test_dpo_raises_the_margin_and_keeps_the_reference(tiny_model, data, pairs, tmp_path):
    from peft import PeftModel

    from fintune.util.console import quiet_libraries

    facts = train(options(tiny_model, data, "dpo", "train.eval_steps=3"), {"prepare": pairs}, tmp_path)
    held_out = [Pair.model_validate_json(line) for line in (pairs / "eval.pairs.jsonl").read_text().splitlines()]
    trained_on = (pairs / "train.pairs.jsonl").read_text()
    assert not [pair for pair in held_out if pair.messages[-1].content in trained_on]
    ref = models.fetch(str(tiny_model))
    tokenizer, base = models.load_tokenizer(ref), models.load_model(ref, dtype="float32", device="cpu")
    before = [margin(base, tokenizer, pair) for pair in held_out]
    with quiet_libraries():
        adapted = PeftModel.from_pretrained(base, tmp_path / "adapter")
    after = [margin(adapted, tokenizer, pair) for pair in held_out]
    assert all(b > a for a, b in zip(before, after, strict=True))
    with adapted.disable_adapter():
        assert [margin(adapted, tokenizer, pair) for pair in held_out] == before
    # What the run says of the held-out pairs is what the saved adapter gives: beta times the change of the margin.
    gained = sum(after) / len(after) - sum(before) / len(before)
    assert facts["eval_reward_margin"] == pytest.approx(0.1 * gained, rel=1e-3)
    assert facts["eval_reward_accuracy"] == 1.0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "metrics.jsonl"]
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "fintune.json",
    ]


@pytest.mark.parametrize(("objective", "first"), [("dpo", math.log(2)), ("kto", 0.5)])
@pytest.mark.parametrize("method", ["model.quantization=none", "model.quantization=nf4", "adapter.kind=dora"])
def test_first_loss_is_that_of_equal_models(tiny_model, data, pairs, tmp_path, objective, first, method):
    train(options(tiny_model, data, objective, method, "train.max_steps=2"), {"prepare": pairs}, tmp_path)
    begin, then = lines(tmp_path)
    assert begin["loss"] == pytest.approx(first, rel=1e-6)
    assert (begin["rewards/margins"], begin["rewards/chosen"]) == (0, 0)
    assert then["rewards/margins"] > 0
    assert {weight.dtype for weight in weights(tmp_path).values()} == {torch.float32}


def test_checkpoints_hold_no_reference_adapter(tiny_model, data, pairs, tmp_path, monkeypatch):
    """TRL would keep a copy of the adapter, and write it into every checkpoint."""
    from fintune.training import checkpoints

    seen, kept = [], set()

    def look(folder, num_kept):
        seen.extend(folder.rglob("adapter_model.safetensors"))
        kept.add(num_kept)

    monkeypatch.setattr(checkpoints, "drop_old_checkpoints", look)
    asked = options(tiny_model, data, "dpo", "train.save_steps=3", "train.save_total_limit=5")
    train(asked, {"prepare": pairs}, tmp_path)
    assert kept == {5}
    assert seen
    assert {path.parent.name for path in seen} <= {"checkpoint-3", "checkpoint-6"}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_interrupted_run_equals_the_uninterrupted_one(tiny_model, data, pairs, tmp_path, objective, monkeypatch):
    asked = options(
        tiny_model, data, objective, "train.save_steps=2", "train.eval_steps=2", "train.select_checkpoint=best_loss"
    )
    check_that_an_interrupted_run_equals_the_uninterrupted_one(asked, pairs, tmp_path, monkeypatch)


@pytest.mark.slow
def test_train_killed_repeatedly_equals_uninterrupted(tiny_model, data, pairs, tmp_path):
    asked = options(
        tiny_model,
        data,
        "dpo",
        *("train.max_steps=12", "train.save_steps=2", "train.eval_steps=4", "train.select_checkpoint=best_loss"),
        "train.threads=1",
    )
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    script = ROOT / "tests/support/killed_training.py"
    done = subprocess.run(
        [sys.executable, str(script), asked.model_dump_json(), str(pairs), str(cut), "1"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len({line.split()[1] for line in done.stdout.splitlines() if line.startswith("killed")}) >= 3, done.stdout
    train(asked, {"prepare": pairs}, whole)
    assert lines(cut) == lines(whole)
    assert all(torch.equal(weights(cut)[name], weight) for name, weight in weights(whole).items())


def test_held_out_pairs_do_not_depend_on_the_batch(tiny_model, data, pairs, tmp_path):
    """Ten pairs in passes of 4, 4 and 2, or of 8 and 2: each pair counts the same."""
    found = []
    for size in (4, 8):
        folder = tmp_path / str(size)
        folder.mkdir()
        asked = options(
            tiny_model,
            data,
            "dpo",
            *(
                "train.max_steps=1",
                "train.eval_steps=1",
                f"train.per_device_train_batch_size={size}",
                "train.learning_rate=1e-12",
            ),
        )
        train(asked, {"prepare": pairs}, folder)
        (line,) = (line for line in lines(folder) if "eval_loss" in line)
        found.append(line)
    assert found[0]["eval_logps/chosen"] == pytest.approx(found[1]["eval_logps/chosen"], rel=1e-5)
    assert found[0]["eval_logps/rejected"] == pytest.approx(found[1]["eval_logps/rejected"], rel=1e-5)


def test_rows_without_pairs_are_refused(tiny_model, data, tmp_path):
    (tmp_path / "train").mkdir()
    rows = {"prepare": prepared(tmp_path / "prepare", tiny_model)}
    with pytest.raises(ArtifactError, match="not preference pairs"):
        train(options(tiny_model, data, "dpo"), rows, tmp_path / "train")


def test_non_finite_loss_names_step_and_pairs(tiny_model, data, pairs, tmp_path):
    config = options(tiny_model, data, "dpo", "train.learning_rate=1e30", "train.dtype=float32")
    with pytest.raises(FintuneError, match=r"not finite at step \d+") as raised:
        train(config, {"prepare": pairs}, tmp_path)
    assert "trader_dpo_data.jsonl:" in str(raised.value)
    assert raised.value.hint == "lower train.learning_rate"


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (["data.source=builtin:statements", "data.sources=[]"], "lacks; set data.source: chat"),
        (["adapter.kind=full"], "not supported with adapter.kind: full"),
        (["adapter.init_lora_weights=pissa"], "not supported with adapter.init_lora_weights: pissa"),
        (
            ["adapter.init_lora_weights=loftq", "model.quantization=nf4"],
            "not supported with adapter.init_lora_weights: loftq",
        ),
        (["adapter.lora_dropout=0.1"], "not supported with adapter.lora_dropout"),
        (["train.fused_layers=always"], "not supported with train.fused_layers: always"),
        (["train.select_checkpoint=best_accuracy", "train.eval_steps=1"], "best_accuracy"),
        (["train.objective=orpo", "train.rpo_alpha=1"], "belongs to train.objective: dpo"),
        (
            ["train.objective=kto", "train.per_device_train_batch_size=1"],
            "set train.per_device_train_batch_size to 2 or more",
        ),
        (["train.objective=sft", "train.beta=0.3"], "train.beta has no effect"),
        (["train.objective=sft", "train.rpo_alpha=1"], "belongs to train.objective: dpo"),
        (["train.beta=0"], "train.beta"),
        (["train.objective=ppo"], "train.objective"),
    ],
)
def test_unproven_combinations_are_refused(tiny_model, data, changed, told):
    with pytest.raises(ConfigError, match=told) as raised:
        options(tiny_model, data, "dpo", *changed)
    assert "\n" not in str(raised.value)


def test_rpo_alpha_adds_the_chosen_loss(tiny_model, data, pairs, tmp_path):
    found = {}
    for weight in (0, 0.5):
        folder = tmp_path / str(weight)
        folder.mkdir()
        asked = options(tiny_model, data, "dpo", "train.max_steps=1", f"train.rpo_alpha={weight}")
        train(asked, {"prepare": pairs}, folder)
        (found[weight],) = lines(folder)
    added = found[0.5]["loss"] - found[0]["loss"]
    assert added == pytest.approx(0.5 * math.log(400), rel=0.1)  # a random model finds 400 tokens equally likely
