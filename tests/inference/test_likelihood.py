from __future__ import annotations

import pytest

from fintune.inference.likelihood import LogitsReader, answer_losses
from fintune.models import load as models

torch = pytest.importorskip("torch")

ROWS = [
    ([5, 9, 30, 31, 32], 3),
    ([5, 9, 30, 31, 32, 33, 34, 35], 6),  # the row before it is its beginning
    ([5, 9, 30, 40, 41], 4),
    ([5, 9, 30, 40, 41], 2),
    ([7, 8, 9], 1),
]


@pytest.fixture(scope="module")
def model(tiny_model):
    return models.load_model(models.fetch(str(tiny_model)), dtype="float32", device="cpu")


def alone(model, ids, first):
    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids])).logits[0, first - 1 :]


def cropped_as_by_transformers_5_0(monkeypatch):
    """There the argument is the length to crop to, of which a negative one is taken from the end."""
    from transformers import DynamicCache

    def crop(cache, length):
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]

    monkeypatch.setattr(DynamicCache, "crop", crop)


@pytest.mark.parametrize("older", [False, True])
def test_rows_that_begin_alike_have_the_logits_of_each_alone(model, monkeypatch, older):
    if older:
        cropped_as_by_transformers_5_0(monkeypatch)
    reader = LogitsReader(model)
    for ids, first in ROWS:
        found = reader.read(ids, first)
        assert found.shape[0] == len(ids) - first + 1
        assert torch.allclose(found, alone(model, ids, first), atol=1e-5)


def test_a_loss_is_that_of_the_answers_tokens_together(model):
    rows = [(ids, [0] * first + [1] * (len(ids) - first)) for ids, first in ROWS]
    for (ids, first), loss in zip(ROWS, answer_losses(model, rows), strict=True):
        log_probs = alone(model, ids, first)[:-1].log_softmax(-1)
        by_hand = -sum(float(row[token]) for row, token in zip(log_probs, ids[first:], strict=True))
        assert loss.total == pytest.approx(by_hand, abs=1e-4)
        assert loss.mean == pytest.approx(by_hand / (len(ids) - first), abs=1e-4)
