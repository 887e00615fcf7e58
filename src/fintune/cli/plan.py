"""``fintune plan``: how training would use a GPU's memory, before anything is loaded."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import click

from fintune.cli.common import config_arguments, echo
from fintune.config import Config
from fintune.config.load import load
from fintune.errors import ConfigError, ModelError, ResourceError
from fintune.models import load as models
from fintune.models.folder import DecoderConfig, read_model_config
from fintune.training.combinations import check_combinations
from fintune.training.memory import planner
from fintune.training.memory.model import (
    FUSED_FAMILIES,
    GIB,
    LINEAR_LAYERS,
    RESERVE_BYTES,
    format_usage,
)
from fintune.util.files import read_json_as


@click.command("plan")
@config_arguments
@click.option(
    "--gib", type=click.FloatRange(min=0, min_open=True), help="GPU memory in GiB (default: this machine's GPU)."
)
@click.option(
    "--tokens", type=click.IntRange(min=1), help="Tokens of the longest example (default: prompt.max_length)."
)
def plan_command(config: Path, overrides: tuple[str, ...], gib: float | None, tokens: int | None) -> None:
    """Estimate the memory plan for training: recomputed layers, passes per step, 16 or 4 bits. Nothing is trained.

    Only the model's configuration is read, so --gib 24 also answers for a GPU that is not in this machine.
    """
    for line in memory_plan_lines(load(config, overrides).config, gib=gib, longest=tokens):
        echo(line)


def memory_plan_lines(config: Config, *, gib: float | None = None, longest: int | None = None) -> list[str]:
    """Return the plan and its reasons, as lines.

    Args:
        config: The run.
        gib: GPU memory in GiB (default: this machine's GPU).
        longest: Tokens of the longest example (default: ``prompt.max_length``).

    Raises:
        ConfigError: The planner does not support the model or the method.
        ResourceError: There is no GPU and no ``gib``, or not even one example per pass fits.
    """
    model_config = read_model_config(folder := models.fetch_config(config.model.name, revision=config.model.revision))
    _check_supported(config, str(model_config.get("model_type")))
    check_combinations(config)
    read_json_as(folder / "config.json", DecoderConfig, ModelError)
    if gib is not None and not math.isfinite(gib):
        raise ConfigError(f"--gib {gib}: not a size", hint="give the GPU's memory in GiB, such as 24")
    if gib is None:
        import torch

        if not torch.cuda.is_available():
            raise ResourceError("there is no CUDA GPU to plan for", hint="give the memory of yours: --gib 24")
        gib = torch.cuda.mem_get_info()[0] / GIB
    total = int(gib * GIB)
    limit = planner.usable_bytes(config.train.max_memory_gib, total)
    longest = longest or config.prompt.max_length
    gpus = config.train.gpus * config.train.machines
    examples = config.train.per_device_train_batch_size * config.train.gradient_accumulation_steps * gpus
    bits = "16-bit" if config.model.quantization == "none" else "4-bit"
    head = (
        f"{config.model.name}, {config.adapter.kind} r={config.adapter.r} on {bits} weights, "
        f"{examples} example{'s' if examples > 1 else ''} a step of at most {longest} tokens"
    )
    may_divide = gpus > 1 and config.train.sharding == "auto" and config.model.quantization == "none"
    request = planner.MemoryRequest.from_config(config, model_config, longest, limit)
    if config.train.sharding == "full" or (may_divide and not request.choose_plan().fits):
        return [head, replace(request, num_shards=gpus).describe_transformers_plan()]
    if config.train.fused_layers == "never":
        return [head, request.describe_transformers_plan()]
    made = request.require_plan()
    from_memory = f"{total / GIB:.1f} less {RESERVE_BYTES / GIB:.2f} for the context and the allocator"
    because = "train.max_memory_gib" if limit < total - RESERVE_BYTES else from_memory
    passes = (
        f"{made.accumulation} accumulated passes over batches" if made.accumulation > 1 else "one pass over a batch"
    )
    on_each = f" on each of {gpus} GPUs, which hold the whole model" if gpus > 1 else ""
    return [
        head,
        f"fits: {format_usage(made.predicted_bytes, limit, ' predicted')} ({because})",
        f"a step: {passes} of {made.batch_size}{on_each}",
        *(f"- {reason}" for reason in made.reasons),
        f"- {request.describe_four_bit_need()}",
    ]


def _check_supported(config: Config, family: str) -> None:
    lower = "lower train.per_device_train_batch_size"
    instead = f"{lower} and raise train.gradient_accumulation_steps if memory runs out"
    objective, backend = config.train.objective, config.train.backend
    layers = ", ".join(sorted({*config.adapter.target_modules} - {"all-linear", *LINEAR_LAYERS}))
    rules = (
        (
            config.adapter.kind == "full",
            "adapter.kind",
            "adapters, not adapter.kind: full",
            "set adapter.kind to lora or dora",
        ),
        (objective != "sft", "train.objective", f"train.objective: sft, not {objective}", instead),
        (
            family not in FUSED_FAMILIES,
            None,
            f"{', '.join(FUSED_FAMILIES)}, not {family}",
            f"train with transformers' layers, and {lower} if memory runs out",
        ),
        (backend != "builtin", "train.backend", f"train.backend: builtin, not {backend}", instead),
        (
            bool(layers),
            "adapter.target_modules",
            f"adapters of {', '.join(LINEAR_LAYERS)}, not of {layers}",
            "name some of these, or all-linear, in adapter.target_modules",
        ),
    )
    for is_refused, option, supported, hint in rules:
        if is_refused:
            raise ConfigError(f"the planner supports {supported}", hint=hint, option=option)
