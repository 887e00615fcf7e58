"""Whether transformers' own layers recompute their activations in the backward pass.

The fused layers have a plan of their own, which recomputes as many as memory demands; here it is all or none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fintune.config import TrainOptions
from fintune.training import planned, ranks, shard
from fintune.training.memory import FAMILIES, PARTS, Method, Shape
from fintune.training.plan import told
from fintune.util.console import say

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def settle(model: PeftModel | PreTrainedModel, options: TrainOptions, lengths: Sequence[int]) -> TrainOptions:
    """The options with the choice made; says so where it was left open and there is a GPU.

    Args:
        model: Trains through transformers' layers.
        options: As asked for.
        lengths: Tokens of each example.
    """
    if options.gradient_checkpointing is not None:
        return options
    import torch

    on_gpu = model.device.type == "cuda" or (shard.is_divided(options) and torch.cuda.is_available())
    return options.model_copy(update={"gradient_checkpointing": on_gpu and _choose(model, options, max(lengths))})


def _choose(model: PeftModel | PreTrainedModel, options: TrainOptions, longest: int) -> bool:
    limit = ranks.least(planned.limit_bytes(options.max_memory_gib, planned.free_bytes()))
    known = _known(model, options)
    if known is None:
        say(
            "layers: all recomputed, since it is not known how much memory they would take otherwise "
            "(train.gradient_checkpointing)"
        )
        return True
    parts = ranks.count() if shard.is_divided(options) else 1
    needed = planned.must_recompute(*known, options, longest=longest, limit=limit, parts=parts)
    room = told(limit)
    say(f"layers: {f'all recomputed, no more than {room} demand' if needed else f'none recomputed: all fit {room}'}")
    return needed


def _known(model: PeftModel | PreTrainedModel, options: TrainOptions) -> tuple[Shape, Method] | None:
    """What the prediction wants to know of a model that it holds for."""
    from peft import PeftModel

    if not isinstance(model, PeftModel) or options.objective != "sft":
        return None
    config = model.get_base_model().config.to_dict()
    if config.get("model_type") not in FAMILIES:
        return None
    method = planned.method_of_model(model, options)
    return (Shape.of(config), method) if set(method.targets) <= set(PARTS) else None
