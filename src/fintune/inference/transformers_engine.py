"""Batched decoding with transformers: base models, merged folders, and PEFT adapters on their base.

The decoding loop is written out here for two reasons. Rows that have ended leave the batch at once. And the margin to
the second-best token is kept for each token; ``generate`` would hold the scores of all steps in memory for that. A
prefix that prompts of a batch share (several questions about a page, several candidates of a question) is computed
once if all layers attend to all tokens. The key-value cache is preallocated: transformers' own cache is copied whole
for every new token, which takes a quarter of the decoding time on a CPU.
"""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fintune.errors import PromptError
from fintune.inference.prefix_cache import group_by_prefix, make_batches, split_prefixes
from fintune.inference.protocol import Completion, Decoding, PromptResult
from fintune.inference.sampling import GrammarMasks, SamplerState, sample_tokens
from fintune.models import chat_template as chat

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_WINDOW_BATCHES = 4
"""Number of batches within which prompts are sorted by page and length.

On FinQA's dev questions in page order, 8 batches would save 1 % of the computed tokens, and 2 would cost 10 %.
"""


@dataclass
class _Row:
    """One candidate of the prompt at an index, while it is decoded."""

    index: int
    candidate: int
    prompt_ids: list[int]
    max_new_tokens: int
    sampler: SamplerState
    token_ids: list[int] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stopped: bool = False
    seconds: float = 0.0

    @property
    def is_open(self) -> bool:
        return not self.stopped and len(self.token_ids) < self.max_new_tokens


