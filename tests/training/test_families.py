"""Every family trains on the loss of its own logits; what is saved is what was trained; what is left out is said."""

from __future__ import annotations

import json

import pytest

from fintune.config import AdapterOptions, Config
from fintune.errors import ArtifactError, ConfigError
from fintune.export.merge.merge import merge_folders
from fintune.models import adapter as adapters
from fintune.models import load as models
from fintune.pipeline.stages.train import train
from fintune.training import lora, metrics
from support.families import FAMILIES, completion_loss, make_family
from support.prepared_rows import prepared

torch = pytest.importorskip("torch")

ROUTED = ("mixtral", "qwen3_moe", "gpt_oss")
IDS = torch.arange(5, 30)[None]


@pytest.fixture(scope="module")
def family_folder(tmp_path_factory):
    made = {}

    def folder(family):
        if family not in made:
            made[family] = make_family(tmp_path_factory.mktemp(family), family)
        return made[family]

    return folder


@pytest.fixture(scope="module")
def prepare(tmp_path_factory, tiny_model):
    return prepared(tmp_path_factory.mktemp("families") / "prepare", tiny_model, 6)


@pytest.fixture(scope="module")
def rows(prepare):
    from datasets import load_from_disk

    return list(load_from_disk(str(prepare / "tokens" / "train")))


def config(model, adapter=None, quantization="none", **options):
    options = {"dtype": "float32", "per_device_train_batch_size": 6, "max_steps": 2, "learning_rate": 1e-2, **options}
    adapter = {"r": 4, **(adapter or {})}
    name = {"name": str(model), "quantization": quantization}
    return Config.model_validate({"model": name, "adapter": adapter, "train": {"threads": 2, **options}})


def load(folder):
    return models.load_model(models.fetch(str(folder)), dtype="float32", device="cpu")


def pad_of(folder):
    return models.load_tokenizer(models.fetch(str(folder))).pad_token_id


@pytest.mark.parametrize("family", FAMILIES)
def test_family_trains_on_its_own_logits(family_folder, prepare, rows, tmp_path, family, capsys):
    base = family_folder(family)
    train(config(base, eval_steps=2), {"prepare": prepare}, tmp_path)
    lines = metrics.read(tmp_path / "metrics.jsonl")
    with torch.no_grad():
        loss, router = completion_loss(load(base), rows, pad_of(base))
        trained = adapters.load_adapter(load(base), tmp_path / "adapter")
        held_out, _ = completion_loss(trained, rows, pad_of(base))
    if router is not None:
        assert lines[0]["aux_loss"] == pytest.approx(float(router), rel=1e-5)
        loss = loss + 0.5 * router
    assert ("aux_loss" in lines[0]) is (family in ROUTED)
    assert lines[0]["loss"] == pytest.approx(float(loss), rel=2e-6)
    # The router's loss is no part of it, and it is that of the adapter as saved.
    assert lines[-1]["eval_loss"] == pytest.approx(float(held_out), rel=2e-6)
    said = capsys.readouterr().err
    assert f"GGUF files of {family} need a llama.cpp checkout" in said
    assert ("the experts" in said) is (family in ROUTED)
    assert ("out_proj cannot have an adapter" in said) is (family in ("mamba2", "falcon_h1"))


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "falcon_h1", "mixtral"])
@pytest.mark.parametrize("adapter", [{"kind": "lora"}, {"kind": "dora", "init_lora_weights": "pissa", "r": 40}])
def test_merged_model_is_the_adapted_one(family_folder, tmp_path, family, adapter):
    base, start = family_folder(family), tmp_path / "start" if "init_lora_weights" in adapter else None
    model = lora.attach_adapter(load(base), AdapterOptions(**{"r": 4, **adapter})).eval()
    if start:
        lora.save_adapter_start(model, start)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    lora.save_adapter(model, str(base), None, tmp_path / "adapter", start=start, base=base)
    adapted = model(input_ids=IDS).logits
    (tmp_path / "merged").mkdir()
    merge_folders(base, tmp_path / "adapter", tmp_path / "merged", dtype="float32")
    assert float((adapted - load(base)(input_ids=IDS).logits).abs().max()) > 1e-2
    assert torch.allclose(load(tmp_path / "merged")(input_ids=IDS).logits, adapted, atol=2e-5)


