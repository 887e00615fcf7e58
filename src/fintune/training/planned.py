"""The planner applied to a model on its GPU, and to a configuration before there is one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fintune.config import AdapterOptions, Config, TrainOptions
from fintune.errors import ResourceError
from fintune.training import ranks
from fintune.training.memory import FAMILIES, PARTS, Method, Setting, Shape, modules_peak_bytes
from fintune.training.optimizers import MOMENT_BYTES
from fintune.training.plan import GIB, RESERVE_BYTES, TrainingPlan, make_plan, told_apart, told_of
from fintune.util.console import say

if TYPE_CHECKING:
    from peft import PeftModel

FILE = "plan.json"
"""Name of the file in the stage's folder: what was chosen, predicted and measured."""
SHARE = 0.9
"""Of the memory that may be used, what transformers' layers may be predicted to take: that is right within a tenth."""


def plan_model(model: PeftModel, options: TrainOptions, lengths: Sequence[int]) -> TrainingPlan:
    """What to do with an adapted model on its GPU; says so.

    Args:
        model: Runs through the written-out layers.
        options: Batch size and accumulation as asked for.
        lengths: Tokens of each example.

    Raises:
        ResourceError: Not even one example a pass fits.
    """
    method = method_of_model(model, options)
    shape = Shape.of(model.get_base_model().config.to_dict())
    limit = ranks.least(limit_bytes(options.max_memory_gib, free_bytes(model.device)))
    made = choose(shape, method, options, longest=max(lengths), limit=limit)
    for reason in (*made.reasons, on_four_bits(shape, method, options, longest=max(lengths), limit=limit)):
        say(f"plan: {reason}")
    say(f"plan: {told_of(made.predicted_bytes, made.limit_bytes, ' predicted')}")
    return made


def method_of_model(model: PeftModel, options: TrainOptions) -> Method:
    """What an adapted model trains."""
    from peft.tuners.lora import LoraLayer

    adapted = {
        path.rpartition(".")[2]: module for path, module in model.named_modules() if isinstance(module, LoraLayer)
    }
    first = next(iter(adapted.values()))
    (name,) = first.active_adapters
    return Method(
        rank=max(module.r[name] for module in adapted.values()),
        targets=tuple(adapted),
        dora=name in first.lora_magnitude_vector,
        four_bit=getattr(first.get_base_layer().weight, "quant_state", None) is not None,
        moment_bytes=MOMENT_BYTES[options.optim],
        dropout=any(getattr(drop, "p", 0) > 0 for drop in first.lora_dropout.values()),
    )


def _plan(shape: Shape, method: Method, options: TrainOptions, *, longest: int, limit: int) -> TrainingPlan:
    return make_plan(
        shape,
        method,
        batch_size=options.per_device_train_batch_size,
        accumulation=options.gradient_accumulation_steps,
        longest=longest,
        limit_bytes=limit,
        recompute=options.gradient_checkpointing,
    )


def on_four_bits(shape: Shape, method: Method, options: TrainOptions, *, longest: int, limit: int) -> str:
    """Whether the base only fits in 4 bits, as a sentence; arguments as for :func:`choose`."""
    if _plan(shape, replace(method, four_bit=False), options, longest=longest, limit=limit).fits:
        return "4 bits are not needed: 16 bits fit"
    return "4 bits are needed: the 16-bit model does not fit"


def choose(shape: Shape, method: Method, options: TrainOptions, *, longest: int, limit: int) -> TrainingPlan:
    """The planner's choice under the options.

    Args:
        shape: The model.
        method: What is trained.
        options: Batch size, accumulation, whether to recompute.
        longest: Tokens of the longest example.
        limit: Bytes that may be allocated.

    Raises:
        ResourceError: Not even one example a pass fits.
    """
    made = _plan(shape, method, options, longest=longest, limit=limit)
    if made.fits:
        return made
    advice = ["a shorter prompt.max_length", "a smaller adapter.r", "a smaller model"]
    layers = "every layer recomputed"
    if options.gradient_checkpointing is False:
        advice.insert(0, "train.gradient_checkpointing=true")
        layers = "no layer recomputed"
    if not method.four_bit:
        advice.insert(0, "model.quantization=nf4")
    needed, room = told_apart(made.predicted_bytes, limit)
    raise ResourceError(
        f"training needs {needed} for one example of {longest} tokens with {layers}, and {room} may be used",
        hint=f"use {', or '.join(advice)}",
    )


def plan_config(
    config: Config, model_config: Mapping[str, Any], *, longest: int, limit: int
) -> tuple[TrainingPlan, str]:
    """The choice for a configuration whose model is not loaded.

    Args:
        config: The run.
        model_config: The model's ``config.json``.
        longest: Tokens of the longest example.
        limit: Bytes that may be allocated.

    Returns:
        The plan, and whether 4 bits are needed, as a sentence.

    Raises:
        ResourceError: Not even one example a pass fits.
    """
    shape = Shape.of(model_config)
    method = method_of(config.adapter, four_bit=config.model.quantization == "nf4")
    method = replace(method, moment_bytes=MOMENT_BYTES[config.train.optim])
    advice = on_four_bits(shape, method, config.train, longest=longest, limit=limit)
    return choose(shape, method, config.train, longest=longest, limit=limit), advice


