"""Adapters on models: what they change, and which are refused."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from fintune.errors import ModelError
from fintune.models.adapter import load_adapter, quiet_peft
from fintune.models.load import fetch, load_model
from support.tiny import make_tiny_model, patch_json


@pytest.fixture(scope="module")
def adapter(tiny_model, tmp_path_factory):
    from peft import LoraConfig, get_peft_model

    model = load_model(fetch(str(tiny_model)), dtype="float32", device="cpu")
    torch.manual_seed(1)
    with quiet_peft():
        adapted = get_peft_model(
            model, LoraConfig(r=4, target_modules="all-linear", use_dora=True, init_lora_weights=False)
        )
    path = tmp_path_factory.mktemp("adapter")
    adapted.save_pretrained(path)
    return path


def test_an_adapter_changes_the_answers_of_its_base(tiny_model, adapter):
    ref = fetch(str(tiny_model))
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        plain = load_model(ref, dtype="float32", device="cpu")(ids).logits
        adapted = load_adapter(load_model(ref, dtype="float32", device="cpu"), adapter)(ids).logits
    assert not torch.allclose(plain, adapted)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"hidden_size": 32}, r"model\.layers\.0\.mlp\.down_proj has 64 in_features here and 128 in the adapter"),
        ({"num_layers": 1}, r"it adapts model\.layers\.1\..*, which this model does not have"),
    ],
)
def test_an_adapter_of_another_base_is_refused_by_name(tiny_model, adapter, tmp_path, shape, message):
    other = make_tiny_model(tmp_path / "other", **shape)
    with pytest.raises(ModelError, match=message) as raised:
        load_adapter(load_model(fetch(str(other)), dtype="float32", device="cpu"), adapter)
    assert f"{adapter} was trained on {tiny_model}, not on {other}" in str(raised.value)


def test_half_of_the_embeddings_that_grew_is_refused(adapter, tmp_path):
    base = make_tiny_model(tmp_path / "base", tie_word_embeddings=False)
    grown = shutil.copytree(adapter, tmp_path / "grown")
    tensors = load_file(grown / "adapter_model.safetensors")
    tensors["base_model.model.lm_head.weight"] = torch.zeros(402, 64)
    save_file(tensors, grown / "adapter_model.safetensors")
    message = "a vocabulary of 402 tokens, .* has 400, and only lm_head was saved .*save_embedding_layers=True"
    with pytest.raises(ModelError, match=message):
        load_adapter(load_model(fetch(str(base)), dtype="float32", device="cpu"), grown)


def test_load_adapter_misfit_of_same_base_name(adapter, tmp_path):
    other = make_tiny_model(tmp_path / "other", num_layers=1)
    own = shutil.copytree(adapter, tmp_path / "own")
    patch_json(own / "adapter_config.json", base_model_name_or_path=str(other))
    with pytest.raises(ModelError, match=f"^{own}: it adapts .*, which this model does not have"):
        load_adapter(load_model(fetch(str(other)), dtype="float32", device="cpu"), own)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_folder_without_an_adapter_is_refused(tiny_model, adapter, tmp_path, name):
    broken = shutil.copytree(adapter, tmp_path / "adapter")
    (broken / name).unlink()
    with pytest.raises(ModelError, match=f"holds no adapter: {name} is missing"):
        load_adapter(load_model(fetch(str(tiny_model)), dtype="float32", device="cpu"), broken)
