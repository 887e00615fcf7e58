"""The prediction of memory against what was measured on an H100, and the settings that are chosen."""

from __future__ import annotations

import pytest

from fintune.training.memory.model import (
    GIB,
    AdapterMethod,
    DecoderShape,
    StepSetting,
    choose_plan,
    format_distinct,
    format_usage,
    fused_peak_bytes,
    transformers_peak_bytes,
)
from support import model_shapes

LLAMA_3B = DecoderShape(3072, 8192, 28, 24, 8, 128, 128256, tied=True)
QWEN_14B = DecoderShape(5120, 13824, 48, 40, 8, 128, 152064, tied=False)
QLORA = AdapterMethod(32, four_bit=True)
QDORA = AdapterMethod(32, dora=True, four_bit=True)

# torch.cuda.max_memory_allocated in GiB, NVIDIA H100 80GB HBM3, every token trained, AdamW.
MEASURED = [
    (LLAMA_3B, AdapterMethod(16), StepSetting(0, True, 16384), 39.13),
    (LLAMA_3B, AdapterMethod(16), StepSetting(28, True, 16384), 11.00),
    (LLAMA_3B, AdapterMethod(16), StepSetting(0, True, 4096), 15.02),
    (LLAMA_3B, AdapterMethod(16, dora=True), StepSetting(0, True, 16384), 48.83),
    (LLAMA_3B, AdapterMethod(16, dora=True), StepSetting(0, True, 4096), 17.43),
    (QWEN_14B, QLORA, StepSetting(0, True, 4096), 58.97),
    (QWEN_14B, QLORA, StepSetting(0, False, 4096), 33.86),
    (QWEN_14B, QLORA, StepSetting(48, False, 4096), 13.86),
    (QWEN_14B, QDORA, StepSetting(0, True, 4096), 65.38),
    (QWEN_14B, QDORA, StepSetting(0, False, 4096), 40.26),
]


@pytest.mark.parametrize(("shape", "method", "setting", "measured"), MEASURED)
def test_fused_peak_is_within_three_percent(shape, method, setting, measured):
    assert fused_peak_bytes(shape, method, setting) / GIB == pytest.approx(measured, rel=0.03)


# TRL's peaks in GiB on an H100 (bench/results, shared measurements): with PEFT, every token trained.
@pytest.mark.parametrize(
    ("shape", "method", "tokens", "recomputed", "measured"),
    [
        (LLAMA_3B, AdapterMethod(16), 16384, True, 11.7),
        (QWEN_14B, QLORA, 4096, False, 46.7),
        (QWEN_14B, QLORA, 4096, True, 13.1),
        (QWEN_14B, QDORA, 4096, True, 17.7),
    ],
)
def test_transformers_peak_is_within_ten_percent(shape, method, tokens, recomputed, measured):
    peak = transformers_peak_bytes(shape, method, tokens=tokens, recomputed=recomputed, accumulates=False)
    assert peak / GIB == pytest.approx(measured, rel=0.1)


def test_decoder_shape_from_config():
    assert DecoderShape.from_config(model_shapes.LLAMA_3B) == LLAMA_3B


def plan(gib, *, shape=LLAMA_3B, method=AdapterMethod(16), **options):  # noqa: B008
    options = {"batch_size": 16, "accumulation": 1, "longest": 1024, **options}
    return choose_plan(shape, method, **options, limit_bytes=int(gib * GIB))


def test_plan_recomputes_nothing_if_all_fits():
    chosen = plan(78)
    assert (chosen.setting.num_checkpointed, chosen.batch_size, chosen.fits) == (0, 16, True)
    assert len(chosen.reasons) == 1


def test_plan_follows_gradient_checkpointing_option():
    chosen = plan(78, recompute=True)
    assert chosen.setting.num_checkpointed == 28
    assert chosen.predicted_bytes < plan(78).predicted_bytes / 3
    assert "train.gradient_checkpointing" in chosen.reasons[0]
    chosen = plan(24, recompute=False)
    assert (chosen.setting.num_checkpointed, chosen.fits) == (0, True)
    assert chosen.batch_size * chosen.accumulation == 16
    assert chosen.batch_size < plan(24).batch_size
    assert "24.0 GiB" in chosen.reasons[0]


def test_plan_recomputes_no_more_layers_than_needed():
    chosen = plan(14)
    assert 0 < chosen.setting.num_checkpointed < 28
    assert chosen.predicted_bytes <= 14 * GIB
    fewer = StepSetting(chosen.setting.num_checkpointed - 1, True, chosen.setting.tokens)
    assert fused_peak_bytes(LLAMA_3B, AdapterMethod(16), fewer) > 14 * GIB


def test_plan_splits_a_batch_that_does_not_fit():
    chosen = plan(9)
    assert chosen.fits
    assert chosen.batch_size < 16
    assert chosen.batch_size * chosen.accumulation == 16
    assert chosen.setting.accumulates


def test_plan_holds_16_bit_copies_if_no_layer_pays_for_them():
    assert plan(78, shape=QWEN_14B, method=QLORA, batch_size=1, longest=4096).setting.unpacked
    chosen = plan(40, shape=QWEN_14B, method=QLORA, batch_size=1, longest=4096)
    assert (chosen.setting.unpacked, chosen.setting.num_checkpointed) == (False, 0)
    chosen = plan(14, shape=QWEN_14B, method=QLORA, batch_size=1, longest=4096)
    assert not chosen.setting.unpacked
    assert chosen.setting.num_checkpointed > 40
    assert chosen.fits


def test_plan_that_never_fits_has_the_smallest_settings():
    chosen = plan(4)
    assert not chosen.fits
    assert (chosen.batch_size, chosen.accumulation, chosen.setting.num_checkpointed) == (1, 16, 28)


def test_format_distinct_shows_the_difference():
    assert format_distinct(600 * 2**20, 512 * 2**20) == ("600 MiB", "512 MiB")
    assert format_distinct(int(7.84 * GIB), int(7.81 * GIB)) == ("7.84 GiB", "7.81 GiB")
    assert format_distinct(2**20 + 1, 2**20) == ("1,048,577 bytes", "1,048,576 bytes")


def test_format_usage_writes_a_shared_unit_once():
    assert format_usage(2**29, 8 * GIB, " predicted") == "512 MiB predicted of 8.0 GiB"
    assert format_usage(2**29, 2**29 + 2**20) == "512 MiB of 513"
