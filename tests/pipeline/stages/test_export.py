"""The export stage: files, Modelfile, and what is said where a template has no counterpart in Ollama."""

from __future__ import annotations

import json
import shutil

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fintune.config import Config
from fintune.errors import ArtifactError
from fintune.pipeline.stages import export as module
from fintune.pipeline.stages.export import export
from fintune.pipeline.stages.merge import merge
from fintune.util.memory import reset_peak_memory
from support.prepared_rows import prepared
from support.tiny import CHATML, patch_json

TYPES = ("F16", "Q8_0")


def config(**more) -> Config:
    export = {"types": TYPES} | more
    return Config.model_validate({"run": {"name": "t"}, "export": export, "predict": {"models": ["base"]}})


def test_every_type_becomes_a_file_of_the_size_that_is_reported(tiny_model, tmp_path):
    facts = export(config(), {"merge": tiny_model}, tmp_path)
    for kind in TYPES:
        path = tmp_path / f"t-{kind}.gguf"
        assert facts["file_bytes"][kind] == path.stat().st_size
        assert gguf.GGUFReader(path).fields["general.name"].contents() == "t"


def test_export_modelfile_names_last_type_and_stop_token(tiny_model, tmp_path):
    export(config(), {"merge": tiny_model}, tmp_path)
    text = (tmp_path / "Modelfile").read_text(encoding="utf-8")
    assert "t-Q8_0.gguf" in text
    assert "<|im_end|>" in text


