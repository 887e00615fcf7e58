"""Batches whose keys and values are in slots of fixed size, so that any completion can be replaced at any step.

A row's tokens are at the beginning of its slot, and every row has its own position. On a GPU the step of a batch always
has the same shapes, and it is recorded as a CUDA graph: Python launches it at once instead of a thousand kernels. On a
CPU a step computes the running rows alone.

Attention is computed here (:func:`attend_to_slots`), so that the queries of a group share their keys without a copy and
a prompt needs no mask. :func:`has_slots` compares a model's logits with those of its own attention first. A model that
computes something else (recurrent layers, attention with biases or caps) gets :class:`GrowingBatch`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeAlias

from fintune.inference.prefix_cache import split_prefixes

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

    Model: TypeAlias = PreTrainedModel | PeftModel

_ATTENTION = "fintune_slots"
_COLUMNS_STEP = 256
"""A GPU's step reads a multiple of so many columns. Each multiple is a CUDA graph of its own."""
_CHECKED_PROMPTS = (tuple(range(3, 12)), tuple(range(5, 9)))


class SlotCache:
    """The keys and values of all slots. A model takes it for its ``past_key_values``.

    Attributes:
        rows: The slots that the next forward pass computes: a slice, or indices of shape [rows].
        positions: The columns that it writes, shape [rows, tokens]. None if it writes the first ones of empty slots.
        num_read: Number of columns that its queries read, unless ``positions`` is None.
    """

    is_compileable = False

    def __init__(self, num_slots: int, num_columns: int) -> None:
        self.num_slots, self.num_columns = num_slots, num_columns
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.rows: slice | torch.Tensor = slice(0, 0)
        self.positions: torch.Tensor | None = None
        self.num_read = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write a layer's new keys and values, shape [rows, heads, tokens, width], and return those to attend to."""
        import torch

        states = (key_states, value_states)
        if layer_idx not in self.layers:
            shapes = [(self.num_slots, new.shape[1], self.num_columns, new.shape[3]) for new in states]
            # Zeros: a masked column must be finite.
            self.layers[layer_idx] = key_states.new_zeros(shapes[0]), value_states.new_zeros(shapes[1])
        keys, values = self.layers[layer_idx]
        if self.positions is None:
            num_tokens = key_states.shape[2]
            keys[self.rows, :, :num_tokens], values[self.rows, :, :num_tokens] = states
            return states
        rows = self.rows
        if isinstance(rows, slice):
            rows = torch.arange(rows.stop, device=keys.device)
        at = (rows[:, None], slice(None), self.positions)
        keys[at], values[at] = key_states.transpose(1, 2), value_states.transpose(1, 2)
        return keys[self.rows, :, : self.num_read], values[self.rows, :, : self.num_read]

    def copy(self, sources: torch.Tensor, targets: torch.Tensor, num_columns: int) -> None:
        """Copy the first columns of some slots to others."""
        for layer in self.layers.values():
            for buffer in layer:
                buffer[targets, :, :num_columns] = buffer[sources, :, :num_columns]

    def get_seq_length(self, *_: Any) -> int:
        """Return 0: positions are always given, so no model needs a length."""
        return 0


