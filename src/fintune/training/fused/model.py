"""A model of transformers with PEFT's adapters, trained through the fused layers.

The modules do not change: PEFT's parameters are trained and saved, and the base weights are those of the model. Only
the computation takes another path.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fintune.training.fused.batch import SequenceBounds
from fintune.training.fused.decoder_layer import FusedDecoderLayer
from fintune.training.fused.kernels_torch import HeadTransform
from fintune.training.fused.lora_linear import AdaptedLinear, LinearGroup
from fintune.training.fused.loss import LabelLoss, label_loss
from fintune.training.fused.stack import GroupStack
from fintune.training.memory.model import FUSED_FAMILIES, LINEAR_LAYERS
from fintune.training.verify import allowed_difference, own_log_probs

if TYPE_CHECKING:
    from peft import PeftModel


def unsupported_reason(model: PeftModel) -> str | None:
    """Return why the fused layers cannot train a model; None if they can.

    Args:
        model: A model with LoRA or DoRA adapters.
    """
    return next(_unsupported_reasons(model), None)


def _unsupported_reasons(model: PeftModel) -> Iterator[str]:
    config = model.get_base_model().config
    if config.model_type not in FUSED_FAMILIES:
        yield f"the layers of {config.model_type} are not implemented (those of {', '.join(FUSED_FAMILIES)} are)"
        return
    if config.hidden_act not in ("silu", "swish"):
        yield f"its activation is {config.hidden_act}"
    uses_window = getattr(config, "use_sliding_window", config.model_type == "mistral")
    if uses_window and getattr(config, "sliding_window", None):
        yield "it attends through a sliding window"
    if getattr(config, "mlp_bias", False):
        yield "its feed-forward layers have a bias"
    if config.model_type in ("llama", "mistral", "qwen3") and getattr(config, "attention_bias", False):
        yield "its attention has a bias at its output"
    if getattr(config, "attention_dropout", 0):
        yield "its attention has dropout"
    yield from _unsupported_adapters(model, config.num_hidden_layers)


def _unsupported_adapters(model: PeftModel, num_layers: int) -> Iterator[str]:
    from peft.tuners.lora import LoraLayer

    ranks: dict[str, list[int]] = {}
    dropouts: set[float] = set()
    for path, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        name = path.rpartition(".")[2]
        ranks.setdefault(name, []).extend(module.r.values())
        dropouts.add(_dropout(module))
        if len(module.active_adapters) != 1:
            yield "it has several adapters"
    if len(dropouts) > 1:
        yield "its adapters have different dropouts"
    for name, layer_ranks in ranks.items():
        if name not in LINEAR_LAYERS:
            yield f"it adapts {name}"
        elif len(layer_ranks) != num_layers:
            yield f"not every layer's {name} has an adapter"
        elif len(set(layer_ranks)) > 1:
            yield f"the adapters of {name} have different ranks"


def differing_reason(model: PeftModel, ids: Sequence[int], compute: str) -> str | None:
    """Return by how much the fused layers differ from a supported model's own logits on a row; None if by rounding."""
    own = own_log_probs(model, ids, compute=compute)
    was_training = model.training
    fused = FusedModel(model.eval(), dtype=getattr(torch, compute), hold=False)
    tokens = torch.tensor(list(ids), device=model.device)
    bounds = SequenceBounds((len(ids),), torch.tensor([0, len(ids)], dtype=torch.int32, device=model.device))
    positions = torch.arange(len(ids), device=model.device)
    with torch.no_grad(), torch.autocast(model.device.type, enabled=False):
        loss = fused.loss(tokens, positions, bounds, positions[:-1], tokens[1:], 1.0, training=False)
    model.train(was_training)
    difference = float((own + loss.losses.cpu()).abs().mean())
    allowed = allowed_difference(own, getattr(torch, compute))
    if not difference > allowed:  # logits that are not finite stop the first step, with its examples
        return None
    return f"the fused layers differ from the model by {difference:.2g} a token (rounding explains {allowed:.2g})"


