"""Dropout in the written-out layers against PEFT's modules with the same masks."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from fintune.training.fused import kernels_torch  # noqa: E402
from fintune.training.fused.dropout import dropout_mask  # noqa: E402
from fintune.training.fused.model import FusedModel, unsupported_reason  # noqa: E402
from training.fused.test_layers import (  # noqa: E402
    LENGTHS,
    gradients,
    largest_difference,
    loss_of_layers,
    loss_of_modules,
    make,
)

SHARE, SEED = 0.3, 5
GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


class SameMask(torch.nn.Module):
    """In place of a module's dropout: the rows of the batch come one after the other."""

    def __init__(self, mask, index, num_in):
        super().__init__()
        self.mask, self.at = mask.apply(torch.ones(sum(LENGTHS), num_in), index), 0

    def forward(self, x):
        rows = self.mask[self.at : self.at + x.shape[1]]
        self.at += x.shape[1]
        return x * rows


def with_masks(model):
    """Give the modules the masks that the layers will draw."""
    torch.manual_seed(SEED)
    seed = int(torch.randint(2**31, ()))
    for number, layer in enumerate(model.get_base_model().model.layers):
        for group, names in enumerate(GROUPS):
            for place, name in enumerate(names):
                module = getattr(layer.self_attn if group < 2 else layer.mlp, name)
                if hasattr(module, "lora_dropout"):
                    drop = dropout_mask(SHARE, seed, number, group)
                    module.lora_dropout["default"] = SameMask(drop, place, module.in_features)
    return model.train()


def trained(family, *, dora=False, num_checkpointed=0, **lora):
    model = make(family, dora=dora, lora_dropout=SHARE, **lora)
    assert unsupported_reason(model) is None
    torch.manual_seed(SEED)
    loss = loss_of_layers(FusedModel(model, dtype=torch.float32, num_checkpointed=num_checkpointed))
    loss.mean.backward()
    return loss, model


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj", "down_proj"]])
@pytest.mark.parametrize("num_checkpointed", [0, 1])
def test_dropout_gives_the_gradients_of_the_modules(family, dora, targets, num_checkpointed):
    theirs = with_masks(make(family, dora=dora, targets=targets, lora_dropout=SHARE))
    expected = loss_of_modules(theirs)
    expected.backward()
    loss, own = trained(family, dora=dora, targets=targets, num_checkpointed=num_checkpointed)
    assert loss.mean.item() == pytest.approx(expected.item(), rel=1e-6)
    assert largest_difference(gradients(own), gradients(theirs)) < 1e-5


@pytest.mark.parametrize("lora", [{"rank_pattern": {"q_proj": 8}}, {"alpha_pattern": {"v_proj": 2}}])
def test_ranks_and_scalings_may_differ_in_a_group(lora):
    theirs = with_masks(make("llama", dora=True, lora_dropout=SHARE, **lora))
    loss_of_modules(theirs).backward()
    _, own = trained("llama", dora=True, **lora)
    assert largest_difference(gradients(own), gradients(theirs)) < 1e-5


def test_batches_have_new_masks_and_evaluations_none():
    model = FusedModel(make("llama", lora_dropout=SHARE), dtype=torch.float32)
    plain = FusedModel(make("llama"), dtype=torch.float32)
    torch.manual_seed(0)
    first, second = (loss_of_layers(model).mean.item() for _ in range(2))
    torch.manual_seed(0)
    assert loss_of_layers(model).mean.item() == first != second
    assert loss_of_layers(model, training=False).mean.item() == loss_of_layers(plain).mean.item() != first


def test_masks_differ_between_layers():
    seeds = {dropout_mask(SHARE, 1, layer, group).seed for layer in range(3) for group in range(4)}
    assert len({seed + place for seed in seeds for place in range(3)}) == 3 * 4 * 3
    assert dropout_mask(0.0, 1, 0, 0) is None
    assert dropout_mask(SHARE, None, 0, 0) is None


def test_mask_keeps_its_probability_and_the_mean():
    x = torch.ones(200, 300)
    made = kernels_torch.dropout(x, SHARE, 3)
    assert float((made == 0).float().mean()) == pytest.approx(SHARE, abs=0.01)
    assert float(made.mean()) == pytest.approx(1, abs=0.02)
    assert torch.equal(made, kernels_torch.dropout(x, SHARE, 3))
    assert not torch.equal(made, kernels_torch.dropout(x, SHARE, 4))


def test_different_dropouts_are_unsupported():
    model = make("llama", lora_dropout=SHARE)
    model.get_base_model().model.layers[0].mlp.up_proj.lora_dropout["default"].p = 0.1
    assert unsupported_reason(model) == "its adapters have different dropouts"
