"""Base weights with an adapter merged in, computed row by row while they are read.

The sums are those of PEFT's ``merge_and_unload`` in float32, bit for bit: the product of the two matrices, times the
scale, plus the weight. DoRA then scales every row to its trained magnitude. If the adapter changes one of two tied
embeddings, they become two tensors, because base + adapter answers like that. PEFT would change both.

:class:`NormalFloat` replaces the base weights by those that 4-bit training used (QLoRA, arXiv 2305.14314).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from fintune.errors import ModelError, ResourceError
from fintune.export.gguf.vocabulary import count_tokens
from fintune.export.merge.adapter_reader import Adapter, LowRank
from fintune.export.merge.safetensors_files import SafetensorFolder, StoredTensor
from fintune.models import adapter as adapters
from fintune.util.files import read_json

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

# Up to this rank every BLAS adds the products of an element in one pass, so numpy gives the bits of torch.
_MAX_PLAIN_RANK = 128
# Threads work on neighbouring tensors, so the shared parts of several tensors are cached.
_NUM_CACHED = 3


BaseTransform = Callable[[StoredTensor, "NDArray[np.float32]"], "NDArray[np.float32]"]
"""Change of a whole base weight: (tensor, values) -> values of the same shape."""


class MergedWeights:
    """A base folder with an adapter; use it as a context manager.

    Args:
        base: Hugging Face folder.
        adapter: PEFT folder.
        transform: Change of every base weight before the adapter is added, such as :class:`NormalFloat`; None keeps
            the weights.

    Attributes:
        adapter: The adapter.
        tensors: Name -> tensor, in the base's order. Replaced tensors have their new shape. If the adapter unties the
            embeddings, the output embedding is a tensor of its own.
        tied: Whether the two embeddings are still one tensor.

    Raises:
        ModelError: Base or adapter is unreadable, or the adapter belongs to another base.
    """

    def __init__(
        self,
        base: Path,
        adapter: Path,
        *,
        transform: BaseTransform | None = None,
    ) -> None:
        self.adapter = Adapter(adapter)
        self._base = SafetensorFolder(base)
        adapters.check_adapter_base(base, adapter)
        tied = bool(read_json(base / "config.json", ModelError).get("tie_word_embeddings"))
        self._transform = transform
        self._changes = dict(self.adapter.changes)
        self._saved = dict(self.adapter.saved)
        self._lock = threading.RLock()
        self._cache: dict[str, dict[str, NDArray[np.float32]]] = {}
        self.tensors: dict[str, StoredTensor] = dict(self._base.tensors)
        self.tied = tied and not self._unties_embeddings()
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
        change, saved = self._changes.pop(HEAD, None), self._saved.pop(HEAD, None)
        if change is not None:
            self._changes.setdefault(EMBEDDING, change)
        if saved is not None:
            self._saved.setdefault(EMBEDDING, saved)
        return False

    def _are_equal(self, one: StoredTensor, other: StoredTensor) -> bool:
        import numpy as np

        step = 1024
        return one.shape == other.shape and all(
            np.array_equal(
                self._base.rows(one, at, min(at + step, one.shape[0])),
                self._base.rows(other, at, min(at + step, one.shape[0])),
            )
            for at in range(0, one.shape[0], step)
        )

    def _check_fits(self) -> None:
        adapter, base = self.adapter, self._base.folder
        subject, missing = f"{adapter.folder} was trained on {adapter.base_name}, not on {base}: it", "is missing there"
        hint: str | None = "name the base model that the adapter was trained on"
        if adapters.is_base_of(base, adapter.base_name):
            subject, missing, hint = str(adapter.folder), f"{base} does not have", None
        for name, saved in self._saved.items():
            tensor = self.tensors.get(name)
            if tensor is None:
                raise ModelError(f"{subject} replaces {name}, which {missing}", hint=hint)
            # Only the vocabulary may have grown. Any other difference means another model.
            resized = name in (EMBEDDING, HEAD) and tensor.shape[1:] == saved.shape[1:]
            if tensor.shape != saved.shape and not resized:
                raise ModelError(f"{subject} replaces {_describe_shapes(name, tensor.shape, saved.shape)}", hint=hint)
        for name, change in self._changes.items():
            tensor = self._saved.get(name) or self.tensors.get(name)
            if tensor is None:
                raise ModelError(f"{subject} adapts {name.removesuffix('.weight')}, which {missing}", hint=hint)
            if name in (EMBEDDING, HEAD) and tensor.shape[0] != change.shape[0] and tensor.shape[1] == change.shape[1]:
                raise ModelError(
                    f"{adapter.folder} was trained with a vocabulary of {change.shape[0]} tokens, {base} "
                    f"has {tensor.shape[0]}, and the resized embeddings were not saved with the adapter",
                    hint="save the adapter again from the training, with PEFT's save_embedding_layers=True",
                )
            if tensor.shape != change.shape:
                raise ModelError(f"{subject} adapts {_describe_shapes(name, tensor.shape, change.shape)}", hint=hint)

    def _check_vocabulary(self) -> None:
        """Check that both embeddings have a row for every token of the merged folder's tokenizer."""
        adapter, base = self.adapter.folder, self._base.folder
        of_adapter = count_tokens(adapter)
        required = count_tokens(base) if of_adapter is None else of_adapter
        if required is None:
            return
        # A missing tensor has another name in this architecture, or is tied to the other one.
        rows = min(
            (self.tensors[name].shape[0] for name in (EMBEDDING, HEAD) if name in self.tensors), default=required
        )
        if required <= rows:
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

    def base_rows(self, tensor: StoredTensor, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """Return rows ``start`` to ``stop`` without the low-rank change. A replaced tensor gives the replacement."""
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
        weight = self.base_rows(tensor, start, stop)
        change = self._changes.get(tensor.name)
        if change is None:
            return weight
        stop = tensor.shape[0] if stop is None else stop
        merged: NDArray[np.float32] = weight + self._delta(tensor.name, change, start, stop)
        if change.magnitude is None:
            return merged
        magnitude = self._once(tensor.name, "magnitude", lambda: self._base.rows(change.magnitude))  # type: ignore[arg-type]
        if change.embedding:
            norms = self._once(tensor.name, "norms", lambda: self._embedding_norms(tensor, change))
            return (magnitude / norms)[None, :] * merged
        return (magnitude[start:stop] / _norms(merged))[:, None] * merged

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
        if change.rank > _MAX_PLAIN_RANK:
            whole = self._once(name, "product", lambda: _torch_product(self._base.rows(change.b), a) * scale)
            return whole.T[start:stop] if change.embedding else whole[start:stop]
        if change.embedding:
            b = self._once(name, "b", lambda: self._base.rows(change.b))
            part: NDArray[np.float32] = (b @ np.ascontiguousarray(a[:, start:stop])).T * scale
            return part
        delta: NDArray[np.float32] = (self._base.rows(change.b, start, stop) @ a) * scale
        return delta

    def _embedding_norms(self, tensor: StoredTensor, change: LowRank) -> NDArray[np.float32]:
        merged = self.base_rows(tensor) + self._delta(tensor.name, change, 0, tensor.shape[0])
        return _norms(merged.T)

    def _once(self, name: str, part: str, compute: Callable[[], NDArray[np.float32]]) -> NDArray[np.float32]:
        """Return a part that all rows of a tensor share, from a cache of the last few tensors."""
        with self._lock:
            if name not in self._cache and len(self._cache) >= _NUM_CACHED:
                del self._cache[next(iter(self._cache))]
            parts = self._cache.setdefault(name, {})
            if part not in parts:
                parts[part] = compute()
            return parts[part]

    def __enter__(self) -> MergedWeights:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cache.clear()
        self._base.__exit__(kind, error, trace)


def _describe_shapes(name: str, base: Sequence[int], adapter: Sequence[int]) -> str:
    return f"{name}, which has the shape {list(base)} in the base and {list(adapter)} in the adapter"


def _norms(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the length of every row. torch computes it, because the order of the sum differs between libraries."""
    torch = _torch("DoRA")
    norms: NDArray[np.float32] = torch.linalg.norm(torch.from_numpy(rows), dim=1).numpy()
    return norms


def _torch_product(b: NDArray[np.float32], a: NDArray[np.float32]) -> NDArray[np.float32]:
    torch = _torch(f"a rank above {_MAX_PLAIN_RANK}")
    product: NDArray[np.float32] = (torch.from_numpy(b) @ torch.from_numpy(a)).numpy()
    return product


def _torch(what: str) -> Any:
    try:
        import torch
    except ImportError as error:
        raise ResourceError(f"merging {what} needs torch", hint='pip install "fintune[train]"') from error
    return torch


class NormalFloat:
    """Round trip of matrices through 4-bit NormalFloat with double quantisation, a :data:`BaseTransform`.

    Embeddings and vectors do not change, as in 4-bit training.

    Attributes:
        max_difference: Largest absolute difference to the base weights so far.
    """

    def __init__(self) -> None:
        self.max_difference = 0.0
        self._squares = self._difference_squares = 0.0
        self._measured: set[str] = set()

    @property
    def relative_rms(self) -> float:
        """Root mean square of the difference, divided by that of the weights."""
        return math.sqrt(self._difference_squares / self._squares) if self._squares else 0.0

    def __call__(self, tensor: StoredTensor, weight: NDArray[np.float32]) -> NDArray[np.float32]:
        """Quantise and dequantise one tensor.

        Args:
            tensor: The tensor.
            weight: Its values, float32, of any shape.

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
            self.max_difference = max(self.max_difference, float(abs(difference).max()))
            self._squares += float((weight.astype(float) ** 2).sum())
            self._difference_squares += float((difference.astype(float) ** 2).sum())
        return rounded


def describe_merge_base(quantised: NormalFloat | None) -> dict[str, str | Mapping[str, float]]:
    """Return the manifest's entries about the weights into which the adapter was merged.

    Args:
        quantised: The transform of the base weights, or None if the base's own weights were used.
    """
    if quantised is None:
        return {"merged_into": "16-bit base"}
    difference = {"relative_rms": quantised.relative_rms, "largest": quantised.max_difference}
    return {"merged_into": "base dequantised from 4 bits", "base_difference": difference}
