"""What to change when training ran out of memory: overrides, worked out by the planner where it knows the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fintune.config import Config
from fintune.training.memory import FAMILIES, Method, Shape, modules_peak_bytes
from fintune.training.optimizers import MOMENT_BYTES
from fintune.training.plan import GIB, TrainingPlan, divisors, make_plan
from fintune.training.planned import SHARE, method_of, must_recompute

# A plan that was too large for the memory is made again for these shares of it.
_SHARES = (0.9, 0.8, 0.7, 0.6, 0.5)
_SHORTEST = 128


@dataclass(frozen=True)
class Room:
    """Where training ran out of memory.

    Attributes:
        model_config: The model's ``config.json``.
        longest: Tokens of the longest example.
        limit_bytes: What might be allocated: see :func:`fintune.training.planned.limit_bytes`.
        followed_plan: The written-out layers ran by a plan, which was too tight.
    """

    model_config: Mapping[str, Any]
    longest: int
    limit_bytes: int
    followed_plan: bool


@dataclass(frozen=True)
class _Way:
    batch_size: int
    recomputed: bool
    method: Method
    longest: int


def less_memory(config: Config, room: Room | None) -> str:
    """The overrides to add, as an imperative.

    Args:
        config: The run.
        room: None where nothing is known of the memory, as on a CPU.
    """
    known = room is not None and room.model_config.get("model_type") in FAMILIES and config.adapter.kind != "full"
    if room is None or not known:
        return _by_rule(config, on_gpu=room is not None)
    shape = Shape.of(room.model_config)
    method = method_of(config.adapter, four_bit=config.model.quantization == "nf4")
    method = replace(method, moment_bytes=MOMENT_BYTES[config.train.optim])
    if room.followed_plan:
        return _tighter_plan(config, room, shape, method)
    return _smaller_passes(config, room, shape, method)


def _tighter_plan(config: Config, room: Room, shape: Shape, method: Method) -> str:
    """A lower limit, by which the planner chooses otherwise; it keeps the examples of a step by itself."""
    train = config.train
    # Whoever forbade to recompute is told to allow it before anything else.
    allowed = ["train.gradient_checkpointing=true"] if train.gradient_checkpointing is False else []

    def plan(limit: int, method: Method, longest: int, *, recompute: bool | None) -> TrainingPlan:
        asked = {"batch_size": train.per_device_train_batch_size, "accumulation": train.gradient_accumulation_steps}
        return make_plan(shape, method, **asked, longest=longest, limit_bytes=limit, recompute=recompute)

    before = plan(room.limit_bytes, method, room.longest, recompute=train.gradient_checkpointing)
    recompute = True if allowed else train.gradient_checkpointing
    for wanted in dict.fromkeys((method, replace(method, four_bit=True))):
        for share in _SHARES:
            made = plan(int(share * room.limit_bytes), wanted, room.longest, recompute=recompute)
            if made.fits and made.predicted_bytes < before.predicted_bytes:
                told = [*allowed] if wanted == method else [*allowed, "model.quantization=nf4"]
                told.append(f"train.max_memory_gib={int(10 * made.limit_bytes / GIB) / 10}")
                what = f"{made.setting.num_checkpointed} of {shape.layers} layers recomputed, {_passes(made)}"
                return _sentence(told, f"{what}, {made.predicted_bytes / GIB:.1f} GiB predicted")
    smallest = replace(method, four_bit=True)
    for longest in _shorter(room.longest):
        if plan(int(_SHARES[0] * room.limit_bytes), smallest, longest, recompute=recompute).fits:
            return _shortened(longest, method, allowed)
    return _nothing_fits()


def _smaller_passes(config: Config, room: Room, shape: Shape, method: Method) -> str:
    """For transformers' layers: the fastest way that fits, with the examples of a step as they were."""
    asked = config.train
    recomputed = must_recompute(shape, method, asked, longest=room.longest, limit=room.limit_bytes)
    for way in _ways(config, room, method, recomputed=recomputed):
        passes = asked.gradient_accumulation_steps * (asked.per_device_train_batch_size // way.batch_size)
        peak = modules_peak_bytes(
            shape,
            way.method,
            tokens=way.batch_size * way.longest,
            recomputed=way.recomputed,
            accumulates=passes > 1,
        )
        if peak > SHARE * room.limit_bytes:
            continue
        if way.longest < room.longest:
            told = (
                ["train.per_device_train_batch_size=1", f"train.gradient_accumulation_steps={passes}"]
                if asked.per_device_train_batch_size > 1
                else []
            )
            told += [] if recomputed else ["train.gradient_checkpointing=true"]
            return _shortened(way.longest, method, told)
        told = []
        if way.batch_size != asked.per_device_train_batch_size:
            told += [
                f"train.per_device_train_batch_size={way.batch_size}",
                f"train.gradient_accumulation_steps={passes}",
            ]
        if way.recomputed and not recomputed:
            told.append("train.gradient_checkpointing=true")
        if way.method != method:
            told.append("model.quantization=nf4")
        if told:  # else it is what ran out of memory
            limit = f"{room.limit_bytes / GIB:.1f} that may be used"
            return _sentence(told, f"about {peak / GIB:.1f} GiB of {limit}, the same examples a step")
    return _nothing_fits()


def _ways(config: Config, room: Room, method: Method, *, recomputed: bool) -> Iterator[_Way]:
    """From the fastest to the smallest."""
    for wanted in dict.fromkeys((method, replace(method, four_bit=True))):
        for again in (True,) if recomputed else (False, True):
            for size in divisors(config.train.per_device_train_batch_size):
                yield _Way(size, again, wanted, room.longest)
    for longest in _shorter(room.longest):
        yield _Way(1, True, replace(method, four_bit=True), longest)


def _shorter(longest: int) -> Iterator[int]:
    yield from range((longest - 1) // _SHORTEST * _SHORTEST, _SHORTEST - 1, -_SHORTEST)


def _passes(plan: TrainingPlan) -> str:
    return f"{plan.accumulation} of {plan.batch_size} examples a step"


def _sentence(overrides: list[str], what: str) -> str:
    return f"add {' '.join(overrides)} ({what}){_behind(overrides)}"


def _behind(overrides: list[str]) -> str:
    # Options that cannot change the result do not part a run from its checkpoints.
    goes_on = all(each.startswith(("train.max_memory_gib", "train.gradient_checkpointing")) for each in overrides)
    return "; training then goes on from its last checkpoint" if goes_on else ", and --redo train"


def _shortened(longest: int, method: Method, besides: list[str]) -> str:
    told = [f"prompt.max_length={longest}", *besides] + ([] if method.four_bit else ["model.quantization=nf4"])
    return f"add {' '.join(told)} (longer examples fit in no way of training), and --redo prepare"


def _nothing_fits() -> str:
    return "no batch size, recomputation, 4-bit weights or shorter examples would fit: take a smaller model or GPU"


def _by_rule(config: Config, *, on_gpu: bool) -> str:
    options = config.train
    # Where empty, a GPU recomputes all layers of a model that the planner does not know.
    recomputed = on_gpu if options.gradient_checkpointing is None else options.gradient_checkpointing
    choices = []
    if options.per_device_train_batch_size > 1:
        half = options.per_device_train_batch_size // 2
        # As many examples a step; an odd batch becomes a little more than that.
        more = -(-options.per_device_train_batch_size * options.gradient_accumulation_steps // half)
        choices.append(f"train.per_device_train_batch_size={half} train.gradient_accumulation_steps={more}")
    if not recomputed:
        choices.append("train.gradient_checkpointing=true")
    if config.adapter.kind == "full":
        choices.append("adapter.kind=lora")
    elif config.model.quantization == "none":
        choices.append("model.quantization=nf4")
    choices.append(f"prompt.max_length below {config.prompt.max_length}")
    return f"set {', or '.join(choices)}; the same command then goes on from the last checkpoint where that is allowed"
