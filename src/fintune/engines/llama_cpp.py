"""GGUF files through llama.cpp, in this process (package xllamacpp).

llama.cpp's server runs the prompts in slots with continuous batching. Two of its habits are turned off because they
would change results: sampling defaults that a GGUF file may carry, and the BOS that it puts before a text. The latter
is why prompts are tokenised first (through the server's own ``/tokenize``, which only listens on loopback, behind a
random key) and given as token ids. Its OpenAI-style answers leave out tokens that end within a UTF-8 character, so the
server's own ``/completion`` is asked; for such a token the margin is not known and given as 0.
"""

from __future__ import annotations

import http.client
import json
import math
import os
import secrets
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from ..errors import ModelError, ResourceError
from .protocol import Completion

# Greedy, whatever `general.sampling.*` of the file says.
_GREEDY = {
    "temperature": 0.0,
    "samplers": ["temperature"],
    "repeat_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "n_probs": 2,
    "return_tokens": True,
    "cache_prompt": False,
}


class LlamaCppEngine:
    """A GGUF file in llama.cpp.

    Args:
        path: The file.
        context_tokens: Longest prompt with its completion, in tokens; each slot has a cache of this length.
        threads: Threads of the arithmetic.
        parallel: Prompts in flight. Batches of different widths round differently, so a near-tie may fall
            otherwise at another width.

    Raises:
        ModelError: The path is a folder, missing, no GGUF file, or one that llama.cpp cannot load.
        ResourceError: xllamacpp is not installed.
    """

    def __init__(self, path: Path | str, *, context_tokens: int = 2048, threads: int = 2, parallel: int = 4) -> None:
        self.name = "llama.cpp"
        self.path = Path(path)
        self.context_tokens = context_tokens
        self._parallel = parallel
        self._key = secrets.token_urlsafe(16)
        _check_file(self.path)
        self._server: Any = self._start(threads)

    def _start(self, threads: int) -> Any:
        # OpenMP reads it when it is loaded: idle threads then sleep instead of burning a core that others need.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        try:
            import xllamacpp
        except ImportError as error:
            raise ResourceError(
                "xllamacpp is not installed, so no GGUF file can be run", hint='pip install "fintune[gguf]"'
            ) from error
        params = xllamacpp.CommonParams()
        params.model.path = str(self.path)
        params.n_parallel = self._parallel
        # Slots of a fixed length of their own: one prompt's length then never touches another's.
        params.n_ctx = self.context_tokens * self._parallel
        params.kv_unified = False
        # Both sets: prompts and single tokens are computed by different pools.
        params.cpuparams.n_threads = threads
        params.cpuparams_batch.n_threads = threads
        params.cache_prompt = False
        params.cache_ram_mib = 0
        params.cache_idle_slots = False
        params.fit_params = False
        params.warmup = False
        params.ui = False
        params.verbosity = -1
        params.n_threads_http = self._parallel + 1
        params.hostnames = ["127.0.0.1"]
        params.port = 0
        params.api_keys = [self._key]
        try:
            return xllamacpp.Server(params)
        except RuntimeError as error:
            raise ModelError(
                f"{self.path}: llama.cpp cannot load it: {error}",
                hint="the file may be truncated, or too large for the memory at this context length",
            ) from error

    def tokenise(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts as llama.cpp sees them: special tokens parsed, none added."""
        with closing(self._connect()) as connection:
            answers = [
                self._post(connection, "/tokenize", {"content": text, "add_special": False, "parse_special": True})
                for text in texts
            ]
        return [[int(token) for token in answer["tokens"]] for answer in answers]

    def _connect(self) -> http.client.HTTPConnection:
        address = urlsplit(self._server.listening_address)
        # No time limit: the server is this process, and a long prompt of a large model takes its time.
        return http.client.HTTPConnection(address.hostname or "127.0.0.1", address.port)

    def _post(self, connection: http.client.HTTPConnection, route: str, body: Mapping[str, Any]) -> dict[str, Any]:
        headers = {"content-type": "application/json", "authorization": f"Bearer {self._key}"}
        connection.request("POST", route, json.dumps(body), headers)
        answer = json.loads(connection.getresponse().read())
        if not isinstance(answer, dict) or "error" in answer:
            error = answer.get("error", {}) if isinstance(answer, dict) else {}
            raise ModelError(f"{self.path}: llama.cpp refused a prompt: {error.get('message', answer)}")
        return answer

    def generate(self, prompts: Sequence[str], *, max_new_tokens: int) -> Iterator[Completion]:
        """Complete prompts greedily; see :class:`fintune.engines.protocol.Engine`.

        Raises:
            ModelError: A prompt is empty, or does not fit the context with its completion.
        """
        rows = self.tokenise(prompts)
        for index, row in enumerate(rows):
            if not row:
                raise ModelError(f"prompt {index} is empty")
            if len(row) + max_new_tokens > self.context_tokens:
                raise ModelError(
                    f"prompt {index} has {len(row)} tokens, with {max_new_tokens} new ones "
                    f"it does not fit the context of {self.context_tokens}",
                    hint="cut the page, or raise the context length",
                )
        return self._run(rows, max_new_tokens)

    def _run(self, rows: Sequence[Sequence[int]], max_new_tokens: int) -> Iterator[Completion]:
        clock = _Shares()

        def one(row: Sequence[int]) -> Completion:
            body = {"prompt": list(row), "n_predict": max_new_tokens, **_GREEDY}
            with closing(self._connect()) as connection:
                answer = self._post(connection, "/completion", body)
            return _completion(answer, clock.take(), len(row))

        pool = ThreadPoolExecutor(self._parallel)
        try:
            yield from pool.map(one, rows)
        finally:
            # A consumer that stops early must not wait for prompts that nobody asked for any more.
            pool.shutdown(cancel_futures=True)

    def close(self) -> None:
        """Stop the server and free the weights."""
        self._server = None

    def __enter__(self) -> LlamaCppEngine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class _Shares:
    """Splits wall time among completions: each gets the time since the one that finished before it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = time.monotonic()

    def take(self) -> float:
        with self._lock:
            now = time.monotonic()
            share, self._last = now - self._last, now
            return share


def _completion(answer: Mapping[str, Any], seconds: float, num_prompt_tokens: int) -> Completion:
    assert answer["tokens_evaluated"] == num_prompt_tokens, "llama.cpp changed the prompt"
    tokens = tuple(int(token) for token in answer["tokens"])
    return Completion(
        token_ids=tokens,
        text=str(answer["content"]),
        finish_reason="stop" if answer["stop_type"] == "eos" else "length",
        margins=_margins(tokens, answer.get("completion_probabilities", [])),
        num_prompt_tokens=num_prompt_tokens,
        seconds=seconds,
    )


def _margins(tokens: Sequence[int], steps: Sequence[Mapping[str, Any]]) -> tuple[float, ...]:
    """One margin per token; llama.cpp reports none for a token that ends within a UTF-8 character."""
    margins, waiting = [], list(reversed(steps))
    for token in tokens:
        if waiting and waiting[-1]["id"] == token:
            first, second = (best["logprob"] for best in waiting.pop()["top_logprobs"])
            # JSON has no infinity: a probability that underflowed comes as null.
            margins.append(math.inf if first is None or second is None else float(first) - float(second))
        else:
            margins.append(0.0)
    assert not waiting, "llama.cpp reported tokens that it did not generate"
    return tuple(margins)


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise ModelError(
            f"{path} is a folder, llama.cpp needs a GGUF file", hint="give the .gguf file, or another engine"
        )
    if not path.is_file():
        raise ModelError(f"{path}: no such file")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(f"{path}: no GGUF file", hint="export the model first")
