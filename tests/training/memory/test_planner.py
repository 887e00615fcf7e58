"""The planner for options and models, plan.json, and the overrides after training ran out of memory."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest

from fintune.config import AdapterOptions, Config, TrainOptions
from fintune.models import load as models
from fintune.training import distributed, lora
from fintune.training.memory import planner
from fintune.training.memory.model import (
    GIB,
    AdapterMethod,
    DecoderShape,
    MemoryPlan,
    StepSetting,
    choose_plan,
    transformers_peak_bytes,
)
from fintune.training.memory.planner import MemoryRequest
from support.model_shapes import LLAMA_3B

torch = pytest.importorskip("torch")

SHAPE = DecoderShape.from_config(LLAMA_3B)
QWEN_14B = DecoderShape(5120, 13824, 48, 40, 8, 128, 152064, tied=False)
QLORA = AdapterMethod(32, four_bit=True)


# -- 4 bits


@pytest.mark.parametrize(
    "method", [QLORA, AdapterMethod(128, dora=True, dropout=True), AdapterMethod(16, moment_bytes=2)]
)
@pytest.mark.parametrize("gib", [8, 9.5, 12, 24, 32, 78])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_four_bit_need_agrees_with_the_16_bit_plan(method, gib, batch_size):
    limit = int(gib * GIB)
    sixteen_bit = replace(method, four_bit=False)
    sizes = {"batch_size": batch_size, "accumulation": 1, "longest": 2048, "limit_bytes": limit}
    fits = choose_plan(QWEN_14B, sixteen_bit, **sizes).fits
    options = TrainOptions(per_device_train_batch_size=batch_size)
    request = MemoryRequest(QWEN_14B, method, options, 2048, limit)
    assert request.describe_four_bit_need().startswith("4 bits are not needed" if fits else "4 bits are needed")


# -- plan.json


def test_record_peak_adds_to_the_prediction(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: int(8.5 * GIB))
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: int(9.5 * GIB))
    plan = MemoryPlan(StepSetting(3, False, 4096), 2, 4, 9 * GIB, 12 * GIB, True, ())
    planner.write_plan(plan, tmp_path)
    planner.record_peak(tmp_path)
    facts = planner.read_plan(tmp_path)
    assert (facts["peak_gib"], facts["predicted_peak_gib"], facts["recomputed_layers"]) == (8.5, 9.0, 3)
    assert facts["held_peak_gib"] == 9.5
    assert "8.5 GiB at most, 9.0 predicted" in capsys.readouterr().err


def test_record_peak_without_a_plan(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2 * GIB)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 3 * GIB)
    planner.record_peak(tmp_path)
    assert planner.read_plan(tmp_path) == {"peak_gib": 2.0, "held_peak_gib": 3.0}
    printed = capsys.readouterr().err
    assert "2.0 GiB at most" in printed and "predicted" not in printed


# -- recomputation with the layers of transformers


def test_layers_are_recomputed_unless_activations_surely_fit():
    method, options = AdapterMethod(16), TrainOptions(per_device_train_batch_size=16)
    need = transformers_peak_bytes(SHAPE, method, tokens=16 * 64, recomputed=False, accumulates=False)
    request = MemoryRequest(SHAPE, method, options, 64, need)
    assert request.recomputes_layers()
    assert not replace(request, limit=int(need / 0.89)).recomputes_layers()
    # Divided weights leave memory for activations.
    assert not replace(request, num_shards=8).recomputes_layers()


@pytest.mark.parametrize("choice", [True, False])
def test_set_gradient_checkpointing_is_followed(choice):
    options = TrainOptions(gradient_checkpointing=choice)
    assert MemoryRequest(SHAPE, AdapterMethod(16), options, 10**6, 1).recomputes_layers() is choice
    assert planner.resolve_checkpointing(SimpleNamespace(), options, [8]) is options


def test_checkpointing_on_a_gpu_is_decided_by_memory(tiny_model, monkeypatch, capsys):
    base = models.load_model(models.fetch(str(tiny_model)), dtype="float32")
    model = lora.attach_adapter(base, AdapterOptions(r=4))
    monkeypatch.setattr(distributed, "is_sharded", lambda _options: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def resolve(free, **options):
        monkeypatch.setattr(planner, "free_bytes", lambda *_: planner.RESERVE_BYTES + free)
        return planner.resolve_checkpointing(model, TrainOptions(**options), [64, 32]).gradient_checkpointing

    assert resolve(GIB) is False
    assert resolve(1000) is True
    capsys.readouterr()
    assert resolve(GIB, objective="dpo") is True
    assert "all recomputed" in capsys.readouterr().err


def test_checkpointing_on_a_cpu_is_off(tiny_model):
    model = models.load_model(models.fetch(str(tiny_model)), dtype="float32")
    assert planner.resolve_checkpointing(model, TrainOptions(), [10**6]).gradient_checkpointing is False


# -- out of memory


def config(quantization="none", kind="lora", **train):
    return Config.model_validate(
        {
            "model": {"name": "x", "quantization": quantization},
            "adapter": {"kind": kind},
            "train": {"per_device_train_batch_size": 16, **train},
        }
    )


def advise(config, gib, *, followed_plan=False, longest=1024, **model):
    model_config = None if gib is None else {**LLAMA_3B, **model}
    limit = int((gib or 0) * GIB)
    return planner.advise_less_memory(config, model_config, longest=longest, limit=limit, followed_plan=followed_plan)


def overrides(advice):
    return dict(text.split("=") for text in re.findall(r"[a-z_]+\.[a-z_]+=\S+", advice.partition("(")[0]))


def test_fused_layers_get_the_limit_that_changes_the_plan():
    advice = advise(config(), 24, followed_plan=True)
    assert overrides(advice).keys() == {"train.max_memory_gib"}
    limit = float(overrides(advice)["train.max_memory_gib"])
    before, after = (
        choose_plan(SHAPE, AdapterMethod(16), batch_size=16, accumulation=1, longest=1024, limit_bytes=int(gib * GIB))
        for gib in (24, limit)
    )
    assert after.fits
    assert after.predicted_bytes < before.predicted_bytes
    assert f"{after.setting.num_checkpointed} of 28 layers recomputed, 1 of 16 examples a step" in advice
    assert advice.endswith("resumes from its last checkpoint")


def test_transformers_layers_get_smaller_passes_of_the_same_step():
    advice = advise(config(gradient_accumulation_steps=2, gradient_checkpointing=False), 24)
    size, passes = (
        int(overrides(advice)[f"train.{name}"])
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps")
    )
    assert size * passes == 32
    need = transformers_peak_bytes(SHAPE, AdapterMethod(16), tokens=size * 1024, recomputed=False, accumulates=True)
    assert need <= 0.9 * 24 * GIB
    assert "train.gradient_checkpointing" not in overrides(advice)
    assert advice.endswith("--redo train")


def test_advice_tries_recomputation_then_4_bits_then_shorter():
    # One example of 16,384 tokens a pass cannot be divided.
    options = config(per_device_train_batch_size=1, gradient_checkpointing=False)
    advice = [advise(options, gib, longest=16384) for gib in (24, 11, 6.5, 1)]
    assert overrides(advice[0]) == {"train.gradient_checkpointing": "true"}
    assert "model.quantization" in overrides(advice[1])
    assert int(overrides(advice[2])["prompt.max_length"]) < 16384
    assert overrides(advice[2])["model.quantization"] == "nf4"
    assert advice[2].endswith("--redo prepare")
    assert overrides(advice[3]) == {}


def test_recomputed_layers_are_not_advised_to_be():
    assert overrides(advise(config(), 24)) == {
        "train.per_device_train_batch_size": "8",
        "train.gradient_accumulation_steps": "2",
    }
    assert "gradient_checkpointing" not in advise(config(), 24, model_type="gemma3")
    assert "gradient_checkpointing" in advise(config(), None)


def test_forbidden_recomputation_is_advised_first():
    advice = advise(config(gradient_checkpointing=False), 48, followed_plan=True)
    assert overrides(advice)["train.gradient_checkpointing"] == "true"


def test_settings_that_ran_out_of_memory_are_not_advised():
    options = config(quantization="nf4", per_device_train_batch_size=1, gradient_checkpointing=True)
    advice = advise(options, 60)
    assert "gradient_checkpointing" not in advice
    assert "model.quantization" not in advice


@pytest.mark.parametrize("gib", [3, 5, 8, 14, 24, 40, 80])
@pytest.mark.parametrize("followed_plan", [False, True])
def test_advice_is_one_line_of_overrides_that_load(gib, followed_plan, tmp_path):
    from fintune.config.load import load

    advice = advise(config(), gib, followed_plan=followed_plan)
    assert "\n" not in advice
    path = tmp_path / "run.yaml"
    path.write_text("model: {name: x}\n")
    load(path, tuple(f"{key}={value}" for key, value in overrides(advice).items()))


def test_general_advice_keeps_the_examples_of_a_step():
    for batch_size, accumulation in ((8, 1), (4, 4), (2, 3)):
        advice = advise(config(per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation), None)
        size, passes = map(int, re.search(r"batch_size=(\d+) train.gradient_accumulation_steps=(\d+)", advice).groups())
        assert (size * passes, size) == (batch_size * accumulation, batch_size // 2)


def test_general_advice_for_models_without_prediction():
    for gib in (None, 24):
        advice = advise(config(), gib, model_type="gemma3")
        assert advice.startswith("set train.per_device_train_batch_size=8 train.gradient_accumulation_steps=2, or ")
    assert "adapter.kind=lora" in advise(config(kind="full"), 24)
