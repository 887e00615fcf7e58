"""Batched decoding with transformers: base models, merged folders, and PEFT adapters on their base.

The loop is written out here: rows that have ended leave the batch at once, and for each token the gap to the
second-best is kept, for which ``generate`` would hold the scores of all steps in memory. What the prompts of a batch
have in common at their beginning (several questions on a page, several candidates of a question) is computed once,
where all layers attend to all tokens.
"""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fintune.errors import PromptError
from fintune.inference.cache_room import cache_with_room, can_spread, spread
from fintune.inference.choosing import Way, choose
from fintune.inference.masks import Masks
from fintune.inference.prefixes import batches, cut, families
from fintune.inference.protocol import Answered, Completion, Decoding
from fintune.models import chat_template as chat

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

_WINDOW_BATCHES = 4
"""Prompts are sorted, by page and length, within so many batches.

Of FinQA's dev questions, pages together, twice as many would save 1 % of the computed tokens, half as many cost 10 %.
"""


@dataclass
class _Row:
    """A candidate of the prompt at a place, on its way through the loop."""

    place: int
    candidate: int
    prompt_ids: list[int]
    max_new_tokens: int
    way: Way
    token_ids: list[int] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stopped: bool = False
    seconds: float = 0.0

    @property
    def open(self) -> bool:
        return not self.stopped and len(self.token_ids) < self.max_new_tokens


