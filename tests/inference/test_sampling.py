from __future__ import annotations

import random
from collections import Counter

import pytest

from fintune.inference.protocol import Decoding
from fintune.inference.sampling import TokenMasks, choose_tokens

torch = pytest.importorskip("torch")

PROBABILITIES = [0.5, 0.25, 0.15, 0.1]


def only(*tokens, rows):
    """TokenMasks that allow these tokens in some rows."""
    bits = sum(1 << token for token in tokens)
    return TokenMasks(torch.tensor(rows), torch.full((len(rows), 1), bits, dtype=torch.int32))


def shares(masks=None, number=4000, **options):
    logits = torch.tensor(PROBABILITIES).log().expand(number, -1)
    numbers = torch.tensor([random.Random(seed).random() for seed in range(number)], dtype=torch.float64)
    tokens = choose_tokens(logits, Decoding(1, **options), numbers, masks)[0].int().tolist()
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
    numbers = torch.rand(3000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    tokens = choose_tokens(torch.zeros(3000, 600), Decoding(1, temperature=1.0, top_p=0.9), numbers)[0].tolist()
    assert 500 < len(set(tokens)) <= 541


def test_allowed_tokens_keep_their_shares_of_what_is_allowed():
    masks = only(1, 3, rows=[*range(4000)])
    assert shares(masks, temperature=1.0) == pytest.approx([0, 0.25 / 0.35, 0, 0.1 / 0.35], abs=0.03)


def test_masked_greedy_and_sampled_rows_are_chosen_together():
    logits = torch.tensor([PROBABILITIES] * 4).log()
    masks = only(2, 3, rows=[0, 3])
    numbers = torch.tensor([-1.0, -1.0, 0.8, 0.99], dtype=torch.float64)
    tokens, logprobs, margins, best = choose_tokens(logits, Decoding(1, temperature=1.0), numbers, masks)
    assert tokens.tolist() == [2, 0, 2, 3]
    assert best.tolist() == [0] * 4
    assert logprobs.exp().tolist() == pytest.approx([0.15, 0.5, 0.15, 0.1], abs=1e-4)
    assert margins.tolist() == pytest.approx([0.6931] * 4, abs=1e-3)


def test_a_mask_has_a_bit_for_every_token():
    bits = torch.zeros(1, 3, dtype=torch.int32)
    bits[0, 2], bits[0, 0] = 1 << 5, -(2**31)
    masks = TokenMasks(torch.tensor([0]), bits)
    logits = torch.arange(70.0)[None]
    assert choose_tokens(logits, Decoding(1), None, masks)[0].item() == 69
    assert choose_tokens(-logits, Decoding(1), None, masks)[0].item() == 31
