from __future__ import annotations

import json
import shutil

import pytest

from fintune import models
from fintune.errors import ArtifactError
from fintune.gguf import layerwise
from fintune.gguf.safetensor_reader import SafetensorFolder
from fintune.options import AdapterOptions, Config
from fintune.stages.merge import merge
from fintune.tuning import adapter
from fintune.tuning.quiet import quiet_libraries
from prepared_rows import prepared
from tiny import patch_json

torch = pytest.importorskip("torch")


def inputs(tmp_path, model, *, kind="lora", scale=0.05):
    """A prepared folder and an adapter with random weights of the given size."""
    base = models.load_model(models.resolve(str(model)), dtype="float32", device="cpu")
    adapted = adapter.attach(base, AdapterOptions(kind=kind, r=4))
    torch.manual_seed(1)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            weight.data = torch.randn_like(weight) * scale
    (tmp_path / "train").mkdir()
    adapter.save(adapted, str(model), None, tmp_path / "train" / "adapter")
    (tmp_path / "merge").mkdir()
    return {"prepare": prepared(tmp_path / "prepare", model, 6), "train": tmp_path / "train"}


def config(model, dtype="auto"):
    return Config.model_validate({"model": {"name": str(model)}, "merge": {"dtype": dtype}})


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_the_merged_folder_gives_the_logits_of_base_and_adapter(tiny_model, tmp_path, kind):
    facts = merge(config(tiny_model), inputs(tmp_path, tiny_model, kind=kind), tmp_path / "merge")
    assert facts["dtype"] == "float32"
    assert facts["num_moved"] == 14
    assert facts["max_logit_difference"] < 1e-4 < facts["max_logit"]
    assert facts["same_best_token_share"] == 1


def test_tokenizer_template_and_licence_come_along(tiny_model, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    (model / "LICENSE").write_text("mine")
    merge(config(model), inputs(tmp_path, model), tmp_path / "merge")
    ref = models.resolve(str(tmp_path / "merge"))
    old, new = models.load_tokenizer(models.resolve(str(model))), models.load_tokenizer(ref)
    assert new.chat_template == old.chat_template
    assert new("net revenue 12")["input_ids"] == old("net revenue 12")["input_ids"]
    assert new.pad_token_id == old.pad_token_id
    assert (tmp_path / "merge" / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    assert (tmp_path / "merge" / "LICENSE").read_text() == "mine"
    assert (tmp_path / "merge" / "generation_config.json").exists()


def test_the_asked_type_is_stored(tiny_model, tmp_path):
    facts = merge(config(tiny_model, "bfloat16"), inputs(tmp_path, tiny_model), tmp_path / "merge")
    with SafetensorFolder(tmp_path / "merge") as stored:
        assert {tensor.dtype for tensor in stored.tensors.values()} == {"BF16"}
    assert facts["dtype"] == "bfloat16"
    assert 0 < facts["max_logit_difference"] < 0.1


def in_bfloat16(model, folder):
    """A copy of the model with bfloat16 weights."""
    shutil.copytree(model, folder)
    loaded = models.load_model(models.resolve(str(model)), dtype="bfloat16", device="cpu")
    with quiet_libraries():
        loaded.save_pretrained(folder)
    return folder


def test_an_untrained_adapter_is_refused(tiny_model, tmp_path):
    with pytest.raises(ArtifactError, match="changes no weight"):
        merge(config(tiny_model), inputs(tmp_path, tiny_model, scale=0.0), tmp_path / "merge")


def test_an_adapter_that_rounding_swallows_is_refused(tiny_model, tmp_path):
    model = in_bfloat16(tiny_model, tmp_path / "model")
    with pytest.raises(ArtifactError, match=r"12 of 14 adapted weights did not move in bfloat16"):
        merge(config(model), inputs(tmp_path, model, scale=1e-9), tmp_path / "merge")


def test_an_adapter_can_be_merged_into_what_training_in_four_bits_saw(tiny_model, tmp_path):
    pytest.importorskip("bitsandbytes")
    options = {"model": {"name": str(tiny_model), "load": "4bit"}, "merge": {"into": "dequantised"}}
    facts = merge(Config.model_validate(options), inputs(tmp_path, tiny_model), tmp_path / "merge")
    assert facts["merged_into"] == "base dequantised from 4 bits"
    # NormalFloat's error on normal weights in blocks of 64 is near a tenth; the answers differ accordingly.
    assert 0.05 < facts["base_difference"]["relative_rms"] < 0.15
    assert facts["base_difference"]["largest"] > 0
    assert facts["max_logit_difference"] > 1e-3


def test_the_end_of_a_turn_and_the_padding_are_written_down(tiny_model, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    (model / "generation_config.json").write_text('{"temperature": 0.5, "do_sample": true, "eos_token_id": 0}')
    patch_json(model / "tokenizer_config.json", pad_token="<|im_end|>")
    merge(config(model), inputs(tmp_path, model), tmp_path / "merge")
    settings = json.loads((tmp_path / "merge" / "generation_config.json").read_text())
    assert settings == {"temperature": 0.5, "do_sample": True, "eos_token_id": 2, "pad_token_id": 0}
    assert json.loads((tmp_path / "merge" / "tokenizer_config.json").read_text())["pad_token"] == "<|endoftext|>"


def test_the_proof_of_an_unknown_family_loads_the_models_and_says_so(tiny_model, tmp_path, monkeypatch):
    given = inputs(tmp_path, tiny_model)
    by_layers = merge(config(tiny_model), given, tmp_path / "merge")
    monkeypatch.delitem(layerwise.FAMILIES, "llama")
    (tmp_path / "again").mkdir()
    whole = merge(config(tiny_model), given, tmp_path / "again")
    assert (by_layers["proof"], whole["proof"]) == ("layer by layer", "whole models in memory")
    assert by_layers["max_logit"] == pytest.approx(whole["max_logit"], abs=1e-5)
    assert by_layers["max_logit_difference"] == pytest.approx(whole["max_logit_difference"], abs=1e-5)
    assert by_layers["same_best_token_share"] == whole["same_best_token_share"]
