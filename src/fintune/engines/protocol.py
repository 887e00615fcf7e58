"""What every engine offers: rendered prompts in, greedy completions out, in the order of the prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol


@dataclass(frozen=True)
class Completion:
    """What an engine gave for one prompt.

    Attributes:
        token_ids: Generated tokens, end-of-turn included.
        text: The same as text, special tokens removed.
        finish_reason: "stop" when an end token came, "length" when the limit did.
        margins: For each generated token the natural-log probability gap between the best and the second-best token;
            0 where an engine does not know it.
        num_prompt_tokens: Length of the prompt as this engine tokenised it.
        seconds: Share of the call's wall time; the shares of all prompts add up to it.
    """

    token_ids: tuple[int, ...]
    text: str
    finish_reason: Literal["stop", "length"]
    margins: tuple[float, ...]
    num_prompt_tokens: int
    seconds: float


class Engine(Protocol):
    """A loaded model.

    Attributes:
        name: As it stands in reports, such as "llama.cpp".
    """

    name: str

    def generate(self, prompts: Sequence[str], *, max_new_tokens: int) -> Iterator[Completion]:
        """Complete prompts greedily.

        Args:
            prompts: Texts that the chat template rendered, generation prompt included. Special tokens in them are
                parsed and none is added: a BOS is there if the template put it there.
            max_new_tokens: Limit for each completion.

        Yields:
            One completion per prompt, in the order of the prompts, as soon as it and those before it are done.

        Raises:
            ModelError: A prompt and its completion do not fit the context.
        """
        ...

    def close(self) -> None:
        """Give the memory back; the engine cannot be used afterwards."""
        ...
