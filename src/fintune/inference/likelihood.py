"""How likely a model finds given answers: the loss of each, prompts that begin alike read once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fintune.inference.prefixes import common

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Loss:
    """The loss of an answer.

    Attributes:
        total: Negative log-probability of all its tokens together, in nats.
        num_tokens: So many.
    """

    total: float
    num_tokens: int

    @property
    def mean(self) -> float:
        """Nats a token."""
        return self.total / self.num_tokens


def answer_losses(
    model: PreTrainedModel | PeftModel, rows: Iterable[tuple[Sequence[int], Sequence[int]]]
) -> Iterator[Loss]:
    """The loss of each row's answer, under the tokens before it.

    Args:
        model: In evaluation mode, with a key-value cache.
        rows: Token ids, and 1 at those of the answer, which stand at the end; rows whose beginnings are alike should
            follow one another.
    """
    import torch

    read = Reader(model)
    for ids, mask in rows:
        first = list(mask).index(1)
        logits = read(ids, first)
        with torch.inference_mode():
            # The last row of logits is about what follows the answer.
            log_probs = logits[:-1].float().log_softmax(-1)
            targets = torch.tensor(list(ids[first:]), device=log_probs.device)[:, None]
            total = -float(log_probs.gather(1, targets).sum())
        yield Loss(total, len(ids) - first)


class Reader:
    """Reads rows one after another; what a row has in common with the one before it is computed once.

    Args:
        model: In evaluation mode, with a key-value cache.
    """

    def __init__(self, model: PreTrainedModel | PeftModel) -> None:
        from transformers import DynamicCache

        self._model, self._cache, self._held = model, DynamicCache(), list[int]()

    def __call__(self, ids: Sequence[int], first: int) -> torch.Tensor:
        """Logits of a row from its answer on.

        Args:
            ids: Tokens.
            first: Index of the answer's first one, at least 1.

        Returns:
            [tokens of the answer + 1, vocabulary]: from which each of them is predicted, and what follows the last.
        """
        import torch
        from transformers import DynamicCache

        num_shared = min(common(self._held, list(ids)), first - 1)
        if num_shared <= 0:
            num_shared, self._cache = 0, DynamicCache()
        elif num_shared < len(self._held):  # where nothing is to go, some versions of transformers take everything
            self._cache.crop(num_shared - len(self._held))  # so many from its end
        with torch.inference_mode():
            new = torch.tensor([list(ids[num_shared:])], device=self._model.device)
            output = self._model(
                input_ids=new, past_key_values=self._cache, use_cache=True, logits_to_keep=len(ids) - first + 1
            )
        self._held = list(ids)
        logits: torch.Tensor = output.logits[0]
        return logits
