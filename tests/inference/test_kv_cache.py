from __future__ import annotations

import pytest

from fintune.inference.transformers_engine import can_expand, expand_batch, preallocate

torch = pytest.importorskip("torch")


def states(num_rows, num_tokens, start):
    """Keys or values with a different number for each token; shape [rows, heads, tokens, size]."""
    numbers = start + torch.arange(num_rows * 2 * num_tokens * 4, dtype=torch.float32)
    return numbers.view(num_rows, 2, num_tokens, 4)


@pytest.fixture
def cache():
    from transformers import LlamaConfig

    return preallocate(LlamaConfig(num_hidden_layers=2, hidden_size=8, num_attention_heads=2), 5)


def test_expand_batch_then_update(cache):
    keys, values = states(2, 3, 0), states(2, 3, 500)
    for layer in (0, 1):
        cache.update(keys, values, layer)
    assert can_expand(cache)
    rows, columns = torch.tensor([1, 0, 1]), torch.tensor([[0, 1, 2], [0, 0, 1], [0, 0, 0]])
    expand_batch(cache, rows, columns)
    assert cache.get_seq_length() == 3
    more = states(3, 2, 900)
    for layer in (0, 1):
        found_keys, found_values = cache.update(more, more, layer)
        for old, found in ((keys, found_keys), (values, found_values)):
            expected = torch.stack([old[row][:, places] for row, places in zip(rows, columns, strict=True)])
            assert torch.equal(found, torch.cat([expected, more], dim=2))


def test_can_expand_sliding_window():
    from transformers import Gemma3TextConfig

    assert not can_expand(preallocate(Gemma3TextConfig(num_hidden_layers=7, sliding_window=16), 5))
