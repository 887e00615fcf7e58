"""The next token of each completion in a batch: the most probable or a drawn one, within a grammar where there is one.

A token is chosen freely first. Only where the grammar refuses it, the allowed ones are looked up and one of them is
chosen: a model that knows the language pays next to nothing for the grammar. For drawn tokens this gives each allowed
one its probability among the allowed ones, as masking first would.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from fintune.inference.masks import Reader
from fintune.inference.protocol import Decoding

if TYPE_CHECKING:
    import torch

_MOST = 256
"""Tokens that are sorted for a nucleus; all of them where these have less than its probability together."""


@dataclass
class Way:
    """How the tokens of one completion are chosen.

    Attributes:
        reader: Where it stands in its grammar; None where it has none.
        chance: What tokens are drawn with; None takes the most probable.
    """

    reader: Reader | None
    chance: random.Random | None


class Chosen(NamedTuple):
    """One token for each row, with its log-probability and the gap of the two best; both without any restriction."""

    tokens: list[int]
    logprobs: list[float]
    margins: list[float]


def choose(logits: torch.Tensor, ways: Sequence[Way], decoding: Decoding) -> Chosen:
    """Choose a token for each row, and move the readers on.

    Args:
        logits: Shape [rows, vocabulary].
        ways: One for each row.
        decoding: Temperature and top_p of the rows that draw.
    """
    import torch

    best = logits.topk(2, dim=-1)
    # The difference of two logits is that of their log-probabilities.
    margins: list[float] = (best.values[:, 0] - best.values[:, 1]).tolist()
    tokens: list[int] = best.indices[:, 0].tolist()
    drawing = [place for place, way in enumerate(ways) if way.chance is not None]
    if drawing:
        found = _draw(logits[drawing], [ways[place] for place in drawing], decoding)
        for place, token in zip(drawing, found, strict=True):
            tokens[place] = token
    refused = [p for p, way in enumerate(ways) if way.reader is not None and not way.reader.take(tokens[p])]
    if refused:
        for place, token in zip(refused, _choose_allowed(logits, ways, refused, decoding), strict=True):
            tokens[place] = token
    places = torch.tensor(tokens, device=logits.device)[:, None]
    logprobs = logits.gather(1, places)[:, 0] - logits.logsumexp(-1)
    return Chosen(tokens, logprobs.tolist(), margins)


def _choose_allowed(logits: torch.Tensor, ways: Sequence[Way], places: Sequence[int], decoding: Decoding) -> list[int]:
    """Tokens for rows whose first choice their grammar refused."""
    import torch

    readers = [reader for place in places if (reader := ways[place].reader) is not None]
    allowed = torch.stack([reader.allowed(logits.shape[-1]) for reader in readers]).to(logits.device)
    masked = logits[list(places)].masked_fill(~allowed, float("-inf"))
    tokens: list[int] = masked.argmax(-1).tolist()
    drawing = [row for row, place in enumerate(places) if ways[place].chance is not None]
    if drawing:
        found = _draw(masked[drawing], [ways[places[row]] for row in drawing], decoding)
        for row, token in zip(drawing, found, strict=True):
            tokens[row] = token
    for reader, token in zip(readers, tokens, strict=True):
        taken = reader.take(token)
        assert taken, "a grammar takes what it allows"
    return tokens


def _draw(logits: torch.Tensor, ways: Sequence[Way], decoding: Decoding) -> list[int]:
    """One token for each row, drawn with one number of its own chance."""
    import torch

    numbers = torch.tensor(
        [[way.chance.random()] for way in ways if way.chance is not None], dtype=torch.float64, device=logits.device
    )
    weights, ids = (logits / decoding.temperature).softmax(-1), None
    if decoding.top_p < 1:
        weights, ids = _nucleus(weights, decoding.top_p)
    sums = weights.double().cumsum(-1)
    # Below the total also after rounding: then what is found has a weight.
    places = torch.searchsorted(sums, numbers * (1 - 1e-12) * sums[:, -1:], right=True)
    found: list[int] = (places if ids is None else ids.gather(1, places))[:, 0].tolist()
    return found


def _nucleus(weights: torch.Tensor, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The most probable tokens that together reach ``top_p``, the others with a weight of 0 (arXiv 1904.09751)."""
    ordered = weights.topk(min(_MOST, weights.shape[-1]), dim=-1)
    if bool((ordered.values.sum(-1) < top_p).any()):
        ordered = weights.sort(dim=-1, descending=True)
    before = ordered.values.cumsum(-1) - ordered.values
    return ordered.values.where(before < top_p, 0), ordered.indices
