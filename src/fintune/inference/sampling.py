"""The next token of each completion in a batch: greedy or sampled, and within a grammar if there is one.

A token is first chosen freely. Only if the grammar refuses it, the allowed tokens are computed and one of them is
chosen, so a model that knows the language pays almost nothing for the grammar. A sampled token has the same
distribution as if all logits had been masked first. llguidance computes the allowed tokens; it handles tokens that span
grammar boundaries.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from fintune.errors import ModelError, ResourceError
from fintune.finqa.grammar import Grammar
from fintune.inference.protocol import Decoding

if TYPE_CHECKING:
    import torch
    from llguidance import LLMatcher
    from transformers import PreTrainedTokenizerBase

_NUCLEUS_TOKENS = 256
"""Number of tokens that are sorted for a nucleus. All are sorted if these have less than its probability."""


class GrammarMasks:
    """Grammars over the tokens of one model.

    Args:
        tokenizer: The model's fast tokenizer.
        num_tokens: Width of the model's logits, which may exceed the tokenizer's vocabulary.
        stop_ids: Tokens that end a completion. All of them are allowed after a complete text.

    Raises:
        ResourceError: llguidance is not installed.
        ModelError: llguidance cannot read the tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, num_tokens: int, stop_ids: frozenset[int]) -> None:
        try:
            from llguidance.hf import from_tokenizer
        except ImportError as error:
            raise ResourceError(
                "decoding within a grammar needs llguidance, which is not installed",
                hint='pip install "fintune[train]"',
            ) from error
        try:
            self._tokens = from_tokenizer(tokenizer, n_vocab=num_tokens, eos_token=sorted(stop_ids))
        except ValueError as error:
            raise ModelError(
                f"{tokenizer.name_or_path}: a grammar needs a tokenizer.json ({error})", hint="predict.constrain: none"
            ) from error
        self._stop_ids = stop_ids
        self._latest: tuple[Grammar, LLMatcher] | None = None

    def start(self, grammar: Grammar) -> GrammarState:
        """Return the initial state of a grammar. Consecutive prompts with the same grammar build it once."""
        if self._latest is None or self._latest[0] is not grammar:
            from llguidance import LLMatcher

            matcher = LLMatcher(self._tokens, LLMatcher.grammar_from_lark(grammar.lark()))
            assert not matcher.is_error(), matcher.get_error()
            self._latest = (grammar, matcher)
        return GrammarState(self._latest[1].deep_copy(), self._stop_ids)


class GrammarState:
    """The position of one completion in its grammar."""

    def __init__(self, matcher: LLMatcher, stop_ids: frozenset[int]) -> None:
        self._matcher, self._stop_ids = matcher, stop_ids

    def accept(self, token: int) -> bool:
        """Advance by a token and return True if the grammar allows it; otherwise return False."""
        # If nothing can follow, llguidance stops by itself and then takes no token.
        if self._matcher.is_stopped():
            return token in self._stop_ids
        return bool(self._matcher.try_consume_tokens([token]) == 1)

    def allowed(self, num_tokens: int) -> torch.Tensor:
        """Return which tokens may come next: bool, shape [num_tokens], on the CPU."""
        import numpy as np
        import torch

        packed = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        assert not self._matcher.is_error(), self._matcher.get_error()
        return torch.from_numpy(np.unpackbits(packed, count=num_tokens, bitorder="little").astype(bool))


@dataclass
class SamplerState:
    """How the tokens of one completion are chosen.

    Attributes:
        grammar: Position in the grammar; None for free text.
        rng: Random numbers for sampling; None for greedy decoding.
    """

    grammar: GrammarState | None
    rng: random.Random | None


class SampledTokens(NamedTuple):
    """One token for each row.

    Attributes:
        tokens: Token ids.
        logprobs: Log-probability of each token, in nats.
        margins: Log-probability of the best minus that of the second-best token, in nats. Like ``logprobs``, of the
            distribution before temperature, top_p and grammar.
    """

    tokens: list[int]
    logprobs: list[float]
    margins: list[float]


