"""Faster attention on a CPU, and a faster output head, for training a model of transformers with the same results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import inf
from types import MethodType
from typing import TYPE_CHECKING, Any

from fintune.training.batches import IGNORED
from fintune.training.verify import allowed_difference, own_log_probs
from fintune.util.console import say

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

_ATTENTION_NAME = "fintune_cpu_attention"
# Scores that are held for the backward pass of a layer: 32 MiB of bfloat16.
_MAX_SCORES = 2**24
# Above this many logits (float32, 1 GiB), TRL's head needs less memory: it splits the vocabulary into tiles.
_MAX_LOGITS = 2**28
_ATTENTION_OPTIONS = {
    "position_ids", "use_cache", "output_attentions", "output_hidden_states", "output_router_logits", "return_dict",
    "is_causal", "sliding_window", "num_items_in_batch", "cache_position",
}  # fmt: skip
"""Arguments of attention that :func:`cpu_attention` may ignore. Others, such as a soft cap, go to transformers."""


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
    is_causal = is_causal and all(value is None or name in _ATTENTION_OPTIONS for name, value in rest.items())
    fits = batch * heads * length * length <= _MAX_SCORES
    if not (is_causal and fits and scaling is not None and length > 1 and in_bfloat16):
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **rest
        )
    query, key, value = (tensor.to(torch.bfloat16) for tensor in (query, key, value))
    return cpu_attention(query, key, value, scaling).transpose(1, 2).contiguous(), None


def cpu_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
    """Compute causal attention with the scores held in memory, [batch, heads, length, head_dim].

    Keys and values are [batch, key heads, length, head_dim]; ``scaling`` is the factor of the scores.
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


def use_label_only_head(model: PreTrainedModel, ids: Sequence[int], *, routed: bool = False) -> str:
    """Give ``model(..., labels=..., fused_lm_head=True)`` the fastest head that computes what the model computes.

    TRL's head skips positions without a label on devices with Triton only. Elsewhere it multiplies every position of
    the batch by the vocabulary, which takes a third of the step for a small model with a long prompt. Both heads read
    the hidden states, so they may miss what a model does to its logits. Each is compared with the model's own
    log-probabilities on a real row. If both differ, the model's own logits are used.

    Args:
        model: A base model. TRL's trainer may have added its head.
        ids: Tokens of a row.
        routed: Whether the loss of the experts' router is trained, which the head has to return.

    Returns:
        ``labels`` (positions with a label, on a CPU), ``trl`` or ``model``.
    """
    import torch

    before, padding = model.forward, 3
    expected = own_log_probs(model, ids)
    allowed = allowed_difference(expected, model.dtype)
    # Padded, as in a batch.
    row = torch.tensor([[*ids, *[ids[0]] * padding]], device=model.device)
    attention_mask, labels = torch.ones_like(row), row.clone()
    attention_mask[:, len(ids) :], labels[:, len(ids) :] = 0, IGNORED
    differences: dict[str, float] = {}

    def heads(name: str) -> Callable[..., Any]:
        return {"labels": partial(_score_labels, model), "trl": partial(before, fused_lm_head=True)}[name]

    def agrees(name: str) -> bool:
        if name not in differences:
            more = {"output_router_logits": True} if routed else {}
            try:
                with torch.no_grad():
                    output = heads(name)(input_ids=row, attention_mask=attention_mask, labels=labels, **more)
            except TypeError:  # TRL before 1.15 has no head
                return False
            is_complete = not routed or getattr(output, "aux_loss", None) is not None
            found = output.log_probs[0, : len(ids) - 1].float()
            differences[name] = float((found - expected).abs().mean()) if is_complete else inf
        return not differences[name] > allowed

    candidates = ("labels", "trl") if model.device.type == "cpu" else ("trl",)
    chosen = next((name for name in candidates if agrees(name)), "model")

    def forward(
        self: PreTrainedModel,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        fused_lm_head: bool = False,
        **rest: Any,
    ) -> object:
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **rest}
        if not fused_lm_head or labels is None or input_ids is None:
            return before(**inputs, labels=labels)
        if chosen == "labels" and _is_for_labels(self, attention_mask, labels):
            return _score_labels(self, input_ids=input_ids, labels=labels)
        if chosen == "trl" or (chosen == "labels" and agrees("trl")):
            return before(**inputs, labels=labels, fused_lm_head=True)
        output = before(**inputs)
        targets = labels[:, 1:]
        return _scored(output.logits[:, :-1][targets != IGNORED], targets, getattr(output, "aux_loss", None))

    model.forward = MethodType(forward, model)
    if chosen == "model":
        figures = " and ".join(f"{value:.2g}" for value in differences.values() if value < inf)
        say(f"output head: the model's own logits, from which shorter heads differ by {figures or 'their router loss'}")
    return chosen


def _is_for_labels(model: PreTrainedModel, attention_mask: torch.Tensor | None, labels: torch.Tensor) -> bool:
    """Whether the logits fit and the rows are padded on the right, so that a causal model needs no attention mask."""
    if int((labels != IGNORED).sum()) * model.config.get_text_config().vocab_size > _MAX_LOGITS:
        return False
    return attention_mask is not None and bool((attention_mask[:, :-1] >= attention_mask[:, 1:]).all())


def _score_labels(model: PreTrainedModel, *, input_ids: torch.Tensor, labels: torch.Tensor, **_: Any) -> Any:
    """Score labels from their rows of the hidden states. Without a mask, attention is faster."""
    hidden = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
    targets = labels[:, 1:]
    # One contiguous matrix: the path for a slice of three dimensions is several times slower.
    rows = hidden[:, :-1][targets != IGNORED]  # [labels, hidden]
    return _scored(model.get_output_embeddings()(rows), targets)


def _scored(logits: torch.Tensor, targets: torch.Tensor, aux_loss: torch.Tensor | None = None) -> Any:
    """Return log-probability and top-1 hit of each target; shapes [batch, length - 1], zero where nothing is trained.

    Args:
        logits: [labels, vocabulary].
        targets: [batch, length - 1].
        aux_loss: Loss of the experts' router.
    """
    import torch
    from transformers.utils import ModelOutput

    mask, logits = targets != IGNORED, logits.float()
    label_ids = targets[mask]  # [labels]
    log_probs = -torch.nn.functional.cross_entropy(logits, label_ids, reduction="none")
    with torch.no_grad():
        is_top1 = logits.argmax(-1) == label_ids

    def scatter(values: torch.Tensor) -> torch.Tensor:
        return values.new_zeros(mask.shape).masked_scatter(mask, values)

    # TRL only logs the mean logit and the entropy, which costs as much as the loss. Nothing here reads that log.
    unknown = torch.zeros(mask.shape, device=logits.device)
    return ModelOutput(
        log_probs=scatter(log_probs),
        entropy=unknown,
        is_top1=scatter(is_top1),
        mean_logits=unknown,
        label_mask=mask,
        aux_loss=aux_loss,
    )
