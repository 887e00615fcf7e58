"""Shapes of the models that the programs here measure, by the names that transformers' configurations have for them."""

from __future__ import annotations

SIZES: dict[str, dict[str, int]] = {
    "14b": {
        "hidden_size": 5120,
        "num_hidden_layers": 48,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "intermediate_size": 13824,
        "vocab_size": 152064,
    },
    "3b": {
        "hidden_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "intermediate_size": 8192,
        "vocab_size": 128256,
    },
    "tiny": {
        "hidden_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 512,
        "vocab_size": 1000,
    },
}
"""DeepSeek-R1-Distill-Qwen-14B, Llama-3.2-3B, and one for trials of a program."""


def settings(name: str) -> dict[str, int | str | bool]:
    """Sizes, family, and whether the embeddings are the head's weights, too."""
    is_qwen = name == "14b"
    return {**SIZES[name], "model_type": "qwen2" if is_qwen else "llama", "tie_word_embeddings": not is_qwen}