def fits_whole(config: Config, model_config: Mapping[str, Any], longest: int, limit: int) -> bool:
    """Whether the base and the smallest pass fit one GPU; True for a model that the planner does not know."""
    if model_config.get("model_type") not in FAMILIES:
        return True
    try:
        plan_config(config, model_config, longest=longest, limit=limit)
    except ResourceError:
        return False
    return True


def must_recompute(
    shape: Shape, method: Method, options: TrainOptions, *, longest: int, limit: int, parts: int = 1
) -> bool:
    """Of transformers' layers: what ``train.gradient_checkpointing`` says, else whether all activations are too many.

    Args:
        shape: The model.
        method: What is trained.
        options: Batch size and accumulation.
        longest: Tokens of the longest example.
        limit: Bytes that may be allocated.
        parts: GPUs among which the frozen weights are divided.
    """
    if options.gradient_checkpointing is not None:
        return options.gradient_checkpointing
    tokens = options.per_device_train_batch_size * longest
    accumulates = options.gradient_accumulation_steps > 1
    peak = modules_peak_bytes(shape, method, tokens=tokens, recomputed=False, accumulates=accumulates, parts=parts)
    return peak > SHARE * limit


def by_modules(
    config: Config, model_config: Mapping[str, Any], *, longest: int, limit: int, divided: bool = False
) -> str:
    """What a GPU needs for transformers' layers, as a sentence.

    Args:
        config: The run.
        model_config: The model's ``config.json``.
        longest: Tokens of the longest example.
        limit: Bytes that may be allocated.
        divided: The base is divided among all GPUs.

    Raises:
        ResourceError: The batch does not fit.
    """
    train = config.train
    shape, method = Shape.of(model_config), method_of(config.adapter, four_bit=config.model.quantization == "nf4")
    method = replace(method, moment_bytes=MOMENT_BYTES[train.optim])
    parts = train.gpus * train.machines if divided else 1
    recomputed = must_recompute(shape, method, train, longest=longest, limit=limit, parts=parts)
    peak = modules_peak_bytes(
        shape,
        method,
        tokens=train.per_device_train_batch_size * longest,
        recomputed=recomputed,
        accumulates=train.gradient_accumulation_steps > 1,
        parts=parts,
    )
    where = f"on each of {parts} GPUs, the frozen weights divided (FSDP2)" if divided else "with transformers' layers"
    where += ", all layers recomputed" if recomputed else ""
    if peak > limit:
        hint = (
            "a smaller train.per_device_train_batch_size with more train.gradient_accumulation_steps"
            if train.per_device_train_batch_size > 1
            else "model.quantization=nf4"
        )
        hint += "" if recomputed else ", train.gradient_checkpointing=true"
        needed, room = told_apart(peak, limit)
        raise ResourceError(
            f"training needs about {needed} {where}, and {room} may be used",
            hint=f"use {hint}{', or more GPUs' if divided else ''}",
        )
    return f"fits: about {told_of(peak, limit)} {where}"


def method_of(options: AdapterOptions, *, four_bit: bool) -> Method:
    """What the options train."""
    targets = (
        PARTS
        if "all-linear" in options.target_modules
        else tuple(part for part in PARTS if part in options.target_modules)
    )
    return Method(options.r, targets, dora=options.kind == "dora", four_bit=four_bit, dropout=options.lora_dropout > 0)


def limit_bytes(max_memory_gib: float | None, free_bytes: int) -> int:
    """What may be allocated: the GPU's free memory but a reserve, or less where the user says so."""
    free = max(0, free_bytes - RESERVE_BYTES)
    return free if max_memory_gib is None else min(free, int(max_memory_gib * GIB))


def free_bytes(device: object = None) -> int:
    """Of the GPU, as it would be without this process's tensors: a model's weights are part of its plan."""
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    return int(free + torch.cuda.memory_reserved(device))


def write(plan: TrainingPlan, folder: Path) -> None:
    """Leave the plan for the manifest.

    Args:
        plan: What was chosen.
        folder: The stage's.
    """
    setting: Setting = plan.setting
    facts = {
        "predicted_peak_gib": round(plan.predicted_bytes / GIB, 2),
        "recomputed_layers": setting.num_checkpointed,
        "unpacked": setting.unpacked,
        "batch_size": plan.batch_size,
        "accumulation": plan.accumulation,
    }
    (folder / FILE).write_text(json.dumps(facts) + "\n", encoding="utf-8")


def write_peak(folder: Path) -> None:
    """Write the largest allocation on this process's GPU beside the prediction, where there was one, and say both.

    Beside it what torch's allocator held for that, since blocks that are free do not always fit what is asked for.
    """
    import torch

    measured, held = torch.cuda.max_memory_allocated() / GIB, torch.cuda.max_memory_reserved() / GIB
    facts = read(folder)
    predicted = f", {facts['predicted_peak_gib']:.1f} predicted" if "predicted_peak_gib" in facts else ""
    say(f"memory: {measured:.1f} GiB at most{predicted}; {held:.1f} held")
    found = {"peak_gib": round(measured, 2), "held_peak_gib": round(held, 2)}
    (folder / FILE).write_text(json.dumps(facts | found) + "\n", encoding="utf-8")


def read(folder: Path) -> dict[str, Any]:
    """What :func:`write` and :func:`write_peak` left; nothing where there was neither."""
    path = folder / FILE
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
