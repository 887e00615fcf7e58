"""Inspect a model folder as files: completeness, configuration, licence, fingerprint. Needs no torch."""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Iterable, Mapping
from math import isfinite
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fintune.errors import ModelError
from fintune.models.safetensors_files import DTYPES, StoredTensor, read_safetensors_header, weight_files
from fintune.util.files import cache_folder, read_json, read_json_as, sha256_file, write_atomically

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("vocab.txt", "merges.txt", "*.model", "chat_template.json", "*.jinja"),
)
MODEL_FILES = (
    *TOKENIZER_FILES,
    *("config.json", "generation_config.json", "adapter_config.json", "*.safetensors", "*.safetensors.index.json"),
)
"""Patterns of the files that decide a model's answers. None of them runs code when it is read (no pickled weights)."""

FULL_MODEL_FOLDER = "model"
"""Folder in that of ``train`` with the result of full fine-tuning; an adapter is in ``adapter``."""

_UNKNOWN_BASE = "not named"
_LARGE_BYTES = 1 << 22
"""The hash of a file above this size is kept in the cache folder."""
_HASH_LETTERS = 64

Count = Annotated[int, Field(gt=0, lt=1 << 31)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class RopeScaling(BaseModel):
    """Rotary parameters of ``config.json``, under the names of transformers 4 or 5."""

    model_config = ConfigDict(extra="allow")

    rope_type: str | None = None
    type: str | None = None
    rope_theta: Positive | None = None
    factor: Positive | None = None
    original_max_position_embeddings: Count | None = None
    low_freq_factor: Positive | None = None
    high_freq_factor: Positive | None = None
    extrapolation_factor: Positive | None = None
    attention_factor: Positive | None = None
    beta_fast: Positive | None = None
    beta_slow: Positive | None = None


class DecoderConfig(BaseModel):
    """The keys of ``config.json`` that decide the shapes of a dense decoder, and the keys that a GGUF file stores."""

    model_config = ConfigDict(extra="allow")

    model_type: str
    hidden_size: Count
    intermediate_size: Count
    num_hidden_layers: Annotated[int, Field(gt=0, le=10_000)]
    num_attention_heads: Count
    num_key_value_heads: Count | None = None
    head_dim: Count | None = None
    vocab_size: Count
    max_position_embeddings: Count
    rms_norm_eps: Positive = 1e-6
    rope_theta: Positive | None = None
    rope_scaling: RopeScaling | None = None
    rope_parameters: RopeScaling | None = None
    tie_word_embeddings: bool | None = None
    quantization_config: dict[str, Any] | None = None
    hidden_act: str | None = None

    @model_validator(mode="after")
    def _check_heads(self) -> DecoderConfig:
        heads = self.num_attention_heads
        if self.head_dim is None and self.model_type != "qwen3" and self.hidden_size % heads:
            raise ValueError(f"hidden_size {self.hidden_size} is no multiple of num_attention_heads {heads}")
        if heads % (self.num_key_value_heads or heads):
            raise ValueError(
                f"num_attention_heads {heads} is no multiple of {self.num_key_value_heads} key-value heads"
            )
        return self

    @property
    def head_width(self) -> int:
        """Width of a head, as transformers assumes it if ``head_dim`` is missing."""
        return self.head_dim or (128 if self.model_type == "qwen3" else self.hidden_size // self.num_attention_heads)

    @property
    def num_kv_heads(self) -> int:
        """Number of key and value heads."""
        return self.num_key_value_heads or self.num_attention_heads


class TokenizerConfig(BaseModel):
    """The keys of ``tokenizer_config.json`` whose types the libraries do not check."""

    tokenizer_class: str | None = None
    model_max_length: float | None = None
    bos_token: str | dict[str, Any] | None = None
    eos_token: str | dict[str, Any] | None = None
    pad_token: str | dict[str, Any] | None = None
    unk_token: str | dict[str, Any] | None = None
    chat_template: str | list[dict[str, Any]] | dict[str, Any] | None = None


DECODERS = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose ``config.json`` is compared with the shapes of the weights."""

# Module -> GGUF's name and the shape of the weight, as keys of config.json; q and kv are all heads of that kind.
LAYER_MODULES: dict[str, tuple[str, tuple[str, ...]]] = {
    "input_layernorm": ("attn_norm", ("hidden_size",)),
    "self_attn.q_proj": ("attn_q", ("q", "hidden_size")),
    "self_attn.k_proj": ("attn_k", ("kv", "hidden_size")),
    "self_attn.v_proj": ("attn_v", ("kv", "hidden_size")),
    "self_attn.o_proj": ("attn_output", ("hidden_size", "q")),
    "self_attn.q_norm": ("attn_q_norm", ("head",)),
    "self_attn.k_norm": ("attn_k_norm", ("head",)),
    "post_attention_layernorm": ("ffn_norm", ("hidden_size",)),
    "mlp.gate_proj": ("ffn_gate", ("intermediate_size", "hidden_size")),
    "mlp.up_proj": ("ffn_up", ("intermediate_size", "hidden_size")),
    "mlp.down_proj": ("ffn_down", ("hidden_size", "intermediate_size")),
}
"""The modules of a decoder layer."""
OTHER_MODULES: dict[str, tuple[str, tuple[str, ...]]] = {
    "model.embed_tokens": ("token_embd", ("vocab_size", "hidden_size")),
    "model.norm": ("output_norm", ("hidden_size",)),
    "lm_head": ("output", ("vocab_size", "hidden_size")),
}
"""The modules outside the layers."""
_MODULES = LAYER_MODULES | OTHER_MODULES


def check_model_folder(folder: Path) -> None:
    """Check that a folder holds a configuration, whole safetensors weights and a tokenizer. Reads only headers.

    Raises:
        ModelError: A file is missing, truncated or unreadable, or the weights do not fit ``config.json``.
    """
    if not (folder / "config.json").is_file():
        raise _not_a_model(folder)
    check_config_fits(folder, (tensor for path in weight_files(folder) for tensor in read_safetensors_header(path)))
    for name in ("generation_config.json", "special_tokens_map.json", "added_tokens.json"):
        if (folder / name).is_file():
            read_json(folder / name, ModelError)
    if (folder / "tokenizer_config.json").is_file():
        read_json_as(folder / "tokenizer_config.json", TokenizerConfig, ModelError)
    is_fast = (folder / "tokenizer.json").is_file() or any(folder.glob("*.model"))
    if not is_fast and not all((folder / name).is_file() for name in ("vocab.json", "merges.txt")):
        raise ModelError(
            f"{folder} holds no tokenizer (tokenizer.json)", hint="copy the tokenizer files of its base model into it"
        )


def check_config_fits(folder: Path, tensors: Iterable[StoredTensor]) -> None:
    """Check the number of layers and the shapes of a model's matrices by its ``config.json``.

    Models of other types than :data:`DECODERS` are left to transformers. Packed weights are not compared.

    Raises:
        ModelError: ``config.json`` is unreadable, or the weights belong to another configuration.
    """
    if read_model_config(folder).get("model_type") not in DECODERS:
        return
    config = read_json_as(folder / "config.json", DecoderConfig, ModelError)
    width, kv_heads, num_layers = config.head_width, config.num_kv_heads, config.num_hidden_layers
    sizes = {"q": config.num_attention_heads * width, "kv": kv_heads * width, "head": width}
    sizes |= config.model_dump(include={"vocab_size", "hidden_size", "intermediate_size"})
    hint, max_layer = "take weights and config.json from the same model", -1
    for tensor in tensors:
        match = re.fullmatch(r"model\.layers\.(\d{1,9})\.(.+)", tensor.name)
        max_layer = max(max_layer, int(match[1]) if match else -1)
        module = (match[2] if match else tensor.name).removesuffix(".weight")
        if module not in _MODULES or tensor.dtype not in DTYPES:
            continue
        shape = [sizes[key] for key in _MODULES[module][1]]
        if list(tensor.shape) != shape:
            raise ModelError(
                f"{folder}: {tensor.name} has the shape {list(tensor.shape)}, config.json says {shape}", hint=hint
            )
    if max_layer >= 0 and max_layer + 1 != num_layers:
        raise ModelError(f"{folder}: config.json says {num_layers} layers, the weights have {max_layer + 1}", hint=hint)


def _not_a_model(folder: Path) -> ModelError:
    """Explain what a folder without a configuration is, and how to get a model from it."""
    if (folder / "adapter_config.json").is_file():
        return ModelError(f"{folder} holds an adapter, not a model", hint=_hint_to_merge(folder))
    if (folder / "merge" / "config.json").is_file():
        return ModelError(f"{folder} is a run's folder, not a model", hint=f"its merged model is {folder / 'merge'}")
    adapter = folder / "train" / "adapter"
    if (adapter / "adapter_config.json").is_file():
        return ModelError(f"{folder} is a run's folder without a merged model", hint=_hint_to_merge(adapter))
    return ModelError(f"{folder} holds no config.json", hint="give a Hugging Face model folder")


def _hint_to_merge(adapter: Path) -> str:
    base = adapter_base_name(adapter)
    model = "BASE" if base == _UNKNOWN_BASE else shlex.quote(base)
    folder = shlex.quote(str(adapter))
    return (
        f"its base model is {base}; to merge it: fintune merge --model {model} --adapter {folder} --out DIR; "
        f"to train it further: model.name={model} adapter.continue_from={folder}"
    )


def check_unquantised(folder: Path) -> None:
    """Refuse quantised weights as the base of training, merge or export.

    Raises:
        ModelError: ``config.json`` has a ``quantization_config``; the message names the method.
    """
    quantised = read_model_config(folder).get("quantization_config")
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        raise ModelError(
            f"{folder} is quantised{f' ({method})' if method else ''}: it can neither be trained nor have an adapter "
            "merged into it",
            hint="use the 16-bit model that it was made from; model.quantization: nf4 quantises it while it loads",
        )


def read_model_config(folder: Path) -> dict[str, Any]:
    """Return the content of a model's ``config.json``.

    Raises:
        ModelError: The file is missing or unreadable.
    """
    return read_json(folder / "config.json", ModelError)


def context_tokens(config: Mapping[str, object]) -> int | None:
    """Return the context length in tokens by a model's ``config.json``, scaled positions included; None if unknown."""
    inner = config.get("text_config")
    text = inner if isinstance(inner, dict) else config
    positions = text.get("max_position_embeddings")
    if not isinstance(positions, int):
        return None
    scaling = text.get("rope_scaling") or text.get("rope_parameters")
    factor = scaling.get("factor") if isinstance(scaling, dict) else None
    if not isinstance(scaling, dict) or not isinstance(factor, int | float) or not isfinite(factor):
        return positions
    # max_position_embeddings is the scaled length in Llama 3.1's files, the original length in Qwen2.5's for YaRN.
    original = scaling.get("original_max_position_embeddings", positions)
    return max(positions, int(factor * original)) if isinstance(original, int) else positions


def count_tokens(folder: Path) -> int | None:
    """Count the tokens of a folder's ``tokenizer.json``, added tokens included.

    Returns:
        The number, or None if there is no such file or its format is unknown.

    Raises:
        ModelError: The file is unreadable, or its vocabulary is empty.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    content = read_json(path, ModelError)
    model, added = content.get("model"), content.get("added_tokens") or []
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocabulary, dict | list) or not isinstance(added, list):
        return None
    if not vocabulary:
        raise ModelError(f"{path}: the vocabulary is empty", hint="copy the tokenizer files of the base model")
    # A Unigram model lists pairs of text and score.
    known = {str(entry[0] if isinstance(entry, list) and entry else entry) for entry in vocabulary}
    return len(known | {str(token.get("content")) for token in added if isinstance(token, dict)})


def full_model_folder(train: Path) -> Path | None:
    """Return the model folder that full fine-tuning left in the folder of ``train``; None if it left an adapter."""
    folder = train / FULL_MODEL_FOLDER
    return folder if folder.is_dir() else None


def adapter_base_name(folder: Path) -> str:
    """Return the name of the base model that a PEFT adapter's configuration gives."""
    config = read_json(folder / "adapter_config.json", ModelError)
    return str(config.get("base_model_name_or_path") or _UNKNOWN_BASE)


def stated_licence(folder: Path) -> str | None:
    """Return the ``license:`` value in the front matter of the folder's README.md, or None."""
    readme = folder / "README.md"
    if not readme.is_file():
        return None
    front = re.match(r"---\n(.*?)\n---", readme.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    line = re.search(r"^license:\s*(\S+)", front[1], re.MULTILINE) if front else None
    return line[1] if line else None


def model_fingerprint(folder: Path) -> str:
    """Return the SHA-256 over the names and contents of a model's or adapter's files (``MODEL_FILES``).

    Raises:
        ModelError: The folder holds no such file.
    """
    files = sorted({path for pattern in MODEL_FILES for path in folder.glob(pattern) if path.is_file()})
    if not files:
        raise ModelError(f"{folder} holds no model files")
    lines = [f"{path.name}\0{cached_sha256(path)}\n" for path in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def cached_sha256(path: Path) -> str:
    """Return a file's SHA-256. A large file is hashed once for its path, size and modification time."""
    stat = path.stat()
    if stat.st_size <= _LARGE_BYTES:
        return sha256_file(path)
    key = hashlib.sha256(f"{path.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}".encode()).hexdigest()
    cached = cache_folder() / "hashes" / key
    if cached.is_file() and len(digest := cached.read_text(encoding="ascii")) == _HASH_LETTERS:
        return digest
    digest = sha256_file(path)
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(cached, digest)
    except OSError:
        # Without a writable cache folder, the file is hashed again the next time.
        pass
    return digest
