from __future__ import annotations

import pytest

from fintune.models import load as models
from fintune.training import cpu_layers

torch = pytest.importorskip("torch")


@pytest.fixture
def model(tiny_model):
    return models.load_model(models.fetch(str(tiny_model)), dtype="bfloat16", device="cpu")


def logits_and_gradient(model, length, mask=None):
    ids = torch.arange(3, 3 + 2 * length).reshape(2, length) % 300
    weight = model.model.layers[0].self_attn.q_proj.weight
    weight.grad = None
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
    logits[:, -1].pow(2).sum().backward()
    return logits.detach(), weight.grad.float().clone()


def close(a, b):
    return float((a - b).norm() / b.norm()) < 0.02


@pytest.mark.parametrize("length", [2, 65])
def test_cpu_attention_equals_torch(model, length):
    torchs = logits_and_gradient(model, length)
    assert cpu_layers.use_cpu_attention(model)
    own = logits_and_gradient(model, length)
    assert close(own[0], torchs[0])
    assert close(own[1], torchs[1])


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_does_not_call_the_torch_kernel(tiny_model, monkeypatch, autocast):
    dtype = "float32" if autocast else "bfloat16"
    model = models.load_model(models.fetch(str(tiny_model)), dtype=dtype, device="cpu")
    cpu_layers.use_cpu_attention(model)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", None)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        logits = model(input_ids=torch.arange(3, 43)[None]).logits
    assert logits.isfinite().all()


def test_a_later_token_changes_nothing_before_it(model):
    cpu_layers.use_cpu_attention(model)
    ids = torch.arange(3, 43)[None]
    before = model(input_ids=ids).logits
    ids[0, 30] = 7
    after = model(input_ids=ids).logits
    assert torch.equal(before[:, :30], after[:, :30])
    assert not torch.equal(before[:, 30:], after[:, 30:])


def test_padding_masks_and_long_sequences_go_to_torchs_kernel(model, monkeypatch):
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, :5] = 0
    torchs = logits_and_gradient(model, 20, mask)[0]
    long = logits_and_gradient(model, 30)[0]
    cpu_layers.use_cpu_attention(model)
    assert torch.equal(logits_and_gradient(model, 20, mask)[0], torchs)
    monkeypatch.setattr(cpu_layers, "_MAX_SCORES", 100)
    assert torch.equal(logits_and_gradient(model, 30)[0], long)


def test_other_attention_is_left_unchanged(model):
    model.set_attn_implementation("eager")
    assert not cpu_layers.use_cpu_attention(model)
    assert model.config._attn_implementation == "eager"
