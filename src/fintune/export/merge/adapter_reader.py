"""Read a PEFT adapter from its files: the tensors of the base that it changes, with product, scale and magnitude.

Source: github.com/huggingface/peft, ``LoraConfig`` and the layout of ``adapter_model.safetensors``; LoRA is arXiv
2106.09685, rank-stabilised scaling arXiv 2312.03732, DoRA arXiv 2402.09353.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fintune.errors import ModelError
from fintune.export.merge.safetensors_files import StoredTensor, read_header
from fintune.util.files import read_json

_PREFIX = "base_model.model."
_PARTS = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_embedding_A": "a",
    ".lora_embedding_B": "b",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
}
# Options that change the model in ways that cannot be merged, and the values with which they do not.
_REFUSED: Mapping[str, tuple[object, ...]] = {
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
} | dict.fromkeys(
    (
        "fan_in_fan_out", "lora_bias", "layer_replication", "target_parameters", "trainable_token_indices",
        "use_qalora", "use_bdlora", "arrow_config", "kasa_config", "velora_config", "monteclora_config",
        "alora_invocation_tokens",
    ),
    (),
)  # fmt: skip


@dataclass(frozen=True)
class LowRank:
    """The low-rank change of one tensor.

    Attributes:
        a: ``lora_A``, (rank, columns); for an embedding (rank, rows).
        b: ``lora_B``, (rows, rank); for an embedding (columns, rank).
        scale: Factor of the product: alpha / rank, or alpha / sqrt(rank) with rank-stabilised scaling.
        magnitude: DoRA's magnitude of each output, or None for plain LoRA.
        embedding: Whether the product is transposed, which is how PEFT stores embeddings.
    """

    a: StoredTensor
    b: StoredTensor
    scale: float
    magnitude: StoredTensor | None
    embedding: bool

    @property
    def rank(self) -> int:
        """Inner dimension of the product."""
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the changed tensor."""
        return (self.a.shape[1], self.b.shape[0]) if self.embedding else (self.b.shape[0], self.a.shape[1])


def read_adapter_header(path: Path) -> Iterator[StoredTensor]:
    """Yield the tensors of ``adapter_model.safetensors`` by their names in the base, without duplicates.

    PEFT removes its own parts from the names of replaced modules, but saves resized embeddings a second time with them.

    Args:
        path: The file.

    Yields:
        Tensors with PEFT's prefix, without the original weights of replaced modules.

    Raises:
        ModelError: The file is unreadable.
    """
    tensors: dict[str, StoredTensor] = {}
    for tensor in read_header(path):
        if ".original_module." in tensor.name:
            continue
        name = re.sub(r"\.modules_to_save\.(default\.)?", ".", tensor.name)
        if name == tensor.name or name not in tensors:
            tensors[name] = replace(tensor, name=name)
    yield from tensors.values()


class Adapter:
    """A LoRA or DoRA adapter in PEFT's format.

    Args:
        folder: Folder with ``adapter_config.json`` and ``adapter_model.safetensors``.

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
        config_path, path = folder / "adapter_config.json", folder / "adapter_model.safetensors"
        for required in (config_path, path):
            if not required.is_file():
                raise ModelError(
                    f"{folder} holds no adapter: {required.name} is missing", hint="name a folder in PEFT format"
                )
        self._config: Mapping[str, Any] = read_json(config_path, ModelError)
        self._refuse_other_kinds(config_path)
        self.base_name = str(self._config.get("base_model_name_or_path") or "an unnamed model")
        self.ties_weights = bool(self._config.get("ensure_weight_tying"))
        self.changes: dict[str, LowRank] = {}
        self.saved: dict[str, StoredTensor] = {}
        self._read_tensors(path)

    def _refuse_other_kinds(self, path: Path) -> None:
        kind = self._config.get("peft_type")
        if kind != "LORA":
            raise ModelError(
                f"{path}: an adapter of type {kind!r} cannot be merged", hint="only LORA (with DoRA) can be merged"
            )
        for key, harmless in _REFUSED.items():
            value = self._config.get(key)
            if value and value not in harmless:
                raise ModelError(
                    f"{path}: {key} is {json.dumps(value)[:80]}, which cannot be merged here",
                    hint="merge this adapter with PEFT's merge_and_unload",
                )

    def _read_tensors(self, path: Path) -> None:
        pieces: dict[str, dict[str, StoredTensor]] = {}
        embeddings = set()
        for tensor in read_adapter_header(path):
            name = tensor.name.removeprefix(_PREFIX)
            match = re.search(r"\.lora_\w+(\.weight)?$", name)
            if match is None:
                # An embedding that was resized and adapted is saved whole, in addition to its two matrices.
                name = name.replace(".base_layer.", ".")
                self.saved[name] = replace(tensor, name=name)
                continue
            part = _PARTS.get(match[0])
            if part is None:
                raise ModelError(f"{path}: tensor {tensor.name} belongs to no LoRA or DoRA adapter")
            module = name[: match.start()]
            pieces.setdefault(module, {})[part] = tensor
            if match[0].startswith(".lora_embedding"):
                embeddings.add(module)
        for module, parts in pieces.items():
            if "a" not in parts or "b" not in parts:
                raise ModelError(f"{path}: {module} lacks one of its two matrices", hint="copy the adapter again")
            a, b, magnitude = parts["a"], parts["b"], parts.get("magnitude")
            fits = len(a.shape) == len(b.shape) == 2 and a.shape[0] == b.shape[1]
            if not fits or (magnitude is not None and magnitude.shape != (b.shape[0],)):
                raise ModelError(f"{path}: the matrices of {module} do not fit each other: {a.shape}, {b.shape}")
            scale = self._scale(module, a.shape[0])
            self.changes[f"{module}.weight"] = LowRank(a, b, scale, magnitude, module in embeddings)
        if not self.changes and not self.saved:
            raise ModelError(f"{path} holds no tensors", hint="the adapter is incomplete; copy it again")

    def _scale(self, module: str, rank: int) -> float:
        alpha = self._config.get("lora_alpha", 8)
        for pattern, value in (self._config.get("alpha_pattern") or {}).items():
            # PEFT uses the first pattern that matches the end of the name.
            if re.match(rf"(.*\.)?({pattern})$", module):
                alpha = value
                break
        return float(alpha) / (math.sqrt(rank) if self._config.get("use_rslora") else rank)
