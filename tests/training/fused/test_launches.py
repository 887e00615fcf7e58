"""How many operations a step gives the GPU: what bounds a small batch."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from fintune.training.fused import kernels_torch  # noqa: E402
from fintune.training.fused.model import FusedModel  # noqa: E402
from training.fused.test_layers import SHAPE, loss_of_layers, make  # noqa: E402

# They give the GPU nothing to do.
SILENT = {"empty", "new_empty", "empty_like", "empty_strided", "detach", "set_", "resize_", "_to_copy", "scalar_tensor"}


class Launches(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count, self.inside = 0, False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not (self.inside or function.is_view or function._schema.name.removeprefix("aten::") in SILENT):
            self.count += 1
        return function(*args, **(kwargs or {}))


def launches(monkeypatch, **options):
    """Of a forward and backward pass, where each elementwise pass is one, as on a GPU."""
    counter = Launches()

    def one(function):
        def run(*args):
            counter.count += 1
            counter.inside = True
            try:
                return function(*args)
            finally:
                counter.inside = False

        return run

    proxy = SimpleNamespace(
        **{name: one(value) for name, value in vars(kernels_torch).items() if callable(value) and name.islower()}
    )
    proxy.num_sums = kernels_torch.num_sums
    monkeypatch.setattr(kernels_torch, "kernels_for", lambda _tensor: proxy)
    fused = FusedModel(make("llama", **options), dtype=torch.float32)
    with counter:
        loss_of_layers(fused).mean.backward()
    return counter.count


def per_layer(monkeypatch, **options):
    found = []
    for num_layers in (1, 3):
        with monkeypatch.context() as patch:
            patch.setitem(SHAPE, "num_hidden_layers", num_layers)
            found.append(launches(patch, **options))
    each, rest = divmod(found[1] - found[0], 2)
    assert rest == 0
    return each, found[0] - each


def test_dora_adds_three_launches_per_layer(monkeypatch):
    lora, lora_once = per_layer(monkeypatch)
    dora, dora_once = per_layer(monkeypatch, dora=True)
    assert dora - lora <= 3  # two factors' backward passes, and the sum of the blocks
    assert dora_once - lora_once <= 4 * 4  # for each of four stacks: two products, the factors, and where they go
