"""Base weights with an adapter merged in, computed row by row while they are read.

The sums are those of PEFT's ``merge_and_unload`` in float32, bit for bit: the product of the two matrices, times the
scale, plus the weight. DoRA then scales every row to its trained magnitude. If the adapter changes one of two tied
embeddings, they become two tensors, because base + adapter answers like that. PEFT would change both.

:class:`NormalFloat` replaces the base weights by those that 4-bit training used (QLoRA, arXiv 2305.14314), and
:class:`RoundedWeights` rounds the merged weights to the type in which they are stored.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fintune.errors import ArtifactError, ModelError, ResourceError
from fintune.export.merge.adapter_reader import Adapter, LowRank
from fintune.models import adapter as adapters
from fintune.models.folder import DECODERS, count_tokens, read_model_config
from fintune.models.safetensors_files import (
    DTYPES,
    SafetensorFolder,
    StoredTensor,
    from_stored,
    to_stored,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import nn

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

# Up to this rank every BLAS adds the products of an element in one pass, so numpy gives the bits of torch.
_MAX_PLAIN_RANK = 128
# Threads work on neighbouring tensors, so the shared parts of several tensors are cached.
_NUM_CACHED = 3
_SLAB_ELEMENTS = 4 << 20
_COMPARED_ROWS = 1024

BaseTransform = Callable[[StoredTensor, "NDArray[np.float32]"], "NDArray[np.float32]"]
"""Change of a whole base weight: (tensor, values) -> values of the same shape."""


class MergedWeights(ExitStack):
    """A base folder with an adapter; use it as a context manager.

    Args:
        base: Hugging Face folder.
        adapter: PEFT folder.
        transform: Change of every base weight before the adapter is added, such as :class:`NormalFloat`, or None.

    Attributes:
        adapter: The adapter.
        tensors: Name -> tensor, in the base's order. Replaced tensors have their new shape. If the adapter unties the
            embeddings, the output embedding is a tensor of its own.
        tied: Whether the two embeddings are still one tensor.

    Raises:
        ModelError: Base or adapter is unreadable, or the adapter belongs to another base.
    """

    def __init__(self, base: Path, adapter: Path, *, transform: BaseTransform | None = None) -> None:
        super().__init__()
        self.adapter = Adapter(adapter)
        self._base = self.enter_context(SafetensorFolder(base))
        adapters.check_adapter_base(base, adapter)
        config = read_model_config(base)
        tied = bool(config.get("tie_word_embeddings"))
        self._transform = transform
        self._changes = dict(self.adapter.changes)
        self._saved = dict(self.adapter.saved)
        self._lock = threading.RLock()
        self._cache: dict[str, dict[str, NDArray[np.float32]]] = {}
        self.tensors: dict[str, StoredTensor] = dict(self._base.tensors)
        if tied and EMBEDDING not in self.tensors and config.get("model_type") in DECODERS:
            raise ModelError(f"{base}: its embeddings are tied, but the weights lack {EMBEDDING}")
        # Other families have other names for their embeddings, which no adapter of this package changes.
        self.tied = tied and (EMBEDDING not in self.tensors or not self._unties_embeddings())
        if tied and not self.tied and HEAD not in self.tensors:
            self.tensors[HEAD] = replace(self.tensors[EMBEDDING], name=HEAD)
        if self.tied:
            self.tensors.pop(HEAD, None)
        self._check_fits()
        for name, saved in self._saved.items():
            self.tensors[name] = replace(saved, name=name)
        self._check_vocabulary()
        # The order of SafetensorFolder: by shard, then by name.
        self.tensors = {name: self.tensors[name] for name in sorted(self.tensors, key=lambda n: (self.shard_of(n), n))}

    def _unties_embeddings(self) -> bool:
        """Return whether only one of two tied embeddings was trained, or both separately."""
        embedding, head = self._saved.get(EMBEDDING), self._saved.get(HEAD)
        resized = embedding is not None and head is None and embedding.shape != self.tensors[EMBEDDING].shape
        alike = embedding is not None and head is not None and self._are_equal(embedding, head)
        if not (resized or alike or self.adapter.ties_weights):
            return any(name in changed for name in (EMBEDDING, HEAD) for changed in (self._changes, self._saved))
        if (change := self._changes.pop(HEAD, None)) is not None:
            self._changes.setdefault(EMBEDDING, change)
        if (saved := self._saved.pop(HEAD, None)) is not None:
            self._saved.setdefault(EMBEDDING, saved)
        return False

    def _are_equal(self, one: StoredTensor, other: StoredTensor) -> bool:
        spans = [(at, min(at + _COMPARED_ROWS, one.shape[0])) for at in range(0, one.shape[0], _COMPARED_ROWS)]
        return one.shape == other.shape and all(
            (self._base.rows(one, *span) == self._base.rows(other, *span)).all() for span in spans
        )

    def _check_fits(self) -> None:
        adapter, base = self.adapter, self._base.folder
        subject, missing = f"{adapter.folder} was trained on {adapter.base_name}, not on {base}: it", "is missing there"
        hint: str | None = "name the base model that the adapter was trained on"
        if adapters.is_base_of(base, adapter.base_name):
            subject, missing, hint = str(adapter.folder), f"{base} does not have", None
        for verb, parts in (("replaces", self._saved), ("adapts", self._changes)):
            for name, part in parts.items():
                tensor = self.tensors.get(name)
                if verb == "adapts":
                    tensor = self._saved.get(name) or tensor
                if tensor is None:
                    module = name.removesuffix(".weight") if verb == "adapts" else name
                    raise ModelError(f"{subject} {verb} {module}, which {missing}", hint=hint)
                # Only the vocabulary may have grown. Any other difference means another model.
                resized = (
                    name in (EMBEDDING, HEAD) and tensor.shape != part.shape and tensor.shape[1:] == part.shape[1:]
                )
                if resized and verb == "adapts":
                    raise ModelError(
                        f"{adapter.folder} was trained with a vocabulary of {part.shape[0]} tokens, {base} "
                        f"has {tensor.shape[0]}, and the resized embeddings were not saved with the adapter",
                        hint="save the adapter again from the training, with PEFT's save_embedding_layers=True",
                    )
                if tensor.shape != part.shape and not resized:
                    raise ModelError(
                        f"{subject} {verb} {name}, which has the shape {list(tensor.shape)} in the base and "
                        f"{list(part.shape)} in the adapter",
                        hint=hint,
                    )

    def _check_vocabulary(self) -> None:
        """Check that both embeddings have a row for every token of the merged folder's tokenizer."""
        adapter, base = self.adapter.folder, self._base.folder
        of_adapter = count_tokens(adapter)
        required = count_tokens(base) if of_adapter is None else of_adapter
        # A missing tensor has another name in this architecture, or is tied to the other one.
        rows = min([self.tensors[name].shape[0] for name in (EMBEDDING, HEAD) if name in self.tensors], default=None)
        if required is None or rows is None or required <= rows:
            return
        if of_adapter is None:
            raise ModelError(f"{base}: the tokenizer has {required} tokens, but the model has only {rows} rows")
        raise ModelError(
            f"{adapter} was trained with a tokenizer of {required} tokens, {base} has {rows}, and the embeddings of "
            "the other tokens were not saved with the adapter",
            hint="save the adapter with save_embedding_layers=True",
        )

    @property
    def changed(self) -> frozenset[str]:
        """Names of the tensors that differ from the base's."""
        return frozenset(self._changes) | frozenset(self._saved)

    def _base_rows(self, tensor: StoredTensor, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """Return rows without the low-rank change. A replaced tensor gives the replacement."""
        if self._transform is None or tensor.name in self._saved:
            return self._base.rows(tensor, start, stop)
        transform = self._transform
        return self._once(tensor.name, "base", lambda: transform(tensor, self._base.rows(tensor)))[start:stop]

    def rows(self, tensor: StoredTensor, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """Return rows ``start`` to ``stop`` of the merged tensor as float32.

        Raises:
            ModelError: A file ended early.
            ResourceError: DoRA or a rank above 128 needs torch, which is not installed.
        """
        weight = self._base_rows(tensor, start, stop)
        change = self._changes.get(tensor.name)
        if change is None:
            return weight
        stop = tensor.shape[0] if stop is None else stop
        merged: NDArray[np.float32] = weight + self._delta(tensor.name, change, start, stop)
        if change.magnitude is None:
            return merged
        stored = change.magnitude
        magnitude = self._once(tensor.name, "magnitude", lambda: self._base.rows(stored))
        if not change.is_transposed:
            return (magnitude[start:stop] / _norms(merged))[:, None] * merged

        def column_norms() -> NDArray[np.float32]:
            return _norms((self._base_rows(tensor) + self._delta(tensor.name, change, 0, tensor.shape[0])).T)

        return (magnitude / self._once(tensor.name, "norms", column_norms))[None, :] * merged

    def original_rows(self, name: str, start: int, stop: int) -> NDArray[np.float32] | None:
        """Return the base's own rows, or None if the base does not have them because the vocabulary grew."""
        stored = self._base.tensors.get(name) or self._base.tensors[EMBEDDING]
        return self._base.rows(stored, start, stop) if stop <= stored.shape[0] else None

    def shard_of(self, name: str) -> str:
        """Return the name of the base's file that holds the tensor, or the tensor that it replaces."""
        return (self._base.tensors.get(name) or self._base.tensors[EMBEDDING]).path.name

    def _delta(self, name: str, change: LowRank, start: int, stop: int) -> NDArray[np.float32]:
        import numpy as np

        scale = np.float32(change.scale)
        a = self._once(name, "a", lambda: self._base.rows(change.a))
        delta: NDArray[np.float32]
        if change.a.shape[0] > _MAX_PLAIN_RANK:
            torch = _import_torch(f"a rank above {_MAX_PLAIN_RANK}")

            def product() -> NDArray[np.float32]:
                b = torch.from_numpy(self._base.rows(change.b))
                whole: NDArray[np.float32] = (b @ torch.from_numpy(a)).numpy() * scale
                return whole.T if change.is_transposed else whole

            delta = self._once(name, "product", product)[start:stop]
        elif change.is_transposed:
            b = self._once(name, "b", lambda: self._base.rows(change.b))
            delta = (b @ np.ascontiguousarray(a[:, start:stop])).T * scale
        else:
            delta = (self._base.rows(change.b, start, stop) @ a) * scale
        return delta

    def _once(self, name: str, part: str, compute: Callable[[], NDArray[np.float32]]) -> NDArray[np.float32]:
        """Return a part that all rows of a tensor share, from a cache of the last few tensors."""
        with self._lock:
            if name not in self._cache and len(self._cache) >= _NUM_CACHED:
                del self._cache[next(iter(self._cache))]
            parts = self._cache.setdefault(name, {})
            if part not in parts:
                parts[part] = compute()
            return parts[part]


def _norms(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the length of every row. torch computes it, because the order of the sum differs between libraries."""
    torch = _import_torch("DoRA")
    norms: NDArray[np.float32] = torch.linalg.norm(torch.from_numpy(rows), dim=1).numpy()
    return norms


def _import_torch(what: str) -> Any:
    try:
        import torch
    except ImportError as error:
        raise ResourceError(f"merging {what} needs torch", hint='pip install "fintune[train]"') from error
    return torch


class NormalFloat:
    """Round trip of matrices through 4-bit NormalFloat with double quantisation, a :data:`BaseTransform`.

    Embeddings and vectors do not change, as in 4-bit training.
    """

    def __init__(self) -> None:
        self._largest = self._squares = self._difference_squares = 0.0
        self._measured: set[str] = set()

    @property
    def difference(self) -> dict[str, float]:
        """The difference to the base so far: its root mean square by that of the weights, and the largest absolute."""
        relative_rms = math.sqrt(self._difference_squares / self._squares) if self._squares else 0.0
        return {"relative_rms": relative_rms, "largest": self._largest}

    def __call__(self, tensor: StoredTensor, weight: NDArray[np.float32]) -> NDArray[np.float32]:
        """Quantise and dequantise the float32 values of one tensor.

        Raises:
            ResourceError: bitsandbytes is missing.
        """
        if len(tensor.shape) != 2 or tensor.name in (EMBEDDING, HEAD):
            return weight
        import torch

        try:
            from bitsandbytes.functional import dequantize_4bit, quantize_4bit
        except ImportError as error:
            raise ResourceError(
                "computing the weights of 4-bit training needs bitsandbytes", hint="pip install bitsandbytes"
            ) from error
        packed, state = quantize_4bit(
            torch.from_numpy(weight), blocksize=64, compress_statistics=True, quant_type="nf4"
        )
        rounded: NDArray[np.float32] = dequantize_4bit(packed, state).numpy()
        if tensor.name not in self._measured:
            self._measured.add(tensor.name)
            difference = rounded - weight
            self._largest = max(self._largest, float(abs(difference).max()))
            self._squares += float((weight.astype(float) ** 2).sum())
            self._difference_squares += float((difference.astype(float) ** 2).sum())
        return rounded


def describe_merge_base(quantised: NormalFloat | None) -> dict[str, str | Mapping[str, float]]:
    """Return the manifest's entries about the weights into which the adapter was merged; None: the base's own."""
    if quantised is None:
        return {"merged_into": "16-bit base"}
    return {"merged_into": "base dequantised from 4 bits", "base_difference": quantised.difference}


class RoundedWeights:
    """Rows of merged weights, rounded to a stored type, and the check that the adapter changed every tensor.

    Several threads may read.

    Args:
        weights: Base and adapter.
        dtype: "bfloat16", "float16", "float32", or "auto" for the type of most values of the base.
        counts_all: Whether to count every changed value. False stops at the first of each tensor, which is faster.
    """

    def __init__(self, weights: MergedWeights, dtype: str, *, counts_all: bool = False) -> None:
        self._weights = weights
        self.tensors: Mapping[str, StoredTensor] = weights.tensors
        if dtype == "auto":
            sizes: Counter[str] = Counter()
            for tensor in weights.tensors.values():
                sizes[tensor.dtype] += math.prod(tensor.shape)
            dtype = DTYPES[max(sizes, key=lambda code: sizes[code])]
        self.dtype = dtype
        self._counts_all = counts_all
        self._lock = threading.Lock()
        # Name -> number of values that were compared with the base, and of those that differ.
        self._counts = {name: [0, 0] for name in sorted(weights.changed) if name in weights.tensors}

    def stored_rows(self, tensor: StoredTensor, start: int = 0, stop: int | None = None) -> NDArray[np.generic]:
        """Return rows ``start`` to ``stop`` in the stored type; bfloat16 as its bits in uint16.

        Raises:
            ModelError: A value is not finite in this type, or a file ended early.
        """
        import numpy as np

        stop = tensor.shape[0] if stop is None else stop
        stored = to_stored(self._weights.rows(tensor, start, stop), self.dtype)
        if not np.isfinite(stored if stored.dtype != np.uint16 else from_stored(stored)).all():
            raise ModelError(
                f"tensor {tensor.name} holds values that are not finite in {self.dtype}",
                hint="the training diverged, or the values exceed the range of float16: use merge.dtype=bfloat16",
            )
        count = self._counts.get(tensor.name)
        if count is not None and (self._counts_all or not count[1]):
            before = self._weights.original_rows(tensor.name, start, stop)
            same = 0 if before is None else int((to_stored(before, self.dtype) == stored).sum())
            with self._lock:
                count[0] += stored.size
                count[1] += stored.size - same
        return stored

    def rows(self, tensor: StoredTensor, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """Return rows ``start`` to ``stop``, rounded to the stored type, as float32."""
        return from_stored(self.stored_rows(tensor, start, stop))

    @property
    def num_moved(self) -> int:
        """Number of tensors that the adapter changed."""
        return sum(num_changed > 0 for _, num_changed in self._counts.values())

    @property
    def moved_share(self) -> float:
        """Share of the values of adapted tensors that differ from the base, if all were counted."""
        num_changed = sum(num for _, num in self._counts.values())
        return num_changed / max(1, sum(num for num, _ in self._counts.values()))

    def check_read(self) -> None:
        """Check, after all rows were read, that the adapter changed every tensor that it adapts.

        Raises:
            ArtifactError: A tensor did not change.
        """
        unchanged = [name for name, (_, num_changed) in self._counts.items() if not num_changed]
        if len(unchanged) == len(self._counts):
            raise ArtifactError(
                "the adapter changes no weight of the model", hint="it is untrained; look at train/metrics.jsonl"
            )
        if unchanged:
            raise ArtifactError(
                f"{len(unchanged)} of {len(self._counts)} adapted weights did not change in {self.dtype}, "
                f"the first is {unchanged[0]}",
                hint="merge.dtype=float32 keeps smaller changes; if none change there either, they are untrained",
            )


WeightSource = SafetensorFolder | RoundedWeights
"""Tensors that several threads can read row by row: those of a folder, or of a base with an adapter."""


def load_merged_weights(model: nn.Module, weights: WeightSource, tensors: Iterable[StoredTensor] | None = None) -> None:
    """Replace embedding and layers of a loaded base with merged weights, slab by slab.

    The output embedding stays the base's, because no layer's input depends on it. The result equals the model that
    loading the merged folder in the same type would give, without a second model in memory. ``tensors`` are those of
    ``weights`` to load, such as an iterator with a progress bar; None loads all of them.

    Raises:
        ModelError: A value is not finite, or a tensor has another shape than the model's.
    """
    import torch

    modules = dict(model.named_modules())
    for tensor in weights.tensors.values() if tensors is None else tensors:
        owner, _, leaf = tensor.name.rpartition(".")
        parameter = getattr(modules.get(owner), leaf, None)
        if tensor.name == HEAD or not isinstance(parameter, torch.nn.Parameter):
            continue  # a checkpoint may hold what a model does not load, such as rotary frequencies
        if parameter.shape != tensor.shape:
            if parameter.shape[1:] != tensor.shape[1:] or not isinstance(modules[owner], torch.nn.Embedding):
                raise ModelError(f"tensor {tensor.name} has the shape {list(tensor.shape)}, which is not the model's")
            parameter = torch.nn.Parameter(parameter.new_empty(tensor.shape), requires_grad=False)
            setattr(modules[owner], leaf, parameter)  # the vocabulary grew in training
        step = max(1, _SLAB_ELEMENTS * tensor.shape[0] // max(1, parameter.numel()))
        with torch.no_grad():
            for start in range(0, tensor.shape[0], step):
                stop = min(start + step, tensor.shape[0])
                parameter[start:stop].copy_(torch.from_numpy(weights.rows(tensor, start, stop)))
