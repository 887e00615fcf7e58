"""A transformers model with PEFT's adapters, trained through this package's layers.

The modules stay what they are: PEFT's parameters are the ones that are trained and saved, and the base weights are the
model's own. Only the way through them is another.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fintune.training.fused.adapted import Adapted
from fintune.training.fused.attend import Sequences
from fintune.training.fused.bordered import Group
from fintune.training.fused.head import Loss, loss_of
from fintune.training.fused.kernels import HeadParts
from fintune.training.fused.layer import Layer
from fintune.training.fused.stack import Stack
from fintune.training.memory.model import FUSED_FAMILIES

if TYPE_CHECKING:
    from peft import PeftModel

_PARTS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def unsupported_reason(model: PeftModel) -> str | None:
    """Why a model cannot be trained through these layers; None where it can.

    Args:
        model: With LoRA or DoRA adapters.
    """
    return next(_unsupported_reasons(model), None)


def _unsupported_reasons(model: PeftModel) -> Iterator[str]:
    config = model.get_base_model().config
    if config.model_type not in FUSED_FAMILIES:
        yield f"the layers of {config.model_type} are not written out (those of {', '.join(FUSED_FAMILIES)} are)"
        return
    if config.hidden_act not in ("silu", "swish"):
        yield f"its activation is {config.hidden_act}"
    if getattr(config, "use_sliding_window", config.model_type == "mistral") and getattr(
        config, "sliding_window", None
    ):
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
    shares: set[float] = set()
    for path, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        name = path.rpartition(".")[2]
        ranks.setdefault(name, []).extend(module.r.values())
        shares |= {_dropout(module)}
        if len(module.active_adapters) != 1:
            yield "it has several adapters"
    if len(shares) > 1:
        yield "its adapters have different dropouts"
    for name, found in ranks.items():
        if name not in _PARTS:
            yield f"it adapts {name}"
        elif len(found) != num_layers:
            yield f"not every layer's {name} has an adapter"
        elif len(set(found)) > 1:
            yield f"the adapters of {name} have different ranks"


class FusedModel:
    """The way through a model.

    Args:
        model: For which :func:`unsupported_reason` finds nothing.
        dtype: Type of the products; the hidden states have the embeddings' type.
        keep: Hold 16-bit copies of 4-bit weights instead of unpacking them at every use.
        num_checkpointed: Layers, from the first, that keep their input only.
    """

    def __init__(self, model: PeftModel, *, dtype: torch.dtype, keep: bool = True, num_checkpointed: int = 0) -> None:
        base: Any = model.get_base_model()
        self._inner = base.model
        self._head = base.get_output_embeddings()
        config = base.config
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.layers = [
            _layer(module, config, width, dtype, number=at, checkpoint=at < num_checkpointed)
            for at, module in enumerate(self._inner.layers)
        ]
        kinds = zip(*(layer.groups for layer in self.layers), strict=True)
        self._stacks = [Stack(groups, keep=keep) for groups in kinds]
        self._eps = config.rms_norm_eps
        self._head_copy = None
        if self._head.weight.dtype != dtype:
            self._head_copy = self._head.weight.detach().to(dtype)

    def loss(
        self,
        input_ids: Tensor,
        positions: Tensor,
        sequences: Sequences,
        rows: Tensor,
        targets: Tensor,
        num_labels: Tensor | float,
        *,
        training: bool = True,
    ) -> Loss:
        """Loss of a batch of sequences that lie behind each other.

        Args:
            input_ids: [tokens].
            positions: Of each token in its sequence, [tokens].
            sequences: Their borders.
            rows: Indices of the tokens that predict a label.
            targets: The labels.
            num_labels: See :func:`fintune.training.fused.head.loss_of`.
            training: With dropout, where the adapters have one.
        """
        for stack in self._stacks:
            stack.refresh()
        hidden = self._inner.embed_tokens(input_ids)
        cos, sin = self._inner.rotary_emb(hidden[None], position_ids=positions[None])
        cos, sin = cos[0], sin[0]
        # From the generator that checkpoints keep, so that a resumed run drops the same.
        seed = int(torch.randint(2**31, ())) if training and self.layers[0].dropout else None
        for layer in self.layers:
            hidden = layer(hidden, cos, sin, sequences, seed)
        head = self._head.weight if self._head_copy is None else self._head_copy
        return loss_of(hidden, rows, targets, self._inner.norm.weight, self._eps, head, num_labels)


def _layer(module: Any, config: Any, width: int, dtype: torch.dtype, *, number: int, checkpoint: bool) -> Layer:
    attention, mlp = module.self_attn, module.mlp
    parts = [attention.q_proj, attention.k_proj, attention.v_proj]
    adapted = [_adapted(each) for each in parts]
    biases = [each.base.bias for each in adapted]
    bias = None
    if any(each is not None for each in biases):
        bias = torch.cat(
            [
                each.base.weight.new_zeros(each.base.out_features, dtype=dtype) if part is None else part.detach()
                for each, part in zip(adapted, biases, strict=True)
            ]
        )
    output = _adapted(attention.o_proj)
    assert output.base.bias is None, "no family here has a bias there"
    norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    return Layer(
        qkv=Group(adapted, dtype=dtype),
        output=Group([output], dtype=dtype),
        gate_up=Group([_adapted(mlp.gate_proj), _adapted(mlp.up_proj)], dtype=dtype),
        down=Group([_adapted(mlp.down_proj)], dtype=dtype),
        norms=(module.input_layernorm.weight, module.post_attention_layernorm.weight),
        eps=config.rms_norm_eps,
        heads=HeadParts(
            num_heads=config.num_attention_heads,
            num_key_heads=config.num_key_value_heads,
            scale=None,
            bias=bias,
            query_norm=None if norms[0] is None else norms[0].weight,
            key_norm=None if norms[1] is None else norms[1].weight,
            eps=config.rms_norm_eps,
        ),
        scaling=width**-0.5,
        checkpoint=checkpoint,
        dropout=max(map(_dropout_of, (*attention.children(), *mlp.children()))),
        number=number,
    )


def _dropout_of(module: Any) -> float:
    from peft.tuners.lora import LoraLayer

    return _dropout(module) if isinstance(module, LoraLayer) else 0.0


def _dropout(module: Any) -> float:
    return max((drop.p for drop in module.lora_dropout.values() if isinstance(drop, nn.Dropout)), default=0.0)


def _adapted(module: Any) -> Adapted:
    from peft.tuners.lora import LoraLayer

    if not isinstance(module, LoraLayer):
        return Adapted(module)
    (name,) = module.active_adapters
    magnitude = module.lora_magnitude_vector[name].weight if name in module.lora_magnitude_vector else None
    return Adapted(
        module.get_base_layer(),
        module.lora_A[name].weight,
        module.lora_B[name].weight,
        float(module.scaling[name]),
        magnitude,
    )
