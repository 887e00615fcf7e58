"""The memory planner for a model or a configuration, and what to change after training ran out of memory.

For the fused layers it chooses how many layers are recomputed, whether 16-bit copies of 4-bit weights are held, and
into how many forward passes a step is split. For the layers of transformers it decides whether all are recomputed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fintune.config import Config, TrainOptions
from fintune.errors import ResourceError
from fintune.training import distributed
from fintune.training.memory.model import (
    FUSED_FAMILIES,
    GIB,
    LINEAR_LAYERS,
    RESERVE_BYTES,
    AdapterMethod,
    DecoderShape,
    MemoryPlan,
    choose_plan,
    divisors,
    format_distinct,
    format_gib,
    format_usage,
    transformers_peak_bytes,
)
from fintune.training.optimizers import MOMENT_BYTES
from fintune.util.console import say

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

PLAN_FILE = "plan.json"
"""Name of the file in the stage's folder with the chosen settings and the predicted and measured memory."""
SAFE_SHARE = 0.9
"""Share of the usable memory that the layers of transformers may be predicted to need, which is right within 10 %."""

# When a plan was too large for the memory, these shares of it are tried.
_TIGHTER_SHARES = (0.9, 0.8, 0.7, 0.6, 0.5)
_SHORTEST_LENGTH = 128


def _plan_with_options(
    shape: DecoderShape, method: AdapterMethod, options: TrainOptions, *, longest: int, limit: int
) -> MemoryPlan:
    return choose_plan(
        shape,
        method,
        batch_size=options.per_device_train_batch_size,
        accumulation=options.gradient_accumulation_steps,
        longest=longest,
        limit_bytes=limit,
        recompute=options.gradient_checkpointing,
    )


def require_plan(
    shape: DecoderShape, method: AdapterMethod, options: TrainOptions, *, longest: int, limit: int
) -> MemoryPlan:
    """Choose settings that fit under the options.

    Args:
        shape: Sizes of the model.
        method: What is trained.
        options: Batch size, accumulation, gradient checkpointing.
        longest: Tokens of the longest example.
        limit: Bytes that may be allocated.

    Raises:
        ResourceError: Not even one example a pass fits.
    """
    plan = _plan_with_options(shape, method, options, longest=longest, limit=limit)
    if plan.fits:
        return plan
    changes = ["a shorter prompt.max_length", "a smaller adapter.r", "a smaller model"]
    layers = "every layer recomputed"
    if options.gradient_checkpointing is False:
        changes.insert(0, "train.gradient_checkpointing=true")
        layers = "no layer recomputed"
    if not method.four_bit:
        changes.insert(0, "model.quantization=nf4")
    needed, usable = format_distinct(plan.predicted_bytes, limit)
    raise ResourceError(
        f"training needs {needed} for one example of {longest} tokens with {layers}, but only {usable} may be used",
        hint=f"use {', or '.join(changes)}",
    )


def describe_four_bit_need(
    shape: DecoderShape, method: AdapterMethod, options: TrainOptions, *, longest: int, limit: int
) -> str:
    """Say in a sentence whether the model fits only in 4 bits; arguments as for :func:`require_plan`."""
    if _plan_with_options(shape, replace(method, four_bit=False), options, longest=longest, limit=limit).fits:
        return "4 bits are not needed: the 16-bit model fits"
    return "4 bits are needed: the 16-bit model does not fit"


# -- the planner for a model, and for a configuration


def plan_for_model(model: PeftModel, options: TrainOptions, lengths: Sequence[int]) -> MemoryPlan:
    """Choose and print the settings for an adapted model on its GPU.

    Args:
        model: A model that the fused layers support.
        options: Batch size, accumulation, memory limit.
        lengths: Tokens of each example.

    Raises:
        ResourceError: Not even one example a pass fits.
    """
    method = method_of_model(model, options)
    shape = DecoderShape.from_config(model.get_base_model().config.to_dict())
    limit = distributed.all_reduce_min(usable_bytes(options.max_memory_gib, free_bytes(model.device)))
    plan = require_plan(shape, method, options, longest=max(lengths), limit=limit)
    for reason in (
        *plan.reasons,
        describe_four_bit_need(shape, method, options, longest=max(lengths), limit=limit),
    ):
        say(f"plan: {reason}")
    say(f"plan: {format_usage(plan.predicted_bytes, plan.limit_bytes, ' predicted')}")
    return plan


