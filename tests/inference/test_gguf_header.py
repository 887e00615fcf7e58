from __future__ import annotations

import struct

import gguf
import pytest

from fintune.errors import ModelError
from fintune.inference.gguf_header import numbers
from fintune.inference.llama_requests import unwritten_tokens

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


def test_numbers_are_found_between_strings_and_arrays_of_strings(path):
    wanted = [TYPES, "llama.context_length", "llama.attention.layer_norm_rms_epsilon", "tokenizer.ggml.add_bos_token"]
    assert numbers(path, [*wanted, "not.there"]) == {
        TYPES: (3, 1, 1, 3, 3),
        "llama.context_length": (77,),
        "llama.attention.layer_norm_rms_epsilon": (0.5,),
        "tokenizer.ggml.add_bos_token": (False,),
    }


def test_control_tokens_that_do_not_end_a_text_are_the_unwritten_ones(path):
    assert unwritten_tokens(path) == [0, 4]


@pytest.mark.parametrize("kept", [20, 60, 150])
def test_a_cut_header_is_one_clear_line(path, kept):
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ModelError, match=r"m\.gguf: its header is damaged"):
        numbers(path, [TYPES])


def test_another_version_is_refused(path):
    data = bytearray(path.read_bytes())
    data[4:8] = struct.pack("<I", 9)
    path.write_bytes(data)
    with pytest.raises(ModelError, match="GGUF version 9"):
        numbers(path, [TYPES])
