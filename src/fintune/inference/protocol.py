"""The protocol of all engines: rendered prompts in, completions out as they end, each with the index of its prompt."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from fintune.finqa.grammar import Grammar

_UNDERFLOW_NATS = -104.0
"""About the logarithm of the smallest float32 above 0."""


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen.

    Attributes:
        max_new_tokens: Limit for each completion in tokens, end-of-turn token included.
        temperature: 0 is greedy decoding; above 0, tokens are sampled from the distribution at this temperature.
        top_p: Tokens are sampled from the most probable ones that together have this probability.
        seed: The same prompts with the same seed give the same completions.
        num_candidates: Number of completions of each prompt; they differ only if tokens are sampled.
        greedy_first: Whether the first candidate of each prompt is greedy at any temperature.
        grammars: The grammar of each prompt's completion; None for free text. ``max_new_tokens`` still applies.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    num_candidates: int = 1
    greedy_first: bool = False
    grammars: Sequence[Grammar] | None = None

    def is_greedy(self, candidate: int) -> bool:
        """Whether this candidate (from 0) of a prompt takes the most probable tokens."""
        return self.temperature == 0 or (self.greedy_first and candidate == 0)

    def server_seed(self, prompt: str, candidate: int) -> int:
        """Return a 31-bit seed for one candidate. It depends on the prompt's text, so a resumed run repeats it."""
        digest = hashlib.blake2b(f"{self.seed}\0{candidate}\0{prompt}".encode(), digest_size=4).digest()
        return int.from_bytes(digest, "big") >> 1


@dataclass(frozen=True)
class Completion:
    """A completion of one prompt.

    Attributes:
        token_ids: Generated tokens, end-of-turn token included.
        text: The generated text without special tokens.
        finish_reason: "stop" if an end token ended it, "length" if the limit did.
        margins: For each generated token, the difference of the log-probabilities of the best and the second-best
            token, in nats. Both are of the model's own distribution, before temperature, top_p and grammar. 0 if an
            engine does not report it.
        num_prompt_tokens: Length of the prompt as this engine tokenised it.
        seconds: This prompt's share of the wall time; the shares of all prompts add up to it.
        logprobs: For each generated token, its log-probability in the model's own distribution, in nats. NaN if an
            engine does not report it; empty if it reports none.
    """

    token_ids: tuple[int, ...]
    text: str
    finish_reason: Literal["stop", "length"]
    margins: tuple[float, ...]
    num_prompt_tokens: int
    seconds: float
    logprobs: tuple[float, ...] = ()


class PromptResult(NamedTuple):
    """All completions of a prompt.

    Attributes:
        prompt_index: Index of the prompt in the call.
        completions: ``Decoding.num_candidates`` completions, in the order of the candidates.
    """

    prompt_index: int
    completions: tuple[Completion, ...]


def parse_logprob(value: float | None) -> float:
    """Return a server's log-probability. JSON has no minus infinity; a server writes null for a probability of 0."""
    return _UNDERFLOW_NATS if value is None else float(value)


def sorted_by_prompt(results: Iterable[PromptResult]) -> list[Completion]:
    """Return all completions in the order of the prompts; the candidates of a prompt follow each other."""
    ordered = sorted(results, key=lambda result: result.prompt_index)
    return [completion for result in ordered for completion in result.completions]


class Engine(Protocol):
    """A loaded model that completes rendered prompts.

    Attributes:
        name: Name for reports, such as "llama.cpp".
    """

    name: str

    def generate(
        self, prompts: Sequence[str], decoding: Decoding, done: Collection[int] = ()
    ) -> Iterator[PromptResult]:
        """Complete prompts.

        Args:
            prompts: Texts that the chat template rendered, generation prompt included. Special tokens in them are
                parsed, and none is added: a BOS is there only if the template wrote it.
            decoding: How tokens are chosen. An engine that does not support a part of it raises an error.
            done: Indices of prompts that an earlier, interrupted call completed. They are not completed again. An
                engine may use them to form the same batches as before, because rounding differs between batches.

        Yields:
            Each prompt as soon as its last candidate has ended, in any order.

        Raises:
            ModelError: A prompt and its completion do not fit the context.
        """
        ...

    def close(self) -> None:
        """Release the model. The engine cannot be used afterwards."""
        ...
