"""``fintune plan``: the planner's choice for a configuration, before anything is loaded."""

from __future__ import annotations

from dataclasses import replace

from fintune.config import Config
from fintune.errors import ConfigError, ResourceError
from fintune.models import load as models
from fintune.models.folder import read_model_config
from fintune.training.combinations import check_combinations
from fintune.training.memory import planner
from fintune.training.memory.model import (
    FUSED_FAMILIES,
    GIB,
    LINEAR_LAYERS,
    RESERVE_BYTES,
    MemoryPlan,
    format_usage,
)


def plan(config: Config, *, gib: float | None = None, longest: int | None = None) -> list[str]:
    """The choice and its reasons, as lines.

    Args:
        config: The run.
        gib: Memory of the GPU; that of this machine's where empty.
        longest: Tokens of the longest example; ``prompt.max_length`` where empty.

    Raises:
        ConfigError: A model or a way of training that the planner does not know.
        ResourceError: No GPU and no ``gib``, or not even one example a pass fits.
    """
    if config.adapter.kind == "full":
        raise ConfigError(
            "the planner knows adapters, not adapter.kind: full",
            hint="set adapter.kind to lora or dora",
            option="adapter.kind",
        )
    if config.train.objective != "sft":
        raise ConfigError(
            f"the planner knows train.objective: sft, not {config.train.objective}",
            option="train.objective",
            hint="lower train.per_device_train_batch_size and raise train.gradient_accumulation_steps "
            "if memory does not suffice",
        )
    model_config = read_model_config(models.fetch_config(config.model.name, revision=config.model.revision))
    if model_config.get("model_type") not in FUSED_FAMILIES:
        raise ConfigError(
            f"the planner knows {', '.join(FUSED_FAMILIES)}, not {model_config.get('model_type')}",
            hint="train with transformers' layers, and lower train.per_device_train_batch_size "
            "if memory does not suffice",
        )
    _check_way(config)
    total = _total_bytes() if gib is None else int(gib * GIB)
    limit = planner.usable_bytes(config.train.max_memory_gib, total)
    longest = longest or config.prompt.max_length
    gpus = config.train.gpus * config.train.machines
    examples = config.train.per_device_train_batch_size * config.train.gradient_accumulation_steps * gpus
    bits = "16-bit" if config.model.quantization == "none" else "4-bit"
    head = (
        f"{config.model.name}, {config.adapter.kind} r={config.adapter.r} on {bits} weights, "
        f"{examples} example{'s' if examples > 1 else ''} a step of at most {longest} tokens"
    )
    check_combinations(config)
    may_divide = gpus > 1 and config.train.sharding == "auto" and config.model.quantization == "none"
    request = planner.MemoryRequest.from_config(config, model_config, longest, limit)
    if config.train.sharding == "full" or (may_divide and not request.choose_plan().fits):
        return [head, replace(request, num_shards=gpus).describe_transformers_plan()]
    if config.train.fused_layers == "never":
        return [head, request.describe_transformers_plan()]
    made = request.require_plan()
    on_each = f" on each of {gpus} GPUs, which hold the whole model" if gpus > 1 else ""
    return [
        head,
        f"fits: {format_usage(made.predicted_bytes, limit, ' predicted')} ({_limit_told(limit, total)})",
        f"a step: {_passes(made)}{on_each}",
        *(f"- {reason}" for reason in made.reasons),
        f"- {request.describe_four_bit_need()}",
    ]


def _check_way(config: Config) -> None:
    if config.train.backend != "builtin":
        raise ConfigError(
            f"the planner knows train.backend: builtin, not {config.train.backend}",
            option="train.backend",
            hint="lower train.per_device_train_batch_size and raise train.gradient_accumulation_steps "
            "if memory does not suffice",
        )
    unknown = sorted(set(config.adapter.target_modules) - {"all-linear", *LINEAR_LAYERS})
    if unknown:
        raise ConfigError(
            f"the planner knows adapters of {', '.join(LINEAR_LAYERS)}, not of {', '.join(unknown)}",
            hint="name some of these, or all-linear, in adapter.target_modules",
            option="adapter.target_modules",
        )


def _passes(made: MemoryPlan) -> str:
    if made.accumulation == 1:
        return f"one pass over a batch of {made.batch_size}"
    return f"{made.accumulation} accumulated passes over batches of {made.batch_size}"


def _limit_told(limit: int, total: int) -> str:
    if limit < total - RESERVE_BYTES:
        return "train.max_memory_gib"
    return f"{total / GIB:.1f} less {RESERVE_BYTES / GIB:.2f} for the context and the allocator"


def _total_bytes() -> int:
    import torch

    if not torch.cuda.is_available():
        raise ResourceError("there is no CUDA GPU to plan for", hint="say how much memory yours has: --gib 24")
    return int(torch.cuda.mem_get_info()[0])
