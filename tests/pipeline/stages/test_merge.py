from __future__ import annotations

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from fintune.config import AdapterOptions, Config
from fintune.errors import ArtifactError
from fintune.export.merge import layerwise
from fintune.export.merge.merge import merge_folders
from fintune.models import adapter as adapters
from fintune.models import load as models
from fintune.models.safetensors_files import SafetensorFolder
from fintune.pipeline.stages.merge import merge, merge_adapter
from fintune.training import lora
from fintune.util.console import quiet_libraries
from support.prepared_rows import prepared
from support.tiny import make_tiny_model, patch_json

torch = pytest.importorskip("torch")


def inputs(tmp_path, model, *, kind="lora", scale=0.05):
    """A prepared folder and an adapter with random weights of the given size."""
    base = models.load_model(models.fetch(str(model)), dtype="float32", device="cpu")
    adapted = lora.attach_adapter(base, AdapterOptions(kind=kind, r=4))
    torch.manual_seed(1)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            weight.data = torch.randn_like(weight) * scale
    (tmp_path / "train").mkdir()
    lora.save_adapter(adapted, str(model), None, tmp_path / "train" / "adapter")
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
    told = f"largest logit difference to base + adapter {facts['max_logit_difference']:.2g}"
    assert facts["summary"] == f"float32, 14 weights moved, {told}"


def test_tokenizer_template_and_licence_come_along(tiny_model, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    (model / "LICENSE").write_text("mine")
    merge(config(model), inputs(tmp_path, model), tmp_path / "merge")
    ref = models.fetch(str(tmp_path / "merge"))
    old, new = models.load_tokenizer(models.fetch(str(model))), models.load_tokenizer(ref)
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
    loaded = models.load_model(models.fetch(str(model)), dtype="bfloat16", device="cpu")
    with quiet_libraries():
        loaded.save_pretrained(folder)
    return folder


def test_an_untrained_adapter_is_refused(tiny_model, tmp_path):
    with pytest.raises(ArtifactError, match="changes no weight"):
        merge(config(tiny_model), inputs(tmp_path, tiny_model, scale=0.0), tmp_path / "merge")


def test_an_adapter_that_rounding_swallows_is_refused(tiny_model, tmp_path):
    model = in_bfloat16(tiny_model, tmp_path / "model")
    with pytest.raises(ArtifactError, match=r"12 of 14 adapted weights did not change in bfloat16"):
        merge(config(model), inputs(tmp_path, model, scale=1e-9), tmp_path / "merge")


def test_merge_into_quantized_base(tiny_model, tmp_path):
    pytest.importorskip("bitsandbytes")
    options = {"model": {"name": str(tiny_model), "quantization": "nf4"}, "merge": {"into": "quantized_base"}}
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


def test_merge_compares_unknown_architecture_as_a_whole(tiny_model, tmp_path, monkeypatch):
    given = inputs(tmp_path, tiny_model)
    by_layers = merge(config(tiny_model), given, tmp_path / "merge")
    monkeypatch.delitem(layerwise.ARCHITECTURES, "llama")
    (tmp_path / "again").mkdir()
    whole = merge(config(tiny_model), given, tmp_path / "again")
    assert (by_layers["proof"], whole["proof"]) == ("layer by layer", "whole models in memory")
    assert by_layers["max_logit"] == pytest.approx(whole["max_logit"], abs=1e-5)
    assert by_layers["max_logit_difference"] == pytest.approx(whole["max_logit_difference"], abs=1e-5)
    assert by_layers["same_best_token_share"] == whole["same_best_token_share"]


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(("spoilt", "blamed"), [("merged", "merge"), ("trained", "adapter")])
def test_logits_that_are_not_finite_prove_nothing(tiny_model, tmp_path, monkeypatch, known, spoilt, blamed):
    given = inputs(tmp_path, tiny_model)

    def merged_and_spoilt(base, lora, folder, **options):
        report = merge_folders(base, lora, folder, **options)
        path = {"merged": folder / "model.safetensors", "trained": lora / "adapter_model.safetensors"}[spoilt]
        tensors = load_file(path)
        next(weight for name, weight in tensors.items() if "q_proj" in name)[0, 0] = float("nan")
        save_file(tensors, path, {"format": "pt"})
        return report

    monkeypatch.setattr("fintune.pipeline.stages.merge.merge_folders", merged_and_spoilt)
    if not known:
        monkeypatch.delitem(layerwise.ARCHITECTURES, "llama")
    with pytest.raises(ArtifactError, match=rf"/{blamed}: the logits of the model are not finite: the training div"):
        merge(config(tiny_model), given, tmp_path / "merge")


def grown(base, folder, *, saved=True, **options):
    """An adapter whose training added two tokens, in PEFT's own form; without the embeddings where not `saved`."""
    from peft import LoraConfig, get_peft_model

    ref = models.fetch(str(base))
    tokenizer = models.load_tokenizer(ref)
    tokenizer.add_tokens(["<|fresh|>", "<|newer|>"], special_tokens=True)
    model = models.load_model(ref, dtype="float32", device="cpu")
    torch.manual_seed(1)
    if saved:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with quiet_libraries(), adapters.quiet_peft():
        lora = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj"]} | options
        adapted = get_peft_model(model, LoraConfig(**lora))
        for weight in adapted.parameters():
            weight.data += torch.randn_like(weight) * 0.05 * weight.requires_grad
        adapted.save_pretrained(folder, save_embedding_layers=saved)
    tokenizer.save_pretrained(folder)
    return folder, adapted


@pytest.mark.parametrize(
    ("tied", "options"),
    [
        (True, {}),
        (True, {"modules_to_save": ["embed_tokens"]}),
        (False, {}),
        (False, {"modules_to_save": ["embed_tokens", "lm_head"]}),
        (False, {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["embed_tokens"]}),
    ],
)
def test_a_vocabulary_that_grew_in_training_is_merged_and_proved(tmp_path, tied, options):
    base = make_tiny_model(tmp_path / "base", tie_word_embeddings=tied)
    lora, trained = grown(base, tmp_path / "lora", **options)
    (tmp_path / "merge").mkdir()
    facts = merge_adapter(config(base), tmp_path / "merge", adapter=lora)
    assert facts["proof"] == "whole models in memory"
    assert facts["max_logit_difference"] < 1e-4 < facts["max_logit"]
    ids = torch.tensor([[400, 5, 401, 17]])
    with torch.no_grad():
        found = models.load_model(models.fetch(str(tmp_path / "merge")), dtype="float32", device="cpu")(ids).logits
        assert float((found - trained.eval()(ids).logits).abs().max()) < 1e-4


def test_merge_of_embeddings_saved_twice_by_peft(tmp_path):
    base = make_tiny_model(tmp_path / "base", tie_word_embeddings=False)
    lora, _ = grown(base, tmp_path / "lora", saved=False, modules_to_save=["embed_tokens", "lm_head"])
    stored = load_file(lora / "adapter_model.safetensors")
    for name in ("model.embed_tokens", "lm_head"):
        weight = stored.pop(f"base_model.model.{name}.weight")
        stored[f"base_model.model.{name}.modules_to_save.weight"] = weight
        stored[f"base_model.model.{name}.original_module.weight"] = torch.zeros_like(weight)
    save_file(stored, lora / "adapter_model.safetensors")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (lora / name).unlink()
    (tmp_path / "merge").mkdir()
    facts = merge_adapter(config(base), tmp_path / "merge", adapter=lora)
    assert (facts["proof"], facts["num_moved"]) == ("layer by layer", 4)
    assert facts["max_logit_difference"] < 1e-4 < facts["max_logit"]
