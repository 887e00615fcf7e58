"""The loss over the trained positions only, on a CPU.

TRL's fused head skips the positions without a label on devices with Triton; elsewhere it multiplies every position of
the batch with the vocabulary, which on a small model with a long prompt is a third of the step. This forward takes its
place there, with the same result.
"""

from __future__ import annotations

from types import MethodType
from typing import TYPE_CHECKING, Any

from fintune.training.collate import IGNORED

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

# Above this many logits (float32, 1 GiB) TRL's way, which goes through the vocabulary tile by tile, needs less memory.
_MAX_LOGITS = 2**28
_SCALES = ("final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")


def score_trained_positions(model: PreTrainedModel) -> bool:
    """Give ``model(..., fused_lm_head=True)`` a forward that applies the head to labelled positions only.

    Rows are padded on the right, so a causal model needs no attention mask for what stands before the padding; without
    one, attention takes its faster path.

    Args:
        model: Base model to which TRL's trainer has added its fused head already.

    Returns:
        False where the model scales its logits, which is left to TRL's head.
    """
    config = model.config.get_text_config()
    if any(getattr(config, name, None) not in (None, 1, 1.0) for name in _SCALES):
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
                return _forward(self, input_ids, labels)
        return trl_forward(
            input_ids=input_ids, attention_mask=attention_mask, labels=labels, fused_lm_head=fused_lm_head, **rest
        )

    model.forward = MethodType(forward, model)
    return True


def _forward(model: PreTrainedModel, input_ids: torch.Tensor, labels: torch.Tensor) -> object:
    """Log-probability and hit of each label; shapes [batch, length - 1], zero where nothing is trained."""
    import torch
    from transformers.utils import ModelOutput

    hidden = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
    targets = labels[:, 1:]
    mask = targets != IGNORED
    # One contiguous matrix: a slice of three dimensions takes a path several times slower.
    rows = hidden[:, :-1][mask]
    chosen = targets[mask]
    logits = model.get_output_embeddings()(rows).float()
    log_probs = -torch.nn.functional.cross_entropy(logits, chosen, reduction="none")
    with torch.no_grad():
        is_top1 = logits.argmax(-1) == chosen

    def spread(values: torch.Tensor) -> torch.Tensor:
        return values.new_zeros(mask.shape).masked_scatter(mask, values)

    # TRL only logs the entropy, which costs as much as the loss, and the mean logit; nothing here reads that log.
    unknown = torch.zeros(mask.shape, device=hidden.device)
    return ModelOutput(
        log_probs=spread(log_probs),
        entropy=unknown,
        is_top1=spread(is_top1),
        mean_logits=unknown,
        label_mask=mask,
    )
