"""What every engine offers: rendered prompts in, completions out as they end, each with the place of its prompt."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from fintune.finqa.grammar import Grammar

_UNDERFLOW_NATS = -104.0
"""The logarithm of what is 0 in 32 bits, about."""


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen.

    Attributes:
        max_new_tokens: Limit for each completion, end-of-turn token included.
        temperature: 0 takes the most probable token; above, tokens are drawn from the distribution sharpened by it.
        top_p: Tokens are drawn from the most probable ones that together have this probability.
        seed: The same prompts with the same seed give the same completions.
        num_candidates: Completions of each prompt, which differ where tokens are drawn.
        greedy_first: The first candidate of each prompt is the greedy one, whatever the temperature.
        grammars: What a completion may say, one for each prompt; None where it may say anything. The limit still cuts.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    num_candidates: int = 1
    greedy_first: bool = False
    grammars: tuple[Grammar, ...] | None = None


@dataclass(frozen=True)
class Completion:
    """What an engine gave for one prompt.

    Attributes:
        token_ids: Generated tokens, end-of-turn included.
        text: The same as text, special tokens removed.
        finish_reason: "stop" when an end token came, "length" when the limit did.
        margins: For each generated token the natural-log probability gap between the best and the second-best token
            of the model's own distribution, whichever was taken: temperature, top_p and grammar are not in it; 0 where
            an engine does not know it.
        num_prompt_tokens: Length of the prompt as this engine tokenised it.
        seconds: Share of the call's wall time; the shares of all prompts add up to it.
        logprobs: For each generated token its natural-log probability in the model's own distribution, NaN where an
            engine does not know it; empty where it knows none.
    """

    token_ids: tuple[int, ...]
    text: str
    finish_reason: Literal["stop", "length"]
    margins: tuple[float, ...]
    num_prompt_tokens: int
    seconds: float
    logprobs: tuple[float, ...] = ()


class Answered(NamedTuple):
    """A prompt with all that it was asked for.

    Attributes:
        place: Of the prompt among those that were given, from 0.
        completions: ``Decoding.num_candidates`` of them, in the order of the candidates.
    """

    place: int
    completions: tuple[Completion, ...]


def log_probability(told: float | None) -> float:
    """One as a server tells it; None stands for that of 0, whose logarithm JSON cannot write."""
    return _UNDERFLOW_NATS if told is None else float(told)


def in_order(answers: Iterable[Answered]) -> list[Completion]:
    """All completions in the order of the prompts, the candidates of a prompt one behind the other."""
    ordered = sorted(answers, key=lambda answer: answer.place)
    return [completion for answer in ordered for completion in answer.completions]


class Engine(Protocol):
    """A loaded model.

    Attributes:
        name: As it stands in reports, such as "llama.cpp".
    """

    name: str

    def generate(self, prompts: Sequence[str], decoding: Decoding, done: Collection[int] = ()) -> Iterator[Answered]:
        """Complete prompts.

        Args:
            prompts: Texts that the chat template rendered, generation prompt included. Special tokens in them are
                parsed and none is added: a BOS is there if the template put it there.
            decoding: How; an engine that cannot do a part of it says so and does not leave it out.
            done: Places of prompts that an earlier, interrupted call has answered. They are not answered again, and
                are given so that an engine can keep the others in the batches in which they would have been with them:
                rounding differs between batches.

        Yields:
            Each prompt as soon as its last candidate has ended, in whatever order that happens.

        Raises:
            ModelError: A prompt and its completion do not fit the context.
        """
        ...

    def close(self) -> None:
        """Give the memory back; the engine cannot be used afterwards."""
        ...
