"""Convert a llama-family GGUF with a byte-level BPE vocabulary into a Hugging Face folder, without torch.

transformers can import such a file too, but loses the pre-tokenizer that splits numbers into digits, so ``  12`` would
tokenise differently from llama.cpp. This module builds the tokenizer from the pre-tokenizer's name in the file.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fintune.errors import ModelError, ResourceError
from fintune.models.tokenizer_check import check_tokenizer_against_llama_cpp
from fintune.util.console import track

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader
    from tokenizers import Tokenizer

# GGUF name -> name in a LlamaForCausalLM; "blk.N." and "model.layers.N." precede the names of the second table.
_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL_TOKEN = 3  # tokenizer.ggml.token_type of a special token


def convert(gguf: Path, folder: Path, pad_token: str) -> int | None:
    """Write weights, configuration and tokenizer of a GGUF into an existing folder.

    Weights become float16: a Q4_1 weight is d*q+m with float16 d and m. Measured on the built-in model's 134.5 million
    weights against float32, the largest error of float16 is 0.0020 (relative 2^-11; 58 % are exact, all norms among
    them). That of bfloat16 is 0.0137 (2^-8; 21 % exact). No value exceeds float16's range (largest 9.25).

    Args:
        gguf: The GGUF file.
        folder: Folder to write into.
        pad_token: Special token of the vocabulary for padding; must not be the end token.

    Returns:
        Number of strings that tokenise as in llama.cpp, or None if xllamacpp is not installed.

    Raises:
        ModelError: The architecture or vocabulary is not supported, or the tokenizer differs from llama.cpp's.
        ResourceError: The ``gguf`` extra is not installed.
    """
    try:
        import gguf as gguf_library
        from safetensors.numpy import save_file
    except ImportError as error:
        raise ResourceError(
            f"the built-in model is converted with the package {error.name}", hint="pip install 'fintune[gguf]'"
        ) from error

    reader = gguf_library.GGUFReader(gguf)
    known = {name: field.contents() for name, field in reader.fields.items()}
    family = known["general.architecture"], known["tokenizer.ggml.model"], known["tokenizer.ggml.pre"]
    if family != ("llama", "gpt2", "smollm"):
        raise ModelError(f"{gguf}: cannot convert architecture, vocabulary and pre-tokenizer {'/'.join(family)}")

    tokenizer = build_tokenizer(known)
    tokenizer.save(str(folder / "tokenizer.json"))
    num_strings = None
    if importlib.util.find_spec("xllamacpp"):
        num_strings = check_tokenizer_against_llama_cpp(
            lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids), gguf
        )
    save_file(read_weights(reader, known), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes files that only their owner can read
    tied = not any(tensor.name == "output.weight" for tensor in reader.tensors)
    pad_id = tokenizer.token_to_id(pad_token)
    if pad_id is None or pad_id == known["tokenizer.ggml.eos_token_id"]:
        raise ModelError(f"{gguf}: {pad_token} cannot pad, it is the end token or not in the vocabulary")
    for name, content in _json_files(known, pad_token, pad_id, tied).items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(known["tokenizer.chat_template"], encoding="utf-8")
    return num_strings


def build_tokenizer(known: Mapping[str, Any]) -> Tokenizer:
    """Build the tokenizer from a GGUF's ``tokenizer.ggml.*`` fields: byte-level BPE, with one token for each digit."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = known["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ", 1)) for pair in known["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=known["tokenizer.ggml.add_space_prefix"], use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = known["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def read_weights(reader: GGUFReader, known: Mapping[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """Return all tensors as float16 under their Hugging Face names.

    Raises:
        ModelError: A llama model does not have a tensor, or a value is outside float16's range.
    """
    import numpy as np
    from gguf import dequantize

    heads = {"attn_q": known["llama.attention.head_count"], "attn_k": known["llama.attention.head_count_kv"]}
    weights = {}
    for tensor in track(reader.tensors, "convert weights", len(reader.tensors)):
        name, kind = _weight_name(tensor.name)
        values = dequantize(tensor.data, tensor.tensor_type)
        if kind in heads:
            values = _undo_rope_order(values, heads[kind])
        # An overflow in the cast would become infinity without an error.
        if np.abs(values).max() > np.finfo(np.float16).max:
            raise ModelError(f"{tensor.name} holds values outside float16's range")
        weights[name] = np.ascontiguousarray(values, dtype=np.float16)
    return weights


def _weight_name(name: str) -> tuple[str, str]:
    if name in _TENSORS:
        return _TENSORS[name], ""
    match name.split("."):
        case ["blk", layer, kind, "weight"] if kind in _LAYER_TENSORS:
            return f"model.layers.{layer}.{_LAYER_TENSORS[kind]}.weight", kind
    raise ModelError(f"the GGUF holds a tensor {name} that a llama model does not have")


def _undo_rope_order(values: np.ndarray[Any, Any], num_heads: int) -> np.ndarray[Any, Any]:
    # llama.cpp rotates neighbouring rows (0,1)(2,3)..., Hugging Face rotates row i with row i + head_dim/2.
    rows, columns = values.shape
    pairs = values.reshape(num_heads, rows // num_heads // 2, 2, columns)
    restored: np.ndarray[Any, Any] = pairs.swapaxes(1, 2).reshape(rows, columns)
    return restored


def _json_files(known: Mapping[str, Any], pad_token: str, pad_id: int, tied: bool) -> dict[str, dict[str, Any]]:
    tokens = known["tokenizer.ggml.tokens"]
    bos_id, eos_id = known["tokenizer.ggml.bos_token_id"], known["tokenizer.ggml.eos_token_id"]
    rope_theta = known["llama.rope.freq_base"]
    hidden_size, num_heads = known["llama.embedding_length"], known["llama.attention.head_count"]
    ids = {"bos_token_id": bos_id, "eos_token_id": eos_id, "pad_token_id": pad_id}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden_size,
        "intermediate_size": known["llama.feed_forward_length"],
        "num_hidden_layers": known["llama.block_count"],
        "num_attention_heads": num_heads,
        "num_key_value_heads": known["llama.attention.head_count_kv"],
        "head_dim": hidden_size // num_heads,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": known["llama.context_length"],
        # The file holds a float32; its nearest short decimal is meant (9.999999747378752e-06 is 1e-05).
        "rms_norm_eps": float(f"{known['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        # transformers 5 reads the second. 4.57 reads the first, and would silently use 10000 without it.
        "rope_theta": rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta},
        "tie_word_embeddings": tied,
        "vocab_size": len(tokens),
        "initializer_range": 0.02,
        "use_cache": True,
        "dtype": "float16",
        **ids,
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": known["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "bos_token": tokens[bos_id],
        "eos_token": tokens[eos_id],
        "pad_token": pad_token,
        # No unk_token: bytes cover every text. Without it, an unknown token name is an error.
    }
    return {"config.json": config, "tokenizer_config.json": tokenizer_config, "generation_config.json": ids}
