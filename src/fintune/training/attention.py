"""Causal attention of short sequences in bfloat16 on a CPU.

torch's fused kernel is written for float32: in bfloat16 its backward pass takes longer than both matrix products with
the scores held in memory (9 heads of 64, 345 tokens: 12.3 ms against 4.8 ms with AVX-512).
In training the score matrix of a report page is small enough to hold.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

_NAME = "fintune_short_causal"
# Scores that are held for the backward pass, a layer; 32 MiB of bfloat16.
_MAX_SCORES = 2**24


def use_short_causal_attention(model: PreTrainedModel) -> bool:
    """Let a model that would use torch's kernel attend through this file where that is faster, in training.

    Args:
        model: A base model of transformers, on a CPU.

    Returns:
        False where the model attends in another way already; it is left alone.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    if model.config._attn_implementation != "sdpa":
        return False
    AttentionInterface.register(_NAME, _attend)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    model.set_attn_implementation(_NAME)
    return True


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **rest: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Shapes: query [batch, heads, length, width], key and value [batch, key heads, length, width]."""
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    batch, heads, length, _ = query.shape
    # Under autocast the rotary embedding leaves float32, and torch's kernel would be handed bfloat16.
    autocast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    in_bfloat16 = autocast or query.dtype == torch.bfloat16
    plain = attention_mask is None and dropout == 0.0 and key.shape[2] == length and not rest.get("sliding_window")
    held = batch * heads * length * length <= _MAX_SCORES
    if not (plain and held and scaling is not None and length > 1 and in_bfloat16):
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **rest
        )
    query, key, value = (each.to(torch.bfloat16) for each in (query, key, value))
    return short_causal(query, key, value, scaling).transpose(1, 2).contiguous(), None


def short_causal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
    """Causal attention with the scores held in memory.

    Args:
        query: [batch, heads, length, width].
        key: [batch, key heads, length, width].
        value: As key.
        scaling: Factor of the scores.

    Returns:
        [batch, heads, length, width].
    """
    import torch

    batch, heads, length, width = query.shape
    groups = heads // key.shape[1]
    rows = (batch * heads, length, width)
    query = query.reshape(rows)
    key = key.repeat_interleave(groups, 1).reshape(rows)
    value = value.repeat_interleave(groups, 1).reshape(rows)
    later = query.new_full((length, length), float("-inf")).triu_(1)
    scores = torch.baddbmm(later.expand(rows[0], -1, -1), query, key.transpose(1, 2), alpha=scaling)
    # The softmax sums in float32 whatever the type of its input.
    return torch.bmm(scores.softmax(-1), value).view(batch, heads, length, width)