def sample_tokens(logits: torch.Tensor, states: Sequence[SamplerState], decoding: Decoding) -> SampledTokens:
    """Choose a token for each row, and advance the grammars.

    Args:
        logits: Float, shape [rows, vocabulary].
        states: One state for each row.
        decoding: Temperature and top_p of the sampled rows.
    """
    import torch

    best = logits.topk(2, dim=-1)
    # The difference of two logits is the difference of their log-probabilities.
    margins: list[float] = (best.values[:, 0] - best.values[:, 1]).tolist()
    tokens: list[int] = best.indices[:, 0].tolist()
    sampled_rows = [row for row, state in enumerate(states) if state.rng is not None]
    if sampled_rows:
        draws = _draw(logits[sampled_rows], [states[row] for row in sampled_rows], decoding)
        for row, token in zip(sampled_rows, draws, strict=True):
            tokens[row] = token
    refused = [
        row for row, state in enumerate(states) if state.grammar is not None and not state.grammar.accept(tokens[row])
    ]
    if refused:
        for row, token in zip(refused, _sample_allowed(logits, states, refused, decoding), strict=True):
            tokens[row] = token
    indices = torch.tensor(tokens, device=logits.device)[:, None]
    logprobs = logits.gather(1, indices)[:, 0] - logits.logsumexp(-1)
    return SampledTokens(tokens, logprobs.tolist(), margins)


def _sample_allowed(
    logits: torch.Tensor, states: Sequence[SamplerState], rows: Sequence[int], decoding: Decoding
) -> list[int]:
    """Choose tokens for the rows whose first choice was refused by their grammar."""
    import torch

    grammars = [grammar for row in rows if (grammar := states[row].grammar) is not None]
    allowed = torch.stack([grammar.allowed(logits.shape[-1]) for grammar in grammars]).to(logits.device)
    masked = logits[list(rows)].masked_fill(~allowed, float("-inf"))
    tokens: list[int] = masked.argmax(-1).tolist()
    sampled = [index for index, row in enumerate(rows) if states[row].rng is not None]
    if sampled:
        draws = _draw(masked[sampled], [states[rows[index]] for index in sampled], decoding)
        for index, token in zip(sampled, draws, strict=True):
            tokens[index] = token
    for grammar, token in zip(grammars, tokens, strict=True):
        is_accepted = grammar.accept(token)
        assert is_accepted, "a grammar accepts what it allows"
    return tokens


def _draw(logits: torch.Tensor, states: Sequence[SamplerState], decoding: Decoding) -> list[int]:
    """Sample one token for each row with one random number of its own."""
    import torch

    numbers = torch.tensor(
        [[state.rng.random()] for state in states if state.rng is not None], dtype=torch.float64, device=logits.device
    )
    weights, ids = (logits / decoding.temperature).softmax(-1), None
    if decoding.top_p < 1:
        weights, ids = _nucleus(weights, decoding.top_p)
    sums = weights.double().cumsum(-1)
    # The factor keeps the number below the total after rounding, so the token found has a weight above 0.
    indices = torch.searchsorted(sums, numbers * (1 - 1e-12) * sums[:, -1:], right=True)
    tokens: list[int] = (indices if ids is None else ids.gather(1, indices))[:, 0].tolist()
    return tokens


def _nucleus(weights: torch.Tensor, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weights in descending order, 0 outside the nucleus of ``top_p`` (arXiv 1904.09751), and their ids."""
    ordered = weights.topk(min(_NUCLEUS_TOKENS, weights.shape[-1]), dim=-1)
    if bool((ordered.values.sum(-1) < top_p).any()):
        ordered = weights.sort(dim=-1, descending=True)
    before = ordered.values.cumsum(-1) - ordered.values
    return ordered.values.where(before < top_p, 0), ordered.indices
