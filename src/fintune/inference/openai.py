"""Any server with an OpenAI-compatible interface: llama.cpp's, vLLM's, Ollama's, or a hosted one.

A conversation goes to ``/chat/completions``, where the server's own template renders it, as for any user of the server.

The interface says little about sampling, so a server's own defaults would decide part of the result. Servers identify
themselves in ``/models``. For llama.cpp and vLLM, everything that this package does not ask for is switched off by name
(repetition penalty, top-k, min-p), a grammar is sent in their own format, and token ids and margins are read. Other
servers are asked for penalties of 0, and constrained decoding is refused.

vLLM's and Ollama's servers were not run here; the requests follow their documentation. The tests run llama.cpp's.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from itertools import islice
from typing import Any
from urllib.parse import urlsplit

from fintune.errors import ModelError, PromptError, ResourceError
from fintune.finqa.grammar import Grammar
from fintune.inference.http_pool import OWN_KEY, Endpoint, HttpPool
from fintune.inference.protocol import Completion, Decoding, PromptResult, parse_logprob
from fintune.records import Message

_QUEUED_PER_REQUEST = 2
"""Waiting requests for each one in flight, so that the server is never idle and a consumer may stop early."""
_MAX_LISTED_MODELS = 5
_NOT_THE_MODEL = ("n_ctx",)
"""Parts of llama.cpp's description of a model that say how the server was started."""


def is_endpoint(reference: str) -> bool:
    """Whether a model's name is an address: ``https://HOST/v1#MODEL``."""
    return reference.startswith(("http://", "https://"))


def parse_endpoint(reference: str) -> Endpoint:
    """Parse ``https://HOST/v1#MODEL``. Without ``#MODEL`` it means the only model of the server.

    Raises:
        ModelError: The address has no host or an invalid port, or contains a user name, password or query.
    """
    address, _, model = reference.partition("#")
    try:
        parts = urlsplit(address)
        is_valid = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        is_valid = False
    if not is_valid:
        raise ModelError(
            f"{address.rpartition('@')[2]} is not an address of a server", hint="write http://HOST:PORT/v1#MODEL"
        )
    if parts.username is not None or parts.query:
        shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        raise ModelError(
            f"the address {shown} contains a password or a query", hint=f"set the environment variable {OWN_KEY}"
        )
    return Endpoint(address.rstrip("/"), model or None)


@dataclass(frozen=True)
class _Dialect:
    """What a kind of server takes: parts of every request, the part with a grammar, the name of the token limit."""

    options: Mapping[str, Any] = field(default_factory=dict)
    grammar: Callable[[Grammar], Mapping[str, Any]] | None = None
    limit: str = "max_tokens"


