"""GGUF files through llama.cpp, in this process (package xllamacpp).

llama.cpp's server runs the prompts in slots with continuous batching. Two of its defaults would change results and are
turned off: sampling options that a GGUF file may carry, and the BOS that it adds to a text. Prompts are therefore
tokenised first and sent as token ids; the server listens on loopback only and asks for a random key. Its
OpenAI-compatible answers leave out tokens that end within a UTF-8 character, so the engine uses the server's own
``/completion``. Such a token has a margin of 0 and a log-probability of NaN. Margins and log-probabilities are those of
the model's own distribution, before temperature, top_p and grammar.

Questions about one page follow each other in one slot, which keeps the tokens of the shared prefix and computes only
the others. The server finds the slot by similarity: a request can name only one slot, and several requests would start
in the order of their arrival. A request has one grammar and one seed. Prompts with their own grammars are therefore
sent one by one, and the candidates of a prompt are separate requests.
"""

from __future__ import annotations

import http.client
import json
import secrets
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fintune.errors import ModelError, PromptError
from fintune.inference.llama_requests import (
    hidden_tokens,
    parse_completion,
    request_body,
    slot_batches,
    split_by_grammar,
)
from fintune.inference.llama_server import check_gguf, server_params, start_server
from fintune.inference.prefix_cache import group_by_prefix
from fintune.inference.protocol import Completion, Decoding, PromptResult
from fintune.models.chat_template import TEMPLATE_DATE
from fintune.records import Message

_WINDOW_PER_SLOT = 16
"""Number of prompts for each slot within which shared prefixes are searched."""
_MIN_SIMILARITY = 0.4
"""Share of a prompt that a slot must hold to be used for it. Grouped prompts share at least half."""