def attend_to_slots(
    _module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Compute attention, as transformers' ``AttentionInterface`` calls it.

    Shapes: ``query`` [rows, heads, tokens, width]; ``key`` and ``value`` [rows, key heads, columns, width];
    ``attention_mask`` [rows, 1, tokens, columns], 0 up to a token's own position and minus infinity after it, or None
    for causal attention among the tokens themselves. A ``sliding_window`` is a number of columns.

    Raises:
        NotImplementedError: An option changes the attention in a way that is not computed here.
    """
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    if any(options.get(name) is not None for name in ("softcap", "s_aux", "position_bias")):
        raise NotImplementedError("attention with caps, sinks or biases")
    rows, num_heads, num_tokens, _ = query.shape
    num_queries = num_heads // key.shape[1]
    mask, columns = attention_mask, torch.arange(key.shape[2], device=query.device)
    if sliding_window is not None and sliding_window < key.shape[2]:
        num_seen = columns[:, None] + 1 if mask is None else (mask == 0).sum(-1, keepdim=True)
        is_seen = (columns < num_seen) & (columns >= num_seen - sliding_window)
        mask = torch.zeros_like(is_seen, dtype=query.dtype).masked_fill(~is_seen, float("-inf"))
        mask = mask.expand(rows, 1, num_tokens, -1)
    if mask is None:
        # Other devices and types have no fast kernel for groups.
        has_groups = num_queries > 1 and query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)
        if num_queries > 1 and not has_groups:
            key, value = (states.repeat_interleave(num_queries, dim=1) for states in (key, value))
        out = scaled_dot_product_attention(query, key, value, scale=scaling, is_causal=True, enable_gqa=has_groups)
    else:
        # The queries of a group are more tokens of the one key head.
        grouped = query.reshape(rows, key.shape[1], num_queries * num_tokens, -1)
        mask = mask if num_tokens == 1 else mask.repeat(1, 1, num_queries, 1)
        out = scaled_dot_product_attention(grouped, key, value, attn_mask=mask.to(query.dtype), scale=scaling)
        out = out.reshape(rows, num_heads, num_tokens, -1)
    return out.transpose(1, 2).contiguous(), None


class SlotBatch:
    """Completions in the slots of a :class:`SlotCache`, of at most ``num_columns`` tokens with their prompts.

    With ``has_fixed_shape``, a step computes all slots, running or not, which a GPU needs. Only then rows may be
    replaced.
    """

    def __init__(self, model: Model, num_slots: int, num_columns: int, *, has_fixed_shape: bool) -> None:
        self.has_fixed_shape = has_fixed_shape
        self.num_slots, self.num_columns = num_slots, -(-num_columns // 16) * 16
        self._model, self._cache = model, SlotCache(num_slots, self.num_columns)
        self._graphs: dict[int, tuple[Any, torch.Tensor] | None] = {}
        self._pool, self._can_record = None, True
        self._inputs: tuple[torch.Tensor, torch.Tensor] | None = None

    def fill(self, slots: Sequence[int], prompts: Sequence[list[int]]) -> torch.Tensor:
        """Compute prompts into empty slots. A beginning that several prompts share is computed once.

        Returns:
            The logits of the next token, shape [rows, vocabulary].
        """
        import torch

        device, cache = self._model.device, self._cache
        split = split_prefixes(prompts)
        num_tail, width = split.num_tail, max(map(len, split.heads))
        rows = to_device(slots, device)
        if width:
            # Padding is on the right, where no head's own tokens attend to it.
            ids = to_device([[*head, *[0] * (width - len(head))] for head in split.heads], device)
            hosts = {head: slot for slot, head in zip(reversed(slots), reversed(split.head_of), strict=True)}
            cache.rows, cache.positions = to_device([hosts[head] for head in range(len(hosts))], device), None
            self._forward(ids, torch.arange(width, device=device)[None].expand_as(ids), None)
            copies = [
                (hosts[head], slot) for slot, head in zip(slots, split.head_of, strict=True) if hosts[head] != slot
            ]
            if copies:
                sources, targets = to_device(copies, device).unbind(1)
                cache.copy(sources, targets, width)
        tails = to_device([prompt[-num_tail:] for prompt in prompts], device)
        starts = to_device([[len(prompt) - num_tail] for prompt in prompts], device)
        cache.rows = slice(0, len(slots)) if [*slots] == [*range(len(slots))] else rows
        return self._attend_to(tails, starts + torch.arange(num_tail, device=device), max(map(len, prompts)))

    def step(self, tokens: torch.Tensor, positions: torch.Tensor, num_read: int) -> torch.Tensor:
        """Compute one more token of the first rows, or of all slots; ``num_read`` is the largest position + 1.

        Returns:
            The logits of the next token, shape [rows, vocabulary]. The next step overwrites them.
        """
        if not self.has_fixed_shape:
            self._cache.rows = slice(0, len(tokens))
            return self._attend_to(tokens[:, None], positions[:, None], num_read)
        width = min(-(-num_read // _COLUMNS_STEP) * _COLUMNS_STEP, self.num_columns)
        return self._replay(tokens, positions, width)

    def keep(self, slots: Sequence[int]) -> None:
        """Make these slots the first ones, in this order. Slots that stay where they are cost nothing."""
        moved = [(old, new) for new, old in enumerate(slots) if old != new]
        if moved:
            sources, targets = to_device(moved, self._model.device).unbind(1)
            self._cache.copy(sources, targets, self.num_columns)

    def _attend_to(self, ids: torch.Tensor, positions: torch.Tensor, num_read: int) -> torch.Tensor:
        """Compute tokens that attend to the first columns of their slots; shapes [rows, tokens]."""
        import torch

        cache = self._cache
        cache.positions, cache.num_read = positions, min(-(-num_read // 16) * 16, self.num_columns)
        is_hidden = torch.arange(cache.num_read, device=ids.device) > positions[:, :, None]
        mask = torch.zeros(is_hidden.shape, dtype=self._model.dtype, device=ids.device)
        return self._forward(ids, positions, mask.masked_fill_(is_hidden, float("-inf"))[:, None])

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
        if ids.shape[1] == 1:
            # The fastest one for a step. It compiles a kernel for each new shape, and prompts have ever new shapes.
            kernels.append(SDPBackend.CUDNN_ATTENTION)
        with _own_attention(self._model, _ATTENTION), sdpa_kernel(kernels):
            return _last_logits(self._model, ids, positions, mask, self._cache)

    def _replay(self, tokens: torch.Tensor, positions: torch.Tensor, width: int) -> torch.Tensor:
        """Compute a step of all slots with the graph of a width. The first step of a width is computed without it."""
        self._inputs = self._inputs or (tokens.clone(), positions.clone())
        for own, given in zip(self._inputs, (tokens, positions), strict=True):
            own.copy_(given)
        self._cache.rows = slice(0, self.num_slots)
        recorded = self._graphs.get(width)
        if recorded is None and width in self._graphs and self._can_record:
            recorded = self._record(width)
            self._can_record = recorded is not None
        self._graphs[width] = recorded
        if recorded is None:
            return self._step_all(width)
        recorded[0].replay()
        return recorded[1]

    def _step_all(self, width: int) -> torch.Tensor:
        assert self._inputs is not None, "_replay sets them"
        tokens, positions = self._inputs
        return self._attend_to(tokens[:, None], positions[:, None], width)

    def _record(self, width: int) -> tuple[Any, torch.Tensor] | None:
        """Return a CUDA graph and the logits that its replay writes. None if the model cannot be recorded."""
        import torch

        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            # The context manager torch.cuda.graph would also collect garbage and empty the allocator: a second or so.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                logits = self._step_all(width)
                graph.capture_end()
            except RuntimeError:  # The model waits for its device, in layers of experts for example.
                with suppress(RuntimeError):
                    graph.capture_end()
                return None
        return graph, logits


class GrowingBatch:
    """Completions in transformers' own cache, for every kind of layer. Prompts are padded on the left.

    Rows that end leave; the others cannot be replaced.
    """

    has_fixed_shape = False

    def __init__(self, model: Model, num_slots: int) -> None:
        self.num_slots, self.num_columns = num_slots, 0
        self._model = model
        self._mask: torch.Tensor | None = None
        self._cache: Any = None

    def fill(self, slots: Sequence[int], prompts: Sequence[list[int]]) -> torch.Tensor:
        """Compute the prompts of a new batch; see :meth:`SlotBatch.fill`."""
        import torch
        from transformers import DynamicCache

        assert [*slots] == [*range(len(prompts))], "rows are never replaced"
        width, device = max(map(len, prompts)), self._model.device
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
        self._mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        self._cache = DynamicCache(config=self._model.config)
        positions = (self._mask.cumsum(1) - 1).clamp(min=0)
        return _last_logits(self._model, ids, positions, self._mask, self._cache)

    def step(self, tokens: torch.Tensor, positions: torch.Tensor, num_read: int) -> torch.Tensor:
        """Compute one more token of each row; see :meth:`SlotBatch.step`."""
        import torch

        assert self._mask is not None, "fill makes it"
        self._mask = torch.cat([self._mask, torch.ones_like(tokens[:, None])], dim=1)
        return _last_logits(self._model, tokens[:, None], positions[:, None], self._mask, self._cache)

    def keep(self, slots: Sequence[int]) -> None:
        """Keep these rows alone, in this order."""
        import torch

        assert self._mask is not None, "fill makes it"
        indices = torch.tensor(slots, device=self._mask.device)
        self._cache.batch_select_indices(indices)
        self._mask = self._mask[indices]


Batch = SlotBatch | GrowingBatch


def to_device(values: torch.Tensor | Sequence[Any], device: torch.device) -> torch.Tensor:
    """Return a tensor of values on a device. A GPU copies it in its turn: nothing waits for what it computes now."""
    import torch

    values = torch.as_tensor(values)
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values


def has_slots(model: Model) -> bool:
    """Return whether a :class:`SlotBatch` computes what the model computes; it is tried on two short prompts."""
    import torch
    from transformers import AttentionInterface, DynamicCache

    if len({parameter.device for parameter in model.parameters()}) > 1:
        return False
    windows = []

    def recorded(module: Any, *given: Any, **options: Any) -> tuple[torch.Tensor, None]:
        windows.append(options.get("sliding_window") is not None)
        return attend_to_slots(module, *given, **options)

    layers = [type(layer).__name__ for layer in DynamicCache(config=model.config).layers]
    if not {*layers} <= {"DynamicLayer", "DynamicSlidingWindowLayer"}:
        return False
    AttentionInterface.register(_ATTENTION, recorded)
    batch, device = SlotBatch(model, 2, 16, has_fixed_shape=False), model.device
    lengths = torch.tensor([*map(len, _CHECKED_PROMPTS)], device=device)
    try:
        with torch.inference_mode():
            batch.fill([0, 1], [[*prompt] for prompt in _CHECKED_PROMPTS])
            found = batch.step(torch.full_like(lengths, 4), lengths, 16).float()
            rows = [torch.tensor([[*prompt, 4]], device=device) for prompt in _CHECKED_PROMPTS]
            expected = torch.stack([model(input_ids=row).logits[0, -1].float() for row in rows])
    except Exception:  # whatever a model's own code raises where it does not expect this cache
        return False
    finally:
        AttentionInterface.register(_ATTENTION, attend_to_slots)
    num_windows = layers.count("DynamicSlidingWindowLayer") * len(windows) // len(layers)
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.1
    return sum(windows) == num_windows and float((found - expected).norm() / expected.norm()) < tolerance


def _last_logits(
    model: Model, ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor | None, cache: Any
) -> torch.Tensor:
    """Return the logits after the last of some tokens, shape [rows, vocabulary]."""
    options = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
    out = model(input_ids=ids, position_ids=positions, attention_mask=mask, **options)
    logits: torch.Tensor = out.logits[:, -1]
    return logits


@contextmanager
def _own_attention(model: Model, name: str) -> Iterator[None]:
    config = model.config.get_text_config()
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before
