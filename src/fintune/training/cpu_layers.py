"""Faster attention and output head for training a model of transformers on a CPU, with the same results."""

from __future__ import annotations

from types import MethodType
from typing import TYPE_CHECKING, Any

from fintune.training.batches import IGNORED

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

_ATTENTION_NAME = "fintune_cpu_attention"
# Scores that are held for the backward pass of a layer: 32 MiB of bfloat16.
_MAX_SCORES = 2**24
# Above this many logits (float32, 1 GiB), TRL's head needs less memory: it splits the vocabulary into tiles.
_MAX_LOGITS = 2**28
_LOGIT_SCALES = (
    "final_logit_softcapping",
    "logit_scale",
    "output_multiplier",
    "lm_head_multiplier",
    "logits_scaling",
)


# -- attention


def use_cpu_attention(model: PreTrainedModel) -> bool:
    """Replace torch's attention kernel by :func:`cpu_attention` where that is faster, in training.

    torch's kernel is written for float32. In bfloat16, its backward pass takes longer than both matrix products with
    the scores held in memory (9 heads of 64, 345 tokens: 12.3 ms against 4.8 ms with AVX-512). In training, the score
    matrix of a report page is small enough to hold.

    Args:
        model: A base model of transformers, on a CPU.

    Returns:
        False if the model attends in another way. It is then left unchanged.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    if model.config._attn_implementation != "sdpa":
        return False
    AttentionInterface.register(_ATTENTION_NAME, _attention_forward)
    AttentionMaskInterface.register(_ATTENTION_NAME, sdpa_mask)
    model.set_attn_implementation(_ATTENTION_NAME)
    return True


def _attention_forward(
    module: nn.Module,
    query: torch.Tensor,  # [batch, heads, length, head_dim]
    key: torch.Tensor,  # [batch, key heads, length, head_dim]
    value: torch.Tensor,  # [batch, key heads, length, head_dim]
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **rest: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    batch, heads, length, _ = query.shape
    # Under autocast the rotary embedding returns float32, and torch's kernel would get bfloat16.
    autocast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    in_bfloat16 = autocast or query.dtype == torch.bfloat16
    is_causal = attention_mask is None and dropout == 0.0 and key.shape[2] == length and not rest.get("sliding_window")
    fits = batch * heads * length * length <= _MAX_SCORES
    if not (is_causal and fits and scaling is not None and length > 1 and in_bfloat16):
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **rest
        )
    query, key, value = (tensor.to(torch.bfloat16) for tensor in (query, key, value))
    return cpu_attention(query, key, value, scaling).transpose(1, 2).contiguous(), None


def cpu_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
    """Compute causal attention with the scores held in memory.

    Args:
        query: [batch, heads, length, head_dim].
        key: [batch, key heads, length, head_dim].
        value: [batch, key heads, length, head_dim].
        scaling: Factor of the scores.

    Returns:
        [batch, heads, length, head_dim].
    """
    import torch

    batch, heads, length, head_dim = query.shape
    groups = heads // key.shape[1]
    rows = (batch * heads, length, head_dim)
    query = query.reshape(rows)
    key = key.repeat_interleave(groups, 1).reshape(rows)
    value = value.repeat_interleave(groups, 1).reshape(rows)
    mask = query.new_full((length, length), float("-inf")).triu_(1)
    scores = torch.baddbmm(mask.expand(rows[0], -1, -1), query, key.transpose(1, 2), alpha=scaling)
    # The softmax sums in float32 whatever the type of its input.
    return torch.bmm(scores.softmax(-1), value).view(batch, heads, length, head_dim)


# -- output head


def use_label_only_head(model: PreTrainedModel) -> bool:
    """Give ``model(..., fused_lm_head=True)`` a forward that applies the head to labelled positions only.

    TRL's fused head skips positions without a label on devices with Triton only. Elsewhere it multiplies every position
    of the batch by the vocabulary, which takes a third of the step for a small model with a long prompt.

    Rows are padded on the right, so a causal model needs no attention mask for the tokens before the padding. Without a
    mask, attention is faster.

    Args:
        model: A base model to which TRL's trainer has already added its fused head.

    Returns:
        False if the model scales its logits. It then keeps TRL's head.
    """
    config = model.config.get_text_config()
    if any(getattr(config, name, None) not in (None, 1, 1.0) for name in _LOGIT_SCALES):
        return False
    trl_forward = model.forward

    def forward(
        self: PreTrainedModel,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        fused_lm_head: bool = False,
        **rest: Any,
    ) -> object:
        if fused_lm_head and labels is not None and input_ids is not None and attention_mask is not None:
            num_logits = int((labels != IGNORED).sum()) * config.vocab_size
            if num_logits <= _MAX_LOGITS and bool((attention_mask[:, :-1] >= attention_mask[:, 1:]).all()):
                return _score_labels(self, input_ids, labels)
        return trl_forward(
            input_ids=input_ids, attention_mask=attention_mask, labels=labels, fused_lm_head=fused_lm_head, **rest
        )

    model.forward = MethodType(forward, model)
    return True


def _score_labels(model: PreTrainedModel, input_ids: torch.Tensor, labels: torch.Tensor) -> object:
    """Return log-probability and top-1 hit of each label; shapes [batch, length - 1], zero where nothing is trained."""
    import torch
    from transformers.utils import ModelOutput

    hidden = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
    targets = labels[:, 1:]
    mask = targets != IGNORED
    # One contiguous matrix: the path for a slice of three dimensions is several times slower.
    rows = hidden[:, :-1][mask]  # [labels, hidden]
    label_ids = targets[mask]  # [labels]
    logits = model.get_output_embeddings()(rows).float()  # [labels, vocabulary]
    log_probs = -torch.nn.functional.cross_entropy(logits, label_ids, reduction="none")
    with torch.no_grad():
        is_top1 = logits.argmax(-1) == label_ids

    def scatter(values: torch.Tensor) -> torch.Tensor:
        return values.new_zeros(mask.shape).masked_scatter(mask, values)

    # TRL only logs the mean logit and the entropy, which costs as much as the loss. Nothing here reads that log.
    unknown = torch.zeros(mask.shape, device=hidden.device)
    return ModelOutput(
        log_probs=scatter(log_probs),
        entropy=unknown,
        is_top1=scatter(is_top1),
        mean_logits=unknown,
        label_mask=mask,
    )
