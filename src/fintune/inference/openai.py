"""Any server with an OpenAI-compatible interface: llama.cpp's, vLLM's, Ollama's, or a hosted one.

A conversation goes to ``/chat/completions``, where the server's own template renders it: what a user of that server
gets.

The interface says little about sampling, so a server's own defaults would decide part of the result. Servers tell who
they are in ``/models``; for llama.cpp and vLLM what this package does not ask for is turned off by name (repetition
penalty, top-k, min-p), the grammar of programs is sent in their own words, and token ids and margins are read. Of any
other server penalties are asked to be 0, and constrained decoding is refused.

vLLM's and Ollama's servers were not run here; what is sent follows their documentation. llama.cpp's is, in the tests.
"""

from __future__ import annotations

import hashlib
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

from fintune.errors import ModelError, PromptError, ResourceError
from fintune.finqa.grammar import Grammar
from fintune.inference.endpoint import Connection, Endpoint
from fintune.inference.in_flight import InFlight
from fintune.inference.protocol import Answered, Completion, Decoding, log_probability
from fintune.inference.told import told_by
from fintune.records import Message

_QUEUED_PER_REQUEST = 2
"""Requests that wait for each one in flight, so that the server is never idle and a consumer may stop early."""
_NAMED = 5


@dataclass(frozen=True)
class _Dialect:
    """What a kind of server takes beyond the common interface.

    Attributes:
        parts: Parts of every request.
        grammar: The part that constrains a completion; None where there is none.
        limit: The name of the limit of new tokens.
    """

    parts: Mapping[str, Any] = field(default_factory=dict)
    grammar: Callable[[Grammar], Mapping[str, Any]] | None = None
    limit: str = "max_tokens"


