"""The tokenizer's check before training: what passes, and what is named when it does not."""

from __future__ import annotations

import json
import shutil

import pytest

from fintune.errors import ModelError
from fintune.options import Config
from fintune.stages import preflight as module
from fintune.stages.preflight import preflight
from synthetic import PRE_TOKENIZERS, write_folder
from tiny import patch_json

pytest.importorskip("xllamacpp")
pytest.importorskip("torch")


def config(model) -> Config:
    return Config.model_validate({"model": {"name": str(model)}})


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_two_thousand_strings_and_the_template_are_compared(tmp_path, pre):
    family = "qwen2" if pre == "qwen2" else "llama"
    model = write_folder(tmp_path / "model", family, pre=pre)
    (tmp_path / "out").mkdir()
    facts = preflight(config(model), {}, tmp_path / "out")
    assert facts["pre_tokenizer"] == pre
    assert facts["num_strings"] >= 2000
    assert facts["eos_token"] == "<|im_end|>"
    assert facts["composes_accents"] == (family == "qwen2")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["preflight.json"]
    assert json.loads((tmp_path / "out" / "preflight.json").read_text()) == facts


def test_a_splitting_that_llama_cpp_does_not_do_names_strings(tiny_model, tmp_path, monkeypatch):
    """The file says gpt-2 where the tokenizer takes digits one by one, as a lost Digits step would have it."""
    read = module.read_vocabulary

    def wrong(folder, vocab_size):
        vocabulary = read(folder, vocab_size)
        object.__setattr__(vocabulary, "pre", "gpt-2")
        return vocabulary

    monkeypatch.setattr(module, "read_vocabulary", wrong)
    with pytest.raises(ModelError, match=r"\d+ of 20\d\d strings tokenise differently from llama\.cpp: '.*' gives \["):
        preflight(config(tiny_model), {}, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_pre_tokenizer_that_is_not_known_is_refused(tiny_model, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    metaspace = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}
    patch_json(model / "tokenizer.json", pre_tokenizer=metaspace)
    with pytest.raises(ModelError, match="pre-tokenizer not recognised"):
        preflight(config(model), {}, tmp_path)


def test_an_end_of_turn_that_is_no_special_token_is_refused(tiny_model, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    for added in tokenizer["added_tokens"]:
        added["special"] = added["content"] != "<|im_end|>"
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    patch_json(model / "tokenizer_config.json", eos_token="<|endoftext|>", pad_token="<|im_start|>")
    with pytest.raises(ModelError):
        preflight(config(model), {}, tmp_path)


@pytest.mark.slow
def test_the_built_in_model_passes(builtin_model, tmp_path):
    facts = preflight(Config(), {}, tmp_path)
    assert (facts["pre_tokenizer"], facts["num_tokens"]) == ("smollm", 49152)
