"""How much GPU memory a run of the written-out layers takes, from the shapes alone.

The figures are those of the allocator (``torch.cuda.max_memory_allocated``); the CUDA context and what lies idle
between allocations come on top and are the caller's to leave room for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""``model_type`` of the configurations whose layers are written out in ``tuning.fused``."""

PARTS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_BORDER = 64  # tuning.fused.bordered pads the adapters' columns to this
_PIECE_LOGITS = 2**27  # tuning.fused.head holds so many logits at a time
# NF4 with double quantisation: 4 bits, a byte for 64 numbers, 4 bytes for 256 of those (arXiv 2305.14314, section 3).
_FOUR_BIT_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)

# What autograd keeps of a layer of transformers' with PEFT's adapters, as a multiple of the written-out layer's.
_MODULES_KEEP = 1.55
# PEFT's DoRA makes whole matrices, float32, of W and of B A.
_MODULES_DORA_COPIES = 12


@dataclass(frozen=True)
class Shape:
    """A decoder of the families that are written out.

    Attributes:
        hidden: Width of the hidden states.
        intermediate: Width of the feed-forward part.
        layers: Decoder layers.
        heads: Query heads.
        key_heads: Key heads.
        width: Of a head.
        vocabulary: Rows of the embedding.
        tied: Whether the head is the embedding.
        head_norms: Whether queries and keys are normed (Qwen3).
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_heads: int
    width: int
    vocabulary: int
    tied: bool
    head_norms: bool = False

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Shape:
        """From a model's ``config.json``."""
        heads = int(config["num_attention_heads"])
        return cls(
            hidden=int(config["hidden_size"]),
            intermediate=int(config["intermediate_size"]),
            layers=int(config["num_hidden_layers"]),
            heads=heads,
            key_heads=int(config.get("num_key_value_heads") or heads),
            width=int(config.get("head_dim") or config["hidden_size"] // heads),
            vocabulary=int(config["vocab_size"]),
            tied=bool(config.get("tie_word_embeddings", False)),
            head_norms=config.get("model_type") == "qwen3",
        )

    @property
    def qkv(self) -> int:
        """Outputs of the projections to queries, keys and values."""
        return (self.heads + 2 * self.key_heads) * self.width

    def linear(self, part: str) -> tuple[int, int]:
        """Outputs and inputs of a linear layer by its name."""
        attention, keys = self.heads * self.width, self.key_heads * self.width
        return {
            "q_proj": (attention, self.hidden),
            "k_proj": (keys, self.hidden),
            "v_proj": (keys, self.hidden),
            "o_proj": (self.hidden, attention),
            "gate_proj": (self.intermediate, self.hidden),
            "up_proj": (self.intermediate, self.hidden),
            "down_proj": (self.hidden, self.intermediate),
        }[part]

    @property
    def linear_weights(self) -> int:
        """Numbers in the linear layers of one decoder layer."""
        return sum(out * num_in for out, num_in in map(self.linear, PARTS))


@dataclass(frozen=True)
class Method:
    """What is trained, on what.

    Attributes:
        rank: Of the adapters.
        targets: Names of the linear layers that have one.
        dora: With magnitudes.
        four_bit: The base is stored in NF4.
        moment_bytes: What the optimiser keeps for a trained number.
        dropout: Of the adapters' input.
    """

    rank: int
    targets: tuple[str, ...] = PARTS
    dora: bool = False
    four_bit: bool = False
    moment_bytes: float = 8
    dropout: bool = False

    def border(self, *parts: str) -> int:
        """Columns that the adapters of layers with one input take."""
        rank = self.rank * sum(part in self.targets for part in parts)
        return ceil(rank / _BORDER) * _BORDER

    def num_trained(self, shape: Shape) -> int:
        """Numbers in all adapters."""
        sizes = [shape.linear(part) for part in self.targets]
        return shape.layers * sum(self.rank * (out + num_in) + self.dora * out for out, num_in in sizes)


@dataclass(frozen=True)
class Setting:
    """What a planner may choose.

    Attributes:
        num_checkpointed: Layers that keep their input only.
        unpacked: 16-bit copies of 4-bit weights are held.
        tokens: In one forward pass.
        accumulates: Gradients wait for further passes.
    """

    num_checkpointed: int
    unpacked: bool
    tokens: int
    accumulates: bool = False


def peak_bytes(shape: Shape, method: Method, setting: Setting, *, num_labels: int | None = None) -> int:
    """Largest allocation of a training step.

    Args:
        shape: The model.
        method: What is trained.
        setting: How.
        num_labels: Trained tokens of a pass; all where empty.
    """
    num_labels = setting.tokens if num_labels is None else num_labels
    kept = setting.num_checkpointed * _input_bytes(shape, setting.tokens)
    kept += (shape.layers - setting.num_checkpointed) * _kept_bytes(shape, method, setting.tokens)
    passing = max(_head_bytes(shape, setting.tokens, num_labels), _layer_bytes(shape, method, setting))
    return standing_bytes(shape, method, setting) + kept + passing


def modules_peak_bytes(
    shape: Shape, method: Method, *, tokens: int, recomputed: bool, accumulates: bool, parts: int = 1
) -> int:
    """Largest allocation with transformers' layers and PEFT's, as far as it can be told from TRL's peaks on an H100.

    Args:
        shape: The model.
        method: What is trained.
        tokens: In one forward pass.
        recomputed: With gradient checkpointing, of all layers.
        accumulates: Gradients wait for further passes.
        parts: GPUs among which the frozen weights are divided; of a layer that computes they lie together, as do those
            of the next one.
    """
    setting = Setting(0, unpacked=not method.four_bit, tokens=tokens, accumulates=accumulates)
    kept = int(_MODULES_KEEP * _kept_bytes(shape, method, tokens))
    total = shape.layers * (_input_bytes(shape, tokens) if recomputed else kept)
    layer = _layer_bytes(shape, method, setting) + (kept if recomputed else 0)
    if method.dora:
        layer += _MODULES_DORA_COPIES * 4 * shape.hidden * shape.intermediate
    total += standing_bytes(shape, method, setting) + max(layer, _head_bytes(shape, tokens, tokens))
    if parts > 1:
        embeddings = 2 * shape.vocabulary * shape.hidden * (1 if shape.tied else 2)
        frozen = embeddings + 2 * shape.layers * shape.linear_weights
        total += frozen // parts - frozen + embeddings + 2 * 2 * shape.linear_weights
    return total


def standing_bytes(shape: Shape, method: Method, setting: Setting) -> int:
    """What lies there between two steps: weights, adapters, the optimiser's moments."""
    embeddings = 2 * shape.vocabulary * shape.hidden * (1 if shape.tied else 2)
    trained = method.num_trained(shape)
    total = embeddings + 4 * trained + int(method.moment_bytes * trained)
    total += 4 * trained if setting.accumulates else 0
    if method.four_bit:
        total += int(shape.layers * shape.linear_weights * _FOUR_BIT_BYTES)
    if not method.four_bit or setting.unpacked:
        total += shape.layers * sum(_matrix_bytes(shape, method, *parts) for parts in _GROUPS)
    if method.dora:
        total += shape.layers * 4 * 3 * sum(shape.linear(part)[0] for part in PARTS)
    return total


_GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


def _matrix_bytes(shape: Shape, method: Method, *parts: str) -> int:
    border = method.border(*parts)
    return 2 * (sum(shape.linear(part)[0] for part in parts) + border) * (shape.linear(parts[0])[1] + border)


def _input_bytes(shape: Shape, tokens: int) -> int:
    return 2 * tokens * shape.hidden


def _kept_bytes(shape: Shape, method: Method, tokens: int) -> int:
    """What a layer without checkpointing leaves for its backward pass; see ``passes.Kept``."""
    attention = shape.heads * shape.width
    columns = shape.hidden + (shape.hidden + method.border(*_GROUPS[0]))  # input, normed
    columns += shape.qkv * (2 if method.dora or shape.head_norms else 1)  # rotated, and raw where it is needed
    columns += attention + method.border(*_GROUPS[1])  # output of the attention
    columns += shape.hidden + (shape.hidden + method.border(*_GROUPS[2]))  # middle, normed
    columns += 2 * shape.intermediate + method.border(*_GROUPS[3])
    columns += 2 * shape.hidden if method.dora else 0  # branches before their factor
    if method.dora and method.dropout:  # what DoRA's factor is applied to, and what came of it
        columns += 2 * shape.intermediate + (shape.qkv if shape.head_norms else 0)
    return 2 * tokens * columns + 4 * tokens * (shape.heads + 2)


def _layer_bytes(shape: Shape, method: Method, setting: Setting) -> int:
    """What comes and goes in the backward pass of one layer, at the feed-forward part."""
    columns = 2 * shape.intermediate + method.border(*_GROUPS[2]) + shape.intermediate + 2 * shape.hidden
    columns += shape.hidden if method.dora else 0
    if method.dropout:  # an input with its mask, at the way down; DoRA's differences of gradients
        columns += shape.intermediate * (3 if method.dora else 1)
    total = 2 * setting.tokens * columns
    if setting.num_checkpointed:
        total += _kept_bytes(shape, method, setting.tokens) - _input_bytes(shape, setting.tokens)
    if method.four_bit and not setting.unpacked:
        total += _matrix_bytes(shape, method, *_GROUPS[2])
    return total


def _head_bytes(shape: Shape, tokens: int, num_labels: int) -> int:
    logits = 2 * min(_PIECE_LOGITS, num_labels * shape.vocabulary)
    return logits + 2 * shape.hidden * (tokens + 3 * num_labels)