def plan_for_config(
    config: Config, model_config: Mapping[str, Any], *, longest: int, limit: int
) -> tuple[MemoryPlan, str]:
    """Choose the settings for a configuration whose model is not loaded.

    Args:
        config: The run.
        model_config: The model's ``config.json``.
        longest: Tokens of the longest example.
        limit: Bytes that may be allocated.

    Returns:
        The plan, and a sentence that says whether 4 bits are needed.

    Raises:
        ResourceError: Not even one example a pass fits.
    """
    shape, method = DecoderShape.from_config(model_config), method_of_config(config)
    four_bit_need = describe_four_bit_need(shape, method, config.train, longest=longest, limit=limit)
    return require_plan(shape, method, config.train, longest=longest, limit=limit), four_bit_need


def fits_one_gpu(config: Config, model_config: Mapping[str, Any], longest: int, limit: int) -> bool:
    """Whether the base and the smallest pass fit one GPU; True for a model that the planner does not know."""
    if model_config.get("model_type") not in FUSED_FAMILIES:
        return True
    try:
        plan_for_config(config, model_config, longest=longest, limit=limit)
    except ResourceError:
        return False
    return True


def method_of_model(model: PeftModel, options: TrainOptions) -> AdapterMethod:
    """Read from an adapted model what is trained."""
    from peft.tuners.lora import LoraLayer

    adapted = {
        path.rpartition(".")[2]: module for path, module in model.named_modules() if isinstance(module, LoraLayer)
    }
    first = next(iter(adapted.values()))
    (name,) = first.active_adapters
    return AdapterMethod(
        rank=max(module.r[name] for module in adapted.values()),
        targets=tuple(adapted),
        dora=name in first.lora_magnitude_vector,
        four_bit=getattr(first.get_base_layer().weight, "quant_state", None) is not None,
        moment_bytes=MOMENT_BYTES[options.optim],
        dropout=any(getattr(dropout, "p", 0) > 0 for dropout in first.lora_dropout.values()),
    )


def method_of_config(config: Config) -> AdapterMethod:
    """Read from a configuration what is trained."""
    adapter = config.adapter
    is_all = "all-linear" in adapter.target_modules
    return AdapterMethod(
        adapter.r,
        tuple(name for name in LINEAR_LAYERS if is_all or name in adapter.target_modules),
        dora=adapter.kind == "dora",
        four_bit=config.model.quantization == "nf4",
        moment_bytes=MOMENT_BYTES[config.train.optim],
        dropout=adapter.lora_dropout > 0,
    )


def usable_bytes(max_memory_gib: float | None, free: int) -> int:
    """Return what may be allocated: the free memory without the reserve, at most ``train.max_memory_gib``."""
    usable = max(0, free - RESERVE_BYTES)
    return usable if max_memory_gib is None else min(usable, int(max_memory_gib * GIB))


def free_bytes(device: object = None) -> int:
    """Return the GPU's free memory, with what this process holds counted as free: the plan includes the weights."""
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    return int(free + torch.cuda.memory_reserved(device))


# -- the layers of transformers


def _transformers_peak(
    shape: DecoderShape,
    method: AdapterMethod,
    options: TrainOptions,
    longest: int,
    num_shards: int,
    *,
    recomputed: bool,
) -> int:
    return transformers_peak_bytes(
        shape,
        method,
        tokens=options.per_device_train_batch_size * longest,
        recomputed=recomputed,
        accumulates=options.gradient_accumulation_steps > 1,
        num_shards=num_shards,
    )


def recomputes_layers(
    shape: DecoderShape,
    method: AdapterMethod,
    options: TrainOptions,
    *,
    longest: int,
    limit: int,
    num_shards: int = 1,
) -> bool:
    """Whether the layers of transformers are recomputed: as set in the options, else if their activations do not fit.

    Args:
        shape: Sizes of the model.
        method: What is trained.
        options: Batch size, accumulation, gradient checkpointing.
        longest: Tokens of the longest example.
        limit: Bytes that may be allocated.
        num_shards: GPUs among which the frozen weights are divided.
    """
    if options.gradient_checkpointing is not None:
        return options.gradient_checkpointing
    return _transformers_peak(shape, method, options, longest, num_shards, recomputed=False) > SAFE_SHARE * limit


