"""Batched decoding with transformers: base models, merged folders, and PEFT adapters on their base.

The decoding loop is written out here so that completions can leave a batch and enter it (continuous batching, after
Orca, OSDI 2022), and so that the margin to the second-best token is kept for each token. A prefix that prompts share
(several questions about a page, several candidates of a question) is computed once; see
:mod:`fintune.inference.kv_cache`.

A GPU never waits for Python: the next position of all rows is queued before the tokens of this one are read. A row that
has ended is therefore computed once more for nothing. A grammar's masks would come too late for that, so the model's
choice is trusted, and a token that the grammar refuses is chosen again one step later. After a refusal, a row gets its
mask in time until the model agrees with the grammar again. On a CPU each step ends before the next one begins.
"""

from __future__ import annotations

import random
import time
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fintune.errors import PromptError
from fintune.inference.kv_cache import Batch, GrowingBatch, SlotBatch, has_slots, to_device
from fintune.inference.prefix_cache import group_by_prefix, make_batches
from fintune.inference.protocol import Completion, Decoding, PromptResult
from fintune.inference.sampling import GrammarMasks, GrammarState, TokenMasks, choose_tokens
from fintune.models import chat_template as chat

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_WINDOW_BATCHES = 4
"""Number of batches within which prompts are sorted by page and length.

On FinQA's dev questions in page order, 8 batches would save 1 % of the computed tokens, and 2 would cost 10 %.
"""
_MIN_REPLACING_WINDOW = 2048
"""Smallest window in prompts where rows are replaced, because the batch runs empty at the end of each window."""
_PREFILL_TOKENS = 65_536
"""Tokens of prompts that enter a running batch in one pass."""


@dataclass(eq=False)
class _Row:
    """One candidate of the prompt at an index, while it is decoded.

    Attributes:
        slot: Its place in the batch.
        is_masked: Whether its next token is chosen within the grammar at once.
        is_refused: Whether its last token was refused, after the position behind it was computed already.
    """

    index: int
    candidate: int
    prompt_ids: list[int]
    max_new_tokens: int
    grammar: GrammarState | None
    rng: random.Random | None
    token_ids: list[int] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    slot: int = 0
    is_masked: bool = False
    is_refused: bool = False
    stopped: bool = False
    seconds: float = 0.0

    @property
    def is_open(self) -> bool:
        return not self.stopped and len(self.token_ids) < self.max_new_tokens


