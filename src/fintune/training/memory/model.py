"""GPU memory and time of a training step, predicted from the shapes of the model, and the settings that fit.

The byte counts predict ``torch.cuda.max_memory_allocated``. The CUDA context and the free blocks of torch's allocator
come on top: :data:`RESERVE_BYTES` is kept free for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

GIB = 2**30
RESERVE_BYTES = int(1.25 * GIB)
"""Memory that is never planned: free blocks that the allocator holds, and workspaces of the libraries."""

FUSED_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""``model_type`` of the models whose decoder layers ``training.fused`` implements."""
LINEAR_GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
"""Linear layers of a decoder layer. Layers of one group read the same input, and the fused layers join them."""
LINEAR_LAYERS = tuple(name for group in LINEAR_GROUPS for name in group)

RANK_MULTIPLE = 64
"""The fused layers pad the adapters' ranks of a group to this multiple, so that rows begin at cache lines."""
MAX_CHUNK_LOGITS = 2**27
"""Logits that the loss of the fused layers holds at a time: 256 MiB in bfloat16."""

# NF4 with double quantization: 4 bits, a byte for 64 numbers, 4 bytes for 256 of those (arXiv 2305.14314, section 3).
_NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
# Activations that autograd saves for a layer of transformers with PEFT's adapters, relative to a fused layer.
_TRANSFORMERS_ACTIVATIONS = 1.55
# Whole float32 matrices that PEFT's DoRA makes of W and of B A.
_PEFT_DORA_COPIES = 12

# A recomputed layer repeats all products of its forward pass but down_proj (and the activations of its adapter).
_RECOMPUTED_SHARE = 0.75
# Rates of an H100: matrix products, and bytes read and written while 4-bit weights are dequantized. Only their ratio
# matters.
_OPERATIONS_PER_SECOND = 7e14
_DEQUANTIZED_BYTES_PER_SECOND = 1.5e12


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of a decoder of one of :data:`FUSED_FAMILIES`.

    Attributes:
        hidden: Width of the hidden states.
        intermediate: Width of the feed-forward part.
        layers: Number of decoder layers.
        heads: Number of query heads.
        key_heads: Number of key heads, which is also the number of value heads.
        head_dim: Width of a head.
        vocab_size: Rows of the embedding.
        tied: Whether the output head is the embedding.
        has_head_norms: Whether queries and keys are normalised (Qwen3).
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_heads: int
    head_dim: int
    vocab_size: int
    tied: bool
    has_head_norms: bool = False

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> DecoderShape:
        """Read the sizes from a model's ``config.json``."""
        heads = int(config["num_attention_heads"])
        return cls(
            hidden=int(config["hidden_size"]),
            intermediate=int(config["intermediate_size"]),
            layers=int(config["num_hidden_layers"]),
            heads=heads,
            key_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or config["hidden_size"] // heads),
            vocab_size=int(config["vocab_size"]),
            tied=bool(config.get("tie_word_embeddings", False)),
            has_head_norms=config.get("model_type") == "qwen3",
        )

    @property
    def qkv(self) -> int:
        """Outputs of the projections to queries, keys and values together."""
        return (self.heads + 2 * self.key_heads) * self.head_dim

    def linear(self, name: str) -> tuple[int, int]:
        """Return the outputs and inputs of one of :data:`LINEAR_LAYERS`."""
        attention, keys = self.heads * self.head_dim, self.key_heads * self.head_dim
        return {
            "q_proj": (attention, self.hidden),
            "k_proj": (keys, self.hidden),
            "v_proj": (keys, self.hidden),
            "o_proj": (self.hidden, attention),
            "gate_proj": (self.intermediate, self.hidden),
            "up_proj": (self.intermediate, self.hidden),
            "down_proj": (self.hidden, self.intermediate),
        }[name]

    @property
    def linear_weights(self) -> int:
        """Number of weights in the linear layers of one decoder layer."""
        return sum(num_out * num_in for num_out, num_in in map(self.linear, LINEAR_LAYERS))

    @property
    def embedding_bytes(self) -> int:
        """Bytes of the embedding and the output head in 16 bits."""
        return 2 * self.vocab_size * self.hidden * (1 if self.tied else 2)


