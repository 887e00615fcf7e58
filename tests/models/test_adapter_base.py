from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fintune.config import AdapterOptions, Config
from fintune.errors import ModelError
from fintune.export.merge.merged_weights import MergedWeights
from fintune.inference.open_model import ModelSpec, open_model
from fintune.models import adapter as adapters
from fintune.models import load as models
from fintune.pipeline.stages.merge import merge
from fintune.training import lora
from support.prepared_rows import prepared
from support.tiny import make_tiny_model, patch_json


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    """A model of the same sizes."""
    return make_tiny_model(tmp_path_factory.mktemp("other") / "model", seed=1)


@pytest.fixture(scope="module")
def trained(tiny_model, tmp_path_factory) -> Path:
    """An adapter of the tiny model, as the training leaves it."""
    import torch

    base = models.load_model(models.fetch(str(tiny_model)), dtype="float32", device="cpu")
    adapted = lora.attach_adapter(base, AdapterOptions(r=4))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            weight.data = torch.full_like(weight, 0.01)
    folder = tmp_path_factory.mktemp("train") / "adapter"
    lora.save_adapter(adapted, str(tiny_model), None, folder, base=tiny_model)
    return folder


def plain(trained: Path, folder: Path, base: str) -> Path:
    """The same adapter as PEFT alone would have saved it, with another name of its base."""
    shutil.copytree(trained, folder)
    (folder / adapters.BASE_FILE).unlink()
    patch_json(folder / "adapter_config.json", base_model_name_or_path=base)
    return folder


@pytest.mark.parametrize("engine", ["auto", "vllm"])
def test_another_folder_of_the_same_sizes_is_refused(trained, other, tiny_model, engine):
    with pytest.raises(ModelError, match=f"was trained on {tiny_model}, not on the weights of {other}: use it with"):
        open_model(ModelSpec(str(other), adapter=trained, engine=engine))


def test_adapter_base_ignores_tokenizer_files(trained, tiny_model, tmp_path):
    copy = Path(shutil.copytree(tiny_model, tmp_path / "moved"))
    patch_json(copy / "tokenizer_config.json", model_max_length=77)
    open_model(ModelSpec(str(copy), adapter=trained)).close()
    MergedWeights(copy, trained)


def test_weights_sha256_ignores_file_names(tiny_model, tmp_path):
    copy = Path(shutil.copytree(tiny_model, tmp_path / "copy"))
    (copy / "model.safetensors").rename(copy / "model-00001-of-00001.safetensors")
    assert adapters.weights_sha256(copy) == adapters.weights_sha256(tiny_model)


def test_adapter_base_without_recorded_hash(trained, other, tiny_model, tmp_path):
    found = plain(trained, tmp_path / "there", str(tiny_model))
    with pytest.raises(ModelError, match="not on the weights of"):
        open_model(ModelSpec(str(other), adapter=found))
    open_model(ModelSpec(str(tiny_model), adapter=found)).close()
    gone = plain(trained, tmp_path / "gone", "/gone/model")
    open_model(ModelSpec(str(tiny_model), adapter=gone)).close()


def test_adapter_on_other_weights_is_refused_everywhere(trained, other):
    with pytest.raises(ModelError, match="not on the weights of"):
        MergedWeights(other, trained)
    loaded = models.load_model(models.fetch(str(other)), dtype="float32", device="cpu")
    with pytest.raises(ModelError, match="not on the weights of"):
        adapters.load_adapter(loaded, trained)


@pytest.mark.parametrize("noted", [True, False])
def test_an_adapter_is_not_applied_to_what_it_was_merged_into(trained, tiny_model, tmp_path, noted):
    if noted:
        shutil.copytree(trained, tmp_path / "train" / "adapter")
    else:
        plain(trained, tmp_path / "train" / "adapter", str(tmp_path / "gone"))
    (tmp_path / "merge").mkdir()
    inputs = {"prepare": prepared(tmp_path / "prepare", tiny_model, 4), "train": tmp_path / "train"}
    facts = merge(Config.model_validate({"model": {"name": str(tiny_model)}}), inputs, tmp_path / "merge")
    (tmp_path / "merge" / "manifest.json").write_text(json.dumps({"facts": facts}))
    with pytest.raises(ModelError, match=r"adapter is already merged into .*merge"):
        open_model(ModelSpec(str(tmp_path / "merge"), adapter=tmp_path / "train" / "adapter"))


def test_a_note_that_cannot_be_read_is_none(trained, tiny_model, tmp_path):
    spoilt = plain(trained, tmp_path / "a", str(tiny_model))
    (spoilt / adapters.BASE_FILE).write_text("[")
    adapters.check_adapter_base(tiny_model, spoilt)


def test_is_base_of_folder_and_hub_copy(tmp_path):
    copy = tmp_path / "models--org--base" / "snapshots" / "1"
    copy.mkdir(parents=True)
    assert adapters.is_base_of(copy, str(copy))
    assert adapters.is_base_of(copy, "org/base")
    assert not adapters.is_base_of(copy, "org/other")
