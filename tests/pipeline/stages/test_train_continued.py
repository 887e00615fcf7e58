"""An adapter that is trained further: its weights, its reference, and what the manifest says of its origin."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

from fintune.config import Config
from fintune.config.load import load
from fintune.errors import ConfigError, ModelError
from fintune.models import load as models
from fintune.models.adapter import load_adapter
from fintune.pipeline.inputs import base_and_adapter_sources
from fintune.pipeline.stages.prepare import prepare
from fintune.pipeline.stages.train import check_training, train
from support.pair_rows import pair_rows, write_rows
from support.plain_training import train_plainly
from support.preference_training import lines, training, weights
from support.prepared_rows import prepared

torch = pytest.importorskip("torch")

RATE = 1e-3


@pytest.fixture(scope="module")
def data(tmp_path_factory, tiny_model) -> Path:
    """Prepared token rows; look, do not touch."""
    return prepared(tmp_path_factory.mktemp("data") / "prepare", tiny_model, 6)


def options(model: Path, *more: str) -> Config:
    defaults = (
        "data.source=builtin:statements",
        f"model.name={model}",
        "adapter.r=4",
        "adapter.lora_alpha=8",
        "train.dtype=float32",
        "train.per_device_train_batch_size=3",
        "train.max_steps=2",
        f"train.learning_rate={RATE}",
        "train.lr_scheduler_type=constant_with_warmup",
        "train.warmup_ratio=0",
    )
    return load(None, [*defaults, *more]).config


def make_adapter(model: Path, data: Path, folder: Path, *more: str) -> Path:
    folder.mkdir()
    train(options(model, "train.learning_rate=1e-2", *more), {"prepare": data}, folder)
    return folder / "adapter"


@pytest.mark.parametrize("more", [(), ("adapter.kind=dora",), ("model.quantization=nf4",)])
def test_continued_adapter_trains_as_in_plain_torch(tiny_model, data, tmp_path, more, capsys):
    from datasets import load_from_disk
    from peft import get_peft_model_state_dict

    first = make_adapter(tiny_model, data, tmp_path / "first", *more, "adapter.lora_dropout=0.1")
    (tmp_path / "second").mkdir()
    asked = options(tiny_model, *more, f"adapter.continue_from={first}", "train.max_steps=3", "run.seed=3")
    facts = train(asked, {"prepare": data}, tmp_path / "second")
    assert "is trained further, on 14 layers" in capsys.readouterr().err.replace("\n", " ")
    assert facts["continued_from"]["adapter"] == str(first)
    assert len(facts["continued_from"]["adapter_sha256"]) == 64

    ref = models.fetch(str(tiny_model))
    base = models.load_model(ref, dtype="float32", device="cpu", quantization=asked.model.quantization)
    model = load_adapter(base, first, trainable=True)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    rows = {row["id"]: row for row in load_from_disk(str(data / "tokens" / "train"))}
    lengths = [len(row["input_ids"]) for row in rows.values()]
    order = [list(rows.values())[index] for index in order_of(lengths, asked)]
    figures, trained = train_plainly(model, [order[:3], order[3:6], order[6:]], "sft", learning_rate=RATE)
    for line, (loss, norm) in zip(lines(tmp_path / "second"), figures, strict=True):
        assert line["loss"] == pytest.approx(loss, rel=3e-6)
        assert line["grad_norm"] == pytest.approx(norm, rel=1e-4)
    saved = weights(tmp_path / "second")
    expected = get_peft_model_state_dict(trained, save_embedding_layers=False)
    assert saved.keys() == expected.keys()
    assert all(float((saved[name] - expected[name].detach()).abs().max()) < 2e-5 for name in saved)


def order_of(lengths: list[int], config: Config) -> list[int]:
    from fintune.training.batches import make_schedule

    return make_schedule(lengths, config.train, config.run.seed).order


@pytest.mark.parametrize(("objective", "first_loss"), [("dpo", math.log(2)), ("kto", 0.5)])
def test_reference_of_a_continued_adapter_is_that_adapter(tiny_model, data, tmp_path, objective, first_loss):
    first = make_adapter(tiny_model, data, tmp_path / "first")
    pairs = write_rows(tmp_path / "pairs.jsonl", pair_rows(12))
    more = (f"adapter.continue_from={first}", "adapter.lora_alpha=8", "train.max_steps=2", "train.eval_steps=2")
    asked = training(tiny_model, pairs, objective, *more)
    for name in ("prepare", "train"):
        (tmp_path / name).mkdir()
    prepare(asked, {}, tmp_path / "prepare")
    train(asked, {"prepare": tmp_path / "prepare"}, tmp_path / "train")
    start, then, evaluation = lines(tmp_path / "train")
    assert start["loss"] == pytest.approx(first_loss, rel=1e-6)
    assert (start["rewards/margins"], start["rewards/chosen"]) == (0, 0)
    assert then["rewards/margins"] > 0
    assert evaluation["eval_rewards/margins"] > 0
    moved = [
        float((weights(tmp_path / "train")[name] - old).abs().max()) for name, old in weights(first.parent).items()
    ]
    assert 0 < max(moved) < 0.02


def test_continued_adapter_has_to_fit_the_options(tiny_model, data, tmp_path):
    first = make_adapter(tiny_model, data, tmp_path / "first")
    asked = options(tiny_model, f"adapter.continue_from={first}", "adapter.r=8", "adapter.use_rslora=true")
    with pytest.raises(ConfigError, match=r"other options: set adapter.r=4 adapter.use_rslora=false$"):
        check_training(asked)
    with pytest.raises(ConfigError, match=r"set adapter.kind=lora$"):
        check_training(options(tiny_model, f"adapter.continue_from={first}", "adapter.kind=dora"))
    with pytest.raises(ModelError, match="holds no adapter"):
        check_training(options(tiny_model, f"adapter.continue_from={tmp_path}"))
    with pytest.raises(ConfigError, match=r"adapter\.kind: full does not allow"):
        options(tiny_model, f"adapter.continue_from={first}", "adapter.kind=full")
    own = options(tiny_model, f"adapter.continue_from={first}", f"run.dir={tmp_path}", "run.name=first")
    with pytest.raises(ConfigError, match="is a result of this run, which would replace it: set another"):
        check_training(own)
    other = options(tiny_model, f"adapter.continue_from={first}")
    before = base_and_adapter_sources(other)
    path = first / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + bytes(4))
    assert base_and_adapter_sources(other) != before


def test_adapter_of_another_base_is_not_continued(tiny_model, data, tmp_path):
    from support.tiny import make_tiny_model

    first = make_adapter(tiny_model, data, tmp_path / "first")
    other = make_tiny_model(tmp_path / "other", seed=1)
    (tmp_path / "second").mkdir()
    with pytest.raises(ModelError, match="was trained on"):
        train(options(other, f"adapter.continue_from={first}"), {"prepare": data}, tmp_path / "second")


def test_new_adapter_on_a_merged_model_names_its_origin(tiny_model, data, tmp_path):
    merged = tmp_path / "merge"
    shutil.copytree(tiny_model, merged)
    manifest = {"facts": {"adapter_sha256": "ab" * 32}, "key": {"options": {"model.name": "acme/base"}}}
    (merged / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "train").mkdir()
    facts = train(options(merged), {"prepare": data}, tmp_path / "train")
    assert facts["base_merged_from"] == {"adapter_sha256": "ab" * 32, "base_model": "acme/base"}
    assert "continued_from" not in facts
