from __future__ import annotations

import struct

import gguf
import pytest

from fintune.errors import ModelError
from fintune.inference.llama_requests import hidden_tokens, read_gguf_numbers, slot_batches

TYPES = "tokenizer.ggml.token_type"


@pytest.fixture
def path(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_token_list([b"<|end|>", "é".encode(), b"", b"<|im_end|>", b"<|tool|>"])
    writer.add_token_merges(["a b", "c d"])
    writer.add_token_types([3, 1, 1, 3, 3])
    writer.add_eos_token_id(3)
    writer.add_chat_template("{{ x }}")
    writer.add_layer_norm_rms_eps(0.5)
    writer.add_add_bos_token(False)
    writer.add_context_length(77)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return tmp_path / "m.gguf"


def test_read_gguf_numbers_skips_strings(path):
    keys = [TYPES, "llama.context_length", "llama.attention.layer_norm_rms_epsilon", "tokenizer.ggml.add_bos_token"]
    assert read_gguf_numbers(path, [*keys, "not.there"]) == {
        TYPES: (3, 1, 1, 3, 3),
        "llama.context_length": (77,),
        "llama.attention.layer_norm_rms_epsilon": (0.5,),
        "tokenizer.ggml.add_bos_token": (False,),
    }


def test_hidden_tokens_excludes_end_tokens(path):
    assert hidden_tokens(path) == [0, 4]


@pytest.mark.parametrize("num_bytes", [20, 60, 150])
def test_read_gguf_numbers_truncated_header(path, num_bytes):
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(ModelError, match=r"m\.gguf: its header is damaged"):
        read_gguf_numbers(path, [TYPES])


def test_read_gguf_numbers_unknown_version(path):
    data = bytearray(path.read_bytes())
    data[4:8] = struct.pack("<I", 9)
    path.write_bytes(data)
    with pytest.raises(ModelError, match="GGUF version 9"):
        read_gguf_numbers(path, [TYPES])


def test_slot_batches_keeps_a_group_in_its_slot():
    batches = list(slot_batches([[0, 1, 2], [3, 4], [5, 6, 7]], 2))
    assert batches == [[0, 3], [1, 4], [2, 5], [6], [7]]


def test_slot_batches_started_groups_come_first():
    assert list(slot_batches([[0, 1], [2, 3, 4], [5, 6]], 2)) == [[0, 2], [1, 3], [4, 5], [6]]


def test_slot_batches_fills_with_single_prompts():
    assert list(slot_batches([[0], [1], [2, 3, 4], [5], [6], [7]], 2)) == [[2, 0], [3, 1], [4, 5], [6, 7]]
    assert list(slot_batches([[index] for index in range(10)], 2)) == [list(range(8)), [8, 9]]


def test_slot_batches_contains_every_prompt_once():
    groups = [list(range(start, start + 1 + start % 4)) for start in range(0, 100, 4)]
    indices = [index for batch in slot_batches(groups, 3) for index in batch]
    assert sorted(indices) == sorted(index for group in groups for index in group)


def test_slot_batches_without_prompts():
    assert list(slot_batches([], 4)) == []
