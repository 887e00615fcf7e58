from __future__ import annotations

import json
import shutil

import pytest

from fintune.config import load
from fintune.errors import ConfigError, ResourceError
from fintune.stages.plan import plan

LLAMA_3B = {
    "model_type": "llama",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}


@pytest.fixture
def lines(tmp_path, tiny_model):
    """Lines of the plan for a folder whose configuration is a large model's; its weights are never read."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)

    def run(gib, *overrides, model=LLAMA_3B, **options):
        config = json.loads((tiny_model / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "head_dim": 128, **model}))
        path = tmp_path / "run.yaml"
        path.write_text(f"model: {{name: {folder}}}\ntrain: {{batch_size: 16}}\nprompt: {{max_length: 1024}}\n")
        return plan(load(path, overrides).config, gib=gib, **options)

    return run


def test_a_large_gpu_recomputes_nothing(lines):
    said = lines(80)
    assert said[1] == "predicted: 39.1 GiB of 78.8 (80.0 less 1.25 for the context and the allocator)"
    assert said[2:] == [
        "passes: 1 of 16 examples a step",
        "- no layer recomputed: all activations fit 78.8 GiB",
        "- 4 bits are not needed: 16 bits fit",
    ]


def test_a_small_one_recomputes_and_divides(lines):
    said = lines(24, "train.max_memory_gib=9")
    assert "of 9.0" in said[1]
    assert "- 28 of 28 layers recomputed" in "\n".join(said) or "do not fit 9.0 GiB" in "\n".join(said)


def test_what_does_not_fit_is_refused_with_what_would(lines):
    with pytest.raises(ResourceError, match=r"needs .* GiB for one example of 1024 tokens .*: use model.load=4bit"):
        lines(6)


def test_models_and_methods_without_a_plan_are_refused(lines):
    with pytest.raises(ConfigError, match="knows llama, mistral, qwen2, qwen3, not gemma3"):
        lines(24, model={**LLAMA_3B, "model_type": "gemma3"})
    with pytest.raises(ConfigError, match=r"not adapter\.kind: full"):
        lines(24, "adapter.kind=full")


def test_without_a_gpu_the_memory_is_asked_for(lines):
    with pytest.raises(ResourceError, match="no CUDA GPU to plan for: say how much memory yours has: --gib 24"):
        lines(None)
