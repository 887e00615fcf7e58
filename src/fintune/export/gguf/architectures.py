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
from fintune.models.folder import DECODERS, LAYER_MODULES, OTHER_MODULES, DecoderConfig, read_model_config
from fintune.util.files import read_json_as

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFWriter
    from numpy.typing import NDArray


class Architecture(NamedTuple):
    """The conversion of one Hugging Face ``model_type`` to llama.cpp's architecture ``arch``."""

    arch: str
    is_llama: bool
    """Whether rows of q and k are interleaved, because llama.cpp rotates neighbouring pairs, and the vocabulary size
    and the rotary dimension are written."""
    required: tuple[str, ...]
    """Tensors that every layer must have, by their Hugging Face names."""
    writes_head_dim: bool
    """Whether the head width is written even if ``config.json`` has none."""


_DENSE = tuple(f"{name}.weight" for name in LAYER_MODULES if not name.endswith(("q_norm", "k_norm")))
_QKV_BIAS = ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias")
_QK_NORM = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama", True, _DENSE, True),
    "mistral": Architecture("llama", True, _DENSE, True),
    "qwen2": Architecture("qwen2", False, _DENSE + _QKV_BIAS, False),
    "qwen3": Architecture("qwen3", False, _DENSE + _QK_NORM, True),
}
_ROPE_TYPES = ("default", "linear", "yarn", "llama3")


class ModelConfig(DecoderConfig):
    """The ``config.json`` of a model that can be exported.

    Attributes:
        folder: The model's folder.
        rope: Rotary parameters in the form of transformers 5; keys of older versions are included.
    """

    folder: Path
    rope: dict[str, Any] = {}  # noqa: RUF012 - pydantic copies it

    @classmethod
    def read(cls, folder: Path) -> ModelConfig:
        """Read the configuration of a Hugging Face folder.

        Raises:
            ModelError: The file is missing or unreadable, the model type is unknown, a key is missing or has an
                impossible value, or the rotary scaling is not supported.
        """
        path, model_type = folder / "config.json", read_model_config(folder).get("model_type")
        if model_type not in DECODERS:
            raise ModelError(
                f"{path}: model_type {model_type!r} cannot be exported to GGUF",
                hint=f"known: {', '.join(DECODERS)}; others need a llama.cpp checkout: export.llama_cpp_path=FOLDER",
            )
        config = read_json_as(path, DecoderConfig, ModelError)
        # The default of the other architectures depends on the version of transformers.
        if model_type != "llama" and config.num_key_value_heads is None:
            raise ModelError(f"{path}: num_key_value_heads is missing")
        if config.hidden_act not in (None, "silu", "swish"):
            raise ModelError(f"{path}: hidden_act {config.hidden_act[:40]!r} cannot be exported, llama.cpp uses silu")
        scaling = config.rope_parameters or config.rope_scaling
        rope = {} if scaling is None else scaling.model_dump(exclude_none=True)
        rope.setdefault("rope_theta", config.rope_theta or 10000.0)
        rope.setdefault("rope_type", rope.get("type", "default"))
        if rope["rope_type"] not in _ROPE_TYPES:
            raise ModelError(
                f"{path}: rotary scaling {rope['rope_type']!r} cannot be exported",
                hint=f"known: {', '.join(_ROPE_TYPES)}",
            )
        return cls.model_construct(**(dict(config) | {"folder": folder, "rope": rope}))

    @property
    def architecture(self) -> Architecture:
        """Row of :data:`ARCHITECTURES`."""
        return ARCHITECTURES[self.model_type]

    @property
    def is_70b(self) -> bool:
        """Whether llama.cpp counts the model as its size 70B, for which it has a quantisation rule."""
        grouped = self.num_attention_heads != self.num_kv_heads
        return self.num_hidden_layers == 80 and (
            self.architecture.arch == "qwen2" or (self.architecture.is_llama and grouped)
        )

    def write_metadata(self, writer: GGUFWriter) -> None:
        """Add the keys of the architecture: all but the tokenizer, the quantisation version and the file type."""
        import gguf

        rope = self.rope
        writer.add_block_count(self.num_hidden_layers)
        writer.add_context_length(self.max_position_embeddings)
        writer.add_embedding_length(self.hidden_size)
        writer.add_feed_forward_length(self.intermediate_size)
        writer.add_head_count(self.num_attention_heads)
        writer.add_head_count_kv(self.num_kv_heads)
        if rope["rope_type"] in ("linear", "yarn") and "factor" in rope:
            writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
            writer.add_rope_scaling_factor(rope["factor"])
            if rope["rope_type"] == "yarn":
                original = rope.get("original_max_position_embeddings") or self.max_position_embeddings
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
        writer.add_layer_norm_rms_eps(self.rms_norm_eps)
        if self.head_dim is not None or self.architecture.writes_head_dim:
            writer.add_key_length(self.head_width)
            writer.add_value_length(self.head_width)

    def write_rope_dimension(self, writer: GGUFWriter) -> None:
        """Add the keys that only some architectures have. llama.cpp's converter writes them after the file type."""
        if self.architecture.is_llama:
            writer.add_vocab_size(self.vocab_size)
            writer.add_rope_dimension_count(self.head_width)


def map_tensor_names(config: ModelConfig, names: Iterable[str]) -> dict[str, str]:
    """Map the tensor names of a folder to GGUF names.

    Returns:
        Hugging Face name -> GGUF name, in the order of ``names``, without buffers that GGUF does not store.

    Raises:
        ModelError: The architecture does not have one of the tensors, or a required tensor is missing.
    """
    mapped: dict[str, str] = {}
    for name in names:
        if name.endswith(".rotary_emb.inv_freq") or (config.tie_word_embeddings and name == "lm_head.weight"):
            continue
        target = gguf_tensor_name(name, config.num_hidden_layers)
        if target is None:
            raise ModelError(
                f"{config.folder}: the architecture {config.architecture.arch} has no tensor {name} in GGUF",
                hint="merge an adapter before the export; another architecture needs llama.cpp's own tools",
            )
        mapped[name] = target
    needed = [f"{name}.weight" for name in OTHER_MODULES if name != "lm_head" or not config.tie_word_embeddings]
    for layer in range(config.num_hidden_layers):
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
    if name.removesuffix(".weight") in OTHER_MODULES:
        return f"{OTHER_MODULES[name.removesuffix('.weight')][0]}.weight"
    match = re.fullmatch(r"model\.layers\.(\d{1,9})\.(.+)\.(weight|bias)", name)
    if not match or int(match[1]) >= num_layers or match[2] not in LAYER_MODULES:
        return None
    return f"blk.{int(match[1])}.{LAYER_MODULES[match[2]][0]}.{match[3]}"


def heads_to_permute(config: ModelConfig, name: str) -> int | None:
    """Return the number of heads whose rows are interleaved in a GGUF tensor, or None if the rows keep their order."""
    match = re.search(r"\.attn_([qk])\.(weight|bias)$", name) if config.architecture.is_llama else None
    return {"q": config.num_attention_heads, "k": config.num_kv_heads}[match[1]] if match else None


def rope_factors(config: ModelConfig) -> NDArray[np.float32] | None:
    """Per-frequency divisors of Llama 3's rotary scaling, (head_dim / 2,), or None for other scalings.

    The power is computed in double precision and rounded; the rest is single precision. This gives the bits of
    llama.cpp's converter.
    """
    import numpy as np

    rope = config.rope
    if rope["rope_type"] != "llama3" or not config.architecture.is_llama:
        return None
    exponents = np.arange(0, config.head_width, 2, dtype=np.float32) / np.float32(config.head_width)
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
