"""The tokenizer's check before training: what passes, and what is named when it does not."""

from __future__ import annotations

import json
import shutil
import string
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from fintune.config import Config
from fintune.errors import ModelError
from fintune.export.gguf import llama_cpp_checkout
from fintune.pipeline.stages import preflight as module
from fintune.pipeline.stages.preflight import preflight
from support.synthetic import PRE_TOKENIZERS, write_folder
from support.tiny import patch_json

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


def sentencepiece_like(tiny_model, folder: Path, scheme: str) -> Path:
    """Letters and bytes, spaces as transformers' LlamaTokenizer has them: always before a text, or first alone."""
    shutil.copytree(tiny_model, folder)
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *string.ascii_lowercase]
    vocab = {piece: place for place, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.add_special_tokens(pieces[:3])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "bos_token": "<s>"}
    settings |= {"eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ '<s>' + m.role + '\n' + m.content + '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
    )
    return folder


@pytest.fixture
def converted_by_checkout(monkeypatch):
    """The keys that llama.cpp's converter writes for such a tokenizer."""

    def convert(_checkout, model, target, **_):
        tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        size = tokenizer.get_vocab_size()
        writer = gguf.GGUFWriter(target, "llama")
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list([tokenizer.id_to_token(place) for place in range(size)])
        writer.add_token_scores([-float(place) for place in range(size)])
        writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * (size - 259)])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_chat_template((model / "chat_template.jinja").read_text())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()

    monkeypatch.setattr(llama_cpp_checkout, "check_checkout", lambda _: None)
    monkeypatch.setattr(llama_cpp_checkout, "convert_model", convert)


@pytest.fixture
def few_strings(monkeypatch):
    """For speed, and so that a mismatch which is met is one of the others."""
    monkeypatch.setattr(module, "probe_strings", lambda: (" 12 x", "Revenue in\u202f2019,\n\t$ 5"))


def by_checkout(model: Path) -> Config:
    return Config.model_validate({"model": {"name": str(model)}, "export": {"llama_cpp_path": "llama.cpp"}})


def test_a_sentencepiece_tokenizer_passes_by_a_checkout(
    tiny_model, tmp_path, converted_by_checkout, few_strings, capsys
):
    model = sentencepiece_like(tiny_model, tmp_path / "model", "always")
    with pytest.raises(ModelError, match=r"export\.llama_cpp_path=FOLDER; or .*--skip export"):
        preflight(config(model), {}, tmp_path)
    facts = preflight(by_checkout(model), {}, tmp_path)
    assert facts["num_strings"] > 6 and facts["drops_leading_space"]
    assert "drops a space at the start of a text" in capsys.readouterr().err


def test_preflight_sentencepiece_names_legacy(tiny_model, tmp_path, converted_by_checkout, few_strings):
    model = sentencepiece_like(tiny_model, tmp_path / "model", "first")
    with pytest.raises(ModelError, match=r"strings tokenise differently .*\"legacy\": true .*--skip export"):
        preflight(by_checkout(model), {}, tmp_path)


def test_preflight_refuses_strip_or_single_word_tokens(tiny_model, tmp_path, few_strings):
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    place = max(tokenizer["model"]["vocab"].values())
    for text, flag in {"<call>": "rstrip", "<then>": "lstrip", "cat": "single_word", "<plain>": "special"}.items():
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
        place += 1
        tokenizer["added_tokens"].append({"id": place, "content": text} | flags | {flag: True})
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    patch_json(model / "config.json", vocab_size=place + 1)
    weights = load_file(model / "model.safetensors")
    embedding = np.zeros((place + 1, 64), np.float32)
    save_file(weights | {"model.embed_tokens.weight": embedding}, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ModelError, match=r"3 of \d\d strings .*'revenue <call> x' .*'revenue <then> x' .*'acatb' gives"
    ):
        preflight(config(model), {}, tmp_path)


@pytest.mark.slow
def test_the_built_in_model_passes(builtin_model, tmp_path):
    facts = preflight(Config(), {}, tmp_path)
    assert (facts["pre_tokenizer"], facts["num_tokens"]) == ("smollm", 49152)
