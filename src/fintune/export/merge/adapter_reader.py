"""Read a PEFT adapter from its files: the tensors of the base that it changes, with product, scale and magnitude.

Source: github.com/huggingface/peft, ``LoraConfig`` and the layout of ``adapter_model.safetensors``; LoRA is arXiv
2106.09685, rank-stabilised scaling arXiv 2312.03732, DoRA arXiv 2402.09353.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from fintune.errors import ModelError
from fintune.models.adapter import check_patterns, read_adapter_config
from fintune.models.safetensors_files import StoredTensor, read_float_tensors

_PREFIX = "base_model.model."
_PART = re.compile(r"\.lora_(embedding_A|embedding_B|A\.weight|B\.weight|magnitude_vector(?:\.weight)?)$")
# Options that change the model in ways that cannot be merged, and the values with which they do not.
_REFUSED: Mapping[str, tuple[object, ...]] = {
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
} | dict.fromkeys(
    (
        "lora_bias", "layer_replication", "target_parameters", "trainable_token_indices",
        "use_qalora", "use_bdlora", "arrow_config", "kasa_config", "velora_config", "monteclora_config",
        "alora_invocation_tokens",
    ),
    (),
)  # fmt: skip


@dataclass(frozen=True)
class LowRank:
    """The low-rank change of one tensor."""

    a: StoredTensor  # lora_A, (rank, columns); transposed (rank, rows)
    b: StoredTensor  # lora_B, (rows, rank); transposed (columns, rank)
    scale: float
    """Factor of the product: alpha / rank, or alpha / sqrt(rank) with rank-stabilised scaling."""
    magnitude: StoredTensor | None
    """DoRA's magnitude of each output, or None for plain LoRA."""
    is_transposed: bool
    """Whether the tensor is the transposed product: an embedding, or GPT-2's ``Conv1D``."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the changed tensor."""
        return (self.a.shape[1], self.b.shape[0]) if self.is_transposed else (self.b.shape[0], self.a.shape[1])


def read_adapter_tensors(folder: Path) -> list[StoredTensor]:
    """Return the tensors of ``adapter_model.safetensors`` by their names in PEFT's model, without duplicates.

    PEFT removes its own parts from the names of replaced modules, but saves resized embeddings a second time with them.

    Raises:
        ModelError: The file is unreadable.
    """
    tensors: dict[str, StoredTensor] = {}
    for tensor in read_float_tensors(folder / "adapter_model.safetensors"):
        name = re.sub(r"\.modules_to_save\.(default\.)?", ".", tensor.name)
        if ".original_module." not in tensor.name and (name == tensor.name or name not in tensors):
            tensors[name] = replace(tensor, name=name)
    return list(tensors.values())


class Adapter:
    """A LoRA or DoRA adapter in PEFT's format.

    Attributes:
        base_name: Name of the base model in the adapter's configuration.
        changes: Base tensor name -> low-rank change.
        saved: Base tensor name -> tensor that replaces it (``modules_to_save``).
        ties_weights: Whether PEFT kept tied embeddings tied during training.

    Raises:
        ModelError: The folder holds no adapter, a file is unreadable or truncated, the adapter is of another kind, or
            one matrix of a pair is missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        config = read_adapter_config(folder)
        if config.peft_type != "LORA":
            raise ModelError(
                f"{folder}: an adapter of type {config.peft_type!r} cannot be merged",
                hint="only LORA (with DoRA) can be merged",
            )
        for key, value in config.model_dump(include=set(_REFUSED)).items():
            if value and value not in _REFUSED[key]:
                raise ModelError(
                    f"{folder}: {key} is {json.dumps(value)[:80]}, which cannot be merged here",
                    hint="merge this adapter with PEFT's merge_and_unload",
                )
        self.base_name = config.base_model_name_or_path or "an unnamed model"
        self.ties_weights = config.ensure_weight_tying
        self.saved: dict[str, StoredTensor] = {}
        pieces: dict[str, dict[str, StoredTensor]] = {}
        for tensor in read_adapter_tensors(folder):
            name = tensor.name.removeprefix(_PREFIX)
            if match := _PART.search(name):
                pieces.setdefault(name[: match.start()], {})[match[1].removesuffix(".weight")] = tensor
            elif ".lora_" in name:
                raise ModelError(f"{folder}: tensor {tensor.name} belongs to no LoRA or DoRA adapter")
            else:
                # An embedding that was resized and adapted is saved whole, in addition to its two matrices.
                name = name.replace(".base_layer.", ".")
                self.saved[name] = replace(tensor, name=name)
        check_patterns(folder, config, pieces)
        self.changes: dict[str, LowRank] = {}
        for module, parts in pieces.items():
            embedding = "embedding_A" in parts or "embedding_B" in parts
            a, b = (parts.get(f"embedding_{side}" if embedding else side) for side in "AB")
            magnitude = parts.get("magnitude_vector")
            if a is None or b is None:
                raise ModelError(f"{folder}: {module} lacks one of its two matrices", hint="copy the adapter again")
            fits = len(a.shape) == len(b.shape) == 2 and a.shape[0] == b.shape[1] > 0
            if not fits or (magnitude is not None and magnitude.shape != (b.shape[0],)):
                raise ModelError(f"{folder}: the matrices of {module} do not fit each other: {a.shape}, {b.shape}")
            rank, alpha = config.rank_and_alpha(module)
            if a.shape[0] != rank:
                raise ModelError(
                    f"{folder}: the matrices of {module} have rank {a.shape[0]}, its configuration says {rank}"
                )
            scale = alpha / (math.sqrt(rank) if config.use_rslora else rank)
            # GPT-2's Conv1D stores its weight transposed, as PEFT stores the product for an embedding.
            is_transposed = embedding or config.fan_in_fan_out
            self.changes[f"{module}.weight"] = LowRank(a, b, scale, magnitude, is_transposed)
        if not self.changes and not self.saved:
            raise ModelError(f"{folder} holds no tensors", hint="the adapter is incomplete; copy it again")
