"""Which trainings through transformers' layers recompute their activations."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from fintune.config import AdapterOptions, TrainOptions
from fintune.models import load as models
from fintune.training import adapter, planned, recompute, shard
from fintune.training.memory import Method, Shape, modules_peak_bytes
from fintune.training.plan import GIB
from support.model_shapes import LLAMA_3B

torch = pytest.importorskip("torch")

SHAPE = Shape.of(LLAMA_3B)
BATCH = TrainOptions(per_device_train_batch_size=16)


def test_layers_are_recomputed_where_their_activations_are_not_sure_to_fit():
    need = modules_peak_bytes(SHAPE, Method(16), tokens=16 * 64, recomputed=False, accumulates=False)
    asked = {"longest": 64}
    assert planned.must_recompute(SHAPE, Method(16), BATCH, **asked, limit=need)
    assert not planned.must_recompute(SHAPE, Method(16), BATCH, **asked, limit=int(need / 0.89))
    # Weights in parts leave room for activations.
    assert not planned.must_recompute(SHAPE, Method(16), BATCH, **asked, limit=need, parts=8)


@pytest.mark.parametrize("said", [True, False])
def test_what_the_user_says_is_done(said):
    options = TrainOptions(gradient_checkpointing=said)
    assert planned.must_recompute(SHAPE, Method(16), options, longest=10**6, limit=1) is said
    assert recompute.settle(SimpleNamespace(), options, [8]) is options


@pytest.fixture
def on_gpu(tiny_model, monkeypatch):
    """A tiny adapted model for which the code believes in a GPU of so much memory."""
    model = adapter.attach(models.load_model(models.fetch(str(tiny_model)), dtype="float32"), AdapterOptions(r=4))
    monkeypatch.setattr(shard, "is_divided", lambda _options: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def settled(free, **options):
        monkeypatch.setattr(planned, "free_bytes", lambda *_: planned.RESERVE_BYTES + free)
        return recompute.settle(model, TrainOptions(**options), [64, 32]).gradient_checkpointing

    return settled


def test_on_a_gpu_the_memory_decides_and_unknown_ways_recompute(on_gpu, capsys):
    assert on_gpu(GIB) is False
    assert on_gpu(1000) is True
    capsys.readouterr()
    assert on_gpu(GIB, objective="dpo") is True
    assert "all recomputed, since it is not known how much memory they would" in " ".join(
        capsys.readouterr().err.split()
    )


def test_a_cpu_recomputes_nothing(tiny_model):
    model = models.load_model(models.fetch(str(tiny_model)), dtype="float32")
    assert recompute.settle(model, TrainOptions(), [10**6]).gradient_checkpointing is False