class TransformersEngine:
    """Decode prompts with a transformers model in evaluation mode, at most ``batch_size`` completions at a time."""

    def __init__(self, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> None:
        self.name = "transformers"
        self._model, self._tokenizer, self._batch_size = model, tokenizer, batch_size
        self._stop_ids = frozenset(chat.end_of_turn_ids(tokenizer))
        self._masks: GrammarMasks | None = None
        self._context = int(model.config.get_text_config().max_position_embeddings)
        self._has_slots: bool | None = None
        self._has_fixed_shape = model.device.type == "cuda"
        self._batch: Batch | None = None

    def generate(
        self, prompts: Sequence[str], decoding: Decoding, done: Collection[int] = ()
    ) -> Iterator[PromptResult]:
        """Complete prompts; see :class:`fintune.inference.protocol.Engine`.

        A batch that an interrupted call left incomplete is decoded again as a whole, and only the missing prompts are
        yielded. Where rows are replaced (on a GPU), this is a window of at least 2,048 prompts. The completions of a
        resumed run are therefore bit-identical to those of an uninterrupted one.

        Raises:
            ModelError: A prompt fills the model's context, which is checked before anything is decoded, or grammars
                cannot be used with the tokenizer.
        """
        encoded = self._encode(prompts)
        if decoding.grammars is not None and self._masks is None:
            num_tokens = int(self._model.config.get_text_config().vocab_size)
            self._masks = GrammarMasks(self._tokenizer, num_tokens, self._stop_ids)
        return self._windows(encoded, decoding, frozenset(done))

    def close(self) -> None:
        """Release the model. The engine cannot be used afterwards."""
        if self._masks is not None:
            self._masks.close()
        self._batch = None
        del self._model

    def _encode(self, prompts: Sequence[str]) -> list[list[int]]:
        """Tokenise all prompts in parallel."""
        encoded: list[list[int]] = []
        if prompts:
            options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
            encoded = self._tokenizer([*prompts], **options)["input_ids"]
        for number, ids in enumerate(encoded, 1):
            if len(ids) >= self._context:
                raise PromptError(
                    number,
                    f" has {len(ids)} tokens, but {self._model.config.name_or_path} reads at most {self._context}",
                    hint="lower prompt.max_length",
                )
        return encoded

    def _windows(self, prompts: list[list[int]], decoding: Decoding, done: frozenset[int]) -> Iterator[PromptResult]:
        if self._has_slots is None:
            self._has_slots = has_slots(self._model)
        is_replacing = self._has_slots and self._has_fixed_shape
        num_rows = max(self._batch_size * _WINDOW_BATCHES, _MIN_REPLACING_WINDOW if is_replacing else 0)
        window = max(1, num_rows // decoding.num_candidates)
        self._batch = None
        if is_replacing:
            # One shape for all windows, since last bits depend on it and a resumed call skips windows.
            num_slots = min(self._batch_size, len(prompts) * decoding.num_candidates)
            num_columns = max((self._num_columns(ids, decoding) for ids in prompts), default=0)
            self._batch = SlotBatch(self._model, num_slots, num_columns, has_fixed_shape=True)
        ended: dict[int, list[_Row]] = defaultdict(list)
        for start in range(0, len(prompts), window):
            indices = range(start, min(start + window, len(prompts)))
            members = [(index, candidate) for index in indices for candidate in range(decoding.num_candidates)]
            for unit in self._units([prompts[index] for index, _ in members], is_replacing):
                if all(members[at][0] in done for part in unit for at in part):
                    continue
                parts = [[self._row(prompts, *members[at], decoding) for at in part] for part in unit]
                for row in self._decode(parts, decoding):
                    if row.index in done:
                        continue
                    ended[row.index].append(row)
                    if len(ended[row.index]) == decoding.num_candidates:
                        candidates = sorted(ended.pop(row.index), key=lambda row: row.candidate)
                        yield PromptResult(row.index, tuple(map(self._completion, candidates)))
        self._batch = None

    def _units(self, prompts: list[list[int]], is_replacing: bool) -> list[list[list[int]]]:
        """Divide a window into units, decoded one after another, and each unit into parts that enter whole."""
        groups = group_by_prefix(prompts)
        if not is_replacing:
            return [[batch] for batch in make_batches(groups, self._batch_size)]
        # A part that enters a full batch must wait until as many rows have ended.
        size = self._batch_size if len(prompts) <= self._batch_size else max(1, self._batch_size // 4)
        return [make_batches(groups, size, [*map(len, prompts)], _PREFILL_TOKENS)]

    def _row(self, prompts: list[list[int]], index: int, candidate: int, decoding: Decoding) -> _Row:
        ids = prompts[index]
        grammar = None
        if decoding.grammars is not None:
            assert self._masks is not None, "generate creates it"
            grammar = self._masks.start(decoding.grammars, index)
        rng = None
        if not decoding.is_greedy(candidate):
            # Seeded by the prompt, not by its index: a resumed run samples the same tokens.
            rng = random.Random(f"{decoding.seed} {candidate} {ids}")  # noqa: S311
        max_new_tokens = self._num_columns(ids, decoding) - len(ids)
        return _Row(index, candidate, ids, max_new_tokens, grammar, rng)

    def _num_columns(self, ids: list[int], decoding: Decoding) -> int:
        """Return the largest number of tokens of a prompt and its completion."""
        return min(len(ids) + decoding.max_new_tokens, self._context)

    def _decode(self, parts: list[list[_Row]], decoding: Decoding) -> Iterator[_Row]:
        """Decode parts of rows, each as soon as it has room, and yield each row when it has ended.

        The running rows share the time of a step.
        """
        self._batch = self._open_batch([row for part in parts for row in part])
        running = _Running(self._batch, self._stop_ids, self._masks, decoding, self._model.device)
        is_ahead, waiting = self._batch.has_fixed_shape, deque(parts)
        while waiting or running.rows:
            started = time.perf_counter()
            ended: list[_Row] = []
            if is_ahead and running.rows:
                running.step()
                ended = running.read()
            while waiting and len(waiting[0]) <= self._batch.num_slots - len(running.rows):
                running.enter(waiting.popleft(), self._prefill)
            if running.rows:
                running.choose()
            if not is_ahead:
                ended = running.read()
                running.close_ranks()
                if running.rows:
                    running.step()
            seconds = (time.perf_counter() - started) / max(1, len(running.rows) + len(ended))
            for row in (*running.rows, *ended):
                row.seconds += seconds
            yield from ended

    def _open_batch(self, rows: list[_Row]) -> Batch:
        """Return a batch for rows: the latest one if it suits them, or a new one."""
        if self._has_slots and self._has_fixed_shape and self._batch is not None:
            return self._batch
        num_slots = min(len(rows), self._batch_size)
        if not self._has_slots:
            return GrowingBatch(self._model, num_slots)
        num_columns = max(len(row.prompt_ids) + row.max_new_tokens for row in rows)
        old = self._batch
        if isinstance(old, SlotBatch) and old.num_columns >= num_columns and old.num_slots >= num_slots:
            return old
        old = self._batch = None  # Its memory must be free before the new one takes its own.
        return SlotBatch(self._model, num_slots, num_columns, has_fixed_shape=False)

    def _prefill(self, rows: list[_Row]) -> torch.Tensor:
        """Compute the prompts of rows in their slots; returns their logits, shape [rows, vocabulary]."""
        assert self._batch is not None, "_decode opens it"
        return self._batch.fill([row.slot for row in rows], [row.prompt_ids for row in rows])

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


class _Running:
    """The rows that are in a batch, and what the device knows about them.

    A batch without a fixed shape has its rows in its first slots.
    """

    def __init__(
        self,
        batch: Batch,
        stop_ids: frozenset[int],
        masks: GrammarMasks | None,
        decoding: Decoding,
        device: torch.device,
    ) -> None:
        import torch

        self.rows: list[_Row] = []
        self._batch, self._stop_ids, self._masks, self._decoding = batch, stop_ids, masks, decoding
        self._tokens = torch.zeros(batch.num_slots, dtype=torch.long, device=device)
        self._positions = torch.zeros_like(self._tokens)
        self._logits: torch.Tensor | None = None
        self._logits_before: torch.Tensor | None = None
        self._chosen: tuple[torch.Tensor, torch.cuda.Event | None] | None = None

    def enter(self, rows: list[_Row], prefill: Callable[[list[_Row]], torch.Tensor]) -> None:
        """Put rows into free slots and compute their prompts."""
        import torch

        taken = {row.slot for row in self.rows}
        free = (slot for slot in range(self._batch.num_slots) if slot not in taken)
        for row in rows:
            row.slot = next(free)
            row.is_masked = row.grammar is not None and (row.rng is not None or not self._batch.has_fixed_shape)
        # Entered for each call: a generator that is suspended within the mode would leave its caller in it.
        with torch.inference_mode():
            logits, device = prefill(rows), self._tokens.device
            slots = to_device([row.slot for row in rows], device)
            self._positions[slots] = to_device([len(row.prompt_ids) - 1 for row in rows], device)
            if self._logits is None:
                self._logits = logits.new_zeros(self._batch.num_slots, logits.shape[1])
            self._logits[slots] = logits
        self.rows += rows

    def choose(self) -> None:
        """Choose a token for each row, as its grammar allows; refused tokens are chosen again."""
        import torch

        assert self._logits is not None, "enter computes them"
        device = self._tokens.device
        numbers = masks = None
        with torch.inference_mode():
            refused = [row.slot for row in self.rows if row.is_refused]
            if refused:
                assert self._logits_before is not None, "step keeps them"
                slots = to_device(refused, device)
                self._logits[slots] = self._logits_before[slots]
                self._positions[slots] -= 1
            masked = [row for row in self.rows if row.is_masked or row.is_refused]
            if masked:
                assert self._masks is not None, "the engine creates it"
                bits = self._masks.allowed([row.grammar for row in masked if row.grammar is not None])
                masks = TokenMasks(to_device([row.slot for row in masked], device), to_device(bits, device))
            if any(row.rng is not None for row in self.rows):
                drawn = torch.full((len(self._logits),), -1.0, dtype=torch.float64)
                for row in self.rows:
                    if row.rng is not None:
                        drawn[row.slot] = row.rng.random()
                numbers = to_device(drawn, device)
            chosen = choose_tokens(self._logits, self._decoding, numbers, masks)
            self._tokens.copy_(chosen[0])
            self._positions.add_(1)
            if self._batch.has_fixed_shape:  # empty slots count on
                self._positions.clamp_(max=self._batch.num_columns - 1)
            event = None
            if device.type == "cuda":
                event = torch.cuda.Event()
                chosen = chosen.to("cpu", non_blocking=True)
                event.record()
            self._chosen = chosen, event

    def read(self) -> list[_Row]:
        """Append the chosen tokens to their rows. Rows that have ended leave; they are returned."""
        assert self._chosen is not None, "choose sets it"
        chosen, event = self._chosen
        if event is not None:
            event.synchronize()
        tokens, logprobs, margins, best = chosen.tolist()
        for row in self.rows:
            token = int(tokens[row.slot])
            if row.grammar is not None:
                row.is_refused = not row.grammar.accept(token)
                if row.is_refused:
                    assert not row.is_masked, "a grammar accepts what it allows"
                    continue
                is_lazy = self._batch.has_fixed_shape and row.rng is None
                row.is_masked = not is_lazy or token != best[row.slot]
            row.token_ids.append(token)
            row.logprobs.append(logprobs[row.slot])
            row.margins.append(margins[row.slot])
            row.stopped = token in self._stop_ids
        ended = [row for row in self.rows if not row.is_open]
        self.rows = [row for row in self.rows if row.is_open]
        return ended

    def close_ranks(self) -> None:
        """Move the rows into the first slots, if some have ended."""
        import torch

        num_rows = len(self.rows)
        if num_rows == len(self._tokens) or not num_rows:
            return
        holes = iter({*range(num_rows)} - {row.slot for row in self.rows})
        order = [*range(num_rows)]
        for row in self.rows:
            if row.slot >= num_rows:
                hole = next(holes)
                order[hole], row.slot = row.slot, hole
        with torch.inference_mode():
            self._batch.keep(order)
            indices = torch.tensor(order, device=self._tokens.device)
            self._tokens, self._positions = self._tokens[indices], self._positions[indices]

    def step(self) -> None:
        """Compute the next position of each row."""
        import torch

        num_read = max(len(row.prompt_ids) + len(row.token_ids) for row in self.rows) + 1
        with torch.inference_mode():
            if self._decoding.grammars is not None and self._batch.has_fixed_shape and self._logits is not None:
                self._logits_before = self._logits.clone()
            self._logits = self._batch.step(self._tokens, self._positions, num_read)
