"""The export stage: files, Modelfile, and what is said where a template has no counterpart in Ollama."""

from __future__ import annotations

import shutil

import gguf

from fintune.options import Config
from fintune.stages.export import export
from tiny import patch_json

TYPES = ("F16", "Q8_0")


def config() -> Config:
    return Config.model_validate({"run": {"name": "t"}, "export": {"types": TYPES}, "predict": {"models": ["base"]}})


def test_every_type_becomes_a_file_of_the_size_that_is_reported(tiny_model, tmp_path):
    facts = export(config(), {"merge": tiny_model}, tmp_path)
    for kind in TYPES:
        path = tmp_path / f"t-{kind}.gguf"
        assert facts["file_bytes"][kind] == path.stat().st_size
        assert gguf.GGUFReader(path).fields["general.name"].contents() == "t"


def test_the_modelfile_is_for_the_last_type_and_stops_at_the_end_of_turn(tiny_model, tmp_path):
    export(config(), {"merge": tiny_model}, tmp_path)
    text = (tmp_path / "Modelfile").read_text(encoding="utf-8")
    assert "t-Q8_0.gguf" in text
    assert "<|im_end|>" in text


def test_a_template_that_ollama_cannot_express_costs_the_modelfile_alone(tiny_model, tmp_path):
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