@dataclass(frozen=True)
class AdapterMethod:
    """What is trained, and on which base weights.

    Attributes:
        rank: Rank of the adapters.
        targets: Names of the linear layers that have an adapter.
        dora: Whether the adapters have DoRA's magnitudes.
        four_bit: Whether the base weights are stored in NF4.
        moment_bytes: Bytes that the optimizer keeps for each trained number.
        dropout: Whether the adapters drop parts of their input.
    """

    rank: int
    targets: tuple[str, ...] = LINEAR_LAYERS
    dora: bool = False
    four_bit: bool = False
    moment_bytes: float = 8
    dropout: bool = False

    def padded_rank(self, *names: str) -> int:
        """Return the padded sum of the ranks of layers that read one input."""
        rank = self.rank * sum(name in self.targets for name in names)
        return ceil(rank / RANK_MULTIPLE) * RANK_MULTIPLE

    def num_trained(self, shape: DecoderShape) -> int:
        """Count the trained numbers of all adapters."""
        sizes = [shape.linear(name) for name in self.targets]
        return shape.layers * sum(self.rank * (num_out + num_in) + self.dora * num_out for num_out, num_in in sizes)


@dataclass(frozen=True)
class StepSetting:
    """What the planner may choose for the fused layers.

    Attributes:
        num_checkpointed: Layers that save their input only and are recomputed in the backward pass.
        unpacked: Whether 16-bit copies of 4-bit weights are held for the whole run.
        tokens: Tokens of one forward pass.
        accumulates: Whether gradients are kept over several forward passes.
    """

    num_checkpointed: int
    unpacked: bool
    tokens: int
    accumulates: bool = False


def fused_peak_bytes(
    shape: DecoderShape, method: AdapterMethod, setting: StepSetting, *, num_labels: int | None = None
) -> int:
    """Predict the largest allocation of a step with the fused layers; ``num_labels`` tokens (all) of a pass count."""
    num_labels = setting.tokens if num_labels is None else num_labels
    saved = setting.num_checkpointed * _input_bytes(shape, setting.tokens)
    saved += (shape.layers - setting.num_checkpointed) * _activation_bytes(shape, method, setting.tokens)
    transient = max(_head_bytes(shape, setting.tokens, num_labels), _backward_bytes(shape, method, setting))
    return static_bytes(shape, method, setting) + saved + transient


def transformers_peak_bytes(
    shape: DecoderShape,
    method: AdapterMethod,
    *,
    tokens: int,
    recomputed: bool,
    accumulates: bool,
    num_shards: int = 1,
) -> int:
    """Predict the largest allocation with the layers of transformers and PEFT; measured on an H100 to be within 10 %.

    Args:
        shape: Sizes of the model.
        method: What is trained.
        tokens: Tokens of one forward pass.
        recomputed: Whether all layers are recomputed.
        accumulates: Whether gradients are kept over several forward passes.
        num_shards: GPUs among which the frozen weights are divided. Those of two layers are gathered on every GPU.
    """
    setting = StepSetting(0, unpacked=not method.four_bit, tokens=tokens, accumulates=accumulates)
    activations = int(_TRANSFORMERS_ACTIVATIONS * _activation_bytes(shape, method, tokens))
    total = shape.layers * (_input_bytes(shape, tokens) if recomputed else activations)
    layer = _backward_bytes(shape, method, setting) + (activations if recomputed else 0)
    if method.dora:
        layer += _PEFT_DORA_COPIES * 4 * shape.hidden * shape.intermediate
    total += static_bytes(shape, method, setting) + max(layer, _head_bytes(shape, tokens, tokens))
    if num_shards > 1:
        frozen = shape.embedding_bytes + 2 * shape.layers * shape.linear_weights
        total += frozen // num_shards - frozen + shape.embedding_bytes + 2 * 2 * shape.linear_weights
    return total


def static_bytes(shape: DecoderShape, method: AdapterMethod, setting: StepSetting) -> int:
    """Predict what is allocated between two steps: weights, adapters, moments of the optimizer."""
    trained = method.num_trained(shape)
    total = shape.embedding_bytes + 4 * trained + int(method.moment_bytes * trained)
    total += 4 * trained if setting.accumulates else 0
    if method.four_bit:
        total += int(shape.layers * shape.linear_weights * _NF4_BYTES)
    if not method.four_bit or setting.unpacked:
        total += shape.layers * sum(_augmented_bytes(shape, method, *names) for names in LINEAR_GROUPS)
    if method.dora:
        total += shape.layers * 4 * 3 * sum(shape.linear(name)[0] for name in LINEAR_LAYERS)
    return total