_NO_THINKING_AND_MARGINS = {
    "chat_template_kwargs": {"enable_thinking": False},
    "logprobs": True,
    "top_logprobs": 2,
}
_PLAIN = _Dialect()
_DIALECTS = {
    "llamacpp": _Dialect(
        # As transformers does it: the temperature first, then the most probable tokens of what it gives.
        parts={"samplers": ["temperature", "top_p"], "repeat_penalty": 1.0, "cache_prompt": True}
        | _NO_THINKING_AND_MARGINS,
        grammar=lambda grammar: {"grammar": grammar.gbnf()},
    ),
    "vllm": _Dialect(
        parts={"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "return_token_ids": True}
        | _NO_THINKING_AND_MARGINS,
        # GBNF is what its default backend, xgrammar, calls EBNF.
        grammar=lambda grammar: {"structured_outputs": {"grammar": grammar.gbnf()}},
    ),
    "openai": _Dialect(limit="max_completion_tokens"),
}
_DIALECTS["system"] = _DIALECTS["openai"]
"""By ``owned_by`` of ``/models``."""


class OpenAIEngine:
    """A model behind an OpenAI-compatible interface.

    Args:
        endpoint: Address and model.
        parallel: Requests in flight. Which completions share the server's batches depends on when they arrive, so
            near-ties may fall otherwise from run to run; with 1 a server that repeats itself is repeated.
        timeout_seconds: Longest wait for one answer.
        retries: How often a request is repeated that the server is too busy for.

    Raises:
        ResourceError: The server cannot be reached, refuses the key, or does not know this interface.
        ModelError: It serves no such model, or several and none was named.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        parallel: int = 8,
        timeout_seconds: float = 600.0,
        retries: int = 5,
    ) -> None:
        self.name = "openai"
        self.url = endpoint.url
        self._parallel = parallel
        self._connection = Connection(endpoint, parallel=parallel, timeout_seconds=timeout_seconds, retries=retries)
        listed = self._connection.get("/models")
        served = listed.get("data") or [] if isinstance(listed, dict) else None
        if served is None and endpoint.model is None:
            raise ModelError(f"{self.url} does not say which models it serves", hint="name one, as in URL#MODEL")
        self.model = endpoint.model or "" if served is None else _chosen(endpoint, served)
        self._entry: Mapping[str, Any] = next((each for each in served or [] if _is_called(each, self.model)), {})
        self._dialect = _DIALECTS.get(str(self._entry.get("owned_by")), _PLAIN)

    def fingerprint(self) -> str:
        """Address, name, and what the server tells about the model, where it tells anything.

        Raises:
            ResourceError: The server cannot be reached any more.
        """
        return f"{self.url}#{self.model} {told_by(self._connection, self._entry)}".rstrip()

    def chat(
        self, conversations: Sequence[Sequence[Message]], decoding: Decoding, done: Collection[int] = ()
    ) -> Iterator[Answered]:
        """Complete conversations through the server's own chat template.

        Args:
            conversations: Turns up to the user's last.
            decoding: How; without greedy decoding the draws are the server's.
            done: Places of conversations that are not asked, as an earlier call has their answers.

        Yields:
            As :meth:`fintune.inference.protocol.Engine.generate`.

        Raises:
            ModelError: The server refuses a conversation, one that is too long for instance, or cannot constrain.
            ResourceError: It does not answer.
        """
        if decoding.grammars is not None and self._dialect.grammar is None:
            raise ModelError(
                f"{self.url} is no server that is known to take a grammar",
                hint="llama.cpp's and vLLM's are; decode freely with this one",
            )
        bodies = [{"messages": [turn.model_dump() for turn in turns]} for turns in conversations]
        asked = {
            (place, number): {
                "model": self.model,
                **body,
                **self._dialect.parts,
                **self._choice(decoding, body, place, number),
            }
            for place, body in enumerate(bodies)
            if place not in done
            for number in range(decoding.num_candidates)
        }
        return self._answers(asked, decoding.num_candidates)

    def _choice(self, decoding: Decoding, body: Mapping[str, Any], at: int, number: int) -> dict[str, Any]:
        """How the tokens of one candidate are chosen."""
        greedy = decoding.temperature == 0 or (decoding.greedy_first and number == 0)
        chosen: dict[str, Any] = {
            self._dialect.limit: decoding.max_new_tokens,
            "temperature": 0.0 if greedy else decoding.temperature,
            "top_p": 1.0 if greedy else decoding.top_p,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "seed": _seed(decoding.seed, repr(body), number),
        }
        if decoding.grammars is not None and self._dialect.grammar is not None:
            chosen |= self._dialect.grammar(decoding.grammars[at])
        return chosen

    def _answers(self, asked: Mapping[tuple[int, int], Mapping[str, Any]], num_candidates: int) -> Iterator[Answered]:
        """Each conversation when all its requests, by place and number of the candidate, are answered."""
        waiting: dict[Future[dict[str, Any]], tuple[int, int]] = {}
        found: dict[int, dict[int, Completion]] = defaultdict(dict)
        left, told = iter(asked.items()), time.monotonic()
        requests = InFlight(lambda body: self._connection.post("/chat/completions", body), self._parallel)
        try:
            while True:
                room = self._parallel * (1 + _QUEUED_PER_REQUEST) - len(waiting)
                for key, request in islice(left, room):
                    waiting[requests.submit(request)] = key
                if not waiting:
                    return
                # Of those that ended together the first asked comes first, so that the same mistake is named each time.
                for future in sorted(wait(waiting, return_when=FIRST_COMPLETED).done, key=waiting.__getitem__):
                    place, number = waiting.pop(future)
                    answer = self._answer(future, place)
                    found[place][number] = _completion(self.url, answer, time.monotonic() - told)
                    told = time.monotonic()
                    if len(found[place]) == num_candidates:
                        yield Answered(place, tuple(one for _, one in sorted(found.pop(place).items())))
                        told = time.monotonic()
        finally:
            requests.close()

    @staticmethod
    def _answer(request: Future[dict[str, Any]], place: int) -> dict[str, Any]:
        try:
            return request.result()
        except ModelError as error:
            raise PromptError(place + 1, f": {error.message}", hint=error.hint) from None

    def close(self) -> None:
        """Drop the connections."""
        self._connection.close()


class ChatEngine:
    """An engine of rendered prompts that sends the conversations they were rendered from.

    Args:
        served: Gets the conversations.
        conversations: By rendered prompt.
    """

    def __init__(self, served: OpenAIEngine, conversations: Mapping[str, Sequence[Message]]) -> None:
        self.name, self.fingerprint = served.name, served.fingerprint
        self._served, self._conversations = served, conversations

    def generate(self, prompts: Sequence[str], decoding: Decoding, done: Collection[int] = ()) -> Iterator[Answered]:
        """See :meth:`OpenAIEngine.chat`."""
        return self._served.chat([self._conversations[prompt] for prompt in prompts], decoding, done)

    def close(self) -> None:
        """Drop the connections."""
        self._served.close()


def _chosen(endpoint: Endpoint, served: Sequence[Mapping[str, Any]]) -> str:
    names = [str(each.get("id")) for each in served]
    listed = ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
    if endpoint.model is None:
        if len(names) != 1:
            has = f"serves {listed}" if names else "serves no model"
            raise ModelError(f"{endpoint.url} {has}", hint="name one, as in URL#MODEL")
        return names[0]
    if not any(_is_called(each, endpoint.model) for each in served):
        raise ModelError(f"{endpoint.url} does not serve {endpoint.model}", hint=f"it serves {listed or 'no model'}")
    return endpoint.model


def _is_called(entry: Mapping[str, Any], name: str) -> bool:
    # Ollama calls "llama3" what it lists as "llama3:latest".
    known = [str(entry.get("id")), *map(str, entry.get("aliases") or ())]
    return name in known or f"{name}:latest" in known


def _seed(seed: int, prompt: str, number: int) -> int:
    """A seed for one candidate: prompts do not share their draws, and a resumed run goes on with the same ones."""
    digest = hashlib.blake2b(f"{seed}\0{number}\0{prompt}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1


def _completion(url: str, answer: Mapping[str, Any], seconds: float) -> Completion:
    try:
        choice = answer["choices"][0]
        text = choice["message"].get("content")
        steps = (choice.get("logprobs") or {}).get("content") or ()
        usage = answer.get("usage") or {}
        ids = choice.get("token_ids") or [step["id"] for step in steps if "id" in step]
        aligned = steps if len(steps) == len(ids) else ()
        return Completion(
            token_ids=tuple(map(int, ids)),
            text=text or "",
            finish_reason=_ending(choice.get("finish_reason")),
            margins=tuple(map(_margin, aligned)) or (0.0,) * len(ids),
            num_prompt_tokens=int(usage.get("prompt_tokens") or 0),
            seconds=seconds,
            logprobs=tuple(log_probability(step["logprob"]) for step in aligned),
        )
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ResourceError(
            f"{url} answers otherwise than an OpenAI-compatible server does ({type(error).__name__}: {error})"
        ) from None


def _ending(reason: object) -> Literal["stop", "length"]:
    return "length" if reason == "length" else "stop"


def _margin(step: Mapping[str, Any]) -> float:
    best = [log_probability(each["logprob"]) for each in step.get("top_logprobs") or ()][:2]
    return best[0] - best[1] if len(best) == 2 else 0.0