def describe_transformers_plan(
    config: Config, model_config: Mapping[str, Any], *, longest: int, limit: int, sharded: bool = False
) -> str:
    """Say in a sentence what a GPU needs for the layers of transformers.

    Args:
        config: The run.
        model_config: The model's ``config.json``.
        longest: Tokens of the longest example.
        limit: Bytes that may be allocated.
        sharded: Whether the base is divided among all GPUs.

    Raises:
        ResourceError: The batch does not fit.
    """
    train = config.train
    shape, method = DecoderShape.from_config(model_config), method_of_config(config)
    num_shards = train.gpus * train.machines if sharded else 1
    recomputed = recomputes_layers(shape, method, train, longest=longest, limit=limit, num_shards=num_shards)
    peak = _transformers_peak(shape, method, train, longest, num_shards, recomputed=recomputed)
    where = "with the layers of transformers"
    if sharded:
        where = f"on each of {num_shards} GPUs, the frozen weights divided (FSDP2)"
    where += ", all layers recomputed" if recomputed else ""
    if peak > limit:
        hint = "model.quantization=nf4"
        if train.per_device_train_batch_size > 1:
            hint = "a smaller train.per_device_train_batch_size with more train.gradient_accumulation_steps"
        hint += "" if recomputed else ", train.gradient_checkpointing=true"
        needed, usable = format_distinct(peak, limit)
        raise ResourceError(
            f"training needs about {needed} {where}, but only {usable} may be used",
            hint=f"use {hint}{', or more GPUs' if sharded else ''}",
        )
    return f"fits: about {format_usage(peak, limit)} {where}"


def resolve_checkpointing(
    model: PeftModel | PreTrainedModel, options: TrainOptions, lengths: Sequence[int]
) -> TrainOptions:
    """Return the options with ``train.gradient_checkpointing`` set; print the choice if it was open and there is a GPU.

    Args:
        model: A model that trains through the layers of transformers.
        options: The options as they were set.
        lengths: Tokens of each example.
    """
    if options.gradient_checkpointing is not None:
        return options
    import torch

    on_gpu = model.device.type == "cuda" or (distributed.is_sharded(options) and torch.cuda.is_available())
    recompute = on_gpu and _chooses_recomputation(model, options, max(lengths))
    return options.model_copy(update={"gradient_checkpointing": recompute})


def _chooses_recomputation(model: PeftModel | PreTrainedModel, options: TrainOptions, longest: int) -> bool:
    limit = distributed.all_reduce_min(usable_bytes(options.max_memory_gib, free_bytes()))
    known = _known_sizes(model, options)
    if known is None:
        say(
            "layers: all recomputed, because their memory cannot be predicted for this model or method "
            "(train.gradient_checkpointing)"
        )
        return True
    num_shards = distributed.world_size() if distributed.is_sharded(options) else 1
    recompute = recomputes_layers(*known, options, longest=longest, limit=limit, num_shards=num_shards)
    usable = format_gib(limit)
    say(f"layers: {f'all recomputed to fit {usable}' if recompute else f'none recomputed: all fit {usable}'}")
    return recompute


def _known_sizes(
    model: PeftModel | PreTrainedModel, options: TrainOptions
) -> tuple[DecoderShape, AdapterMethod] | None:
    """Return the sizes for the prediction; None for a model or method that it does not hold for."""
    from peft import PeftModel

    if not isinstance(model, PeftModel) or options.objective != "sft":
        return None
    config = model.get_base_model().config.to_dict()
    if config.get("model_type") not in FUSED_FAMILIES:
        return None
    method = method_of_model(model, options)
    return (DecoderShape.from_config(config), method) if set(method.targets) <= set(LINEAR_LAYERS) else None


# -- plan.json


def write_plan(plan: MemoryPlan, folder: Path) -> None:
    """Write the plan for the manifest into the stage's folder."""
    facts = {
        "predicted_peak_gib": round(plan.predicted_bytes / GIB, 2),
        "recomputed_layers": plan.setting.num_checkpointed,
        "unpacked": plan.setting.unpacked,
        "batch_size": plan.batch_size,
        "accumulation": plan.accumulation,
    }
    (folder / PLAN_FILE).write_text(json.dumps(facts) + "\n", encoding="utf-8")


