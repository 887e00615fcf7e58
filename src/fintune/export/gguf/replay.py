"""What a GGUF file answers at given positions, through llama.cpp, compared with what another engine answered there."""

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
"""Of whose exponential a float can hold the value."""

NUM_LISTED = 1000
"""Tokens whose probability llama.cpp is asked for at a position; all others count as one."""


@dataclass(frozen=True)
class Distribution:
    """Next-token probabilities at one position.

    Attributes:
        ids: Token ids, the likeliest first, (num_listed,).
        log_probs: Natural logarithms of their probabilities.
        target_log_prob: That of the token that really follows.
    """

    ids: NDArray[np.int64]
    log_probs: NDArray[np.float64]
    target_log_prob: float


@dataclass(frozen=True)
class Agreement:
    """How near one model's answers are to a reference's.

    Attributes:
        num_positions: Positions compared.
        mean_kl: Mean Kullback-Leibler divergence from the reference, in nats; over the listed tokens and all others as
            one, which can only make it smaller.
        same_best_token_share: Share of positions whose likeliest token is the reference's.
        perplexity: Of the tokens that really follow.
    """

    num_positions: int
    mean_kl: float
    same_best_token_share: float
    perplexity: float


def from_logits(logits: NDArray[np.float32], target: int, num_listed: int = NUM_LISTED) -> Distribution:
    """The distribution of one row of logits, (vocabulary,)."""
    import numpy as np

    log_probs = _log_softmax(logits)
    num_listed = min(num_listed, len(log_probs))
    # Sorting the whole vocabulary would take longer than all the rest.
    likeliest = np.sort(np.argpartition(-log_probs, num_listed - 1)[:num_listed])
    ids = likeliest[np.argsort(-log_probs[likeliest], kind="stable")]
    return Distribution(ids, log_probs[ids], float(log_probs[target]))


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    import numpy as np

    log_probs = logits.astype(np.float64)
    log_probs -= log_probs.max()
    log_probs -= math.log(np.exp(log_probs).sum())
    return log_probs


def compare(references: Sequence[NDArray[np.float32]], found: Sequence[Distribution]) -> Agreement:
    """Compare position by position.

    Args:
        references: Logits of the reference at each position, (vocabulary,).
        found: What another model answered there.
    """
    import numpy as np

    assert references and len(references) == len(found)
    divergences, num_same = [], 0
    for logits, other in zip(references, found, strict=True):
        own = _log_softmax(logits)
        theirs = own[other.ids]
        inside = float((np.exp(theirs) * (theirs - other.log_probs)).sum())
        rest, other_rest = 1 - float(np.exp(theirs).sum()), 1 - float(np.exp(other.log_probs).sum())
        outside = rest * math.log(rest / max(other_rest, 1e-12)) if rest > 1e-9 else 0.0
        divergences.append(inside + outside)
        num_same += int(own.argmax() == other.ids[0])
    mean_kl = sum(divergences) / len(found)
    surprise = -sum(each.target_log_prob for each in found) / len(found)
    return Agreement(
        len(found),
        0.0 if mean_kl < 0 else mean_kl,  # max() would hide what is not a number
        num_same / len(found),
        math.inf if surprise > _LARGEST_EXPONENT else math.exp(surprise),
    )


class GgufReplay:
    """A GGUF file in llama.cpp's server on loopback, behind a random key; use it as a context manager.

    Args:
        path: The file.
        context_tokens: Longest row of tokens.
        threads: Threads of the arithmetic.

    Raises:
        ModelError: llama.cpp cannot load the file.
        ResourceError: xllamacpp is not installed.
    """

    def __init__(self, path: Path, *, context_tokens: int, threads: int) -> None:
        self._path = path
        self._key = secrets.token_urlsafe(16)
        # OpenMP reads it when it is loaded: idle threads then sleep instead of burning a core that others need.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        try:
            import xllamacpp
        except ImportError as error:
            raise ResourceError("replaying a GGUF file needs xllamacpp", hint='pip install "fintune[gguf]"') from error
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
        # The token that is generated is thrown away. Where it ended within a character, the server would leave its
        # probabilities out, so it always is this one.
        self._plain: int = self._post("/tokenize", {"content": "a"})["tokens"][0]
        self._num_tokens: int = json.loads(self._get("/v1/models"))["data"][0]["meta"]["n_vocab"]

    def distributions(self, row: Sequence[int], positions: Iterable[int]) -> list[Distribution]:
        """The distributions of the tokens at these positions of a row, each from the tokens before it."""
        import numpy as np

        found = []
        for position in positions:
            target = row[position]
            for num_listed in (min(NUM_LISTED, self._num_tokens), self._num_tokens):
                listed = self._next(row[:position], num_listed)
                if target in listed:
                    break
            ids = np.array(list(listed)[:NUM_LISTED], np.int64)
            log_probs = np.array([listed[token] for token in ids.tolist()])
            found.append(Distribution(ids, log_probs, listed[target]))
        return found

    def _next(self, prompt: Sequence[int], num_listed: int) -> dict[int, float]:
        """Log-probability by token, the likeliest first."""
        answer = self._post(
            "/completion",
            {
                "prompt": list(prompt),
                "n_predict": 1,
                "n_probs": num_listed,
                "temperature": 0,
                "cache_prompt": True,
                "logit_bias": [[self._plain, 1000.0]],
            },
        )
        entries = answer["completion_probabilities"][0]["top_logprobs"]
        # JSON has null for what is not a number, as ruined weights give it.
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