class FusedModel:
    """Computes the loss of a model through the fused layers.

    Args:
        model: A model for which :func:`unsupported_reason` returns None.
        dtype: Type of the products. The hidden states have the type of the embeddings.
        hold: Hold 16-bit copies of 4-bit weights instead of dequantizing them at every use.
        num_checkpointed: Number of layers, from the first, that save only their input.
    """

    def __init__(self, model: PeftModel, *, dtype: torch.dtype, hold: bool = True, num_checkpointed: int = 0) -> None:
        base: Any = model.get_base_model()
        self._inner = base.model
        self._head = base.get_output_embeddings()
        config = base.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.layers = [
            _fused_layer(module, config, head_dim, dtype, index=index, checkpoint=index < num_checkpointed)
            for index, module in enumerate(self._inner.layers)
        ]
        groups_by_kind = zip(*(layer.groups for layer in self.layers), strict=True)
        self._stacks = [GroupStack(groups, hold=hold) for groups in groups_by_kind]
        self._eps = config.rms_norm_eps
        self._head_copy = None
        if self._head.weight.dtype != dtype:
            self._head_copy = self._head.weight.detach().to(dtype)

    def loss(
        self,
        input_ids: Tensor,
        positions: Tensor,
        bounds: SequenceBounds,
        rows: Tensor,
        targets: Tensor,
        num_labels: Tensor | float,
        *,
        training: bool = True,
    ) -> LabelLoss:
        """Compute the loss of a batch of concatenated sequences, see :func:`fintune.training.fused.loss.label_loss`.

        Args:
            input_ids: [tokens].
            positions: Position of each token in its sequence, [tokens].
            bounds: Bounds of the sequences.
            rows: Indices of the tokens that predict a label, [labels].
            targets: The labels, [labels].
            num_labels: Divisor of the sum.
            training: Whether the adapters' dropout is applied.
        """
        for stack in self._stacks:
            stack.refresh()
        hidden = self._inner.embed_tokens(input_ids)  # [tokens, hidden]
        cos, sin = self._inner.rotary_emb(hidden[None], position_ids=positions[None])
        cos, sin = cos[0], sin[0]  # [tokens, head_dim]
        # From the generator whose state is in the checkpoints, so that a resumed run drops the same numbers.
        seed = int(torch.randint(2**31, ())) if training and self.layers[0].dropout else None
        for layer in self.layers:
            hidden = layer(hidden, cos, sin, bounds, seed)
        head = self._head.weight if self._head_copy is None else self._head_copy
        return label_loss(hidden, rows, targets, self._inner.norm.weight, self._eps, head, num_labels)


def _fused_layer(
    module: Any, config: Any, head_dim: int, dtype: torch.dtype, *, index: int, checkpoint: bool
) -> FusedDecoderLayer:
    attention, mlp = module.self_attn, module.mlp
    qkv = [_adapted_linear(projection) for projection in (attention.q_proj, attention.k_proj, attention.v_proj)]
    output = _adapted_linear(attention.o_proj)
    assert output.base.bias is None, "no supported family has a bias there"
    norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    return FusedDecoderLayer(
        qkv=LinearGroup(qkv, dtype=dtype),
        output=LinearGroup([output], dtype=dtype),
        gate_up=LinearGroup([_adapted_linear(mlp.gate_proj), _adapted_linear(mlp.up_proj)], dtype=dtype),
        down=LinearGroup([_adapted_linear(mlp.down_proj)], dtype=dtype),
        norms=(module.input_layernorm.weight, module.post_attention_layernorm.weight),
        eps=config.rms_norm_eps,
        heads=HeadTransform(
            num_heads=config.num_attention_heads,
            num_key_heads=config.num_key_value_heads,
            scale=None,
            bias=_joined_bias(qkv, dtype),
            query_norm=None if norms[0] is None else norms[0].weight,
            key_norm=None if norms[1] is None else norms[1].weight,
            eps=config.rms_norm_eps,
        ),
        scaling=head_dim**-0.5,
        checkpoint=checkpoint,
        dropout=max(map(_dropout_if_adapted, (*attention.children(), *mlp.children()))),
        index=index,
    )


def _joined_bias(linears: list[AdaptedLinear], dtype: torch.dtype) -> Tensor | None:
    """Return the biases of layers one after the other, [out]; None if no layer has a bias."""
    biases = [linear.base.bias for linear in linears]
    if all(bias is None for bias in biases):
        return None
    return torch.cat(
        [
            linear.base.weight.new_zeros(linear.base.out_features, dtype=dtype) if bias is None else bias.detach()
            for linear, bias in zip(linears, biases, strict=True)
        ]
    )


def _dropout_if_adapted(module: Any) -> float:
    from peft.tuners.lora import LoraLayer

    return _dropout(module) if isinstance(module, LoraLayer) else 0.0


def _dropout(module: Any) -> float:
    return max((drop.p for drop in module.lora_dropout.values() if isinstance(drop, nn.Dropout)), default=0.0)


def _adapted_linear(module: Any) -> AdaptedLinear:
    from peft.tuners.lora import LoraLayer

    if not isinstance(module, LoraLayer):
        return AdaptedLinear(module)
    (name,) = module.active_adapters
    magnitude = module.lora_magnitude_vector[name].weight if name in module.lora_magnitude_vector else None
    return AdaptedLinear(
        module.get_base_layer(),
        module.lora_A[name].weight,
        module.lora_B[name].weight,
        float(module.scaling[name]),
        magnitude,
    )