def test_export_without_modelfile_for_odd_template(tiny_model, tmp_path):
    merged, folder = tmp_path / "merge", tmp_path / "export"
    shutil.copytree(tiny_model, merged)
    folder.mkdir()
    # Turns are numbered, which Ollama's language cannot do role by role.
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }} {{ loop.index }}\n{{ m.content }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    (merged / "chat_template.jinja").write_text(template, encoding="utf-8")
    patch_json(merged / "tokenizer_config.json", chat_template=template)
    facts = export(config(), {"merge": merged}, folder)
    assert (folder / "t-F16.gguf").is_file()
    assert not (folder / "Modelfile").exists()
    assert any("no Modelfile" in note for note in facts["notes"])


def test_export_notes_modelfile_differences(tiny_model, tmp_path):
    merged, folder = tmp_path / "merge", tmp_path / "export"
    shutil.copytree(tiny_model, merged)
    folder.mkdir()
    forgets = CHATML.replace("message['content']", "message['content'].split('</think>')[-1]")
    (merged / "chat_template.jinja").write_text(forgets, encoding="utf-8")
    facts = export(config(), {"merge": merged}, folder)
    assert any(note.startswith("Modelfile: ") and "<think>" in note for note in facts["notes"])
    assert "send earlier answers without their thoughts" in (folder / "Modelfile").read_text(encoding="utf-8")


def trained(tmp_path, model):
    """An adapter of the model's query and down projections, as PEFT would have saved it."""
    random = np.random.default_rng(3)
    tensors = {}
    for layer in range(2):
        for name, rows, columns in (("self_attn.q_proj", 64, 64), ("mlp.down_proj", 64, 128)):
            module = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{module}.lora_A.weight"] = random.standard_normal((4, columns), np.float32)
            tensors[f"{module}.lora_B.weight"] = random.standard_normal((rows, 4), np.float32) / 10
    adapter = tmp_path / "train" / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    save_file(tensors, adapter / "adapter_model.safetensors")
    return {"prepare": prepared(tmp_path / "prepare", model, 4), "train": tmp_path / "train"}


@pytest.mark.parametrize(("dtype", "pad"), [("auto", "<|endoftext|>"), ("bfloat16", "<|im_end|>")])
def test_base_and_adapter_give_the_bytes_of_the_merged_folder(tiny_model, tmp_path, dtype, pad):
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    patch_json(model / "tokenizer_config.json", pad_token=pad)
    options = {
        "model": {"name": str(model)},
        "merge": {"dtype": dtype},
        **config().model_dump(exclude={"model", "merge"}),
    }
    run = Config.model_validate(options)
    inputs = trained(tmp_path, model)
    for name in ("merge", "through", "direct"):
        (tmp_path / name).mkdir()
    merge(run, inputs, tmp_path / "merge")
    through = export(run, {"merge": tmp_path / "merge"}, tmp_path / "through")
    direct = export(run, inputs, tmp_path / "direct")
    names = sorted(path.name for path in (tmp_path / "through").iterdir())
    assert names == ["Modelfile", "t-F16.gguf", "t-Q8_0.gguf"]
    assert names == sorted(path.name for path in (tmp_path / "direct").iterdir())
    for name in names:
        assert (tmp_path / "through" / name).read_bytes() == (tmp_path / "direct" / name).read_bytes()
    assert (through["source"], direct["source"]) == ("merged folder", "base + adapter")


def test_an_untrained_adapter_leaves_no_file(tiny_model, tmp_path):
    inputs = trained(tmp_path, tiny_model)
    path = tmp_path / "train" / "adapter" / "adapter_model.safetensors"
    save_file({name: values * ("lora_A" in name) for name, values in load_file(path).items()}, path)
    (tmp_path / "export").mkdir()
    run = Config.model_validate({"model": {"name": str(tiny_model)}, **config().model_dump(exclude={"model"})})
    with pytest.raises(ArtifactError, match="changes no weight"):
        export(run, inputs, tmp_path / "export")
    assert list((tmp_path / "export").iterdir()) == []


def test_speed_and_memory_are_recorded_and_an_excess_is_told(tiny_model, tmp_path, monkeypatch):
    reset_peak_memory()  # as the pipeline does before a stage; earlier tests have loaded models
    facts = export(config(), {"merge": tiny_model}, tmp_path)
    assert facts["megabytes_per_second"] > 0
    assert facts["weight_bytes_read"] == sum(v.nbytes for v in load_file(tiny_model / "model.safetensors").values())
    assert facts["memory_grown_bytes"] <= facts["memory_limit_bytes"] and facts["memory_within_limit"]
    monkeypatch.setattr(module, "MEMORY_LIMIT_BYTES", -1)
    facts = export(config(), {"merge": tiny_model}, tmp_path)
    assert not facts["memory_within_limit"] and any("of memory" in note for note in facts["notes"])


def test_export_computed_imatrix_same_bytes_both_ways(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "IMATRIX_TOKENS", 100)
    inputs = trained(tmp_path, tiny_model)
    options = config(types=("Q4_K_M",), imatrix="compute").model_dump(exclude={"model", "merge"})
    run = Config.model_validate(options | {"model": {"name": str(tiny_model)}, "merge": {"dtype": "bfloat16"}})
    for name in ("merge", "through", "direct"):
        (tmp_path / name).mkdir()
    merge(run, inputs, tmp_path / "merge")
    export(run, inputs | {"merge": tmp_path / "merge"}, tmp_path / "through")
    export(run, inputs, tmp_path / "direct")
    for name in ("t-imatrix.gguf", "t-Q4_K_M.gguf"):
        assert (tmp_path / "through" / name).read_bytes() == (tmp_path / "direct" / name).read_bytes()


def test_export_computes_imatrix_from_training_texts(tiny_model, tmp_path):
    inputs = trained(tmp_path, tiny_model)

    def run(importance):
        options = config(types=("Q4_K_M",), imatrix=importance).model_dump(exclude={"model"})
        return Config.model_validate(options | {"model": {"name": str(tiny_model)}})

    for name in ("weighed", "plain"):
        (tmp_path / name).mkdir()
    facts = export(run("compute"), inputs, tmp_path / "weighed")
    assert facts["imatrix"] == "t-imatrix.gguf"
    assert facts["imatrix_tokens"] > 100
    export(run(None), inputs, tmp_path / "plain")
    weighed, plain = tmp_path / "weighed" / "t-Q4_K_M.gguf", tmp_path / "plain" / "t-Q4_K_M.gguf"
    fields = gguf.GGUFReader(weighed).fields
    assert fields["quantize.imatrix.dataset"].contents() == "train"
    assert fields["quantize.imatrix.entries_count"].contents() == 14
    assert weighed.read_bytes()[-20_000:] != plain.read_bytes()[-20_000:]
    again = tmp_path / "again"
    again.mkdir()
    export(run(tmp_path / "weighed" / "t-imatrix.gguf"), inputs, again)
    assert (again / "t-Q4_K_M.gguf").read_bytes() == weighed.read_bytes()
