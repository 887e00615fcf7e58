from __future__ import annotations

import pytest

from fintune.inference.kv_cache import SlotCache, attend_to_slots

torch = pytest.importorskip("torch")


def states(num_rows, num_tokens, start=0, heads=2):
    """Keys or values with a different number for each token; shape [rows, heads, tokens, size]."""
    numbers = start + torch.arange(num_rows * heads * num_tokens * 4, dtype=torch.float32)
    return numbers.view(num_rows, heads, num_tokens, 4)


def test_slots_are_written_and_read_at_their_positions():
    cache = SlotCache(4, 8)
    cache.rows, cache.positions = torch.tensor([2, 0]), None
    keys, values = states(2, 3), states(2, 3, 500)
    assert cache.update(keys, values, 5) == (keys, values)
    cache.copy(torch.tensor([2]), torch.tensor([1]), 3)
    cache.rows, cache.positions, cache.num_read = slice(0, 3), torch.tensor([[3], [1], [2]]), 4
    new = states(3, 1, 900)
    found, _ = cache.update(new, new, 5)
    assert found.shape == (3, 2, 4, 4)
    assert torch.equal(found[0], torch.cat([keys[1], new[0]], dim=1))
    assert torch.equal(found[1, :, :3], torch.stack([keys[0, :, 0], new[1, :, 0], keys[0, :, 2]], dim=1))
    assert torch.equal(found[2, :, :3], torch.cat([keys[0, :, :2], new[2]], dim=1))
    assert not found[1:, :, 3].any()


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("num_tokens", [1, 4])
def test_attention_is_that_of_the_formula(window, num_tokens):
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(2, 6, num_tokens, 4, generator=generator)
    key, value = (torch.randn(2, 2, 9, 4, generator=generator) for _ in range(2))
    positions = torch.tensor([[4], [2]]) + torch.arange(num_tokens)
    distance = positions[:, :, None] - torch.arange(9)
    mask = torch.zeros(2, 1, num_tokens, 9).masked_fill(distance[:, None] < 0, float("-inf"))
    found, _ = attend_to_slots(None, query, key, value, mask, scaling=0.3, sliding_window=window)
    weights = 0.3 * query @ key.repeat_interleave(3, dim=1).transpose(2, 3)
    is_hidden = (distance < 0) | (distance >= (window or 99))
    expected = weights.masked_fill(is_hidden[:, None], float("-inf")).softmax(-1) @ value.repeat_interleave(3, dim=1)
    assert torch.allclose(found, expected.transpose(1, 2), atol=1e-6)


@pytest.mark.parametrize("window", [None, 3])
def test_attention_of_a_prompt_is_causal(window):
    generator = torch.Generator().manual_seed(4)
    query, key, value = (torch.randn(2, heads, 7, 4, generator=generator) for heads in (4, 2, 2))
    mask = torch.zeros(1, 1, 7, 7).masked_fill(torch.ones(7, 7).triu(1).bool(), float("-inf")).expand(2, 1, 7, 7)
    whole, _ = attend_to_slots(None, query, key, value, None, sliding_window=window)
    masked, _ = attend_to_slots(None, query, key, value, mask, sliding_window=window)
    assert torch.allclose(whole, masked, atol=1e-6)


def test_attention_with_caps_is_refused():
    with pytest.raises(NotImplementedError):
        attend_to_slots(None, states(1, 1), states(1, 2), states(1, 2), None, softcap=30.0)