def record_peak(folder: Path) -> None:
    """Print the largest allocation on this process's GPU, and write it beside the prediction if there was one.

    The memory that torch's allocator reserved for it is recorded too: free blocks do not always fit a new tensor.
    """
    import torch

    measured, reserved = torch.cuda.max_memory_allocated() / GIB, torch.cuda.max_memory_reserved() / GIB
    facts = read_plan(folder)
    predicted = f", {facts['predicted_peak_gib']:.1f} predicted" if "predicted_peak_gib" in facts else ""
    say(f"memory: {measured:.1f} GiB at most{predicted}, {reserved:.1f} reserved")
    facts |= {"peak_gib": round(measured, 2), "held_peak_gib": round(reserved, 2)}
    (folder / PLAN_FILE).write_text(json.dumps(facts) + "\n", encoding="utf-8")


def read_plan(folder: Path) -> dict[str, Any]:
    """Read what :func:`write_plan` and :func:`record_peak` wrote; an empty dictionary if there is no file."""
    path = folder / PLAN_FILE
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


# -- after training ran out of memory


@dataclass(frozen=True)
class MemoryShortage:
    """The training that ran out of GPU memory.

    Attributes:
        model_config: The model's ``config.json``.
        longest: Tokens of the longest example.
        limit_bytes: Memory that could be allocated, see :func:`usable_bytes`.
        followed_plan: Whether the fused layers ran by a plan, which needed more than predicted.
    """

    model_config: Mapping[str, Any]
    longest: int
    limit_bytes: int
    followed_plan: bool


def advise_less_memory(config: Config, shortage: MemoryShortage | None) -> str:
    """Return the overrides to add, as an imperative.

    Args:
        config: The run.
        shortage: What is known of the memory; None on a CPU.
    """
    is_known = shortage is not None and shortage.model_config.get("model_type") in FUSED_FAMILIES
    if shortage is None or not is_known or config.adapter.kind == "full":
        return _general_advice(config, on_gpu=shortage is not None)
    shape, method = DecoderShape.from_config(shortage.model_config), method_of_config(config)
    if shortage.followed_plan:
        return _advise_tighter_plan(config, shortage, shape, method)
    return _advise_smaller_passes(config, shortage, shape, method)


def _advise_tighter_plan(config: Config, shortage: MemoryShortage, shape: DecoderShape, method: AdapterMethod) -> str:
    """Advise a lower limit. The planner then chooses other settings and keeps the examples of a step."""
    train = config.train
    limits = [int(share * shortage.limit_bytes) for share in _TIGHTER_SHARES]
    before = _plan_with_options(shape, method, train, longest=shortage.longest, limit=shortage.limit_bytes)
    # If recomputation was forbidden, allowing it comes before anything else.
    allowed = ["train.gradient_checkpointing=true"] if train.gradient_checkpointing is False else []
    if allowed:
        train = train.model_copy(update={"gradient_checkpointing": True})
    four_bit = replace(method, four_bit=True)
    for candidate in dict.fromkeys((method, four_bit)):
        for limit in limits:
            plan = _plan_with_options(shape, candidate, train, longest=shortage.longest, limit=limit)
            if plan.fits and plan.predicted_bytes < before.predicted_bytes:
                overrides = [*allowed] if candidate == method else [*allowed, "model.quantization=nf4"]
                overrides.append(f"train.max_memory_gib={int(10 * plan.limit_bytes / GIB) / 10}")
                passes = f"{plan.accumulation} of {plan.batch_size} examples a step"
                layers = f"{plan.setting.num_checkpointed} of {shape.layers} layers recomputed"
                return _advice(overrides, f"{layers}, {passes}, {plan.predicted_bytes / GIB:.1f} GiB predicted")
    for longest in _shorter_lengths(shortage.longest):
        if _plan_with_options(shape, four_bit, train, longest=longest, limit=limits[0]).fits:
            return _advise_shorter_examples(longest, method, allowed)
    return _NOTHING_FITS