@pytest.mark.parametrize(
    ("adapter", "quantization"),
    [({"init_lora_weights": "pissa", "use_rslora": True}, "none"), ({"init_lora_weights": "loftq"}, "nf4")],
)
def test_rank_above_the_smaller_side_of_a_layer(tiny_model, prepare, tmp_path, adapter, quantization):
    """The tiny model's keys have 32 rows."""
    train(config(tiny_model, {**adapter, "r": 48}, quantization), {"prepare": prepare}, tmp_path)
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["r"] == 96
    loaded = adapters.load_adapter(load(tiny_model), tmp_path / "adapter")
    assert loaded.get_base_model().model.layers[0].self_attn.k_proj.lora_A["default"].weight.shape[0] == 96


@pytest.mark.parametrize("init", ["pissa", "loftq"])
def test_high_rank_start_is_the_exact_sum(tiny_model, tmp_path, init):
    """Base and adapter together are the stored weights: for PiSSA exactly, for LoftQ with all directions of a layer."""
    quantization = "nf4" if init == "loftq" else "none"
    base = models.load_model(models.fetch(str(tiny_model)), dtype="float32", device="cpu", quantization=quantization)
    model = lora.attach_adapter(base, AdapterOptions(r=64, init_lora_weights=init)).eval()
    if init == "loftq":
        lora.init_from_quantization_error(model, tiny_model)
    assert torch.allclose(model(input_ids=IDS).logits, load(tiny_model)(input_ids=IDS).logits, atol=1e-4)


def test_adapter_beside_the_weights_is_not_loaded(tiny_model, prepare, tmp_path, capsys):
    import shutil

    adapted = lora.attach_adapter(load(tiny_model), AdapterOptions(r=4))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            weight.data.normal_()
    both = tmp_path / "both"
    shutil.copytree(tiny_model, both)
    adapted.save_pretrained(both)
    assert torch.equal(load(both)(input_ids=IDS).logits, load(tiny_model)(input_ids=IDS).logits)
    assert "the adapter is not loaded" in capsys.readouterr().err
    train(config(both, {"kind": "full"}), {"prepare": prepare}, tmp_path)
    found, stored = (dict(load(folder).named_parameters()) for folder in (tmp_path / "model", tiny_model))
    assert found.keys() == stored.keys()
    assert not any(torch.equal(found[name], stored[name]) for name in stored)


def test_gpt2_layers_have_names(family_folder):
    model = load(family_folder("gpt2"))
    adapted = lora.attach_adapter(model, AdapterOptions(r=4, target_modules=("c_attn",)))
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in adapted.state_dict() if "lora_A" in name} == {
        "c_attn"
    }


@pytest.mark.parametrize(
    ("family", "target"), [("mixtral", "gate_proj"), ("mamba2", "out_proj"), ("gpt_neox", "embed_out")]
)
def test_layer_without_an_adapter_is_refused_by_name(family_folder, family, target):
    with pytest.raises(ConfigError, match=f"(no linear layer '{target}'|{target} cannot have .*): use some of "):
        lora.attach_adapter(load(family_folder(family)), AdapterOptions(r=4, target_modules=(target,)))


@pytest.mark.parametrize("spoiled", ["scale", "shape"])
def test_saved_adapter_that_differs_stops_the_run(tiny_model, prepare, tmp_path, monkeypatch, spoiled):
    save = lora.save_adapter

    def spoil(model, name, revision, folder, **options):
        save(model, name, revision, folder, **options)
        path = folder / "adapter_config.json"
        saved = json.loads(path.read_text())
        saved |= {"lora_alpha": 99} if spoiled == "scale" else {"r": 5}
        path.write_text(json.dumps(saved))

    monkeypatch.setattr(lora, "save_adapter", spoil)
    problem = "differ from the trained model by" if spoiled == "scale" else "cannot be loaded again"
    with pytest.raises(ArtifactError, match=problem):
        train(config(tiny_model), {"prepare": prepare}, tmp_path)
    assert not (tmp_path / "adapter").exists()
