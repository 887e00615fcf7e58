"""How likely a model finds given answers: the loss of each, prompts that begin alike read once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fintune.engines.prefixes import common

if TYPE_CHECKING:
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
    from transformers import DynamicCache

    cache, held = DynamicCache(), list[int]()
    for ids, mask in rows:
        first = list(mask).index(1)
        num_shared = min(common(held, list(ids)), first - 1)
        if num_shared > 0:
            cache.crop(num_shared - len(held))  # so many from its end
        else:
            num_shared, cache = 0, DynamicCache()
        with torch.inference_mode():
            new = torch.tensor([list(ids[num_shared:])], device=model.device)
            num_kept = len(ids) - first + 1
            output = model(input_ids=new, past_key_values=cache, use_cache=True, logits_to_keep=num_kept)
            # The last row of logits is about what follows the answer.
            log_probs = output.logits[0, :-1].float().log_softmax(-1)
            targets = torch.tensor(list(ids[first:]), device=log_probs.device)[:, None]
            total = -float(log_probs.gather(1, targets).sum())
        held = list(ids)
        yield Loss(total, len(ids) - first)
