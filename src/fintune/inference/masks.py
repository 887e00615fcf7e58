"""Which tokens a grammar allows next, told by llguidance, which knows how tokens cross the grammar's borders."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fintune.errors import ModelError, ResourceError
from fintune.finqa.grammar import Grammar

if TYPE_CHECKING:
    import torch
    from llguidance import LLMatcher
    from transformers import PreTrainedTokenizerBase


class Masks:
    """Grammars over the tokens of one model.

    Args:
        tokenizer: The model's, a fast one.
        num_tokens: Width of the model's logits, which may be larger than the tokenizer.
        stop_ids: Tokens that end a completion; all of them are allowed where the grammar has a whole text.

    Raises:
        ResourceError: llguidance is not installed.
        ModelError: The tokenizer is none that llguidance reads.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, num_tokens: int, stop_ids: frozenset[int]) -> None:
        try:
            from llguidance.hf import from_tokenizer
        except ImportError as error:
            raise ResourceError(
                "llguidance is not installed, so no grammar can be kept to", hint='pip install "fintune[train]"'
            ) from error
        try:
            self._tokens = from_tokenizer(tokenizer, n_vocab=num_tokens, eos_token=sorted(stop_ids))
        except ValueError as error:
            raise ModelError(
                f"{tokenizer.name_or_path}: a grammar needs a tokenizer.json ({error})", hint="predict.constrain: none"
            ) from error
        self._stop_ids = stop_ids
        self._known: tuple[Grammar, LLMatcher] | None = None

    def reader(self, grammar: Grammar) -> Reader:
        """A reader at the beginning of the grammar; prompts of one grammar in a row build it once."""
        if self._known is None or self._known[0] is not grammar:
            from llguidance import LLMatcher

            matcher = LLMatcher(self._tokens, LLMatcher.grammar_from_lark(grammar.lark()))
            assert not matcher.is_error(), matcher.get_error()
            self._known = (grammar, matcher)
        return Reader(self._known[1].deep_copy(), self._stop_ids)


class Reader:
    """One completion's way through a grammar."""

    def __init__(self, matcher: LLMatcher, stop_ids: frozenset[int]) -> None:
        self._matcher, self._stop_ids = matcher, stop_ids

    def take(self, token: int) -> bool:
        """Go on by a token where the grammar has it there; else stay."""
        # Where nothing can follow, llguidance stops by itself and then takes no token any more.
        if self._matcher.is_stopped():
            return token in self._stop_ids
        return bool(self._matcher.try_consume_tokens([token]) == 1)

    def allowed(self, num_tokens: int) -> torch.Tensor:
        """The tokens that may come next, shape [num_tokens], on the CPU."""
        import numpy as np
        import torch

        packed = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        assert not self._matcher.is_error(), self._matcher.get_error()
        return torch.from_numpy(np.unpackbits(packed, count=num_tokens, bitorder="little").astype(bool))