def pass_seconds(shape: DecoderShape, method: AdapterMethod, setting: StepSetting) -> float:
    """Estimate the time of a forward and backward pass, as far as the setting changes it."""
    layer = 2 * shape.linear_weights * setting.tokens / _OPERATIONS_PER_SECOND
    dequantization = 0.0
    if method.four_bit and not setting.unpacked:
        dequantization = 2.5 * shape.linear_weights / _DEQUANTIZED_BYTES_PER_SECOND
    recomputation = setting.num_checkpointed * _RECOMPUTED_SHARE * (layer + dequantization)
    return shape.layers * 2 * (layer + dequantization) + recomputation


def _augmented_bytes(shape: DecoderShape, method: AdapterMethod, *names: str) -> int:
    """Bytes of the augmented weight [W | B; A | 0] of a group, see ``fused.lora_linear``."""
    rank = method.padded_rank(*names)
    return 2 * (sum(shape.linear(name)[0] for name in names) + rank) * (shape.linear(names[0])[1] + rank)


def _input_bytes(shape: DecoderShape, tokens: int) -> int:
    return 2 * tokens * shape.hidden


def _activation_bytes(shape: DecoderShape, method: AdapterMethod, tokens: int) -> int:
    """Bytes that a layer without checkpointing saves for its backward pass, see ``decoder_layer.SavedActivations``."""
    attention = shape.heads * shape.head_dim
    columns = shape.hidden + (shape.hidden + method.padded_rank(*LINEAR_GROUPS[0]))  # input, normalised input
    columns += shape.qkv * (2 if method.dora or shape.has_head_norms else 1)  # rotated, and raw where it is needed
    columns += attention + method.padded_rank(*LINEAR_GROUPS[1])  # output of the attention
    columns += shape.hidden + (shape.hidden + method.padded_rank(*LINEAR_GROUPS[2]))  # middle, normalised middle
    columns += 2 * shape.intermediate + method.padded_rank(*LINEAR_GROUPS[3])
    columns += 2 * shape.hidden if method.dora else 0  # branches before DoRA's scale
    if method.dora and method.dropout:  # outputs before DoRA's scale, and after it
        columns += 2 * shape.intermediate + (shape.qkv if shape.has_head_norms else 0)
    return 2 * tokens * columns + 4 * tokens * (shape.heads + 2)


def _backward_bytes(shape: DecoderShape, method: AdapterMethod, setting: StepSetting) -> int:
    """Bytes that the backward pass of one layer needs for a while, at the feed-forward part."""
    columns = 2 * shape.intermediate + method.padded_rank(*LINEAR_GROUPS[2]) + shape.intermediate + 2 * shape.hidden
    columns += shape.hidden if method.dora else 0
    if method.dropout:  # an input with its mask, at down_proj; the differences of gradients of DoRA
        columns += shape.intermediate * (3 if method.dora else 1)
    total = 2 * setting.tokens * columns
    if setting.num_checkpointed:
        total += _activation_bytes(shape, method, setting.tokens) - _input_bytes(shape, setting.tokens)
    if method.four_bit and not setting.unpacked:
        total += _augmented_bytes(shape, method, *LINEAR_GROUPS[2])
    return total


def _head_bytes(shape: DecoderShape, tokens: int, num_labels: int) -> int:
    logits = 2 * min(MAX_CHUNK_LOGITS, num_labels * shape.vocab_size)
    return logits + 2 * shape.hidden * (tokens + 3 * num_labels)


# -- sizes as text


def format_gib(num_bytes: int, decimals: int = 1) -> str:
    """Return ``9.4 GiB``, or below one GiB ``614 MiB`` with one decimal less."""
    if num_bytes >= GIB:
        return f"{num_bytes / GIB:.{decimals}f} GiB"
    return f"{num_bytes / 2**20:.{decimals - 1}f} MiB"


def format_distinct(needed: int, limit: int) -> tuple[str, str]:
    """Format two different sizes with as many decimals as it takes to show the difference."""
    pairs = ((format_gib(needed, decimals), format_gib(limit, decimals)) for decimals in (1, 2, 3))
    return next((pair for pair in pairs if pair[0] != pair[1]), (f"{needed:,} bytes", f"{limit:,} bytes"))


def format_usage(used: int, limit: int, suffix: str = "") -> str:
    """Return ``39.1 GiB predicted of 78.8``, with ``" predicted"`` as suffix. A shared unit is written once."""
    unit = format_gib(used).split()[1]
    return f"{format_gib(used)}{suffix} of {format_gib(limit).removesuffix(f' {unit}')}"


