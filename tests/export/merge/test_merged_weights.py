"""A loaded base filled with other weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
from safetensors.torch import load_file

from fintune.errors import ModelError
from fintune.export.merge import merged_weights
from fintune.export.merge.merged_weights import load_merged_weights
from fintune.models.safetensors_files import SafetensorFolder
from support.tiny import make_tiny_model

torch = pytest.importorskip("torch")


@pytest.fixture
def loaded(tiny_model):
    from fintune.models.load import fetch, load_model

    return load_model(fetch(str(tiny_model)), dtype="bfloat16", device="cpu")


@pytest.mark.parametrize("vocab_size", [400, 420])
def test_load_merged_weights_equals_loading_the_folder(loaded, tmp_path, monkeypatch, vocab_size):
    other = make_tiny_model(tmp_path, seed=7, vocab_size=vocab_size)
    monkeypatch.setattr(merged_weights, "_SLAB_ELEMENTS", 1000)  # several slabs, the last one short
    with SafetensorFolder(other) as weights:
        load_merged_weights(loaded, weights)
    own = dict(loaded.named_parameters())
    expected = load_file(other / "model.safetensors")
    assert len(expected["model.embed_tokens.weight"]) == vocab_size
    for name, values in expected.items():
        assert own[name].dtype == torch.bfloat16
        assert torch.equal(own[name], values.bfloat16()), name


def test_a_tensor_of_another_shape_is_refused(loaded, tmp_path):
    wider = make_tiny_model(tmp_path, hidden_size=128)
    with SafetensorFolder(wider) as weights, pytest.raises(ModelError, match=r"has the shape .* not the model's"):
        load_merged_weights(loaded, weights)


def test_what_a_model_does_not_load_is_passed_over(loaded, tiny_model):
    before = {name: values.clone() for name, values in loaded.state_dict().items()}
    with SafetensorFolder(tiny_model) as weights:
        first = next(iter(weights.tensors.values()))
        load_merged_weights(loaded, weights, [replace(first, name="model.layers.0.self_attn.rotary_emb.inv_freq")])
    assert all(torch.equal(values, before[name]) for name, values in loaded.state_dict().items())
