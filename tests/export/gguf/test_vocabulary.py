from __future__ import annotations

import hashlib
import json
import shutil

import gguf
import pytest
from tokenizers import Tokenizer

from fintune.errors import ModelError
from fintune.export.gguf import vocabulary
from fintune.export.gguf.vocabulary import read_vocabulary
from support.synthetic import LLAMA3_SPLIT, PRE_TOKENIZERS, split, write_tokenizer
from support.tiny import patch_json


@pytest.fixture
def folder(tmp_path):
    write_tokenizer(tmp_path)
    return tmp_path


def num_tokens(folder):
    return Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()


def test_tokens_keep_their_ids_and_kinds(folder):
    size = num_tokens(folder)
    read = read_vocabulary(folder, size + 2)
    assert read.tokens[:3] == ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    assert read.tokens[-2:] == (f"[PAD{size}]", f"[PAD{size + 1}]")
    kinds = [gguf.TokenType(kind).name for kind in read.kinds]
    assert kinds == ["CONTROL"] * 3 + ["NORMAL"] * (size - 3) + ["UNUSED"] * 2


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_the_pre_tokenizer_is_known_by_what_it_does(tmp_path, pre):
    assert read_vocabulary(tmp_path, write_tokenizer(tmp_path, pre)).pre == pre


def test_pre_tokenizer_without_digits_step_is_refused(folder, monkeypatch):
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(vocabulary._PROBE).ids
    digest = hashlib.sha256(str(ids).encode()).hexdigest()
    monkeypatch.setattr(vocabulary, "_PRE_BY_HASH", {digest: "smollm"})
    with pytest.raises(ModelError, match="splits text like gpt-2, but its tokens are those of smollm"):
        read_vocabulary(folder, num_tokens(folder))


@pytest.mark.parametrize(
    "pre_tokenizer",
    [
        {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True},
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        split(LLAMA3_SPLIT + "|x"),
        # The right words, but llama.cpp would take whole words before merging, as Llama 3 does and this does not.
        split(LLAMA3_SPLIT),
    ],
)
def test_a_splitting_that_llama_cpp_does_not_have_is_refused(folder, pre_tokenizer):
    patch_json(folder / "tokenizer.json", pre_tokenizer=pre_tokenizer)
    with pytest.raises(ModelError, match=r"pre-tokenizer not recognised .*known: .*smollm"):
        read_vocabulary(folder, 400)


def test_a_sentencepiece_tokenizer_is_refused(folder):
    raw = json.loads((folder / "tokenizer.json").read_text())
    patch_json(folder / "tokenizer.json", model=raw["model"] | {"byte_fallback": True})
    with pytest.raises(ModelError, match=r"SentencePiece .*export\.llama_cpp_path=FOLDER; .*--skip export"):
        read_vocabulary(folder, 400)


def test_more_tokens_than_rows_are_refused(folder):
    size = num_tokens(folder)
    with pytest.raises(ModelError, match=f"token id {size - 1} has no row in an embedding of {size - 1}"):
        read_vocabulary(folder, size - 1)


@pytest.mark.parametrize("content", [None, "{", '{"model": 1}'])
def test_a_missing_or_broken_tokenizer_is_one_line(folder, content):
    (folder / "tokenizer.json").unlink()
    if content is not None:
        (folder / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        read_vocabulary(folder, 400)


def test_vocabulary_eos_is_the_end_of_a_turn(folder):
    patch_json(folder / "tokenizer_config.json", eos_token="<|endoftext|>")
    read = read_vocabulary(folder, 400)
    assert (read.eos_id, read.eos_replaced) == (2, 0)


def test_without_a_chat_template_the_end_token_is_the_tokenizers(folder):
    (folder / "chat_template.jinja").unlink()
    patch_json(folder / "tokenizer_config.json", eos_token="<|endoftext|>")
    read = read_vocabulary(folder, 400)
    assert (read.eos_id, read.eos_replaced, read.chat_template) == (0, None, None)


def test_vocabulary_prefers_the_template_file(folder):
    template = (folder / "chat_template.jinja").read_text()
    patch_json(folder / "tokenizer_config.json", chat_template="other")
    assert read_vocabulary(folder, 400).chat_template == template
    shutil.move(folder / "chat_template.jinja", folder / "kept")
    patch_json(folder / "tokenizer_config.json", chat_template=template + " ")
    assert read_vocabulary(folder, 400).chat_template == template + " "


def test_a_template_that_drops_the_answer_is_refused(folder):
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    with pytest.raises(ModelError, match="drops the assistant's turn"):
        read_vocabulary(folder, 400)


def test_a_template_that_is_no_template_is_refused(folder):
    (folder / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(ModelError, match="chat template cannot be rendered"):
        read_vocabulary(folder, 400)
