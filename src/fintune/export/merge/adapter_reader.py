"""A PEFT adapter as files: which tensor of the base it changes, by which low-rank product, scale and magnitude.

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
from fintune.export.merge.safetensor_reader import StoredTensor, read_header

_PREFIX = "base_model.model."
_PARTS = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_embedding_A": "a",
    ".lora_embedding_B": "b",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
}
# What changes the model in a way that is not served here, with the values under which it does not.
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
    """The change of one tensor.

    Attributes:
        a: ``lora_A``, (rank, columns); for an embedding (rank, rows).
        b: ``lora_B``, (rows, rank); for an embedding (columns, rank).
        scale: Factor of the product: alpha / rank, or alpha / sqrt(rank) where rank-stabilised.
        magnitude: DoRA's length of each output, None for plain LoRA.
        embedding: Whether the product is transposed, as PEFT stores that of embeddings.
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
        """Rows and columns of the tensor that is changed."""
        return (self.a.shape[1], self.b.shape[0]) if self.embedding else (self.b.shape[0], self.a.shape[1])


def read_adapter_header(path: Path) -> Iterator[StoredTensor]:
    """The tensors of ``adapter_model.safetensors`` under the names that they have in the base, one of each.

    PEFT strips its own parts of the names of replaced modules, but saves resized embeddings once more with them.

    Args:
        path: The file.

    Yields:
        Tensors with PEFT's prefix; what a replaced module was before is left out.

    Raises:
        ModelError: An unreadable file.
    """
    found: dict[str, StoredTensor] = {}
    for tensor in read_header(path):
        if ".original_module." in tensor.name:
            continue
        name = re.sub(r"\.modules_to_save\.(default\.)?", ".", tensor.name)
        if name == tensor.name or name not in found:
            found[name] = replace(tensor, name=name)
    yield from found.values()


class Adapter:
    """A LoRA or DoRA adapter in PEFT's format.

    Args:
        folder: Holds ``adapter_config.json`` and ``adapter_model.safetensors``.

    Attributes:
        base_name: The model that it says it was trained on.
        changes: Base tensor name -> low-rank change.
        saved: Base tensor name -> tensor that replaces it (``modules_to_save``).
        ties_weights: Whether PEFT kept tied embeddings tied while it trained them.

    Raises:
        ModelError: No adapter, an unreadable or truncated file, another kind of adapter, or half a pair of matrices.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        config_path, path = folder / "adapter_config.json", folder / "adapter_model.safetensors"
        for needed in (config_path, path):
            if not needed.is_file():
                raise ModelError(
                    f"{folder} holds no adapter: {needed.name} is missing", hint="give a folder in PEFT format"
                )
        try:
            config = json.loads(config_path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ModelError(f"{config_path}: unreadable: {error}") from error
        self._config: Mapping[str, Any] = config if isinstance(config, dict) else {}
        self._refuse_other_kinds(config_path)
        self.base_name = str(self._config.get("base_model_name_or_path") or "a model that it does not name")
        self.ties_weights = bool(self._config.get("ensure_weight_tying"))
        self.changes: dict[str, LowRank] = {}
        self.saved: dict[str, StoredTensor] = {}
        self._sort(path)

    def _refuse_other_kinds(self, path: Path) -> None:
        kind = self._config.get("peft_type")
        if kind != "LORA":
            raise ModelError(f"{path}: an adapter of type {kind!r}", hint="only LORA (with DoRA) can be merged")
        for key, harmless in _REFUSED.items():
            value = self._config.get(key)
            if value and value not in harmless:
                raise ModelError(
                    f"{path}: {key} is {json.dumps(value)[:80]}, which cannot be merged here",
                    hint="merge this adapter with PEFT's merge_and_unload",
                )

    def _sort(self, path: Path) -> None:
        pieces: dict[str, dict[str, StoredTensor]] = {}
        embeddings = set()
        for tensor in read_adapter_header(path):
            name = tensor.name.removeprefix(_PREFIX)
            match = re.search(r"\.lora_\w+(\.weight)?$", name)
            if match is None:
                # An embedding that was resized and adapted is saved whole, beside its two matrices.
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
        for module, found in pieces.items():
            if "a" not in found or "b" not in found:
                raise ModelError(f"{path}: {module} lacks one of its two matrices", hint="copy the adapter again")
            a, b, magnitude = found["a"], found["b"], found.get("magnitude")
            whole = len(a.shape) == len(b.shape) == 2 and a.shape[0] == b.shape[1]
            if not whole or (magnitude is not None and magnitude.shape != (b.shape[0],)):
                raise ModelError(f"{path}: the matrices of {module} do not fit each other: {a.shape}, {b.shape}")
            scale = self._scale(module, a.shape[0])
            self.changes[f"{module}.weight"] = LowRank(a, b, scale, magnitude, module in embeddings)
        if not self.changes and not self.saved:
            raise ModelError(f"{path}: holds no tensors", hint="the adapter was not saved whole; copy it again")

    def _scale(self, module: str, rank: int) -> float:
        alpha = self._config.get("lora_alpha", 8)
        for pattern, value in (self._config.get("alpha_pattern") or {}).items():
            # PEFT takes the first pattern that matches the end of the name.
            if re.match(rf"(.*\.)?({pattern})$", module):
                alpha = value
                break
        return float(alpha) / (math.sqrt(rank) if self._config.get("use_rslora") else rank)
