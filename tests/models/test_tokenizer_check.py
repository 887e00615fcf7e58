from __future__ import annotations

import hashlib
import unicodedata

import pytest
from tokenizers import Tokenizer, normalizers, pre_tokenizers

from fintune.errors import ModelError, ResourceError
from fintune.models.tokenizer_check import (
    NUM_STRINGS,
    check_tokenizer_against_llama_cpp,
    probe_strings,
)
from support.tiny_gguf import make_tiny_gguf


@pytest.fixture(scope="module")
def gguf(tiny_model, tmp_path_factory):
    return make_tiny_gguf(tiny_model, tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture
def tokenizer(tiny_model):
    return Tokenizer.from_file(str(tiny_model / "tokenizer.json"))


def encoder(tokenizer):
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def test_probe_strings_same_on_every_machine():
    joined = "\0".join(probe_strings()).encode()
    assert hashlib.sha256(joined).hexdigest() == "ab1dd4f34daa812f74911034cbe5198a55ac67541b5fb5f94051adbdfa8bca35"


def test_probe_strings_distinct_and_composed():
    strings = probe_strings()
    assert len(strings) == len(set(strings)) == NUM_STRINGS == 2000
    assert all(unicodedata.is_normalized("NFC", text) for text in strings)


def test_probe_strings_hold_what_tokenizers_differ_on():
    strings = probe_strings()
    for piece in ("  2", "\n\n", "\t", "1,", "$ ", "'s", "divide(", "#0", "\u00a0", "\r\n", "%", "Ж"):
        assert any(piece in text for text in strings), piece
    kinds = {unicodedata.category(char) for text in strings for char in text}
    assert {"Lu", "Ll", "Lo", "Nd", "No", "Sc", "Sm", "So", "Zs", "Cc", "Po", "Mn", "Cf"} <= kinds


def test_a_tokenizer_that_composes_accents_agrees_too(gguf, tokenizer):
    """Qwen's normalises to NFC, which llama.cpp never does."""
    tokenizer.normalizer = normalizers.NFC()
    assert check_tokenizer_against_llama_cpp(encoder(tokenizer), gguf) == NUM_STRINGS + 2


def test_the_same_tokenizer_agrees_on_every_string(gguf, tokenizer):
    assert check_tokenizer_against_llama_cpp(encoder(tokenizer), gguf) == NUM_STRINGS + 2


def test_a_lost_pre_tokenizer_is_shown_with_its_strings(gguf, tokenizer):
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    with pytest.raises(ModelError, match=r"1 of 2 strings tokenise differently from llama.cpp: ' 12  345' gives"):
        check_tokenizer_against_llama_cpp(encoder(tokenizer), gguf, ["no digits", " 12  345"])


def test_a_special_token_read_as_text_is_a_difference(gguf, tokenizer):
    broken = {"<|im_end|>": [7]}
    with pytest.raises(ModelError, match="1 of 1 strings"):
        check_tokenizer_against_llama_cpp(broken.__getitem__, gguf, ["<|im_end|>"])


def test_a_file_that_llama_cpp_cannot_load_is_named(tmp_path):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"broken\.gguf: llama\.cpp cannot load it"):
        check_tokenizer_against_llama_cpp(lambda text: [], tmp_path / "broken.gguf", ["x"])


def test_a_missing_xllamacpp_says_what_to_install(gguf, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "xllamacpp", None)
    with pytest.raises(ResourceError, match="pip install"):
        check_tokenizer_against_llama_cpp(lambda text: [], gguf, ["x"])