class LlamaCppEngine:
    """A GGUF file in llama.cpp.

    Args:
        path: The file.
        context_tokens: Longest prompt with its completion, in tokens; each slot has a cache of this length.
        threads: Threads of the arithmetic.
        parallel: Number of slots. A fresh engine repeats its completions for the same prompts. With another number of
            slots or other prompts, rounding differs and near-ties may resolve differently.

    Raises:
        ModelError: The path is not a GGUF file, or llama.cpp cannot load it.
        ResourceError: xllamacpp is not installed.
    """

    def __init__(self, path: Path | str, *, context_tokens: int = 2048, threads: int = 2, parallel: int = 4) -> None:
        self.name = "llama.cpp"
        self.path = Path(path)
        self.context_tokens = context_tokens
        self._parallel = parallel
        self._hidden_tokens: list[int] | None = None
        self._key = secrets.token_urlsafe(16)
        check_gguf(self.path)
        params = server_params(self.path, context_tokens=context_tokens, threads=threads, parallel=parallel)
        params.slot_prompt_similarity = _MIN_SIMILARITY
        params.n_cache_reuse = 0
        params.cache_idle_slots = False
        params.warmup = False
        params.n_threads_http = 1
        params.hostnames, params.port = ["127.0.0.1"], 0
        params.api_keys = [self._key]
        self._server: Any = start_server(params, self.path)

    def tokenise(self, texts: Sequence[str]) -> list[list[int]]:
        """Return token ids of texts as llama.cpp tokenises them: special tokens parsed, none added."""
        with closing(self._connect()) as connection:
            answers = [
                self._post(connection, "/tokenize", {"content": text, "add_special": False, "parse_special": True})
                for text in texts
            ]
        return [[int(token) for token in answer["tokens"]] for answer in answers]

    def render(self, messages: Sequence[Message], *, thinking: bool = False) -> str:
        """Render a conversation with the file's own chat template, generation prompt included.

        Raises:
            ModelError: The file has no chat template, or it refuses these messages.
        """
        body = {
            "messages": [message.model_dump() for message in messages],
            "chat_template_kwargs": {"enable_thinking": thinking, "date_string": f"{TEMPLATE_DATE:%d %b %Y}"},
        }
        with closing(self._connect()) as connection:
            return str(self._post(connection, "/apply-template", body)["prompt"])

    def generate(
        self, prompts: Sequence[str], decoding: Decoding, done: Collection[int] = ()
    ) -> Iterator[PromptResult]:
        """Complete prompts; see :class:`fintune.inference.protocol.Engine`.

        Raises:
            ModelError: A prompt is empty, or does not fit the context with its completion.
        """
        rows, max_new_tokens, context = self.tokenise(prompts), decoding.max_new_tokens, self._slot_tokens()
        for number, row in enumerate(rows, 1):
            if not row:
                raise PromptError(number, " is empty")
            if len(row) + max_new_tokens > context:
                limit = f" that {self.path.name} was trained for" if context < self.context_tokens else ""
                raise PromptError(
                    number,
                    f" has {len(row)} tokens, with {max_new_tokens} new ones it does not fit the context"
                    f" of {context}{limit}",
                    hint="lower prompt.max_length",
                )
        return self._run(rows, decoding, frozenset(done))

    def _connect(self) -> http.client.HTTPConnection:
        address = urlsplit(self._server.listening_address)
        # No timeout: the server is this process, and a long prompt of a large model takes long.
        return http.client.HTTPConnection(address.hostname or "127.0.0.1", address.port)

    def _post(self, connection: http.client.HTTPConnection, route: str, body: Mapping[str, Any]) -> Any:
        headers = {"content-type": "application/json", "authorization": f"Bearer {self._key}"}
        connection.request("POST", route, json.dumps(body), headers)
        answer = json.loads(connection.getresponse().read())
        if isinstance(answer, dict) and "error" in answer:
            raise ModelError(f"{self.path}: llama.cpp refused a prompt: {answer['error'].get('message', answer)}")
        return answer

    def _slot_tokens(self) -> int:
        """Return the context of a slot: as asked, or the model's own if that is shorter."""
        with closing(self._connect()) as connection:
            connection.request("GET", "/props", headers={"authorization": f"Bearer {self._key}"})
            answer = json.loads(connection.getresponse().read())
        return int(answer["default_generation_settings"]["n_ctx"])

    def _run(self, rows: Sequence[list[int]], decoding: Decoding, done: Collection[int]) -> Iterator[PromptResult]:
        """Complete the prompts that are not done, window by window.

        Rounding depends on which prompts share a batch, and on what the slots' caches hold. So a window starts without
        caches, and a window that was interrupted is repeated whole. A resumed run then gives the completions of an
        uninterrupted one.
        """
        size = self._parallel * _WINDOW_PER_SLOT
        with closing(self._connect()) as connection:
            for start in range(0, len(rows), size):
                window = range(start, min(start + size, len(rows)))
                if all(index in done for index in window):
                    continue
                groups = group_by_prefix([rows[index] for index in window])
                requests = [
                    (number, request)
                    for number, batch in enumerate(slot_batches(sorted(groups, key=min), self._parallel))
                    for request in split_by_grammar([window[index] for index in batch], decoding)
                ]
                while all(index in done for index in requests[-1][1]):
                    requests.pop()  # nothing after it is open
                for number, request in requests:
                    for result in self._complete(connection, rows, request, decoding, use_cache=number > 0):
                        if result.prompt_index not in done:
                            yield result

    def _complete(
        self,
        connection: http.client.HTTPConnection,
        rows: Sequence[list[int]],
        indices: Sequence[int],
        decoding: Decoding,
        *,
        use_cache: bool,
    ) -> list[PromptResult]:
        """Generate all candidates of the prompts at some indices.

        The prompts of a request start together, and the next request follows when all are complete. The batches, and
        with them the rounding, therefore do not depend on when a request arrives.
        """
        completions: dict[int, list[Completion]] = {index: [] for index in indices}
        grammar = None if decoding.grammars is None else decoding.grammars[indices[0]]
        if grammar is not None and self._hidden_tokens is None:
            self._hidden_tokens = hidden_tokens(self.path)
        for candidate in range(decoding.num_candidates):
            body = request_body(decoding, candidate, grammar, self._hidden_tokens or ())
            body["cache_prompt"] = use_cache or candidate > 0
            started = time.monotonic()
            answer = self._post(connection, "/completion", {"prompt": [rows[index] for index in indices], **body})
            # The answer is an object for one prompt, and a list in the order of the prompts for several.
            answers = answer if isinstance(answer, list) else [answer]
            seconds = (time.monotonic() - started) / len(indices)
            for index, entry in zip(indices, answers, strict=True):
                completions[index].append(parse_completion(entry, seconds, len(rows[index])))
        return [PromptResult(index, tuple(candidates)) for index, candidates in completions.items()]

    def close(self) -> None:
        """Stop the server and free the weights."""
        self._server = None
