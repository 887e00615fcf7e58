from __future__ import annotations

import pytest

from fintune.inference.cache_room import cache_with_room, can_spread, spread

torch = pytest.importorskip("torch")


def states(num_rows, num_tokens, start):
    """Keys or values, each token with a number of its own; shape [rows, heads, tokens, size]."""
    numbers = start + torch.arange(num_rows * 2 * num_tokens * 4, dtype=torch.float32)
    return numbers.view(num_rows, 2, num_tokens, 4)


@pytest.fixture
def cache():
    from transformers import LlamaConfig

    return cache_with_room(LlamaConfig(num_hidden_layers=2, hidden_size=8, num_attention_heads=2), 5)


def test_rows_are_spread_by_tokens_and_take_more_behind_them(cache):
    keys, values = states(2, 3, 0), states(2, 3, 500)
    for layer in (0, 1):
        cache.update(keys, values, layer)
    assert can_spread(cache)
    rows, columns = torch.tensor([1, 0, 1]), torch.tensor([[0, 1, 2], [0, 0, 1], [0, 0, 0]])
    spread(cache, rows, columns)
    assert cache.get_seq_length() == 3
    more = states(3, 2, 900)
    for layer in (0, 1):
        found_keys, found_values = cache.update(more, more, layer)
        for old, found in ((keys, found_keys), (values, found_values)):
            expected = torch.stack([old[row][:, places] for row, places in zip(rows, columns, strict=True)])
            assert torch.equal(found, torch.cat([expected, more], dim=2))


def test_a_cache_that_forgets_tokens_cannot_be_spread():
    from transformers import Gemma3TextConfig

    assert not can_spread(cache_with_room(Gemma3TextConfig(num_hidden_layers=7, sliding_window=16), 5))
