"""Which way of training fits the GPU's memory and is the fastest that does.

What a step costs besides its products: a layer that keeps its input only runs most of its forward pass once more; a
4-bit weight that is not held unpacked is unpacked at every use. What it gains: memory. All ways are few enough to try.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fintune.training.memory import Method, Setting, Shape, peak_bytes

GIB = 2**30
RESERVE_BYTES = int(1.25 * GIB)
"""Left free: what the allocator holds between two sizes, and libraries' workspaces."""

# Of one forward pass through a layer: all products but the way down (and the activations of its adapter).
_AGAIN = 0.75
# Rates of an H100, of which only the ratio matters: matrix products, and unpacking 4-bit weights (bytes read and
# written).
_OPERATIONS_A_SECOND = 7e14
_UNPACKED_BYTES_A_SECOND = 1.5e12


def told(num_bytes: int, decimals: int = 1) -> str:
    """``9.4 GiB``; below one ``614 MiB``, with a decimal less."""
    if num_bytes >= GIB:
        return f"{num_bytes / GIB:.{decimals}f} GiB"
    return f"{num_bytes / 2**20:.{decimals - 1}f} MiB"


def told_apart(needed: int, limit: int) -> tuple[str, str]:
    """Two sizes of which the one is more than the other, with as many decimals as show it."""
    pairs = ((told(needed, decimals), told(limit, decimals)) for decimals in (1, 2, 3))
    return next((pair for pair in pairs if pair[0] != pair[1]), (f"{needed:,} bytes", f"{limit:,} bytes"))


def told_of(used: int, limit: int, what: str = "") -> str:
    """``39.1 GiB predicted of 78.8``: the unit stands once where it is that of both."""
    room = told(limit)
    return f"{told(used)}{what} of {room.removesuffix(' ' + told(used).split()[1])}"


@dataclass(frozen=True)
class TrainingPlan:
    """A way to train.

    Attributes:
        setting: What was chosen.
        batch_size: Examples a forward pass.
        accumulation: Forward passes a step; the product with ``batch_size`` is what was asked for.
        predicted_bytes: Largest allocation.
        limit_bytes: What there is.
        fits: Whether the one is below the other.
        reasons: A sentence for every choice.
    """

    setting: Setting
    batch_size: int
    accumulation: int
    predicted_bytes: int
    limit_bytes: int
    fits: bool
    reasons: tuple[str, ...]


def make_plan(
    shape: Shape,
    method: Method,
    *,
    batch_size: int,
    accumulation: int,
    longest: int,
    limit_bytes: int,
    recompute: bool | None = None,
) -> TrainingPlan:
    """The fastest way that fits; where none does, the smallest, with ``fits`` false.

    Args:
        shape: The model.
        method: What is trained.
        batch_size: Examples a forward pass as asked for.
        accumulation: Forward passes a step as asked for.
        longest: Tokens of the longest example; a batch of such examples must fit.
        limit_bytes: Memory that may be allocated, see :data:`RESERVE_BYTES`.
        recompute: All layers, or none; as many as memory demands where empty.
    """
    best: tuple[float, TrainingPlan] | None = None
    smallest: TrainingPlan | None = None
    for size in divisors(batch_size):
        passes = accumulation * (batch_size // size)
        for setting in _settings(shape, method, recompute, tokens=size * longest, accumulates=passes > 1):
            peak = peak_bytes(shape, method, setting)
            made = TrainingPlan(setting, size, passes, peak, limit_bytes, peak <= limit_bytes, ())
            if smallest is None or peak < smallest.predicted_bytes:
                smallest = made
            cost = passes * _seconds(shape, setting, method)
            if made.fits and (best is None or cost < best[0]):
                best = cost, made
        if best is not None:
            # Smaller passes only ever cost more: the same products in smaller pieces.
            break
    assert smallest is not None, "there is always a batch of one example"
    chosen = smallest if best is None else best[1]
    reasons = (*_pass_reasons(chosen, batch_size, recompute), *_layer_reasons(shape, method, chosen, recompute))
    return TrainingPlan(**{**vars(chosen), "reasons": reasons})


def divisors(number: int) -> Iterator[int]:
    """From the largest down."""
    return (size for size in range(number, 0, -1) if number % size == 0)


def _settings(
    shape: Shape, method: Method, recompute: bool | None, *, tokens: int, accumulates: bool
) -> Iterator[Setting]:
    numbers = {None: range(shape.layers + 1), True: (shape.layers,), False: (0,)}
    for unpacked in (True, False) if method.four_bit else (True,):
        for num_checkpointed in numbers[recompute]:
            yield Setting(num_checkpointed, unpacked, tokens, accumulates)


def _seconds(shape: Shape, setting: Setting, method: Method) -> float:
    """Time of a pass, as far as the choice changes it."""
    layer = 2 * shape.linear_weights * setting.tokens / _OPERATIONS_A_SECOND
    unpacking = 0.0
    if method.four_bit and not setting.unpacked:
        unpacking = 2.5 * shape.linear_weights / _UNPACKED_BYTES_A_SECOND
    again = setting.num_checkpointed * _AGAIN * (layer + unpacking)
    return shape.layers * 2 * (layer + unpacking) + again


def _pass_reasons(plan: TrainingPlan, batch_size: int, recompute: bool | None) -> Iterator[str]:
    if plan.batch_size < batch_size:
        layers = "without recomputed layers" if recompute is False else "even with every layer checkpointed"
        yield (
            f"{plan.batch_size} of {batch_size} examples a pass, {plan.accumulation} passes a step: "
            f"{batch_size} do not fit {told(plan.limit_bytes)} {layers}"
        )


def _layer_reasons(shape: Shape, method: Method, plan: TrainingPlan, recompute: bool | None) -> Iterator[str]:
    setting = plan.setting
    room = told(plan.limit_bytes)
    if recompute is not None:
        yield f"{'every' if recompute else 'no'} layer recomputed, as train.gradient_checkpointing says"
    elif setting.num_checkpointed == 0:
        yield f"no layer recomputed: all activations fit {room}"
    else:
        yield f"{setting.num_checkpointed} of {shape.layers} layers recomputed, no more than {room} demand"
    if method.four_bit:
        if setting.unpacked:
            yield "4-bit weights held unpacked beside: there is room, and no step unpacks them"
        else:
            yield "4-bit weights unpacked at every use: 16-bit copies would cost more in recomputed layers, or not fit"
