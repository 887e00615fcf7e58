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


@dataclass(frozen=True)
class MemoryRequest:
    """A training whose settings are to fit a GPU: batches of its ``longest`` example (tokens) in ``limit`` bytes.

    The frozen weights are divided among ``num_shards`` GPUs.
    """

    shape: DecoderShape
    method: AdapterMethod
    options: TrainOptions
    longest: int
    limit: int
    num_shards: int = 1

    @classmethod
    def from_config(cls, config: Config, model_config: Mapping[str, Any], longest: int, limit: int) -> MemoryRequest:
        """Make the request of a configuration whose model is not loaded; ``model_config`` is its ``config.json``."""
        adapter, targets = config.adapter, config.adapter.target_modules
        method = AdapterMethod(
            adapter.r,
            tuple(name for name in LINEAR_LAYERS if "all-linear" in targets or name in targets),
            dora=adapter.kind == "dora",
            four_bit=config.model.quantization == "nf4",
            moment_bytes=MOMENT_BYTES[config.train.optim],
            dropout=adapter.lora_dropout > 0,
        )
        return cls(DecoderShape.from_config(model_config), method, config.train, longest, limit)

    @classmethod
    def from_model(cls, model: PeftModel, options: TrainOptions, lengths: Sequence[int]) -> MemoryRequest:
        """Make the request of an adapted model on its GPU; ``lengths`` are the tokens of each example."""
        from peft.tuners.lora import LoraLayer

        adapted = {
            path.rpartition(".")[2]: module for path, module in model.named_modules() if isinstance(module, LoraLayer)
        }
        first = next(iter(adapted.values()))
        (name,) = first.active_adapters
        method = AdapterMethod(
            rank=max(module.r[name] for module in adapted.values()),
            targets=tuple(adapted),
            dora=name in first.lora_magnitude_vector,
            four_bit=getattr(first.get_base_layer().weight, "quant_state", None) is not None,
            moment_bytes=MOMENT_BYTES[options.optim],
            dropout=any(getattr(dropout, "p", 0) > 0 for dropout in first.lora_dropout.values()),
        )
        shape = DecoderShape.from_config(model.get_base_model().config.to_dict())
        device = model.device if model.device.type == "cuda" else None
        limit = distributed.all_reduce_min(usable_bytes(options.max_memory_gib, free_bytes(device)))
        num_shards = distributed.world_size() if distributed.is_sharded(options) else 1
        return cls(shape, method, options, max(lengths), limit, num_shards)

    def in_four_bits(self, four_bit: bool) -> MemoryRequest:
        """Return the same request with the base weights in 4 or 16 bits."""
        return replace(self, method=replace(self.method, four_bit=four_bit))

    def choose_plan(self) -> MemoryPlan:
        """Choose the fastest settings of the fused layers that fit; if none fit, the smallest ones."""
        return choose_plan(
            self.shape,
            self.method,
            batch_size=self.options.per_device_train_batch_size,
            accumulation=self.options.gradient_accumulation_steps,
            longest=self.longest,
            limit_bytes=self.limit,
            recompute=self.options.gradient_checkpointing,
        )

    def require_plan(self) -> MemoryPlan:
        """Choose settings of the fused layers that fit.

        Raises:
            ResourceError: Not even one example a pass fits.
        """
        plan = self.choose_plan()
        if plan.fits:
            return plan
        may_recompute = self.options.gradient_checkpointing is not False
        layers = "every layer recomputed" if may_recompute else "no layer recomputed"
        changes = [] if self.method.four_bit else ["model.quantization=nf4"]
        changes += [] if may_recompute else ["train.gradient_checkpointing=true"]
        changes += ["a shorter prompt.max_length", "a smaller adapter.r", "a smaller model"]
        needed, usable = format_distinct(plan.predicted_bytes, self.limit)
        raise ResourceError(
            f"training needs {needed} for one example of {self.longest} tokens with {layers}, but only {usable} may be "
            "used",
            hint=f"use {', or '.join(changes)}",
        )

    def describe_four_bit_need(self) -> str:
        """Say in a sentence whether the model fits only in 4 bits."""
        if self.in_four_bits(False).choose_plan().fits:
            return "4 bits are not needed: the 16-bit model fits"
        return "4 bits are needed: the 16-bit model does not fit"

    def transformers_peak(self, *, recomputed: bool) -> int:
        """Predict the largest allocation with the layers of transformers."""
        return transformers_peak_bytes(
            self.shape,
            self.method,
            tokens=self.options.per_device_train_batch_size * self.longest,
            recomputed=recomputed,
            accumulates=self.options.gradient_accumulation_steps > 1,
            num_shards=self.num_shards,
        )

    def recomputes_layers(self) -> bool:
        """Whether the layers of transformers are recomputed: as set, else if their activations may not fit."""
        if self.options.gradient_checkpointing is not None:
            return self.options.gradient_checkpointing
        return self.transformers_peak(recomputed=False) > SAFE_SHARE * self.limit

    def describe_transformers_plan(self) -> str:
        """Say in a sentence what a GPU needs for the layers of transformers.

        Raises:
            ResourceError: The batch does not fit.
        """
        recomputed, is_sharded = self.recomputes_layers(), self.num_shards > 1
        peak = self.transformers_peak(recomputed=recomputed)
        divided = f"on each of {self.num_shards} GPUs, the frozen weights divided (FSDP2)"
        where = divided if is_sharded else "with the layers of transformers"
        where += ", all layers recomputed" if recomputed else ""
        if peak <= self.limit:
            return f"fits: about {format_usage(peak, self.limit)} {where}"
        hint = "model.quantization=nf4"
        if self.options.per_device_train_batch_size > 1:
            hint = "a smaller train.per_device_train_batch_size with more train.gradient_accumulation_steps"
        hint += "" if recomputed else ", train.gradient_checkpointing=true"
        needed, usable = format_distinct(peak, self.limit)
        raise ResourceError(
            f"training needs about {needed} {where}, but only {usable} may be used",
            hint=f"use {hint}{', or more GPUs' if is_sharded else ''}",
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


def fits_one_gpu(config: Config, model_config: Mapping[str, Any], longest: int, limit: int) -> bool:
    """Whether the base and the smallest pass fit one GPU; True for a model that the planner does not know."""
    is_known = model_config.get("model_type") in FUSED_FAMILIES
    return not is_known or MemoryRequest.from_config(config, model_config, longest, limit).choose_plan().fits


def plan_for_model(model: PeftModel, options: TrainOptions, lengths: Sequence[int]) -> MemoryPlan:
    """Choose and print the settings of the fused layers for a model on its GPU; ``lengths`` in tokens.

    Raises:
        ResourceError: Not even one example a pass fits.
    """
    request = MemoryRequest.from_model(model, options, lengths)
    plan = request.require_plan()
    for reason in (*plan.reasons, request.describe_four_bit_need()):
        say(f"plan: {reason}")
    say(f"plan: {format_usage(plan.predicted_bytes, plan.limit_bytes, ' predicted')}")
    return plan


def resolve_checkpointing(
    model: PeftModel | PreTrainedModel, options: TrainOptions, lengths: Sequence[int]
) -> TrainOptions:
    """Return the options with ``train.gradient_checkpointing`` set for the layers of transformers.

    The choice is printed if the option was not set and there is a GPU. ``lengths`` are the tokens of each example.
    """
    if options.gradient_checkpointing is not None:
        return options
    import torch

    recompute = False
    if model.device.type == "cuda" or (distributed.is_sharded(options) and torch.cuda.is_available()):
        request = MemoryRequest.from_model(model, options, lengths) if _is_predictable(model, options) else None
        recompute = request is None or request.recomputes_layers()
        choice = "all recomputed to fit" if recompute else "none recomputed: all fit"
        reason = "all recomputed, because their memory cannot be predicted (train.gradient_checkpointing)"
        say(f"layers: {reason if request is None else f'{choice} {format_gib(request.limit)}'}")
    return options.model_copy(update={"gradient_checkpointing": recompute})


def _is_predictable(model: PeftModel | PreTrainedModel, options: TrainOptions) -> bool:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    if not isinstance(model, PeftModel) or options.objective != "sft":
        return False
    names = {path.rpartition(".")[2] for path, module in model.named_modules() if isinstance(module, LoraLayer)}
    return model.get_base_model().config.model_type in FUSED_FAMILIES and names <= set(LINEAR_LAYERS)


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
    """Print what torch allocated and reserved at most on this process's GPU, and write it beside the prediction."""
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


def advise_less_memory(
    config: Config, model_config: Mapping[str, Any] | None, *, longest: int, limit: int, followed_plan: bool
) -> str:
    """Return the overrides to add after training ran out of memory, as an imperative.

    Args:
        config: The run.
        model_config: The model's ``config.json``; None on a CPU, whose memory is not predicted.
        longest: Tokens of the longest example.
        limit: Bytes that could be allocated.
        followed_plan: Whether the fused layers ran by a plan.
    """
    if (model_config or {}).get("model_type") not in FUSED_FAMILIES or config.adapter.kind == "full":
        return _general_advice(config, on_gpu=model_config is not None)
    assert model_config is not None, "its type is known"
    request = MemoryRequest.from_config(config, model_config, longest, limit)
    return _advise_tighter_plan(request) if followed_plan else _advise_smaller_passes(request)


def _advise_tighter_plan(request: MemoryRequest) -> str:
    """Advise a lower limit. The planner then chooses other settings and keeps the examples of a step."""
    before, limit, options = request.choose_plan(), request.limit, request.options
    # If recomputation was forbidden, allowing it comes before anything else.
    allowed = ["train.gradient_checkpointing=true"] if options.gradient_checkpointing is False else []
    if allowed:
        request = replace(request, options=options.model_copy(update={"gradient_checkpointing": True}))
    for four_bit in dict.fromkeys((request.method.four_bit, True)):
        for share in _TIGHTER_SHARES:
            plan = replace(request, limit=int(share * limit)).in_four_bits(four_bit).choose_plan()
            if plan.fits and plan.predicted_bytes < before.predicted_bytes:
                overrides = [*allowed] if four_bit == request.method.four_bit else [*allowed, "model.quantization=nf4"]
                overrides.append(f"train.max_memory_gib={int(10 * plan.limit_bytes / GIB) / 10}")
                passes = f"{plan.accumulation} of {plan.batch_size} examples a step"
                layers = f"{plan.setting.num_checkpointed} of {request.shape.layers} layers recomputed"
                return _advice(overrides, f"{layers}, {passes}, {plan.predicted_bytes / GIB:.1f} GiB predicted")
    smallest = replace(request, limit=int(_TIGHTER_SHARES[0] * limit)).in_four_bits(True)
    for longest in _shorter_lengths(request.longest):
        if replace(smallest, longest=longest).choose_plan().fits:
            return _advise_shorter_examples(longest, request, allowed)
    return _NOTHING_FITS


def _advise_smaller_passes(request: MemoryRequest) -> str:
    """Advise the fastest settings of the layers of transformers that fit, with the same examples in a step."""
    options, was_recomputed = request.options, request.recomputes_layers()
    for size, recomputed, four_bit, longest in _candidates(request, was_recomputed):
        passes = options.gradient_accumulation_steps * (options.per_device_train_batch_size // size)
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": passes}
        candidate = replace(request, options=options.model_copy(update=sizes), longest=longest).in_four_bits(four_bit)
        peak = candidate.transformers_peak(recomputed=recomputed)
        if peak > SAFE_SHARE * request.limit:
            continue
        overrides = []
        if size != options.per_device_train_batch_size:
            overrides += [f"train.{name}={value}" for name, value in sizes.items()]
        if recomputed and not was_recomputed:
            overrides.append("train.gradient_checkpointing=true")
        if longest < request.longest:
            return _advise_shorter_examples(longest, request, overrides)
        if four_bit != request.method.four_bit:
            overrides.append("model.quantization=nf4")
        if overrides:  # without any, these are the settings that ran out of memory
            usable = f"{request.limit / GIB:.1f} that may be used"
            return _advice(overrides, f"about {peak / GIB:.1f} GiB of {usable}, the same examples a step")
    return _NOTHING_FITS


def _candidates(request: MemoryRequest, was_recomputed: bool) -> Iterator[tuple[int, bool, bool, int]]:
    """Yield batch size, recomputation, 4 bits and longest example, the fastest settings first."""
    for four_bit in dict.fromkeys((request.method.four_bit, True)):
        for recomputed in (True,) if was_recomputed else (False, True):
            for size in divisors(request.options.per_device_train_batch_size):
                yield size, recomputed, four_bit, request.longest
    for longest in _shorter_lengths(request.longest):
        yield 1, True, True, longest


def _shorter_lengths(longest: int) -> range:
    return range((longest - 1) // _SHORTEST_LENGTH * _SHORTEST_LENGTH, _SHORTEST_LENGTH - 1, -_SHORTEST_LENGTH)


def _advice(overrides: list[str], effect: str) -> str:
    # Options that cannot change the result leave the checkpoints valid.
    neutral = ("train.max_memory_gib", "train.gradient_checkpointing")
    is_neutral = all(option.startswith(neutral) for option in overrides)
    after = ", then training resumes from its last checkpoint" if is_neutral else ", and --redo train"
    return f"add {' '.join(overrides)} ({effect}){after}"


def _advise_shorter_examples(longest: int, request: MemoryRequest, others: list[str]) -> str:
    overrides = [f"prompt.max_length={longest}", *others]
    overrides += [] if request.method.four_bit else ["model.quantization=nf4"]
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
