from __future__ import annotations

import gguf
import numpy as np
import pytest

from fintune.errors import ModelError
from fintune.export.gguf.architectures import (
    ARCHITECTURES,
    ModelConfig,
    heads_to_permute,
    map_tensor_names,
    rope_factors,
)
from fintune.models.safetensors_files import SafetensorFolder
from support.synthetic import write_folder
from support.tiny import patch_json


def names_of(folder):
    with SafetensorFolder(folder) as weights:
        return map_tensor_names(ModelConfig.read(folder), weights.tensors)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_names_are_those_of_the_gguf_package(tmp_path, model_type):
    names = names_of(write_folder(tmp_path / "m", model_type, num_layers=2))
    arch = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}[ARCHITECTURES[model_type].arch]
    theirs = gguf.get_tensor_name_map(arch, 2)
    assert names == {name: theirs.get_name(name, (".weight", ".bias")) for name in names}


def test_an_unknown_family_lists_those_that_are_known(llama_folder, tmp_path):
    (tmp_path / "config.json").write_text((llama_folder / "config.json").read_text())
    patch_json(tmp_path / "config.json", model_type="gpt_neox")
    with pytest.raises(ModelError, match=r"model_type 'gpt_neox' .*known: llama, mistral, qwen2, qwen3"):
        ModelConfig.read(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_a_config_that_is_no_object_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config\.json"):
        ModelConfig.read(tmp_path)


def test_a_missing_number_is_named(llama_folder, tmp_path):
    (tmp_path / "config.json").write_text((llama_folder / "config.json").read_text())
    patch_json(tmp_path / "config.json", num_hidden_layers=None)
    with pytest.raises(ModelError, match="num_hidden_layers is missing"):
        ModelConfig.read(tmp_path)


def test_a_tensor_without_a_place_is_named(llama_folder):
    with SafetensorFolder(llama_folder) as weights:
        tensors = {**weights.tensors, "model.layers.0.self_attn.q_proj.lora_A.weight": None}
    with pytest.raises(ModelError, match=r"llama has no tensor .*q_proj\.lora_A\.weight in GGUF"):
        map_tensor_names(ModelConfig.read(llama_folder), tensors)


def test_a_missing_tensor_is_named(llama_folder):
    with SafetensorFolder(llama_folder) as weights:
        tensors = {name: tensor for name, tensor in weights.tensors.items() if "layers.1.mlp.up" not in name}
    with pytest.raises(ModelError, match=r"1 tensors are missing, the first is model\.layers\.1\.mlp\.up_proj\.weight"):
        map_tensor_names(ModelConfig.read(llama_folder), tensors)


def test_only_the_llama_architecture_interleaves_rows(tmp_path):
    llama = ModelConfig.read(write_folder(tmp_path / "llama", num_layers=1))
    qwen = ModelConfig.read(write_folder(tmp_path / "qwen", "qwen2", num_layers=1))
    assert heads_to_permute(llama, "blk.0.attn_q.weight") == 4
    assert heads_to_permute(llama, "blk.0.attn_k.bias") == 2
    assert heads_to_permute(llama, "blk.0.attn_v.weight") is None
    assert heads_to_permute(qwen, "blk.0.attn_q.weight") is None


def test_rotary_scaling_in_the_older_keys_is_understood(llama_folder, tmp_path):
    (tmp_path / "config.json").write_text((llama_folder / "config.json").read_text())
    scaling = {"type": "linear", "factor": 2.0}
    patch_json(tmp_path / "config.json", rope_parameters=None, rope_scaling=scaling, rope_theta=5e5)
    rope = ModelConfig.read(tmp_path).rope
    assert (rope["rope_type"], rope["factor"], rope["rope_theta"]) == ("linear", 2.0, 5e5)


def test_rotary_scaling_that_is_not_served_is_refused(llama_folder, tmp_path):
    (tmp_path / "config.json").write_text((llama_folder / "config.json").read_text())
    patch_json(tmp_path / "config.json", rope_parameters={"rope_type": "longrope"})
    with pytest.raises(ModelError, match="'longrope' cannot be exported"):
        ModelConfig.read(tmp_path)


def test_rope_factors_of_llama_3_slow_low_frequencies(tmp_path):
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    factors = rope_factors(ModelConfig.read(write_folder(tmp_path / "m", num_layers=1, rope=rope)))
    assert factors is not None and factors.shape == (32,)
    assert factors[0] == 1 and factors[-1] == 8 and np.all(np.diff(factors) >= 0)
