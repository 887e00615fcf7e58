"""The loss of a model on given answers. A prefix that consecutive rows share is computed once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fintune.inference.prefix_cache import num_shared_tokens

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class AnswerLoss:
    """The loss of one answer: the negative log-probability of all its tokens together, in nats, and their number."""

    total: float
    num_tokens: int

    @property
    def mean(self) -> float:
        """Nats per token."""
        return self.total / self.num_tokens


def answer_losses(
    model: PreTrainedModel | PeftModel, rows: Iterable[tuple[Sequence[int], Sequence[int]]]
) -> Iterator[AnswerLoss]:
    """Yield the loss of each row's answer, given the tokens before it.

    A row has token ids, and a mask that is 1 at the answer's tokens, which end it. Rows that share a prefix should
    follow each other.
    """
    import torch

    reader = LogitsReader(model)
    for ids, mask in rows:
        first = list(mask).index(1)
        logits = reader.read(ids, first)
        with torch.inference_mode():
            # The last row of logits predicts what follows the answer.
            log_probs = logits[:-1].float().log_softmax(-1)
            targets = torch.tensor(list(ids[first:]), device=log_probs.device)[:, None]
            total = -float(log_probs.gather(1, targets).sum())
        yield AnswerLoss(total, len(ids) - first)


class LogitsReader:
    """Compute the logits of rows one after another. A prefix shared with the row before is not computed again."""

    def __init__(self, model: PreTrainedModel | PeftModel) -> None:
        from transformers import DynamicCache

        self._model, self._cache, self._cached_ids = model, DynamicCache(), list[int]()

    def read(self, ids: Sequence[int], first: int) -> torch.Tensor:
        """Return the logits of a row from its answer on.

        Args:
            ids: Token ids.
            first: Index of the answer's first token, at least 1.

        Returns:
            Shape [tokens of the answer + 1, vocabulary]: the prediction of each answer token, and of what follows.
        """
        import torch
        from transformers import DynamicCache

        num_shared = min(num_shared_tokens(self._cached_ids, list(ids)), first - 1)
        if num_shared <= 0:
            num_shared, self._cache = 0, DynamicCache()
        elif num_shared < len(self._cached_ids):  # some versions of transformers crop everything if nothing is to go
            self._cache.crop(num_shared - len(self._cached_ids))  # a negative length is counted from the end
        with torch.inference_mode():
            new = torch.tensor([list(ids[num_shared:])], device=self._model.device)
            output = self._model(
                input_ids=new, past_key_values=self._cache, use_cache=True, logits_to_keep=len(ids) - first + 1
            )
        self._cached_ids = list(ids)
        logits: torch.Tensor = output.logits[0]
        return logits
