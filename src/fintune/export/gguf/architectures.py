"""The model architectures that can be exported: tensor names, metadata and the order of rows.

A new architecture needs one row in :data:`ARCHITECTURES`. Source of names and keys: the GGUF specification
(``docs/gguf.md`` of ggml) and llama.cpp's converter.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fintune.errors import ModelError

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFWriter
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Architecture:
    """The conversion of one Hugging Face ``model_type`` to a GGUF architecture.

    Attributes:
        arch: llama.cpp's architecture name.
        permutes_qk: Whether rows of q and k are interleaved, because llama.cpp rotates neighbouring pairs.
        writes_rope_dimension: Whether the vocabulary size and the rotary dimension are written.
        required: Tensors that every layer must have, by their Hugging Face names.
        default_head_dim: Head width that transformers assumes if config.json has none: a number, or "split" for the
            hidden size divided by the number of heads. None if the architecture has no such key.
    """

    arch: str
    permutes_qk: bool
    writes_rope_dimension: bool
    required: tuple[str, ...]
    default_head_dim: int | Literal["split"] | None


# Hugging Face's name in a layer -> GGUF's.
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OTHER_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_DENSE = tuple(f"{name}.weight" for name in _LAYER_NAMES if not name.endswith(("q_norm", "k_norm")))
_QKV_BIAS = ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias")
_QK_NORM = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama", True, True, _DENSE, "split"),
    "mistral": Architecture("llama", True, True, _DENSE, "split"),
    "qwen2": Architecture("qwen2", False, False, _DENSE + _QKV_BIAS, None),
    "qwen3": Architecture("qwen3", False, False, _DENSE + _QK_NORM, 128),
}


class ModelConfig:
    """The ``config.json`` of a Hugging Face folder, with the values that an export needs.

    Args:
        folder: The model's folder.

    Attributes:
        architecture: Row of :data:`ARCHITECTURES`.
        num_layers: Number of decoder layers.
        num_heads: Number of query heads.
        num_kv_heads: Number of key and value heads.
        head_dim: Width of a head.
        writes_head_dim: Whether the head width is written as key and value length.
        vocab_size: Number of rows of the embedding.
        tied: Whether input and output embedding are one tensor.
        rope: Rotary parameters in the form of transformers 5; keys of older versions are included.

    Raises:
        ModelError: The file is missing or unreadable, the model type is unknown, a key is missing, or the rotary
            scaling is not supported.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "config.json"
        if not self.path.is_file():
            raise ModelError(f"{folder}: no config.json", hint="give a Hugging Face model folder")
        try:
            raw = json.loads(self.path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ModelError(f"{self.path}: unreadable: {error}") from error
        self._raw: dict[str, Any] = raw if isinstance(raw, dict) else {}
        model_type = self._raw.get("model_type")
        if model_type not in ARCHITECTURES:
            raise ModelError(
                f"{self.path}: model_type {model_type!r} cannot be exported to GGUF",
                hint=f"known: {', '.join(ARCHITECTURES)}; others need a llama.cpp checkout: "
                "export.llama_cpp_path=FOLDER",
            )
        self.architecture = ARCHITECTURES[model_type]
        self.num_layers = self.integer("num_hidden_layers")
        self.num_heads = self.integer("num_attention_heads")
        # The default of the other architectures depends on the version of transformers.
        self.num_kv_heads = self.integer("num_key_value_heads", self.num_heads if model_type == "llama" else None)
        default_head_dim = self.architecture.default_head_dim
        self.writes_head_dim = self._raw.get("head_dim") is not None or default_head_dim is not None
        split = self.integer("hidden_size") // self.num_heads
        self.head_dim = self.integer("head_dim", default_head_dim if isinstance(default_head_dim, int) else split)
        self.vocab_size = self.integer("vocab_size")
        self.tied = bool(self._raw.get("tie_word_embeddings", False))
        self.rope = self._read_rope()

    def integer(self, key: str, default: int | None = None) -> int:
        """Return an integer of the file, or ``default`` if the key is absent or null."""
        value = self._raw.get(key)
        if value is None:
            value = default
        if not isinstance(value, int):
            raise ModelError(f"{self.path}: {key} is {value!r}, expected a whole number")
        return value

    @property
    def is_70b(self) -> bool:
        """Whether llama.cpp counts the model as its size 70B, for which it has a quantisation rule."""
        grouped = self.num_heads != self.num_kv_heads
        return self.num_layers == 80 and (
            self.architecture.arch == "qwen2" or (self.architecture.arch == "llama" and grouped)
        )

    def _read_rope(self) -> dict[str, Any]:
        rope = dict(self._raw.get("rope_parameters") or self._raw.get("rope_scaling") or {})
        rope.setdefault("rope_theta", self._raw.get("rope_theta", 10000.0))
        rope.setdefault("rope_type", rope.get("type", "default"))
        known = ("default", "linear", "yarn", "llama3")
        if rope["rope_type"] not in known:
            raise ModelError(
                f"{self.path}: rotary scaling {rope['rope_type']!r} cannot be exported",
                hint=f"known: {', '.join(known)}",
            )
        return rope

    def write_metadata(self, writer: GGUFWriter) -> None:
        """Add the keys of the architecture: all but the tokenizer, the quantisation version and the file type."""
        import gguf

        writer.add_block_count(self.num_layers)
        writer.add_context_length(self.integer("max_position_embeddings"))
        writer.add_embedding_length(self.integer("hidden_size"))
        writer.add_feed_forward_length(self.integer("intermediate_size"))
        writer.add_head_count(self.num_heads)
        writer.add_head_count_kv(self.num_kv_heads)
        rope = self.rope
        if rope["rope_type"] in ("linear", "yarn") and rope.get("factor") is not None:
            writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
            writer.add_rope_scaling_factor(rope["factor"])
            if rope["rope_type"] == "yarn":
                self._write_yarn(writer)
        writer.add_rope_freq_base(rope["rope_theta"])
        writer.add_layer_norm_rms_eps(self._raw.get("rms_norm_eps", 1e-6))
        if self.writes_head_dim:
            writer.add_key_length(self.head_dim)
            writer.add_value_length(self.head_dim)

    def _write_yarn(self, writer: GGUFWriter) -> None:
        rope = self.rope
        original = rope.get("original_max_position_embeddings") or self.integer("max_position_embeddings")
        writer.add_rope_scaling_orig_ctx_len(original)
        for key, add in (
            ("extrapolation_factor", writer.add_rope_scaling_yarn_ext_factor),
            ("attention_factor", writer.add_rope_scaling_yarn_attn_factor),
            ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
            ("beta_slow", writer.add_rope_scaling_yarn_beta_slow),
        ):
            if rope.get(key) is not None:
                add(rope[key])

    def write_rope_dimension(self, writer: GGUFWriter) -> None:
        """Add the keys that only some architectures have. llama.cpp's converter writes them after the file type."""
        if self.architecture.writes_rope_dimension:
            writer.add_vocab_size(self.vocab_size)
            writer.add_rope_dimension_count(self.head_dim)


def map_tensor_names(config: ModelConfig, names: Mapping[str, object]) -> dict[str, str]:
    """Map the tensor names of a folder to GGUF names.

    Args:
        config: The model.
        names: Tensor names of the folder.

    Returns:
        Hugging Face name -> GGUF name, in the order of ``names``, without buffers that GGUF does not store.

    Raises:
        ModelError: The architecture does not have one of the tensors, or a required tensor is missing.
    """
    mapped: dict[str, str] = {}
    for name in names:
        if name.endswith(".rotary_emb.inv_freq") or (config.tied and name == "lm_head.weight"):
            continue
        target = gguf_tensor_name(name, config.num_layers)
        if target is None:
            raise ModelError(
                f"{config.path.parent}: the architecture {config.architecture.arch} has no tensor {name} in GGUF",
                hint="merge an adapter before the export; another architecture needs llama.cpp's own tools",
            )
        mapped[name] = target
    needed = [name for name in _OTHER_NAMES if name != "lm_head.weight" or not config.tied]
    for layer in range(config.num_layers):
        needed += [f"model.layers.{layer}.{name}" for name in config.architecture.required]
    missing = [name for name in needed if name not in mapped]
    if missing:
        raise ModelError(
            f"{config.path.parent}: {len(missing)} tensors are missing, the first is {missing[0]}",
            hint="the folder is incomplete, or its config.json belongs to another model",
        )
    return mapped


def gguf_tensor_name(name: str, num_layers: int) -> str | None:
    """Return the GGUF name of a tensor by its Hugging Face name, or None if GGUF has no such tensor."""
    if name in _OTHER_NAMES:
        return _OTHER_NAMES[name]
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    if not match or int(match[1]) >= num_layers or match[2] not in _LAYER_NAMES:
        return None
    return f"blk.{int(match[1])}.{_LAYER_NAMES[match[2]]}.{match[3]}"


def heads_to_permute(config: ModelConfig, name: str) -> int | None:
    """Return the number of heads whose rows are interleaved in a GGUF tensor, or None if the rows keep their order."""
    if not config.architecture.permutes_qk:
        return None
    if re.search(r"\.attn_q\.(weight|bias)$", name):
        return config.num_heads
    if re.search(r"\.attn_k\.(weight|bias)$", name):
        return config.num_kv_heads
    return None


def rope_factors(config: ModelConfig) -> NDArray[np.float32] | None:
    """Per-frequency divisors of Llama 3's rotary scaling, (head_dim / 2,), or None for other scalings.

    The power is computed in double precision and rounded; the rest is single precision. This gives the bits of
    llama.cpp's converter.
    """
    import numpy as np

    rope = config.rope
    if rope["rope_type"] != "llama3" or config.architecture.arch != "llama":
        return None
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    powers = np.float64(rope["rope_theta"]) ** exponents.astype(np.float64)
    frequencies = np.float32(1) / powers.astype(np.float32)
    factor, low, high = (
        rope.get(k, d) for k, d in (("factor", 8.0), ("low_freq_factor", 1.0), ("high_freq_factor", 4.0))
    )
    original = rope.get("original_max_position_embeddings", 8192)
    factors = []
    for frequency in frequencies:
        wavelength = 2 * math.pi / frequency
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)
