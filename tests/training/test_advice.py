"""Out of memory: the overrides that the planner says would fit."""

from __future__ import annotations

import re

import pytest

from fintune.config import Config
from fintune.training.advice import Room, less_memory
from fintune.training.memory import Method, Shape, modules_peak_bytes
from fintune.training.plan import GIB, make_plan
from support.model_shapes import LLAMA_3B

SHAPE = Shape.of(LLAMA_3B)
QWEN_14B = Shape(5120, 13824, 48, 40, 8, 128, 152064, tied=False)


def config(quantization="none", kind="lora", **train):
    return Config.model_validate(
        {
            "model": {"name": "x", "quantization": quantization},
            "adapter": {"kind": kind},
            "train": {"per_device_train_batch_size": 16, **train},
        }
    )


def room(gib, *, followed_plan=False, longest=1024, **model):
    return Room({**LLAMA_3B, **model}, longest, int(gib * GIB), followed_plan)


# TRL's peaks in GiB on an H100 (bench/results, shared measurements): with PEFT, every token trained.
@pytest.mark.parametrize(
    ("shape", "method", "tokens", "recomputed", "measured"),
    [
        (SHAPE, Method(16), 16384, True, 11.7),
        (QWEN_14B, Method(32, four_bit=True), 4096, False, 46.7),
        (QWEN_14B, Method(32, four_bit=True), 4096, True, 13.1),
        (QWEN_14B, Method(32, dora=True, four_bit=True), 4096, True, 17.7),
    ],
)
def test_the_need_of_transformers_layers_is_known_within_a_tenth(shape, method, tokens, recomputed, measured):
    peak = modules_peak_bytes(shape, method, tokens=tokens, recomputed=recomputed, accumulates=False)
    assert peak / GIB == pytest.approx(measured, rel=0.1)


def overrides(told):
    return dict(each.split("=") for each in re.findall(r"[a-z_]+\.[a-z_]+=\S+", told.partition("(")[0]))


def test_with_the_written_out_layers_the_limit_is_lowered_until_the_plan_changes():
    told = less_memory(config(), room(24, followed_plan=True))
    assert set(overrides(told)) == {"train.max_memory_gib"}
    limit = float(overrides(told)["train.max_memory_gib"])
    before, after = (
        make_plan(SHAPE, Method(16), batch_size=16, accumulation=1, longest=1024, limit_bytes=int(gib * GIB))
        for gib in (24, limit)
    )
    assert after.fits
    assert after.predicted_bytes < before.predicted_bytes
    assert f"{after.setting.num_checkpointed} of 28 layers recomputed, 1 of 16 examples a step" in told
    assert told.endswith("training then goes on from its last checkpoint")


def test_transformers_layers_get_passes_that_fit_with_the_examples_of_a_step():
    told = less_memory(config(gradient_accumulation_steps=2, gradient_checkpointing=False), room(24))
    found = overrides(told)
    size, passes = int(found["train.per_device_train_batch_size"]), int(found["train.gradient_accumulation_steps"])
    assert size * passes == 32
    need = modules_peak_bytes(SHAPE, Method(16), tokens=size * 1024, recomputed=False, accumulates=True)
    assert need <= 0.9 * 24 * GIB
    assert "train.gradient_checkpointing" not in found
    assert told.endswith("the same examples a step), and --redo train")


def test_recomputing_comes_before_four_bits_and_four_bits_before_shorter_examples():
    # One example of 16,384 tokens a pass: there is nothing to divide.
    long = {"longest": 16384}
    one = config(per_device_train_batch_size=1, gradient_checkpointing=False)
    assert overrides(less_memory(one, room(24, **long))) == {"train.gradient_checkpointing": "true"}
    assert "model.quantization" in overrides(less_memory(one, room(11, **long)))
    told = less_memory(one, room(6.5, **long))
    found = overrides(told)
    assert int(found["prompt.max_length"]) < 16384
    assert found["model.quantization"] == "nf4"
    assert "(longer examples fit in no way of training)" in told
    assert less_memory(one, room(1, **long)).endswith("take a smaller model or GPU")


def test_layers_that_were_recomputed_by_themselves_are_not_advised_to_be():
    told = less_memory(config(), room(24))
    assert "gradient_checkpointing" not in told
    assert overrides(told) == {"train.per_device_train_batch_size": "8", "train.gradient_accumulation_steps": "2"}
    assert "gradient_checkpointing" not in less_memory(config(), room(24, model_type="gemma3"))
    assert "gradient_checkpointing" in less_memory(config(), None)


def test_whoever_forbade_to_recompute_is_told_to_allow_it():
    told = less_memory(config(gradient_checkpointing=False), room(48, followed_plan=True))
    assert overrides(told)["train.gradient_checkpointing"] == "true"


def test_what_ran_out_of_memory_is_not_advised():
    told = less_memory(config(quantization="nf4", per_device_train_batch_size=1, gradient_checkpointing=True), room(60))
    assert "gradient_checkpointing" not in told
    assert "model.quantization" not in told


@pytest.mark.parametrize("gib", [3, 5, 8, 14, 24, 40, 80])
@pytest.mark.parametrize("followed_plan", [False, True])
def test_every_advice_is_one_line_of_overrides_that_load(gib, followed_plan, tmp_path):
    from fintune.config.load import load

    told = less_memory(config(), room(gib, followed_plan=followed_plan))
    assert "\n" not in told
    path = tmp_path / "run.yaml"
    path.write_text("model: {name: x}\n")
    load(path, tuple(f"{key}={value}" for key, value in overrides(told).items()))


def test_the_rules_keep_the_examples_of_a_step():
    for batch_size, accumulation in ((8, 1), (4, 4), (2, 3)):
        told = less_memory(
            config(per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation), None
        )
        size, passes = map(int, re.search(r"batch_size=(\d+) train.gradient_accumulation_steps=(\d+)", told).groups())
        assert (size * passes, size) == (batch_size * accumulation, batch_size // 2)


def test_where_the_planner_knows_nothing_the_rules_speak():
    for known in (None, room(24, model_type="gemma3")):
        assert less_memory(config(), known).startswith(
            "set train.per_device_train_batch_size=8 train.gradient_accumulation_steps=2, or "
        )
    assert "adapter.kind=lora" in less_memory(config(kind="full"), room(24))
