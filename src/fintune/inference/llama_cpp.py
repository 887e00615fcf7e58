"""GGUF files through llama.cpp, in this process (package xllamacpp).

llama.cpp's server runs the prompts in slots with continuous batching. Two of its habits are turned off because they
would change results: sampling defaults that a GGUF file may carry, and the BOS that it puts before a text. The latter
is why prompts are tokenised first (through the server's own ``/tokenize``, which only listens on loopback, behind a
random key) and given as token ids. Its OpenAI-style answers leave out tokens that end within a UTF-8 character, so the
server's own ``/completion`` is asked; for such a token the margin is not known and given as 0, its log-probability as
NaN. Margins and log-probabilities are of the model's own distribution, before temperature, top_p and grammar.

Questions on a page share the page: they follow each other in one slot, which keeps the tokens that the next prompt
begins with and computes only the others. The slot is found by similarity; one request can name one slot only, and
several requests would start as they happen to arrive. A request has one grammar and one seed: prompts with a
grammar of their own go one by one, and candidates of a prompt are separate requests.
"""

from __future__ import annotations

import http.client
import json
import os
import secrets
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from fintune.errors import ModelError, PromptError, ResourceError
from fintune.inference.llama_requests import completion, of_one_grammar, question, unwritten_tokens
from fintune.inference.prefixes import families
from fintune.inference.protocol import Answered, Completion, Decoding
from fintune.inference.waves import waves
from fintune.models.chat_template import TEMPLATE_DATE
from fintune.records import Message

_WINDOW_PER_SLOT = 16
"""Families are looked for among so many prompts for each slot."""
_SIMILARITY = 0.4
"""Share of a prompt that a slot must hold to be taken for it; members of a family share at least half."""


class LlamaCppEngine:
    """A GGUF file in llama.cpp.

    Args:
        path: The file.
        context_tokens: Longest prompt with its completion, in tokens; each slot has a cache of this length.
        threads: Threads of the arithmetic.
        parallel: Prompts in flight. The same prompts give the same completions from a fresh engine; at another width,
            or beside and behind other prompts, rounding differs and near-ties may fall otherwise.

    Raises:
        ModelError: The path is a folder, missing, no GGUF file, or one that llama.cpp cannot load.
        ResourceError: xllamacpp is not installed.
    """

    def __init__(self, path: Path | str, *, context_tokens: int = 2048, threads: int = 2, parallel: int = 4) -> None:
        self.name = "llama.cpp"
        self.path = Path(path)
        self.context_tokens = context_tokens
        self._parallel = parallel
        self._unwritten: list[int] | None = None
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
        params.slot_prompt_similarity = _SIMILARITY
        # Both sets: prompts and single tokens are computed by different pools.
        params.cpuparams.n_threads = threads
        params.cpuparams_batch.n_threads = threads
        params.n_cache_reuse = 0
        params.cache_ram_mib = 0
        params.cache_idle_slots = False
        params.fit_params = False
        params.warmup = False
        params.ui = False
        params.verbosity = -1
        params.n_threads_http = 1
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

    def render(self, messages: Sequence[Message]) -> str:
        """A conversation through the file's own chat template, generation prompt included, thinking switched off.

        Raises:
            ModelError: The file has no chat template, or it refuses these messages.
        """
        body = {
            "messages": [message.model_dump() for message in messages],
            "chat_template_kwargs": {"enable_thinking": False, "date_string": f"{TEMPLATE_DATE:%d %b %Y}"},
        }
        with closing(self._connect()) as connection:
            return str(self._post(connection, "/apply-template", body)["prompt"])

    def _connect(self) -> http.client.HTTPConnection:
        address = urlsplit(self._server.listening_address)
        # No time limit: the server is this process, and a long prompt of a large model takes its time.
        return http.client.HTTPConnection(address.hostname or "127.0.0.1", address.port)

    def _post(self, connection: http.client.HTTPConnection, route: str, body: Mapping[str, Any]) -> Any:
        headers = {"content-type": "application/json", "authorization": f"Bearer {self._key}"}
        connection.request("POST", route, json.dumps(body), headers)
        answer = json.loads(connection.getresponse().read())
        if isinstance(answer, dict) and "error" in answer:
            raise ModelError(f"{self.path}: llama.cpp refused a prompt: {answer['error'].get('message', answer)}")
        return answer

    def generate(self, prompts: Sequence[str], decoding: Decoding, done: Collection[int] = ()) -> Iterator[Answered]:
        """Complete prompts; see :class:`fintune.inference.protocol.Engine`.

        Raises:
            ModelError: A prompt is empty, or does not fit the context with its completion.
        """
        rows, max_new_tokens, room = self.tokenise(prompts), decoding.max_new_tokens, self._room()
        for number, row in enumerate(rows, 1):
            if not row:
                raise PromptError(number, " is empty")
            if len(row) + max_new_tokens > room:
                raise PromptError(
                    number,
                    f" has {len(row)} tokens, with {max_new_tokens} new ones it does not fit the context"
                    f" of {room}" + (f" that {self.path.name} was trained for" if room < self.context_tokens else ""),
                    hint="lower prompt.max_length",
                )
        return self._run(rows, decoding, [place for place in range(len(rows)) if place not in done])

    def _room(self) -> int:
        """Tokens that a slot has: what was asked for, or the model's own context where that is shorter."""
        with closing(self._connect()) as connection:
            connection.request("GET", "/props", headers={"authorization": f"Bearer {self._key}"})
            answer = json.loads(connection.getresponse().read())
        return int(answer["default_generation_settings"]["n_ctx"])

    def _run(self, rows: Sequence[list[int]], decoding: Decoding, asked: Sequence[int]) -> Iterator[Answered]:
        size = self._parallel * _WINDOW_PER_SLOT
        with closing(self._connect()) as connection:
            for start in range(0, len(asked), size):
                window = asked[start : start + size]
                grouped = families([rows[place] for place in window])
                for wave in waves(sorted(grouped, key=min), self._parallel):
                    for places in of_one_grammar([window[at] for at in wave], decoding):
                        yield from self._complete(connection, rows, places, decoding)

    def _complete(
        self,
        connection: http.client.HTTPConnection,
        rows: Sequence[list[int]],
        places: Sequence[int],
        decoding: Decoding,
    ) -> list[Answered]:
        """All candidates of the prompts at some places.

        The prompts of a request are taken up together, and the next request follows when all are answered, so that the
        batches do not depend on when a request arrives: the rounding does depend on the batches.
        """
        found: dict[int, list[Completion]] = {place: [] for place in places}
        grammar = None if decoding.grammars is None else decoding.grammars[places[0]]
        if grammar is not None and self._unwritten is None:
            self._unwritten = unwritten_tokens(self.path)
        for candidate in range(decoding.num_candidates):
            body = question(decoding, candidate, grammar, self._unwritten or ())
            started = time.monotonic()
            answer = self._post(connection, "/completion", {"prompt": [rows[place] for place in places], **body})
            # One prompt is answered by an object, several by a list in their order.
            answers = answer if isinstance(answer, list) else [answer]
            seconds = (time.monotonic() - started) / len(places)
            for place, each in zip(places, answers, strict=True):
                found[place].append(completion(each, seconds, len(rows[place])))
        return [Answered(place, tuple(each)) for place, each in found.items()]

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
