"""The model architectures that can be exported: tensor names, metadata and the order of rows.

A new architecture needs one row in :data:`ARCHITECTURES`. Source of names and keys: the GGUF specification
(``docs/gguf.md`` of ggml) and llama.cpp's converter.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fintune.errors import ModelError
from fintune.models.folder import DecoderConfig, read_model_config
from fintune.util.files import read_json_as

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFWriter
    from numpy.typing import NDArray


class Architecture(NamedTuple):
    """The conversion of one Hugging Face ``model_type`` to a GGUF architecture.

    Attributes:
        arch: llama.cpp's architecture name.
        is_llama: Whether rows of q and k are interleaved, because llama.cpp rotates neighbouring pairs, and the
            vocabulary size and the rotary dimension are written.
        required: Tensors that every layer must have, by their Hugging Face names.
        writes_head_dim: Whether the head width is written even if ``config.json`` has none.
    """

    arch: str
    is_llama: bool
    required: tuple[str, ...]
    writes_head_dim: bool


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
    "llama": Architecture("llama", True, _DENSE, True),
    "mistral": Architecture("llama", True, _DENSE, True),
    "qwen2": Architecture("qwen2", False, _DENSE + _QKV_BIAS, False),
    "qwen3": Architecture("qwen3", False, _DENSE + _QK_NORM, True),
}
_ROPE_TYPES = ("default", "linear", "yarn", "llama3")
_REQUIRED_KEYS = (
    *("num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size", "vocab_size"),
    "max_position_embeddings",
)


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
        vocab_size: Number of rows of the embedding.
        tied: Whether input and output embedding are one tensor.
        rope: Rotary parameters in the form of transformers 5; keys of older versions are included.

    Raises:
        ModelError: The file is missing or unreadable, the model type is unknown, a key is missing or has an impossible
            value, or the rotary scaling is not supported.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        raw = read_model_config(folder)
        model_type = raw.get("model_type")
        if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
            raise ModelError(
                f"{folder}/config.json: model_type {model_type!r} cannot be exported to GGUF",
                hint=f"known: {', '.join(ARCHITECTURES)}; others need a llama.cpp checkout: "
                "export.llama_cpp_path=FOLDER",
            )
        self.architecture = ARCHITECTURES[model_type]
        # The default of the other architectures depends on the version of transformers.
        required = _REQUIRED_KEYS if model_type == "llama" else (*_REQUIRED_KEYS, "num_key_value_heads")
        config = self._config = read_json_as(folder / "config.json", DecoderConfig, ModelError)
        for key in required:
            if getattr(config, key) is None:
                raise ModelError(f"{folder}/config.json: {key} is {raw.get(key)!r}, expected a whole number")
        self.num_layers: int = config.num_hidden_layers or 0
        self.num_heads: int = config.num_attention_heads or 0
        self.num_kv_heads: int = config.num_key_value_heads or self.num_heads
        self.head_dim: int = config.head_width or 0
        self.vocab_size: int = config.vocab_size or 0
        self.tied = bool(config.tie_word_embeddings)
        rope = config.rope_parameters or config.rope_scaling
        self.rope: dict[str, Any] = {} if rope is None else rope.model_dump(exclude_none=True)
        self.rope.setdefault("rope_theta", 10000.0 if config.rope_theta is None else config.rope_theta)
        self.rope.setdefault("rope_type", self.rope.get("type", "default"))
        if self.rope["rope_type"] not in _ROPE_TYPES:
            raise ModelError(
                f"{folder}/config.json: rotary scaling {self.rope['rope_type']!r} cannot be exported",
                hint=f"known: {', '.join(_ROPE_TYPES)}",
            )

    @property
    def is_70b(self) -> bool:
        """Whether llama.cpp counts the model as its size 70B, for which it has a quantisation rule."""
        grouped = self.num_heads != self.num_kv_heads
        return self.num_layers == 80 and (self.architecture.arch == "qwen2" or (self.architecture.is_llama and grouped))

    def write_metadata(self, writer: GGUFWriter) -> None:
        """Add the keys of the architecture: all but the tokenizer, the quantisation version and the file type."""
        import gguf

        config, rope = self._config, self.rope
        writer.add_block_count(self.num_layers)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(self.num_heads)
        writer.add_head_count_kv(self.num_kv_heads)
        if rope["rope_type"] in ("linear", "yarn") and "factor" in rope:
            writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
            writer.add_rope_scaling_factor(rope["factor"])
            if rope["rope_type"] == "yarn":
                original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
                writer.add_rope_scaling_orig_ctx_len(original)
                for key, add in (
                    ("extrapolation_factor", writer.add_rope_scaling_yarn_ext_factor),
                    ("attention_factor", writer.add_rope_scaling_yarn_attn_factor),
                    ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
                    ("beta_slow", writer.add_rope_scaling_yarn_beta_slow),
                ):
                    if key in rope:
                        add(rope[key])
        writer.add_rope_freq_base(rope["rope_theta"])
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        if config.head_dim is not None or self.architecture.writes_head_dim:
            writer.add_key_length(self.head_dim)
            writer.add_value_length(self.head_dim)

    def write_rope_dimension(self, writer: GGUFWriter) -> None:
        """Add the keys that only some architectures have. llama.cpp's converter writes them after the file type."""
        if self.architecture.is_llama:
            writer.add_vocab_size(self.vocab_size)
            writer.add_rope_dimension_count(self.head_dim)


def map_tensor_names(config: ModelConfig, names: Iterable[str]) -> dict[str, str]:
    """Map the tensor names of a folder to GGUF names.

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
                f"{config.folder}: the architecture {config.architecture.arch} has no tensor {name} in GGUF",
                hint="merge an adapter before the export; another architecture needs llama.cpp's own tools",
            )
        mapped[name] = target
    needed = [name for name in _OTHER_NAMES if name != "lm_head.weight" or not config.tied]
    for layer in range(config.num_layers):
        needed += [f"model.layers.{layer}.{name}" for name in config.architecture.required]
    missing = [name for name in needed if name not in mapped]
    if missing:
        raise ModelError(
            f"{config.folder}: {len(missing)} tensors are missing, the first is {missing[0]}",
            hint="the folder is incomplete, or its config.json belongs to another model",
        )
    return mapped


def gguf_tensor_name(name: str, num_layers: int) -> str | None:
    """Return the GGUF name of a tensor by its Hugging Face name, or None if GGUF has no such tensor."""
    if name in _OTHER_NAMES:
        return _OTHER_NAMES[name]
    match = re.fullmatch(r"model\.layers\.(\d{1,9})\.(.+)\.(weight|bias)", name)
    if not match or int(match[1]) >= num_layers or match[2] not in _LAYER_NAMES:
        return None
    return f"blk.{int(match[1])}.{_LAYER_NAMES[match[2]]}.{match[3]}"


def heads_to_permute(config: ModelConfig, name: str) -> int | None:
    """Return the number of heads whose rows are interleaved in a GGUF tensor, or None if the rows keep their order."""
    match = re.search(r"\.attn_([qk])\.(weight|bias)$", name) if config.architecture.is_llama else None
    return {"q": config.num_heads, "k": config.num_kv_heads}[match[1]] if match else None


def rope_factors(config: ModelConfig) -> NDArray[np.float32] | None:
    """Per-frequency divisors of Llama 3's rotary scaling, (head_dim / 2,), or None for other scalings.

    The power is computed in double precision and rounded; the rest is single precision. This gives the bits of
    llama.cpp's converter.
    """
    import numpy as np

    rope = config.rope
    if rope["rope_type"] != "llama3" or not config.architecture.is_llama:
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
