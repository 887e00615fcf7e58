"""The synthetic models whose GGUF files are compared with llama.cpp's own tools."""

from __future__ import annotations

from pathlib import Path

from support.synthetic import lora_of, write_folder

LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3_ROPE |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
YARN = {"rope_type": "yarn", "rope_theta": 1000000.0, "factor": 4.0, "original_max_position_embeddings": 512}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
FEW = ("F16", "Q4_K_M", "Q3_K_M")
CASES = {
    "llama": {},
    "llama-tied-odd": {"tied": True, "hidden_size": 320, "pre": "smollm", "dtype": "F32"},
    "llama3": {"pre": "llama-bpe", "rope": LLAMA3_ROPE, "num_shards": 3, "head_dim": 64},
    "qwen2-yarn": {"model_type": "qwen2", "pre": "qwen2", "rope": YARN},
    "qwen3": {"model_type": "qwen3", "pre": "qwen2", "tied": True, "head_dim": 64},
    "linear": {"rope": LINEAR},
    # 80 layers with grouped queries are llama.cpp's 70B, which has a rule of its own for attn_v.
    "llama-80-layers": {"num_layers": 80, "kinds": FEW},
    "qwen2-80-layers-odd": {"model_type": "qwen2", "pre": "qwen2", "num_layers": 80, "hidden_size": 160, "kinds": FEW},
    "mistral": {"model_type": "mistral", "sliding_window": 4096},
    "mistral-odd": {"model_type": "mistral", "hidden_size": 672, "sliding_window": 4096, "kinds": FEW},
    "merged-lora": {"merges": True, "num_shards": 2, "kinds": ("F16", "Q8_0", "Q4_K_M")},
}
"""Options of :func:`synthetic.write_folder`; ``kinds`` are the types that are compared, ``merges`` adds an adapter."""

BUILTIN = "builtin:smollm2-135m"
BUILTIN_KINDS = ("F16", "Q8_0", "Q4_K_M")
"""A real model, whose pre-tokenizer the converter knows by itself."""


def write_case(name: str, folder: Path) -> Path:
    options = {key: value for key, value in CASES[name].items() if key not in ("kinds", "merges")}
    return write_folder(folder, **options)


def folder_of(name: str, work: Path) -> tuple[Path, str]:
    """The folder that llama.cpp's converter is given, and the type of its weights."""
    from fintune.export.merge.merge import merge_folders

    model = write_case(name, work / "model")
    if CASES[name].get("merges"):
        (work / "merge").mkdir()
        merge_folders(model, lora_of(model, work / "adapter"), work / "merge", dtype="float16")
        model = work / "merge"
    return model, "float32" if CASES[name].get("dtype") == "F32" else "float16"