_NO_THINKING_AND_MARGINS = {
    "chat_template_kwargs": {"enable_thinking": False},
    "logprobs": True,
    "top_logprobs": 2,
}
_PLAIN = _Dialect()
_OPENAI = _Dialect(limit="max_completion_tokens")
_DIALECTS = {
    "llamacpp": _Dialect(
        # In transformers' order: first the temperature, then top_p of the resulting distribution.
        options={"samplers": ["temperature", "top_p"], "repeat_penalty": 1.0, "cache_prompt": True}
        | _NO_THINKING_AND_MARGINS,
        grammar=lambda grammar: {"grammar": grammar.gbnf()},
    ),
    "vllm": _Dialect(
        options={"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "return_token_ids": True}
        | _NO_THINKING_AND_MARGINS,
        # xgrammar, vLLM's default backend, calls GBNF "EBNF".
        grammar=lambda grammar: {"structured_outputs": {"grammar": grammar.gbnf()}},
    ),
    "openai": _OPENAI,
    "system": _OPENAI,
}
"""Dialects by ``owned_by`` of ``/models``."""


class OpenAIEngine:
    """A model of an OpenAI-compatible server.

    Args:
        endpoint: Address and model.
        parallel: Number of concurrent requests. Which completions share the server's batches depends on their arrival,
            so near-ties may resolve differently from run to run. With 1, a deterministic server repeats its answers.
        timeout_seconds: Longest wait for one answer.
        retries: How often a request is repeated if the server is busy.

    Attributes:
        url: Address of the interface.
        model: Name of the model on the server.

    Raises:
        ResourceError: The server cannot be reached, refuses the key, or does not have this interface.
        ModelError: The server does not have the model, or has several and none was named.
    """

    def __init__(
        self, endpoint: Endpoint, *, parallel: int = 8, timeout_seconds: float = 600.0, retries: int = 5
    ) -> None:
        self.name = "openai"
        self.url = endpoint.url
        self._parallel = parallel
        self._pool = HttpPool(endpoint, parallel=parallel, timeout_seconds=timeout_seconds, retries=retries)
        listed = self._pool.get("/models")
        found = (listed.get("data") or []) if isinstance(listed, dict) else None
        entries = [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else None
        if entries is None and endpoint.model is None:
            raise ModelError(f"{self.url} does not say which models it serves", hint="name one, as in URL#MODEL")
        self.model = endpoint.model or "" if entries is None else _find_model(endpoint, entries)
        self._entry: Mapping[str, Any] = next((entry for entry in entries or [] if _has_name(entry, self.model)), {})
        self._dialect = _DIALECTS.get(str(self._entry.get("owned_by")), _PLAIN)

    def fingerprint(self) -> str:
        """Return address, model and a hash of the weights' description, if ``/models`` contains one.

        llama.cpp describes the weights in ``meta`` (number of parameters, size, vocabulary), vLLM names their folder in
        ``root``. Other servers give nothing but the name.
        """
        meta = self._entry.get("meta")
        facts = {
            "meta": {name: value for name, value in meta.items() if name not in _NOT_THE_MODEL}
            if isinstance(meta, dict) and self._entry.get("owned_by") == "llamacpp"
            else None,
            "root": self._entry.get("root") if self._entry.get("owned_by") == "vllm" else None,
        }
        if not any(facts.values()):
            return f"{self.url}#{self.model}"
        return f"{self.url}#{self.model} {hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()}"

    def chat(
        self, conversations: Sequence[Sequence[Message]], decoding: Decoding, done: Collection[int] = ()
    ) -> Iterator[PromptResult]:
        """Complete conversations with the server's own chat template.

        Sampled tokens are drawn by the server. See :meth:`fintune.inference.protocol.Engine.generate`.

        Raises:
            ModelError: The server refuses a conversation, for example a long one, or takes no grammar.
            ResourceError: The server does not answer.
        """
        if decoding.grammars is not None and self._dialect.grammar is None:
            raise ModelError(
                f"{self.url} is not a server that takes a grammar",
                hint="llama.cpp's and vLLM's do; use predict.constrain: none with this one",
            )
        bodies = [{"messages": [turn.model_dump() for turn in turns]} for turns in conversations]
        requests = {
            (index, candidate): {
                "model": self.model,
                **body,
                **self._dialect.options,
                **self._sampling_options(decoding, body, index, candidate),
            }
            for index, body in enumerate(bodies)
            if index not in done
            for candidate in range(decoding.num_candidates)
        }
        return self._run(requests, decoding.num_candidates)

    def _sampling_options(
        self, decoding: Decoding, body: Mapping[str, Any], index: int, candidate: int
    ) -> dict[str, Any]:
        is_greedy = decoding.is_greedy(candidate)
        options: dict[str, Any] = {
            self._dialect.limit: decoding.max_new_tokens,
            "temperature": 0.0 if is_greedy else decoding.temperature,
            "top_p": 1.0 if is_greedy else decoding.top_p,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "seed": decoding.server_seed(repr(body), candidate),
        }
        if decoding.grammars is not None and self._dialect.grammar is not None:
            options |= self._dialect.grammar(decoding.grammars[index])
        return options

    def _run(
        self, requests: Mapping[tuple[int, int], Mapping[str, Any]], num_candidates: int
    ) -> Iterator[PromptResult]:
        """Yield each conversation when all its requests, by index and candidate, are answered."""
        pending: dict[Future[dict[str, Any]], tuple[int, int]] = {}
        completions: dict[int, dict[int, Completion]] = defaultdict(dict)
        remaining, started = iter(requests.items()), time.monotonic()
        queue = self._pool.queue("/chat/completions")
        try:
            while True:
                num_free = self._parallel * (1 + _QUEUED_PER_REQUEST) - len(pending)
                for key, body in islice(remaining, num_free):
                    pending[queue.submit(body)] = key
                if not pending:
                    return
                # Sorted, so that of several failures the same one is reported each time.
                for future in sorted(wait(pending, return_when=FIRST_COMPLETED).done, key=pending.__getitem__):
                    index, candidate = pending.pop(future)
                    answer = self._answer(future, index)
                    completions[index][candidate] = _completion(self.url, answer, time.monotonic() - started)
                    started = time.monotonic()
                    if len(completions[index]) == num_candidates:
                        candidates = completions.pop(index)
                        yield PromptResult(index, tuple(candidates[number] for number in sorted(candidates)))
                        started = time.monotonic()
        finally:
            queue.close()

    @staticmethod
    def _answer(future: Future[dict[str, Any]], index: int) -> dict[str, Any]:
        try:
            return future.result()
        except ModelError as error:
            raise PromptError(index + 1, f": {error.message}", hint=error.hint) from None

    def close(self) -> None:
        """Close all connections."""
        self._pool.close()


def _find_model(endpoint: Endpoint, entries: Sequence[Mapping[str, Any]]) -> str:
    names = [str(entry.get("id")) for entry in entries]
    num_more = len(names) - _MAX_LISTED_MODELS
    listed = ", ".join(names[:_MAX_LISTED_MODELS]) + (f" and {num_more} more" if num_more > 0 else "")
    if endpoint.model is None:
        if len(names) != 1:
            has = f"serves {listed}" if names else "serves no model"
            raise ModelError(f"{endpoint.url} {has}", hint="name one, as in URL#MODEL")
        return names[0]
    if not any(_has_name(entry, endpoint.model) for entry in entries):
        raise ModelError(f"{endpoint.url} does not serve {endpoint.model}", hint=f"it serves {listed or 'no model'}")
    return endpoint.model


def _has_name(entry: Mapping[str, Any], name: str) -> bool:
    # Ollama accepts "llama3" for the model that it lists as "llama3:latest".
    names = [str(entry.get("id")), *map(str, aliases if isinstance(aliases := entry.get("aliases"), list) else ())]
    return name in names or f"{name}:latest" in names


def _completion(url: str, answer: Mapping[str, Any], seconds: float) -> Completion:
    try:
        choice = answer["choices"][0]
        text = choice["message"].get("content")
        steps = (choice.get("logprobs") or {}).get("content") or ()
        usage = answer.get("usage") or {}
        ids = choice.get("token_ids") or [step["id"] for step in steps if "id" in step]
        aligned_steps = steps if len(steps) == len(ids) else ()
        return Completion(
            token_ids=tuple(map(int, ids)),
            text=text or "",
            finish_reason="length" if choice.get("finish_reason") == "length" else "stop",
            margins=tuple(map(_margin, aligned_steps)) or (0.0,) * len(ids),
            num_prompt_tokens=int(usage.get("prompt_tokens") or 0),
            seconds=seconds,
            logprobs=tuple(parse_logprob(step["logprob"]) for step in aligned_steps),
        )
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ResourceError(
            f"{url} does not answer as an OpenAI-compatible server does ({type(error).__name__}: {error})"
        ) from None


def _margin(step: Mapping[str, Any]) -> float:
    best = [parse_logprob(entry["logprob"]) for entry in step.get("top_logprobs") or ()][:2]
    return best[0] - best[1] if len(best) == 2 else 0.0