# -- the choice for the fused layers


@dataclass(frozen=True)
class MemoryPlan:
    """Settings of the fused layers for a run.

    Attributes:
        setting: Recomputed layers, 16-bit copies, tokens of a pass.
        batch_size: Examples of a forward pass.
        accumulation: Forward passes of a step. The product with ``batch_size`` is what the options ask for.
        predicted_bytes: Largest allocation.
        limit_bytes: Memory that may be allocated.
        fits: Whether ``predicted_bytes`` is at most ``limit_bytes``.
        reasons: One sentence for every choice.
    """

    setting: StepSetting
    batch_size: int
    accumulation: int
    predicted_bytes: int
    limit_bytes: int
    fits: bool
    reasons: tuple[str, ...]


def choose_plan(
    shape: DecoderShape,
    method: AdapterMethod,
    *,
    batch_size: int,
    accumulation: int,
    longest: int,
    limit_bytes: int,
    recompute: bool | None = None,
) -> MemoryPlan:
    """Choose the fastest settings that fit, of all; if none fit, the smallest ones with ``fits`` False.

    Args:
        shape: Sizes of the model.
        method: What is trained.
        batch_size: Examples of a forward pass that the options ask for.
        accumulation: Forward passes of a step that the options ask for.
        longest: Tokens of the longest example. A batch of such examples must fit.
        limit_bytes: Memory that may be allocated, see :func:`usable_bytes`.
        recompute: True recomputes all layers and False none. Default: as few as the memory allows.
    """
    best: tuple[float, MemoryPlan] | None = None
    smallest: MemoryPlan | None = None
    for size in divisors(batch_size):
        passes = accumulation * (batch_size // size)
        for setting in _settings(shape, method, recompute, tokens=size * longest, accumulates=passes > 1):
            peak = fused_peak_bytes(shape, method, setting)
            plan = MemoryPlan(setting, size, passes, peak, limit_bytes, peak <= limit_bytes, ())
            if smallest is None or peak < smallest.predicted_bytes:
                smallest = plan
            cost = passes * pass_seconds(shape, method, setting)
            if plan.fits and (best is None or cost < best[0]):
                best = cost, plan
        if best is not None:
            break  # smaller passes are never faster: they are the same products in smaller pieces
    assert smallest is not None, "a batch of one example is always tried"
    chosen = smallest if best is None else best[1]
    reasons = (*_pass_reasons(chosen, batch_size, recompute), *_layer_reasons(shape, method, chosen, recompute))
    return replace(chosen, reasons=reasons)


def divisors(number: int) -> Iterator[int]:
    """Yield the divisors of a number, the largest first."""
    return (size for size in range(number, 0, -1) if number % size == 0)


def _settings(
    shape: DecoderShape, method: AdapterMethod, recompute: bool | None, *, tokens: int, accumulates: bool
) -> Iterator[StepSetting]:
    numbers = {None: range(shape.layers + 1), True: (shape.layers,), False: (0,)}
    for unpacked in (True, False) if method.four_bit else (True,):
        for num_checkpointed in numbers[recompute]:
            yield StepSetting(num_checkpointed, unpacked, tokens, accumulates)


def _pass_reasons(plan: MemoryPlan, batch_size: int, recompute: bool | None) -> Iterator[str]:
    if plan.batch_size < batch_size:
        layers = "without recomputed layers" if recompute is False else "even with every layer recomputed"
        yield (
            f"{plan.batch_size} of {batch_size} examples a pass, {plan.accumulation} passes a step: "
            f"{batch_size} do not fit {format_gib(plan.limit_bytes)} {layers}"
        )


def _layer_reasons(
    shape: DecoderShape, method: AdapterMethod, plan: MemoryPlan, recompute: bool | None
) -> Iterator[str]:
    setting, limit = plan.setting, format_gib(plan.limit_bytes)
    if recompute is not None:
        yield f"{'every' if recompute else 'no'} layer recomputed, as set by train.gradient_checkpointing"
    elif setting.num_checkpointed == 0:
        yield f"no layer recomputed: all activations fit {limit}"
    else:
        yield f"{setting.num_checkpointed} of {shape.layers} layers recomputed: fewer do not fit {limit}"
    if method.four_bit:
        if setting.unpacked:
            yield "16-bit copies of the 4-bit weights are held: they fit, and no step dequantizes the weights"
        else:
            yield "4-bit weights are dequantized at every use: 16-bit copies need more recomputed layers, or do not fit"
