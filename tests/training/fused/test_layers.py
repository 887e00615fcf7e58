"""Losses and gradients of the written-out layers against transformers' modules with PEFT's adapters."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from fintune.training.fused.batch import PackedCollator, SequenceBounds  # noqa: E402
from fintune.training.fused.model import FusedModel, unsupported_reason  # noqa: E402
from fintune.util.console import quiet_libraries  # noqa: E402

LENGTHS = (9, 17, 5)
SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 112,
    "vocab_size": 300,
}
FAMILIES = {"llama": {}, "mistral": {"sliding_window": None}, "qwen2": {}, "qwen3": {"head_dim": 32}}


def make(family, *, dora=False, targets="all-linear", dtype=torch.float32, **lora):
    """A small random model with adapters that do something; the same at every call."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SHAPE, **FAMILIES[family], tie_word_embeddings=family != "qwen2")
    model = AutoModelForCausalLM.from_config(config)
    for name, weight in model.named_parameters():
        if "bias" in name or "norm" in name:
            weight.data.add_(0.1 * torch.randn_like(weight))
    config = LoraConfig(
        **{"r": 4, "lora_alpha": 12, **lora}, target_modules=targets, use_dora=dora, task_type="CAUSAL_LM"
    )
    with quiet_libraries():
        model = get_peft_model(model.to(dtype), config)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, 0.1)
        if "magnitude" in name:
            weight.data.mul_(1 + 0.1 * torch.randn_like(weight))
    return model


def rows():
    draw = torch.Generator().manual_seed(1)
    return [
        {
            "id": str(at),
            "input_ids": torch.randint(0, 300, (length,), generator=draw).tolist(),
            "completion_mask": [0] * 3 + [1] * (length - 3),
        }
        for at, length in enumerate(LENGTHS)
    ]


def loss_of_modules(model, dtype=torch.float32):
    total, count = 0.0, 0
    for row in rows():
        ids = torch.tensor([row["input_ids"]])
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = model(input_ids=ids).logits[0].float()
        total = total + torch.nn.functional.cross_entropy(logits[2:-1], ids[0, 3:], reduction="sum")
        count += len(row["input_ids"]) - 3
    return total / count


def loss_of_layers(fused, **options):
    batch = PackedCollator()(rows())
    return fused.loss(
        batch["input_ids"][0],
        batch["position_ids"][0],
        SequenceBounds(batch["lengths"], batch["offsets"]),
        batch["rows"],
        batch["targets"],
        len(batch["targets"]),
        **options,
    )


def gradients(model):
    return {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}


def largest_difference(own, theirs):
    assert own.keys() == theirs.keys()
    assert all(each is not None for each in own.values())
    return max(float((own[name] - theirs[name]).norm() / theirs[name].norm()) for name in own)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj", "down_proj"]])
@pytest.mark.parametrize("num_checkpointed", [0, 1])
def test_loss_and_gradients_equal_the_modules(family, dora, targets, num_checkpointed):
    theirs, own = (make(family, dora=dora, targets=targets) for _ in range(2))
    expected = loss_of_modules(theirs)
    expected.backward()
    assert unsupported_reason(own) is None
    loss = loss_of_layers(FusedModel(own, dtype=torch.float32, num_checkpointed=num_checkpointed))
    loss.mean.backward()
    assert loss.mean.item() == pytest.approx(expected.item(), rel=1e-6)
    assert largest_difference(gradients(own), gradients(theirs)) < 1e-5


@pytest.mark.parametrize("dora", [False, True])
def test_bfloat16_is_as_close_as_peft_autocast(dora):
    exact, theirs, own = (make("llama", dora=dora) for _ in range(3))
    loss_of_modules(exact).backward()
    expected = loss_of_modules(theirs, torch.bfloat16)
    expected.backward()
    loss = loss_of_layers(FusedModel(own, dtype=torch.bfloat16))
    loss.mean.backward()
    assert loss.mean.item() == pytest.approx(expected.item(), rel=2e-3)
    # No further from float32 than PEFT under autocast is.
    own_error = largest_difference(gradients(own), gradients(exact))
    assert own_error < 1.5 * largest_difference(gradients(theirs), gradients(exact))


@pytest.mark.parametrize(
    "lora", [{"use_rslora": True}, {"rank_pattern": {"q_proj": 8}}, {"alpha_pattern": {"v_proj": 2}}]
)
def test_ranks_and_scalings_may_differ_in_a_group(lora):
    theirs, own = (make("llama", dora=True, **lora) for _ in range(2))
    loss_of_modules(theirs).backward()
    loss_of_layers(FusedModel(own, dtype=torch.float32)).mean.backward()
    assert largest_difference(gradients(own), gradients(theirs)) < 1e-5


@pytest.mark.parametrize("hold", [True, False])
def test_optimizer_steps_reach_the_layers(hold):
    losses = []
    for fused in (False, True):
        model = make("llama", dora=True)
        layers = FusedModel(model, dtype=torch.float32, hold=hold) if fused else None
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        optimiser = torch.optim.AdamW(weights, lr=1e-2, fused=True)
        seen = []
        for _ in range(4):
            loss = loss_of_layers(layers).mean if layers else loss_of_modules(model)
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            seen.append(loss.item())
        losses.append(seen)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[0][-1] < losses[0][0] - 0.05


def test_modules_compute_the_same_with_held_weights():
    model = make("qwen2")
    before = loss_of_modules(model).detach()
    names = {name: weight.shape for name, weight in model.named_parameters()}
    FusedModel(model, dtype=torch.float32)
    assert {name: weight.shape for name, weight in model.named_parameters()} == names
    assert torch.equal(loss_of_modules(model).detach(), before)


def test_loss_is_the_same_in_chunks(monkeypatch):
    from fintune.training.fused import loss

    model = make("llama")
    fused = FusedModel(model, dtype=torch.float32)
    whole = loss_of_layers(fused)
    monkeypatch.setattr(loss, "MAX_CHUNK_LOGITS", 300 * 4)
    pieces = loss_of_layers(fused)
    assert torch.allclose(whole.losses, pieces.losses, rtol=1e-6)
    assert whole.mean.item() == pytest.approx(whole.losses.mean().item(), rel=1e-6)
    assert len(whole.losses) == sum(LENGTHS) - 3 * len(LENGTHS) == len(whole.is_top1)


def test_evaluation_takes_no_gradient():
    fused = FusedModel(make("llama"), dtype=torch.float32)
    with torch.no_grad():
        assert not loss_of_layers(fused).mean.requires_grad


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda model: setattr(model.get_base_model().config, "model_type", "gemma3"), "gemma3 are not implemented"),
        (lambda model: setattr(model.get_base_model().config, "hidden_act", "gelu"), "activation is gelu"),
        (lambda model: setattr(model.get_base_model().config, "mlp_bias", True), "feed-forward layers have a bias"),
        (lambda model: setattr(model.get_base_model().config, "attention_dropout", 0.1), "its attention has dropout"),
    ],
)
def test_unsupported_reason_names_the_feature(spoil, reason):
    model = make("llama")
    assert unsupported_reason(model) is None
    spoil(model)
    assert reason in unsupported_reason(model)


def test_uneven_adapters_are_unsupported():
    assert "different ranks" in unsupported_reason(make("llama", rank_pattern={"layers.0.self_attn.q_proj": 8}))
    assert "not every layer's q_proj" in unsupported_reason(make("llama", targets=["q_proj"], layers_to_transform=[1]))