def _advise_smaller_passes(config: Config, shortage: MemoryShortage, shape: DecoderShape, method: AdapterMethod) -> str:
    """Advise the fastest settings of the layers of transformers that fit, with the same examples in a step."""
    train, limit = config.train, shortage.limit_bytes
    was_recomputed = recomputes_layers(shape, method, train, longest=shortage.longest, limit=limit)
    for size, recomputed, candidate, longest in _candidates(train, shortage, method, was_recomputed):
        passes = train.gradient_accumulation_steps * (train.per_device_train_batch_size // size)
        tokens = size * longest
        peak = transformers_peak_bytes(shape, candidate, tokens=tokens, recomputed=recomputed, accumulates=passes > 1)
        if peak > SAFE_SHARE * limit:
            continue
        overrides = []
        if size != train.per_device_train_batch_size:
            overrides += [f"train.per_device_train_batch_size={size}", f"train.gradient_accumulation_steps={passes}"]
        if recomputed and not was_recomputed:
            overrides.append("train.gradient_checkpointing=true")
        if longest < shortage.longest:
            return _advise_shorter_examples(longest, method, overrides)
        if candidate != method:
            overrides.append("model.quantization=nf4")
        if overrides:  # without any, these are the settings that ran out of memory
            usable = f"{limit / GIB:.1f} that may be used"
            return _advice(overrides, f"about {peak / GIB:.1f} GiB of {usable}, the same examples a step")
    return _NOTHING_FITS


def _candidates(
    train: TrainOptions, shortage: MemoryShortage, method: AdapterMethod, was_recomputed: bool
) -> Iterator[tuple[int, bool, AdapterMethod, int]]:
    """Yield batch size, recomputation, method and longest example, the fastest settings first."""
    four_bit = replace(method, four_bit=True)
    for candidate in dict.fromkeys((method, four_bit)):
        for recomputed in (True,) if was_recomputed else (False, True):
            for size in divisors(train.per_device_train_batch_size):
                yield size, recomputed, candidate, shortage.longest
    for longest in _shorter_lengths(shortage.longest):
        yield 1, True, four_bit, longest


def _shorter_lengths(longest: int) -> range:
    return range((longest - 1) // _SHORTEST_LENGTH * _SHORTEST_LENGTH, _SHORTEST_LENGTH - 1, -_SHORTEST_LENGTH)


def _advice(overrides: list[str], effect: str) -> str:
    # Options that cannot change the result leave the checkpoints valid.
    is_neutral = all(
        option.startswith(("train.max_memory_gib", "train.gradient_checkpointing")) for option in overrides
    )
    after = ", then training resumes from its last checkpoint" if is_neutral else ", and --redo train"
    return f"add {' '.join(overrides)} ({effect}){after}"


def _advise_shorter_examples(longest: int, method: AdapterMethod, others: list[str]) -> str:
    overrides = [f"prompt.max_length={longest}", *others, *([] if method.four_bit else ["model.quantization=nf4"])]
    return f"add {' '.join(overrides)} (longer examples do not fit with any setting), and --redo prepare"


_NOTHING_FITS = "use a smaller model or GPU with more memory: no batch size, recomputation, 4 bits or length would fit"


def _general_advice(config: Config, *, on_gpu: bool) -> str:
    options = config.train
    # By default, a GPU recomputes all layers of a model that the planner does not know.
    recomputed = on_gpu if options.gradient_checkpointing is None else options.gradient_checkpointing
    choices = []
    if options.per_device_train_batch_size > 1:
        half = options.per_device_train_batch_size // 2
        # The same number of examples a step, or a few more if the batch size is odd.
        passes = -(-options.per_device_train_batch_size * options.gradient_accumulation_steps // half)
        choices.append(f"train.per_device_train_batch_size={half} train.gradient_accumulation_steps={passes}")
    if not recomputed:
        choices.append("train.gradient_checkpointing=true")
    if config.adapter.kind == "full":
        choices.append("adapter.kind=lora")
    elif config.model.quantization == "none":
        choices.append("model.quantization=nf4")
    choices.append(f"prompt.max_length below {config.prompt.max_length}")
    return f"set {', or '.join(choices)}, and rerun (training resumes from its last checkpoint if the option allows it)"
