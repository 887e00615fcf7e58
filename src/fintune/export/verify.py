"""Next-token distributions of a GGUF file in llama.cpp, and their comparison with the trained model's logits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fintune.models.tokenizer_check import LlamaCppServer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_LARGEST_EXPONENT = 709.0
"""Largest exponent whose exponential a float can hold."""

NUM_LISTED = 1000
"""Number of likeliest tokens that are compared at a position. All other tokens count as one."""


@dataclass(frozen=True)
class TokenDistribution:
    """Next-token probabilities at one position: token ids, the likeliest first, with natural logarithms."""

    ids: NDArray[np.int64]  # (num_listed,)
    log_probs: NDArray[np.float64]  # (num_listed,)
    target_log_prob: float
    """That of the text's next token."""


@dataclass(frozen=True)
class TokenAgreement:
    """The agreement of a model's next-token distributions with a reference, and the perplexity of the text."""

    num_positions: int
    mean_kl: float
    """Mean Kullback-Leibler divergence from the reference, in nats, over the listed tokens and all others as one.
    Counting the others as one can only make it smaller."""
    same_best_token_share: float
    """Share of positions at which the likeliest token is the reference's."""
    perplexity: float


def distribution_from_logits(
    logits: NDArray[np.float32], target: int, num_listed: int = NUM_LISTED
) -> TokenDistribution:
    """Compute the distribution of one position from its logits, (vocabulary,), and the id of the text's next token."""
    import numpy as np

    log_probs = _log_softmax(logits)
    num_listed = min(num_listed, len(log_probs))
    # A partition, because sorting the whole vocabulary would take longer than everything else.
    likeliest = np.sort(np.argpartition(-log_probs, num_listed - 1)[:num_listed])
    ids = likeliest[np.argsort(-log_probs[likeliest], kind="stable")]
    return TokenDistribution(ids, log_probs[ids], float(log_probs[target]))


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    import numpy as np

    log_probs = logits.astype(np.float64)
    log_probs -= log_probs.max()
    log_probs -= math.log(np.exp(log_probs).sum())
    return log_probs


def compare_distributions(
    references: Sequence[NDArray[np.float32]], distributions: Sequence[TokenDistribution]
) -> TokenAgreement:
    """Compare distributions with those of a reference, whose logits are (vocabulary,) at every position."""
    import numpy as np

    assert references and len(references) == len(distributions)
    divergences, num_same = [], 0
    for logits, other in zip(references, distributions, strict=True):
        reference = _log_softmax(logits)
        listed = reference[other.ids]
        inside = float((np.exp(listed) * (listed - other.log_probs)).sum())
        rest, other_rest = 1 - float(np.exp(listed).sum()), 1 - float(np.exp(other.log_probs).sum())
        outside = rest * math.log(rest / max(other_rest, 1e-12)) if rest > 1e-9 else 0.0
        divergences.append(inside + outside)
        num_same += int(reference.argmax() == other.ids[0])
    mean_kl = sum(divergences) / len(distributions)
    surprise = -sum(distribution.target_log_prob for distribution in distributions) / len(distributions)
    return TokenAgreement(
        len(distributions),
        0.0 if mean_kl < 0 else mean_kl,  # max() would hide NaN
        num_same / len(distributions),
        math.inf if surprise > _LARGEST_EXPONENT else math.exp(surprise),
    )


class GgufReplay(LlamaCppServer):
    """A GGUF file in llama.cpp's server, which gives next-token distributions; use it as a context manager."""

    def __init__(self, path: Path, *, context_tokens: int, threads: int) -> None:
        super().__init__(path, context_tokens=context_tokens + 8, threads=threads)
        # The generated token is discarded. If it ended inside a character, the server would omit its probabilities, so
        # the request forces this token.
        self._forced_token: int = self.request("/tokenize", {"content": "a"})["tokens"][0]
        self._num_tokens: int = self.request("/v1/models")["data"][0]["meta"]["n_vocab"]

    def distributions(self, row: Sequence[int], positions: Iterable[int]) -> list[TokenDistribution]:
        """Return the distribution of the token at every position of a row, predicted from the tokens before it."""
        import numpy as np

        distributions = []
        for position in positions:
            target = row[position]
            for num_listed in (min(NUM_LISTED, self._num_tokens), self._num_tokens):
                listed = self._next(row[:position], num_listed)
                if target in listed:
                    break
            ids = np.array(list(listed)[:NUM_LISTED], np.int64)
            log_probs = np.array([listed[token] for token in ids.tolist()])
            distributions.append(TokenDistribution(ids, log_probs, listed[target]))
        return distributions

    def _next(self, prompt: Sequence[int], num_listed: int) -> dict[int, float]:
        """Return token id -> log-probability, the likeliest first."""
        body = {"prompt": list(prompt), "n_predict": 1, "n_probs": num_listed, "temperature": 0, "cache_prompt": True}
        answer = self.request("/completion", body | {"logit_bias": [[self._forced_token, 1000.0]]})
        # The server writes null for NaN, which damaged weights can give.
        return {
            int(entry["id"]): math.nan if entry["logprob"] is None else float(entry["logprob"])
            for entry in answer["completion_probabilities"][0]["top_logprobs"]
        }