class TransformersEngine:
    """Decodes prompts with a transformers model, on whatever device it is.

    Args:
        model: In evaluation mode.
        tokenizer: With a padding token and a chat template, whose end-of-turn token ends a completion.
        batch_size: Prompts decoded together.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> None:
        self.name = "transformers"
        self._model, self._tokenizer, self._batch_size = model, tokenizer, batch_size
        self._stop_ids = frozenset(chat.end_of_turn_ids(tokenizer))
        self._masks: Masks | None = None
        self._context = int(model.config.get_text_config().max_position_embeddings)

    def generate(self, prompts: Sequence[str], decoding: Decoding, done: Collection[int] = ()) -> Iterator[Answered]:
        """Completions as their rows end; see :class:`fintune.inference.protocol.Engine`.

        A batch that an interrupted call left half answered is decoded again as a whole, without handing out what is
        done: what a resumed run answers is, to the last bit, what an uninterrupted one does.

        Raises:
            ModelError: A prompt that leaves no room in the model's context; raised before anything is decoded. Or the
                tokenizer is none that grammars can be read with.
        """
        encoded = [self._encode(number, prompt) for number, prompt in enumerate(prompts, 1)]
        if decoding.grammars is not None and self._masks is None:
            num_tokens = int(self._model.config.get_text_config().vocab_size)
            self._masks = Masks(self._tokenizer, num_tokens, self._stop_ids)
        return self._windows(encoded, decoding, frozenset(done))

    def close(self) -> None:
        """Let go of the model; the engine cannot be used afterwards."""
        del self._model

    def _windows(self, prompts: list[list[int]], decoding: Decoding, done: frozenset[int]) -> Iterator[Answered]:
        window = max(1, self._batch_size * _WINDOW_BATCHES // decoding.num_candidates)
        ended: dict[int, list[_Row]] = defaultdict(list)
        for start in range(0, len(prompts), window):
            places = range(start, min(start + window, len(prompts)))
            part = [(place, candidate) for place in places for candidate in range(decoding.num_candidates)]
            for batch in batches(families([prompts[place] for place, _ in part]), self._batch_size):
                asked = [part[at] for at in batch]
                if all(place in done for place, _ in asked):
                    continue
                for row in self._decode([self._row(prompts, *each, decoding) for each in asked], decoding):
                    if row.place in done:
                        continue
                    ended[row.place].append(row)
                    if len(ended[row.place]) == decoding.num_candidates:
                        rows = sorted(ended.pop(row.place), key=lambda row: row.candidate)
                        yield Answered(row.place, tuple(map(self._completion, rows)))

    def _encode(self, number: int, prompt: str) -> list[int]:
        ids: list[int] = self._tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= self._context:
            raise PromptError(
                number,
                f" has {len(ids)} tokens, but {self._model.config.name_or_path} reads at most {self._context}",
                hint="lower prompt.max_length",
            )
        return ids

    def _row(self, prompts: list[list[int]], place: int, candidate: int, decoding: Decoding) -> _Row:
        ids = prompts[place]
        reader = None
        if decoding.grammars is not None:
            assert self._masks is not None, "generate opens it"
            reader = self._masks.reader(decoding.grammars[place])
        chance = None
        if decoding.temperature > 0 and not (decoding.greedy_first and candidate == 0):
            # From the prompt, not its number: a run that goes on where another stopped draws the same.
            chance = random.Random(f"{decoding.seed} {candidate} {ids}")  # noqa: S311
        return _Row(place, candidate, ids, min(decoding.max_new_tokens, self._context - len(ids)), Way(reader, chance))

    def _decode(self, rows: list[_Row], decoding: Decoding) -> Iterator[_Row]:
        """Run one batch to its end, and give each row when it has ended; a step's time is shared by its rows."""
        state: _State | None = None
        while rows:
            started = time.perf_counter()
            state, logits = self._prefill(rows) if state is None else self._step(state, rows)
            going = self._take(rows, logits, decoding)
            seconds = (time.perf_counter() - started) / len(rows)
            for row in rows:
                row.seconds += seconds
            yield from (row for row in rows if not row.open)
            rows = going

    def _step(self, state: _State, rows: list[_Row]) -> tuple[_State, torch.Tensor]:
        """Compute one more position of each row.

        Returns:
            The batch behind it, and its logits, shape [rows, 1, vocabulary].
        """
        import torch

        # A step at a time: a generator that rests within the mode would leave its caller in it.
        with torch.inference_mode():
            if len(rows) < len(state.rows):
                state = state.only(rows)
            last = torch.tensor([[row.token_ids[-1]] for row in rows], device=self._model.device)
            state.mask = torch.cat([state.mask, torch.ones_like(last)], dim=1)
            out = self._model(
                input_ids=last,
                attention_mask=state.mask,
                position_ids=state.mask.sum(1, keepdim=True) - 1,
                past_key_values=state.cache,
                use_cache=True,
            )
        return state, out.logits

    def _prefill(self, rows: list[_Row]) -> tuple[_State, torch.Tensor]:
        """Compute the prompts of a batch; gives what :meth:`_step` gives."""
        import torch

        with torch.inference_mode():
            return self._prefilled(rows)

    def _prefilled(self, rows: list[_Row]) -> tuple[_State, torch.Tensor]:
        import torch

        prompts = [row.prompt_ids for row in rows]
        width = max(map(len, prompts))
        pad, device = self._tokenizer.pad_token_id, self._model.device
        input_ids = torch.tensor([[pad] * (width - len(ids)) + ids for ids in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
        # Padding stands on the left; each prompt's own first token is at position 0.
        position_ids = (mask.cumsum(1) - 1).clamp(min=0)
        cache = cache_with_room(self._model.config, max(row.max_new_tokens for row in rows))
        num_tail = self._prefill_heads(prompts, cache) if can_spread(cache) else width
        out = self._model(
            input_ids=input_ids[:, -num_tail:],
            attention_mask=mask,
            position_ids=position_ids[:, -num_tail:],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return _State(rows, mask, cache), out.logits

    def _prefill_heads(self, prompts: list[list[int]], cache: DynamicCache) -> int:
        """Fill the cache with the beginnings of the prompts, computing those that are shared only once.

        Returns:
            Tokens at the end of the prompts that are left to compute.
        """
        import torch

        plan = cut(prompts)
        if not plan.heads:
            return plan.num_tail
        device = self._model.device
        width, num_head = max(map(len, prompts)), max(map(len, plan.heads))
        pad = self._tokenizer.pad_token_id
        # Padding on the right, which no head's own tokens see, so that no mask is needed.
        input_ids = torch.tensor([[*head, *[pad] * (num_head - len(head))] for head in plan.heads], device=device)
        self._model(input_ids=input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        # From there to the right end of each prompt's row; what stands before its first token is masked.
        num_pads = torch.tensor([[width - len(ids)] for ids in prompts], device=device)
        columns = (torch.arange(width - plan.num_tail, device=device) - num_pads).clamp(min=0)
        spread(cache, torch.tensor(plan.head_of, device=device), columns)
        return plan.num_tail

    def _take(self, rows: list[_Row], logits: torch.Tensor, decoding: Decoding) -> list[_Row]:
        """Append a token to each row.

        Args:
            rows: The rows of the batch.
            logits: Shape [rows, 1, vocabulary].
            decoding: How it is chosen.

        Returns:
            The rows that go on.
        """
        chosen = choose(logits[:, -1].float(), [row.way for row in rows], decoding)
        for row, token, logprob, margin in zip(rows, *chosen, strict=True):
            row.token_ids.append(token)
            row.logprobs.append(logprob)
            row.margins.append(margin)
            row.stopped = token in self._stop_ids
        return [row for row in rows if row.open]

    def _completion(self, row: _Row) -> Completion:
        return Completion(
            token_ids=tuple(row.token_ids),
            text=self._tokenizer.decode(row.token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False),
            finish_reason="stop" if row.stopped else "length",
            margins=tuple(row.margins),
            num_prompt_tokens=len(row.prompt_ids),
            seconds=row.seconds,
            logprobs=tuple(row.logprobs),
        )


@dataclass
class _State:
    """A batch between two steps.

    Attributes:
        rows: What is in the batch.
        mask: Attention mask, shape [rows, tokens so far].
        cache: Keys and values.
    """

    rows: list[_Row]
    mask: torch.Tensor
    cache: DynamicCache

    def only(self, kept: list[_Row]) -> _State:
        """The batch without the rows that have ended."""
        import torch

        places = {id(row): place for place, row in enumerate(self.rows)}
        indices = torch.tensor([places[id(row)] for row in kept], device=self.mask.device)
        self.cache.batch_select_indices(indices)
        return _State(kept, self.mask[indices], self.cache)