class TransformersEngine:
    """Decode prompts with a transformers model, on the device that it is on.

    Args:
        model: A model in evaluation mode.
        tokenizer: Its tokenizer with a padding token and a chat template, whose end-of-turn token ends a completion.
        batch_size: Number of completions that are decoded together.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> None:
        self.name = "transformers"
        self._model, self._tokenizer, self._batch_size = model, tokenizer, batch_size
        self._stop_ids = frozenset(chat.end_of_turn_ids(tokenizer))
        self._masks: GrammarMasks | None = None
        self._context = int(model.config.get_text_config().max_position_embeddings)

    def generate(
        self, prompts: Sequence[str], decoding: Decoding, done: Collection[int] = ()
    ) -> Iterator[PromptResult]:
        """Complete prompts; see :class:`fintune.inference.protocol.Engine`.

        A batch that an interrupted call left incomplete is decoded again as a whole, and only the missing prompts are
        yielded. The completions of a resumed run are therefore bit-identical to those of an uninterrupted one.

        Raises:
            ModelError: A prompt fills the model's context, which is checked before anything is decoded, or grammars
                cannot be used with the tokenizer.
        """
        encoded = [self._encode(number, prompt) for number, prompt in enumerate(prompts, 1)]
        if decoding.grammars is not None and self._masks is None:
            num_tokens = int(self._model.config.get_text_config().vocab_size)
            self._masks = GrammarMasks(self._tokenizer, num_tokens, self._stop_ids)
        return self._windows(encoded, decoding, frozenset(done))

    def close(self) -> None:
        """Release the model. The engine cannot be used afterwards."""
        del self._model

    def _windows(self, prompts: list[list[int]], decoding: Decoding, done: frozenset[int]) -> Iterator[PromptResult]:
        window = max(1, self._batch_size * _WINDOW_BATCHES // decoding.num_candidates)
        ended: dict[int, list[_Row]] = defaultdict(list)
        for start in range(0, len(prompts), window):
            indices = range(start, min(start + window, len(prompts)))
            part = [(index, candidate) for index in indices for candidate in range(decoding.num_candidates)]
            groups = group_by_prefix([prompts[index] for index, _ in part])
            for batch in make_batches(groups, self._batch_size):
                members = [part[member] for member in batch]
                if all(index in done for index, _ in members):
                    continue
                rows = [self._row(prompts, index, candidate, decoding) for index, candidate in members]
                for row in self._decode(rows, decoding):
                    if row.index in done:
                        continue
                    ended[row.index].append(row)
                    if len(ended[row.index]) == decoding.num_candidates:
                        candidates = sorted(ended.pop(row.index), key=lambda row: row.candidate)
                        yield PromptResult(row.index, tuple(map(self._completion, candidates)))

    def _encode(self, number: int, prompt: str) -> list[int]:
        ids: list[int] = self._tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= self._context:
            raise PromptError(
                number,
                f" has {len(ids)} tokens, but {self._model.config.name_or_path} reads at most {self._context}",
                hint="lower prompt.max_length",
            )
        return ids

    def _row(self, prompts: list[list[int]], index: int, candidate: int, decoding: Decoding) -> _Row:
        ids = prompts[index]
        grammar = None
        if decoding.grammars is not None:
            assert self._masks is not None, "generate creates it"
            grammar = self._masks.start(decoding.grammars[index])
        rng = None
        if not decoding.is_greedy(candidate):
            # Seeded by the prompt, not by its index: a resumed run samples the same tokens.
            rng = random.Random(f"{decoding.seed} {candidate} {ids}")  # noqa: S311
        max_new_tokens = min(decoding.max_new_tokens, self._context - len(ids))
        return _Row(index, candidate, ids, max_new_tokens, SamplerState(grammar, rng))

    def _decode(self, rows: list[_Row], decoding: Decoding) -> Iterator[_Row]:
        """Decode one batch and yield each row when it has ended. The rows share the time of a step."""
        state: _BatchState | None = None
        while rows:
            started = time.perf_counter()
            state, logits = self._prefill(rows) if state is None else self._step(state, rows)
            open_rows = self._append_tokens(rows, logits, decoding)
            seconds = (time.perf_counter() - started) / len(rows)
            for row in rows:
                row.seconds += seconds
            yield from (row for row in rows if not row.is_open)
            rows = open_rows

    def _step(self, state: _BatchState, rows: list[_Row]) -> tuple[_BatchState, torch.Tensor]:
        """Compute one more position of each row.

        Returns:
            The state of the batch after it, and its logits, shape [rows, 1, vocabulary].
        """
        import torch

        # Entered for each step: a generator that is suspended within the mode would leave its caller in it.
        with torch.inference_mode():
            if len(rows) < len(state.rows):
                state = state.select(rows)
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

    def _prefill(self, rows: list[_Row]) -> tuple[_BatchState, torch.Tensor]:
        """Compute the prompts of a batch; returns what :meth:`_step` returns."""
        import torch

        with torch.inference_mode():
            return self._prefill_batch(rows)

    def _prefill_batch(self, rows: list[_Row]) -> tuple[_BatchState, torch.Tensor]:
        import torch

        prompts = [row.prompt_ids for row in rows]
        width = max(map(len, prompts))
        pad, device = self._tokenizer.pad_token_id, self._model.device
        input_ids = torch.tensor([[pad] * (width - len(ids)) + ids for ids in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
        # Padding is on the left; each prompt's own first token is at position 0.
        position_ids = (mask.cumsum(1) - 1).clamp(min=0)
        cache = preallocate(self._model.config, max(row.max_new_tokens for row in rows))
        num_tail = self._prefill_heads(prompts, cache) if can_expand(cache) else width
        out = self._model(
            input_ids=input_ids[:, -num_tail:],
            attention_mask=mask,
            position_ids=position_ids[:, -num_tail:],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return _BatchState(rows, mask, cache), out.logits

    def _prefill_heads(self, prompts: list[list[int]], cache: DynamicCache) -> int:
        """Fill the cache with the heads of the prompts. A shared head is computed once.

        Returns:
            Number of tokens at the end of the prompts that remain to be computed.
        """
        import torch

        split = split_prefixes(prompts)
        if not split.heads:
            return split.num_tail
        device = self._model.device
        width, num_head = max(map(len, prompts)), max(map(len, split.heads))
        pad = self._tokenizer.pad_token_id
        # Padding is on the right, where no head's own tokens attend to it, so no mask is needed.
        input_ids = torch.tensor([[*head, *[pad] * (num_head - len(head))] for head in split.heads], device=device)
        self._model(input_ids=input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        # Copy each head to the right end of its prompt's row. What is before the prompt's first token is masked.
        num_pads = torch.tensor([[width - len(ids)] for ids in prompts], device=device)
        columns = (torch.arange(width - split.num_tail, device=device) - num_pads).clamp(min=0)
        expand_batch(cache, torch.tensor(split.head_of, device=device), columns)
        return split.num_tail

    def _append_tokens(self, rows: list[_Row], logits: torch.Tensor, decoding: Decoding) -> list[_Row]:
        """Append a token to each row.

        Args:
            rows: The rows of the batch.
            logits: Shape [rows, 1, vocabulary].
            decoding: How the tokens are chosen.

        Returns:
            The rows that have not ended.
        """
        sampled = sample_tokens(logits[:, -1].float(), [row.sampler for row in rows], decoding)
        for row, token, logprob, margin in zip(rows, *sampled, strict=True):
            row.token_ids.append(token)
            row.logprobs.append(logprob)
            row.margins.append(margin)
            row.stopped = token in self._stop_ids
        return [row for row in rows if row.is_open]

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
class _BatchState:
    """A batch between two steps.

    Attributes:
        rows: The rows of the batch.
        mask: Attention mask, shape [rows, tokens so far].
        cache: Keys and values.
    """

    rows: list[_Row]
    mask: torch.Tensor
    cache: DynamicCache

    def select(self, rows: list[_Row]) -> _BatchState:
        """Return the batch with these rows alone."""
        import torch

        index_of = {id(row): index for index, row in enumerate(self.rows)}
        indices = torch.tensor([index_of[id(row)] for row in rows], device=self.mask.device)
        self.cache.batch_select_indices(indices)
        return _BatchState(rows, self.mask[indices], self.cache)


# --- the preallocated key-value cache


def preallocate(config: PreTrainedConfig, num_new_tokens: int) -> DynamicCache:
    """Return an empty cache whose full-attention layers take new tokens after the prompt without a copy.

    Layers of other kinds (sliding windows) stay transformers' own.

    Args:
        config: The model's configuration.
        num_new_tokens: Expected number of new tokens. More of them work too, with a copy now and then.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    class PreallocatedLayer(DynamicLayer):  # type: ignore[misc]
        """A layer whose keys and values are views of longer buffers, shape [rows, heads, tokens, width]."""

        def update(
            self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
                self.buffers: list[torch.Tensor] = [key_states[:, :, :0], value_states[:, :, :0]]
            start = self.get_seq_length()
            end = start + key_states.shape[-2]
            for index, states in enumerate((key_states, value_states)):
                old = self.buffers[index]
                if old.shape[-2] < end:
                    longer = states.new_empty((*states.shape[:-2], end + num_new_tokens, states.shape[-1]))
                    longer[:, :, :start] = old[:, :, :start]
                    self.buffers[index] = longer
                self.buffers[index][:, :, start:end] = states
            self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)
            return self.keys, self.values

        def batch_select_indices(self, indices: torch.Tensor) -> None:
            length = self.get_seq_length()
            if length:
                self.buffers = [buffer.index_select(0, indices) for buffer in self.buffers]
                self.keys, self.values = (buffer[:, :, :length] for buffer in self.buffers)

        def expand(self, rows: torch.Tensor, columns: torch.Tensor) -> None:
            self.buffers = [buffer.transpose(1, 2)[rows[:, None], columns].transpose(1, 2) for buffer in self.buffers]
            self.keys, self.values = self.buffers

    cache = DynamicCache(config=config)
    # Exactly this class: its subclasses store their tokens differently.
    cache.layers = [PreallocatedLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def can_expand(cache: DynamicCache) -> bool:
    """Whether :func:`expand_batch` works with a cache: all its layers keep all tokens."""
    return bool(cache.layers) and all(hasattr(layer, "expand") for layer in cache.layers)


def expand_batch(cache: DynamicCache, rows: torch.Tensor, columns: torch.Tensor) -> None:
    """Replace the rows of a cache by rows made from the tokens that it holds; nothing is computed again.

    Args:
        cache: A cache from :func:`preallocate` that is not empty.
        rows: For each new row, the old row that it is taken from; shape [rows].
        columns: For each token of a new row, its index in the old row; shape [rows, tokens].
    """
    for layer in cache.layers:
        layer.expand(rows, columns)
