from __future__ import annotations

from collections import Counter

import pytest

from fintune.errors import ModelError
from fintune.export.gguf.ggml import QUANT_TYPES, tensor_types


def shapes(num_layers: int, width: int = 256, *, tied: bool = False) -> dict[str, tuple[int, ...]]:
    found = {"token_embd.weight": (50, width), "output_norm.weight": (width,)}
    if not tied:
        found["output.weight"] = (50, width)
    for layer in range(num_layers):
        names = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
        found |= {f"blk.{layer}.{name}.weight": (8, width) for name in names}
        found |= {f"blk.{layer}.attn_norm.weight": (width,), f"blk.{layer}.attn_q.bias": (8,)}
    return found


def test_q4_k_m_gives_more_bits_to_llama_cpps_layers():
    types = tensor_types("Q4_K_M", shapes(32), is_70b=False)
    better = {0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31}
    assert {layer for layer in range(32) if types[f"blk.{layer}.attn_v.weight"] == "Q6_K"} == better
    assert {layer for layer in range(32) if types[f"blk.{layer}.ffn_down.weight"] == "Q6_K"} == better
    assert types["output.weight"] == "Q6_K" and types["token_embd.weight"] == "Q4_K"
    assert types["blk.5.attn_q.bias"] == types["blk.5.attn_norm.weight"] == "F32"


def test_a_tied_embedding_is_stored_as_the_output_would_be():
    assert tensor_types("Q4_K_M", shapes(2, tied=True), is_70b=False)["token_embd.weight"] == "Q6_K"
    assert tensor_types("Q8_0", shapes(2, tied=True), is_70b=False)["token_embd.weight"] == "Q8_0"


def test_a_70b_model_has_no_four_bit_values():
    values = [f"blk.{layer}.attn_v.weight" for layer in range(80)]
    small = tensor_types("Q4_K_M", shapes(80), is_70b=False)
    large = tensor_types("Q4_K_M", shapes(80), is_70b=True)
    assert Counter(small[name] for name in values)["Q4_K"] == Counter(large[name] for name in values)["Q5_K"] > 0
    assert {name for name in small if small[name] != large[name]} <= set(values)


@pytest.mark.parametrize(
    ("kind", "width", "expected"),
    [
        ("Q4_K_M", 320, "Q5_0"),
        ("Q5_K_M", 320, "Q5_1"),
        ("Q6_K", 320, "Q8_0"),
        ("Q3_K_M", 320, "Q4_0"),
        ("Q4_K_M", 20, "F16"),
        ("Q8_0", 20, "F16"),
    ],
)
def test_a_width_that_fills_no_block_falls_back(kind, width, expected):
    assert tensor_types(kind, shapes(4, width), is_70b=False)["blk.1.attn_q.weight"] == expected


def test_tensor_types_order_quantised_files_by_layer():
    names = {"blk.10.ffn_up.weight": (8, 256), "blk.9.ffn_up.weight": (8, 256), "output_norm.weight": (256,)}
    assert list(tensor_types("F16", names, is_70b=False)) == list(names)
    assert list(tensor_types("Q8_0", names, is_70b=False)) == [*names][::-1]


def test_an_unknown_type_lists_those_that_are_known():
    with pytest.raises(ModelError, match=r"'Q9_Z': known: F32, F16, .*Q4_K_M") as caught:
        tensor_types("Q9_Z", shapes(1), is_70b=False)
    assert all(kind in str(caught.value) for kind in QUANT_TYPES)
