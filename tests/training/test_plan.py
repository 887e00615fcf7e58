"""The planner: its prediction against what was measured on an H100, and what it chooses."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fintune.config import TrainOptions
from fintune.training import planned
from fintune.training.memory import Method, Setting, Shape, peak_bytes
from fintune.training.plan import GIB, make_plan
from support import model_shapes

LLAMA_3B = Shape(3072, 8192, 28, 24, 8, 128, 128256, tied=True)
QWEN_14B = Shape(5120, 13824, 48, 40, 8, 128, 152064, tied=False)
QLORA = Method(32, four_bit=True)

# torch.cuda.max_memory_allocated in GiB, NVIDIA H100 80GB HBM3, every token trained, AdamW.
MEASURED = [
    (LLAMA_3B, Method(16), Setting(0, True, 16384), 39.13),
    (LLAMA_3B, Method(16), Setting(28, True, 16384), 11.00),
    (LLAMA_3B, Method(16), Setting(0, True, 4096), 15.02),
    (LLAMA_3B, Method(16, dora=True), Setting(0, True, 16384), 48.83),
    (LLAMA_3B, Method(16, dora=True), Setting(0, True, 4096), 17.43),
    (QWEN_14B, QLORA, Setting(0, True, 4096), 58.97),
    (QWEN_14B, QLORA, Setting(0, False, 4096), 33.86),
    (QWEN_14B, QLORA, Setting(48, False, 4096), 13.86),
    (QWEN_14B, Method(32, dora=True, four_bit=True), Setting(0, True, 4096), 65.38),
    (QWEN_14B, Method(32, dora=True, four_bit=True), Setting(0, False, 4096), 40.26),
]


@pytest.mark.parametrize(("shape", "method", "setting", "measured"), MEASURED)
def test_the_prediction_is_within_three_hundredths_of_what_was_measured(shape, method, setting, measured):
    assert peak_bytes(shape, method, setting) / GIB == pytest.approx(measured, rel=0.03)


def test_the_shape_is_read_from_a_models_configuration():
    assert Shape.of(model_shapes.LLAMA_3B) == LLAMA_3B


def plan(gib, *, shape=LLAMA_3B, method=Method(16), **asked):  # noqa: B008
    return make_plan(
        shape,
        method,
        **{"batch_size": 16, "accumulation": 1, "longest": 1024, **asked},
        limit_bytes=int(gib * GIB),
    )


def test_nothing_is_recomputed_where_all_fits():
    made = plan(78)
    assert (made.setting.num_checkpointed, made.batch_size, made.fits) == (0, 16, True)
    assert made.reasons == ("no layer recomputed: all activations fit 78.0 GiB",)


def test_what_is_asked_of_the_layers_is_planned_and_predicted():
    made = plan(78, recompute=True)
    assert made.setting.num_checkpointed == 28
    assert made.predicted_bytes < plan(78).predicted_bytes / 3
    assert made.reasons == ("every layer recomputed, as train.gradient_checkpointing says",)
    made = plan(24, recompute=False)
    assert (made.setting.num_checkpointed, made.fits) == (0, True)
    assert made.batch_size * made.accumulation == 16
    assert made.batch_size < plan(24).batch_size
    assert "do not fit 24.0 GiB without recomputed layers" in made.reasons[0]


def test_no_more_layers_are_recomputed_than_memory_demands():
    made = plan(14)
    assert 0 < made.setting.num_checkpointed < 28
    assert made.predicted_bytes <= 14 * GIB
    fewer = Setting(made.setting.num_checkpointed - 1, True, made.setting.tokens)
    assert peak_bytes(LLAMA_3B, Method(16), fewer) > 14 * GIB


def test_a_batch_that_does_not_fit_is_taken_in_passes_of_the_same_sum():
    made = plan(9)
    assert made.fits
    assert made.batch_size < 16
    assert made.batch_size * made.accumulation == 16
    assert made.setting.accumulates


def test_four_bit_weights_are_held_unpacked_only_where_that_costs_no_recomputing():
    assert plan(78, shape=QWEN_14B, method=QLORA, batch_size=1, longest=4096).setting.unpacked
    made = plan(40, shape=QWEN_14B, method=QLORA, batch_size=1, longest=4096)
    assert (made.setting.unpacked, made.setting.num_checkpointed) == (False, 0)
    made = plan(14, shape=QWEN_14B, method=QLORA, batch_size=1, longest=4096)
    assert not made.setting.unpacked
    assert made.setting.num_checkpointed > 40
    assert made.fits


def test_what_never_fits_is_said_with_the_smallest_way():
    made = plan(4)
    assert not made.fits
    assert (made.batch_size, made.accumulation, made.setting.num_checkpointed) == (1, 16, 28)


@pytest.mark.parametrize("method", [QLORA, Method(128, dora=True, dropout=True), Method(16, moment_bytes=2)])
@pytest.mark.parametrize("gib", [8, 9.5, 12, 24, 32, 78])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_whether_four_bits_are_needed_is_what_the_16_bit_plan_says(method, gib, batch_size):
    wide = {"batch_size": batch_size, "longest": 2048}
    fits = plan(gib, shape=QWEN_14B, method=replace(method, four_bit=False), **wide).fits
    options = TrainOptions(per_device_train_batch_size=batch_size)
    told = planned.on_four_bits(QWEN_14B, method, options, longest=2048, limit=int(gib * GIB))
    assert told.startswith("4 bits are not needed" if fits else "4 bits are needed")
