"""Hugging Face folders of random weights for the families that are exported: numpy only, the same bytes everywhere."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from support.tiny import CHATML

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_WORDS = ("in", "th", "the", "Ġthe", "re", "Ġre", "on", "an", "ue", "Ġ$", "00", "20", "201", "ĊĊ", "ĠĠ", "ve", "'s")


def split(regex: str) -> dict[str, object]:
    """The pre-tokenizer of the Llama 3 and Qwen kind."""
    cut = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [cut, {**_BYTE_LEVEL, "use_regex": False}]}


PRE_TOKENIZERS = {
    "gpt-2": _BYTE_LEVEL,
    "smollm": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, _BYTE_LEVEL]},
    "llama-bpe": split(LLAMA3_SPLIT),
    "qwen2": split(LLAMA3_SPLIT.replace("{1,3}", "")),
}


def write_tokenizer(folder: Path, pre: str = "gpt-2") -> int:
    """Write a byte-level BPE of all bytes and a few words; return the number of its tokens."""
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = [*SPECIAL, *sorted(ByteLevel.alphabet())]
    merges = []
    for word in _WORDS:
        for at in range(1, len(word)):
            if word[:at] in tokens and word[at:] in tokens and word not in tokens:
                merges.append([word[:at], word[at:]])
                tokens.append(word)
    added = [
        {"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False}
        | {"normalized": False, "special": True}
        for i, text in enumerate(SPECIAL)
    ]
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None}
    model |= {"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False}
    model |= {"ignore_merges": pre == "llama-bpe", "merges": merges}
    model["vocab"] = {token: i for i, token in enumerate(tokens)}
    tokenizer = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None}
    tokenizer |= {"pre_tokenizer": PRE_TOKENIZERS[pre], "post_processor": None, "decoder": _BYTE_LEVEL, "model": model}
    config = {"bos_token": SPECIAL[1], "eos_token": SPECIAL[2], "pad_token": SPECIAL[0]}
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
    return len(tokens)


def write_folder(
    folder: Path,
    model_type: str = "llama",
    *,
    pre: str = "gpt-2",
    hidden_size: int = 256,
    num_layers: int = 3,
    tied: bool = False,
    dtype: str = "F16",
    num_shards: int = 1,
    rope: dict[str, object] | None = None,
    **config: object,
) -> Path:
    """Write a model with 4 query and 2 key heads."""
    folder.mkdir(parents=True)
    vocab_size = write_tokenizer(folder, pre) + 5
    intermediate = hidden_size * 2
    content: dict[str, object] = {
        "architectures": [f"{model_type.capitalize()}ForCausalLM"],
        "model_type": model_type, "hidden_size": hidden_size, "intermediate_size": intermediate,
        "num_hidden_layers": num_layers, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": vocab_size, "max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "tie_word_embeddings": tied,
        "rope_parameters": rope or {"rope_type": "default", "rope_theta": 10000.0},
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    } | config  # fmt: skip
    (folder / "config.json").write_text(json.dumps(content, indent=2), encoding="utf-8")
    shapes = _shapes(model_type, hidden_size, intermediate, num_layers, vocab_size, tied)
    random = np.random.default_rng(7)
    tensors = {name: _values(random, shape).astype({"F16": "f2", "F32": "f4"}[dtype]) for name, shape in shapes.items()}
    _save(folder, tensors, num_shards)
    return folder


def lora_of(base: Path, folder: Path, *, scale: float = 0.1, **changes: object) -> Path:
    """An adapter of the query matrices of a synthetic folder, written without PEFT."""
    config = json.loads((base / "config.json").read_text())
    hidden = config["hidden_size"]
    random = np.random.default_rng(3)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        module = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{module}.lora_A.weight"] = random.standard_normal((4, hidden), np.float32)
        tensors[f"{module}.lora_B.weight"] = random.standard_normal((hidden, 4), np.float32) * np.float32(scale)
    folder.mkdir()
    content = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": "the/right-one"} | changes
    (folder / "adapter_config.json").write_text(json.dumps(content))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def importance_of(base: Path, path: Path) -> Path:
    """An importance matrix of a synthetic folder in which a few columns matter most."""
    from fintune.export.gguf.imatrix import write_imatrix
    from fintune.export.gguf.layout import ModelLayout
    from fintune.models.safetensors_files import SafetensorFolder

    random = np.random.default_rng(11)
    sums = {}
    with SafetensorFolder(base) as weights:
        for source in ModelLayout(base, weights).sources.values():
            if source.name.startswith("blk.") and len(source.shape) == 2:
                values = random.random(source.shape[1], np.float32)
                for _ in range(3):
                    values = values * values
                sums[source.name] = values * np.float32(50)
    write_imatrix(path, sums, dict.fromkeys(sums, 1024), datasets=["finance.txt"], chunk_size=512)
    return path


def _values(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    scale = 0.1 if len(shape) == 1 else shape[-1] ** -0.5
    return (random.random(shape, np.float32) - 0.5) * np.float32(2 * scale) + np.float32(len(shape) == 1)


def _save(folder: Path, tensors: dict[str, np.ndarray], num_shards: int) -> None:
    if num_shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return
    names = list(tensors)
    weight_map = {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
        part = names[shard::num_shards]
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _shapes(
    model_type: str, hidden: int, intermediate: int, num_layers: int, vocab_size: int, tied: bool
) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not tied:
        shapes["lm_head.weight"] = (vocab_size, hidden)
    for layer in range(num_layers):
        parts: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,),
            "self_attn.q_proj.weight": (hidden, hidden), "self_attn.k_proj.weight": (hidden // 2, hidden),
            "self_attn.v_proj.weight": (hidden // 2, hidden), "self_attn.o_proj.weight": (hidden, hidden),
            "mlp.gate_proj.weight": (intermediate, hidden), "mlp.up_proj.weight": (intermediate, hidden),
            "mlp.down_proj.weight": (hidden, intermediate),
        }  # fmt: skip
        if model_type == "qwen2":
            parts |= {
                f"self_attn.{name}_proj.bias": (rows,)
                for name, rows in zip("qkv", (hidden, hidden // 2, hidden // 2), strict=True)
            }
        if model_type == "qwen3":
            parts |= {f"self_attn.{name}_norm.weight": (hidden // 4,) for name in "qk"}
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in parts.items()}
    return shapes
