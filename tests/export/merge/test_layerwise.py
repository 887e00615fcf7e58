"""The comparison layer by layer says what the whole models say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from fintune.errors import ModelError
from fintune.export.merge import layerwise as module
from fintune.export.merge.layerwise import can_compare_layers, compare_layers
from fintune.export.merge.merge import merge_folders
from fintune.models.adapter import load_adapter, quiet_peft
from fintune.models.load import fetch, load_model
from fintune.util.console import quiet_libraries
from support.synthetic import write_folder
from support.tiny import patch_json

torch = pytest.importorskip("torch")

LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3_ROPE |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
ARCHITECTURES = {
    "llama": {"rope": LLAMA3_ROPE},
    "llama-tied": {"tied": True},
    "mistral": {"model_type": "mistral", "sliding_window": 8},
    "qwen2": {"model_type": "qwen2", "num_shards": 2},
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "tied": True},
}
ADAPTERS = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True, "target_modules": ["down_proj"]},
    "ends": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "dora-ends": {"target_modules": ["embed_tokens", "lm_head"], "use_dora": True},
    "saved": {"modules_to_save": ["lm_head", "embed_tokens", "input_layernorm"]},
}
PROMPTS = [list(range(3, 43)), [5, 9, 200, 9], [7]]


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("layerwise")
    for name, options in ARCHITECTURES.items():
        write_folder(folder / name, **{"hidden_size": 64, "num_layers": 2, "dtype": "F32"} | options)
    return folder


@pytest.fixture(autouse=True)
def small_slabs(monkeypatch):
    monkeypatch.setattr(module, "_SLAB_ROWS", 100)


def adapter_of(base: Path, folder: Path, **options: object) -> Path:
    from peft import LoraConfig, get_peft_model

    model = load_model(fetch(str(base)), dtype="float32", device="cpu")
    options = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options
    with quiet_libraries(), quiet_peft():
        wrapped = get_peft_model(model, LoraConfig(**options))
        torch.manual_seed(5)
        for name, weight in wrapped.named_parameters():
            if weight.requires_grad:
                by = 1.5 if "magnitude" in name else 0.9 if "modules_to_save" in name else 0.0
                weight.data = weight.data * by + torch.randn_like(weight) * (0.01 if by else 0.1)
        wrapped.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def logits(base: Path, adapter: Path | None) -> list[torch.Tensor]:
    model = load_model(fetch(str(base)), dtype="float32", device="cpu")
    if adapter is not None:
        with quiet_libraries():
            model = load_adapter(model, adapter)
    with torch.inference_mode():
        return [model(input_ids=torch.tensor([ids])).logits[0] for ids in PROMPTS]


def by_whole_models(one, other) -> tuple[float, int, float]:
    pairs = list(zip(logits(*one), logits(*other), strict=True))
    difference = max(float((a - b).abs().max()) for a, b in pairs)
    same = sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in pairs)
    return difference, same, max(float(a.abs().max()) for a, _ in pairs)


def check(one, other) -> None:
    with quiet_libraries():
        found = compare_layers(one, other, PROMPTS)
    difference, same, largest = by_whole_models(one, other)
    assert found.max_difference == pytest.approx(difference, abs=1e-5) and difference > 0.01
    assert found.max_logit == pytest.approx(largest, abs=1e-5)
    assert (found.num_same, found.num_positions) == (same, 45)
    assert same < 45


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_compare_layers_equals_whole_models(bases, tmp_path, family):
    base = bases / family
    assert can_compare_layers(base, None)
    check((base, adapter_of(base, tmp_path / "adapter")), (base, None))


@pytest.mark.parametrize("kind", [kind for kind in ADAPTERS if kind != "lora"])
def test_every_kind_of_adapter_is_pefts(bases, tmp_path, kind):
    base = bases / ("llama" if kind == "saved" else "llama-tied")
    adapter = adapter_of(base, tmp_path / "adapter", **ADAPTERS[kind])
    assert can_compare_layers(base, adapter)
    check((base, adapter), (base, None))


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_right_merge_is_told_from_a_wrong_one(bases, tmp_path, kind):
    base = bases / "qwen3"
    adapter = adapter_of(base, tmp_path / "adapter", **ADAPTERS[kind])
    merged = tmp_path / "merged"
    merged.mkdir()
    merge_folders(base, adapter, merged)
    with quiet_libraries():
        right = compare_layers((base, adapter), (merged, None), PROMPTS)
    assert right.max_difference < 1e-4 and right.num_same == right.num_positions
    weights = load_file(merged / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][:, 3] += 1
    save_file(weights, merged / "model.safetensors", {"format": "pt"})
    with quiet_libraries():
        assert compare_layers((base, adapter), (merged, None), PROMPTS).max_difference > 0.1


def test_compare_layers_with_targets_missing_in_the_adapter(bases, tmp_path):
    base = bases / "llama"
    adapter = adapter_of(base, tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    kept = {name: values for name, values in tensors.items() if "v_proj" not in name}
    assert len(kept) < len(tensors)
    save_file(kept, adapter / "adapter_model.safetensors")
    (tmp_path / "merged").mkdir()
    merge_folders(base, adapter, tmp_path / "merged")
    with quiet_libraries():
        assert compare_layers((base, adapter), (tmp_path / "merged", None), PROMPTS).max_difference < 1e-4


def test_progress_adds_up_to_one(bases):
    shares: list[float] = []
    with quiet_libraries():
        compare_layers((bases / "llama", None), (bases / "qwen2", None), PROMPTS, progress=shares.append)
    assert sum(shares) == pytest.approx(1)


def test_can_compare_layers_refuses_unknown_and_grown_models(bases, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(bases / "llama", other)
    patch_json(other / "config.json", model_type="gemma3")
    assert not can_compare_layers(other)
    adapter = adapter_of(bases / "llama", tmp_path / "adapter", modules_to_save=["embed_tokens"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = "base_model.model.model.embed_tokens.weight"
    tensors[name] = tensors[name][:-1]
    save_file(tensors, adapter / "adapter_model.safetensors")
    assert not can_compare_layers(bases / "llama", adapter)


def test_a_weight_that_is_missing_or_of_another_shape_is_named(bases, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(bases / "llama", folder)
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({**weights, name: weights[name][:, :-1].copy()}, folder / "model.safetensors")
    with quiet_libraries(), pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj\.weight has the shape \[128, 63"):
        compare_layers((folder, None), (folder, None), PROMPTS)
    del weights[name]
    save_file(weights, folder / "model.safetensors")
    with quiet_libraries(), pytest.raises(ModelError, match=r"the weights lack .*layers\.1\.mlp\.up_proj"):
        compare_layers((folder, None), (folder, None), PROMPTS)
    (folder / "config.json").write_text(json.dumps([1]))
    with pytest.raises(ModelError, match="holds no JSON object"):
        can_compare_layers(folder)
