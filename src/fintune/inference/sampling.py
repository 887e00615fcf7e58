"""The next token of each completion in a batch: greedy or sampled, and within a grammar if there is one.

All rows are chosen on the model's device at once. llguidance computes on the CPU which tokens a grammar allows; it
handles tokens that span grammar boundaries. The masks are computed in parallel, and only for the rows that need them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

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
            from llguidance import LLExecutor
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
        self._num_tokens, self._stop_ids = num_tokens, stop_ids
        self._executor = LLExecutor()
        self._builders = ThreadPoolExecutor(max_workers=max(1, (os.cpu_count() or 1) // 2))
        self._latest: tuple[object, Future[LLMatcher]] | None = None

    def start(self, grammars: Sequence[Grammar], index: int) -> GrammarState:
        """Return the initial state of a prompt's grammar, which is built in the background.

        The candidates of a prompt build it once, and so do consecutive prompts with one grammar in a tuple.
        """
        key = grammars[index] if isinstance(grammars, tuple) else (grammars, index)
        if self._latest is None or (self._latest[0] is not key and self._latest[0] != key):
            self._latest = (key, self._builders.submit(self._build, grammars, index))
        return GrammarState(self._latest[1], self._stop_ids)

    def allowed(self, states: Sequence[GrammarState]) -> torch.Tensor:
        """Return which tokens may come next: bits of int32, shape [states, vocabulary / 32], on the CPU."""
        import torch
        from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask_par

        bits = allocate_token_bitmask(len(states), self._num_tokens)
        fill_next_token_bitmask_par(self._executor, [(state.matcher, at) for at, state in enumerate(states)], bits)
        for state in states:
            assert not state.matcher.is_error(), state.matcher.get_error()
        return torch.from_numpy(bits)

    def close(self) -> None:
        """Stop building grammars."""
        self._builders.shutdown(wait=False, cancel_futures=True)

    def _build(self, grammars: Sequence[Grammar], index: int) -> LLMatcher:
        from llguidance import LLMatcher

        matcher = LLMatcher(self._tokens, LLMatcher.grammar_from_lark(grammars[index].lark()))
        assert not matcher.is_error(), matcher.get_error()
        return matcher


class GrammarState:
    """The position of one completion in its grammar."""

    def __init__(self, built: Future[LLMatcher], stop_ids: frozenset[int]) -> None:
        self._built, self._stop_ids = built, stop_ids
        self._matcher: LLMatcher | None = None

    @property
    def matcher(self) -> LLMatcher:
        """The state of llguidance."""
        if self._matcher is None:
            self._matcher = self._built.result().deep_copy()
        return self._matcher

    def accept(self, token: int) -> bool:
        """Advance by a token and return True if the grammar allows it; otherwise return False."""
        # If nothing can follow, llguidance stops by itself and then takes no token.
        if self.matcher.is_stopped():
            return token in self._stop_ids
        return bool(self.matcher.try_consume_tokens([token]) == 1)


@dataclass(frozen=True)
class TokenMasks:
    """The allowed tokens of some rows: indices [masked rows], and bits of int32 [masked rows, vocabulary / 32]."""

    rows: torch.Tensor
    bits: torch.Tensor


def choose_tokens(
    logits: torch.Tensor, decoding: Decoding, numbers: torch.Tensor | None = None, masks: TokenMasks | None = None
) -> torch.Tensor:
    """Choose a token for each row, without waiting for the device.

    Args:
        logits: Shape [rows, vocabulary].
        decoding: Temperature and top_p of the sampled rows.
        numbers: A random number below 1 for each sampled row, float64, shape [rows]; negative for greedy rows.
        masks: The allowed tokens of the rows that have any.

    Returns:
        Float64, shape [4, rows]: the tokens; their log-probabilities in nats; the log-probability of the best minus
        that of the second-best token, in nats; the best tokens. All but the tokens are of the distribution before
        temperature, top_p and grammar.
    """
    import torch

    logits = logits.float()
    best = logits.topk(2, dim=-1)
    tokens, allowed = best.indices[:, 0], logits
    if masks is not None:
        shifts = torch.arange(32, dtype=torch.int32, device=logits.device)
        is_allowed = (masks.bits[:, :, None] >> shifts & 1).flatten(1)[:, : logits.shape[1]].bool()
        allowed = logits.index_copy(0, masks.rows, logits[masks.rows].masked_fill_(~is_allowed, float("-inf")))
        tokens = tokens.index_copy(0, masks.rows, allowed[masks.rows].argmax(-1))
    if numbers is not None:
        tokens = torch.where(numbers < 0, tokens, _draw(allowed, numbers.clamp(min=0), decoding))
    logprobs = logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(-1)
    # The difference of two logits is the difference of their log-probabilities.
    margins = best.values[:, 0] - best.values[:, 1]
    return torch.stack([tokens.double(), logprobs.double(), margins.double(), best.indices[:, 0].double()])


def _draw(logits: torch.Tensor, numbers: torch.Tensor, decoding: Decoding) -> torch.Tensor:
    """Sample one token for each row with one random number of its own."""
    import torch

    weights, ids = (logits / decoding.temperature).softmax(-1), None
    if decoding.top_p < 1:
        weights, ids = _nucleus(weights, decoding.top_p)
    sums = weights.double().cumsum(-1)
    # The factor keeps the number below the total after rounding, so the token found has a weight above 0.
    indices = torch.searchsorted(sums, numbers[:, None] * (1 - 1e-12) * sums[:, -1:], right=True)
    return (indices if ids is None else ids.gather(1, indices))[:, 0]


def _nucleus(weights: torch.Tensor, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weights in descending order, 0 outside the nucleus of ``top_p`` (arXiv 1904.09751), and their ids."""
    ordered = weights.topk(min(_NUCLEUS_TOKENS, weights.shape[-1]), dim=-1)
    if bool((ordered.values.sum(-1) < top_p).any()):
        ordered = weights.sort(dim=-1, descending=True)
    before = ordered.values.cumsum(-1) - ordered.values
    return ordered.values.where(before < top_p, 0), ordered.indices
