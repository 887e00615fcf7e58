from __future__ import annotations

import random
from collections import Counter

import pytest

from fintune.inference.protocol import Decoding
from fintune.inference.sampling import SamplerState, sample_tokens

torch = pytest.importorskip("torch")

PROBABILITIES = [0.5, 0.25, 0.15, 0.1]


class Some:
    """A grammar of single tokens."""

    def __init__(self, *tokens):
        self.tokens = tokens

    def accept(self, token):
        return token in self.tokens

    def allowed(self, num_tokens):
        return torch.tensor([token in self.tokens for token in range(num_tokens)])


def shares(reader=None, number=4000, **options):
    logits = torch.tensor(PROBABILITIES).log().expand(number, -1)
    ways = [SamplerState(reader, random.Random(seed)) for seed in range(number)]
    tokens = sample_tokens(logits, ways, Decoding(1, **options)).tokens
    return [Counter(tokens)[token] / number for token in range(4)]


def test_tokens_are_drawn_as_often_as_they_are_probable():
    assert shares(temperature=1.0) == pytest.approx(PROBABILITIES, abs=0.03)


def test_a_low_temperature_sharpens():
    squares = [p**2 for p in PROBABILITIES]
    assert shares(temperature=0.5) == pytest.approx([each / sum(squares) for each in squares], abs=0.03)


def test_the_nucleus_is_the_fewest_tokens_that_reach_top_p():
    assert shares(temperature=1.0, top_p=0.76) == pytest.approx([0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0], abs=0.03)
    assert shares(temperature=1.0, top_p=0.1) == [1, 0, 0, 0]


def test_a_wide_distribution_is_sorted_whole_for_its_nucleus():
    ways = [SamplerState(None, random.Random(seed)) for seed in range(3000)]
    tokens = sample_tokens(torch.zeros(3000, 600), ways, Decoding(1, temperature=1.0, top_p=0.9)).tokens
    assert 500 < len(set(tokens)) <= 541


def test_allowed_tokens_keep_their_shares_of_what_is_allowed():
    assert shares(Some(1, 3), temperature=1.0) == pytest.approx([0, 0.25 / 0.35, 0, 0.1 / 0.35], abs=0.03)


def test_a_refused_token_gives_way_to_the_best_allowed_one():
    logits = torch.tensor([PROBABILITIES, PROBABILITIES, PROBABILITIES]).log()
    ways = [SamplerState(Some(2, 3), None), SamplerState(None, None), SamplerState(Some(0), None)]
    chosen = sample_tokens(logits, ways, Decoding(1))
    assert chosen.tokens == [2, 0, 0]
    assert [round(2.718281828**each, 4) for each in chosen.logprobs] == [0.15, 0.5, 0.5]
    assert chosen.margins == pytest.approx([0.6931] * 3, abs=1e-3)
