"""Next-token distributions of a GGUF file in llama.cpp, and their comparison with the trained model's logits."""

from __future__ import annotations

import http.client
import json
import math
import os
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from fintune.errors import ModelError, ResourceError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_LARGEST_EXPONENT = 709.0
"""Largest exponent whose exponential a float can hold."""

NUM_LISTED = 1000
"""Number of likeliest tokens that are compared at a position. All other tokens count as one."""


@dataclass(frozen=True)
class TokenDistribution:
    """Next-token probabilities at one position.

    Attributes:
        ids: Token ids, the likeliest first, (num_listed,).
        log_probs: Natural logarithms of their probabilities, (num_listed,).
        target_log_prob: Natural logarithm of the probability of the text's next token.
    """

    ids: NDArray[np.int64]
    log_probs: NDArray[np.float64]
    target_log_prob: float


@dataclass(frozen=True)
class TokenAgreement:
    """The agreement of a model's next-token distributions with a reference.

    Attributes:
        num_positions: Number of positions.
        mean_kl: Mean Kullback-Leibler divergence from the reference, in nats, over the listed tokens and all others as
            one. Counting the others as one can only make it smaller.
        same_best_token_share: Share of positions at which the likeliest token is the reference's.
        perplexity: Perplexity of the text's tokens.
    """

    num_positions: int
    mean_kl: float
    same_best_token_share: float
    perplexity: float


def distribution_from_logits(
    logits: NDArray[np.float32], target: int, num_listed: int = NUM_LISTED
) -> TokenDistribution:
    """Compute the distribution of one position.

    Args:
        logits: Logits, (vocabulary,).
        target: Id of the text's next token.
        num_listed: Number of likeliest tokens to list.
    """
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
    """Compare distributions with a reference, position by position.

    Args:
        references: Logits of the reference at every position, each (vocabulary,).
        distributions: Distributions of the other model at the same positions.
    """
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


class GgufReplay:
    """A GGUF file in llama.cpp's server; use it as a context manager.

    The server listens on the loopback interface and requires a random key.

    Args:
        path: The file.
        context_tokens: Length of the longest row of tokens.
        threads: Number of threads that compute.

    Raises:
        ModelError: llama.cpp cannot load the file.
        ResourceError: xllamacpp is not installed.
    """

    def __init__(self, path: Path, *, context_tokens: int, threads: int) -> None:
        self._path = path
        self._key = secrets.token_urlsafe(16)
        # OpenMP reads this when it is loaded. Idle threads then sleep, and other processes can use their cores.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        try:
            import xllamacpp
        except ImportError as error:
            raise ResourceError(
                "replaying a GGUF file needs xllamacpp, which is not installed", hint='pip install "fintune[gguf]"'
            ) from error
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.n_threads_http, params.port = context_tokens + 8, 1, 1, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.warmup = params.fit_params = params.ui = False
        params.cache_ram_mib, params.verbosity = 0, -1
        params.hostnames, params.api_keys = ["127.0.0.1"], [self._key]
        try:
            self._server: Any = xllamacpp.Server(params)
        except RuntimeError as error:
            raise ModelError(f"{path}: llama.cpp cannot load it: {error}") from error
        address = urlsplit(self._server.listening_address)
        self._connection = http.client.HTTPConnection(address.hostname or "127.0.0.1", address.port)
        # The generated token is discarded. If it ended inside a character, the server would omit its probabilities, so
        # the request forces this token.
        self._forced_token: int = self._post("/tokenize", {"content": "a"})["tokens"][0]
        self._num_tokens: int = json.loads(self._get("/v1/models"))["data"][0]["meta"]["n_vocab"]

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
        answer = self._post(
            "/completion",
            {
                "prompt": list(prompt),
                "n_predict": 1,
                "n_probs": num_listed,
                "temperature": 0,
                "cache_prompt": True,
                "logit_bias": [[self._forced_token, 1000.0]],
            },
        )
        entries = answer["completion_probabilities"][0]["top_logprobs"]
        # The server writes null for NaN, which damaged weights can give.
        return {
            int(entry["id"]): math.nan if entry["logprob"] is None else float(entry["logprob"]) for entry in entries
        }

    def _get(self, route: str) -> bytes:
        self._connection.request("GET", route, headers={"authorization": f"Bearer {self._key}"})
        return self._connection.getresponse().read()

    def _post(self, route: str, body: dict[str, Any]) -> Any:
        headers = {"content-type": "application/json", "authorization": f"Bearer {self._key}"}
        self._connection.request("POST", route, json.dumps(body), headers)
        answer = json.loads(self._connection.getresponse().read())
        if "error" in answer:
            raise ModelError(f"{self._path}: llama.cpp refused a row: {answer['error'].get('message', answer)}")
        return answer

    def __enter__(self) -> GgufReplay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()
        self._server = None
