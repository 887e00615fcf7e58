"""Base weights with an adapter folded in, read row by row as if they lay in a folder: nothing is merged beforehand.

The sums are those of PEFT's ``merge_and_unload`` in float32, bit for bit: the product of the two matrices, times the
scale, plus the weight; with DoRA each row is then brought to its trained length. Where the adapter changes one of two
tied embeddings, the two are parted, so that the merged model answers as base and adapter do; PEFT would change both.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from fintune.errors import ModelError, ResourceError
from fintune.export.gguf.vocab import num_tokens
from fintune.export.merge.adapter_reader import Adapter, LowRank
from fintune.export.merge.safetensor_reader import SafetensorFolder, StoredTensor
from fintune.models import adapter as adapters

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

# Up to this rank every BLAS sums the products of an element in one run, so that numpy's bits are torch's.
_MAX_PLAIN_RANK = 128
# Threads are at work on neighbouring tensors.
_NUM_REMEMBERED = 3


class Weights(Protocol):
    """Tensors that can be read row by row, by several threads: those of a folder, or of a base with an adapter."""

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Name -> shape, type and place."""

    def rows(self, tensor: StoredTensor, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """Rows ``start`` to ``stop`` (axis 0) as float32."""

    def check(self) -> None:
        """Called when all rows were read.

        Raises:
            ArtifactError: They are not what they should be.
        """


class MergedWeights:
    """A base folder with an adapter; use it as a context manager.

    Args:
        base: Hugging Face folder.
        adapter: PEFT folder.
        transform: Applied to the whole of each base weight before the adapter, such as what 4-bit training saw; None
            leaves the weights alone.

    Attributes:
        adapter: The adapter.
        tensors: Base tensors in the base's order, replaced ones with their new shape; with an output embedding of its
            own where the adapter parts it from the input's.
        tied: Whether the two embeddings still are one tensor.

    Raises:
        ModelError: Unreadable base or adapter, or an adapter of another base.
    """

    def __init__(
        self,
        base: Path,
        adapter: Path,
        *,
        transform: Callable[[StoredTensor, NDArray[np.float32]], NDArray[np.float32]] | None = None,
    ) -> None:
        self.adapter = Adapter(adapter)
        self._base = SafetensorFolder(base)
        adapters.check_adapter_base(base, adapter)
        tied = self._is_tied(base)
        self._transform = transform
        self._changes = dict(self.adapter.changes)
        self._saved = dict(self.adapter.saved)
        self._lock = threading.RLock()
        self._whole: dict[str, dict[str, NDArray[np.float32]]] = {}
        self.tensors: dict[str, StoredTensor] = dict(self._base.tensors)
        self.tied = tied and not self._parts_embeddings()
        if tied and not self.tied and HEAD not in self.tensors:
            self.tensors[HEAD] = replace(self.tensors[EMBEDDING], name=HEAD)
        if self.tied:
            self.tensors.pop(HEAD, None)
        self._check_fits()
        for name, saved in self._saved.items():
            self.tensors[name] = replace(saved, name=name)
        self._check_vocabulary()
        # The order of a folder that is read: by shard, then by name.
        self.tensors = {name: self.tensors[name] for name in sorted(self.tensors, key=lambda n: (self.shard_of(n), n))}

    @staticmethod
    def _is_tied(base: Path) -> bool:
        try:
            return bool(json.loads((base / "config.json").read_text(encoding="utf-8")).get("tie_word_embeddings"))
        except (OSError, ValueError, AttributeError) as error:
            raise ModelError(f"{base / 'config.json'} cannot be read: {error}") from error

    def _parts_embeddings(self) -> bool:
        """Tied weights of which only one was trained, or each by itself, are two tensors from then on."""
        embedding, head = self._saved.get(EMBEDDING), self._saved.get(HEAD)
        resized = embedding is not None and head is None and embedding.shape != self.tensors[EMBEDDING].shape
        alike = embedding is not None and head is not None and self._are_equal(embedding, head)
        if not (resized or alike or self.adapter.ties_weights):
            return any(name in found for name in (EMBEDDING, HEAD) for found in (self._changes, self._saved))
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
        where, missing = f"{adapter.folder} was trained on {adapter.base_name}, not on {base}: it", "is not there"
        hint: str | None = "name the base model that the adapter was trained on"
        if adapters.is_base_of(base, adapter.base_name):
            where, missing, hint = str(adapter.folder), f"{base} does not have", None
        for name, saved in self._saved.items():
            tensor = self.tensors.get(name)
            if tensor is None:
                raise ModelError(f"{where} replaces {name}, which {missing}", hint=hint)
            # Only a vocabulary may have grown; whatever else differs is another model's.
            resized = name in (EMBEDDING, HEAD) and tensor.shape[1:] == saved.shape[1:]
            if tensor.shape != saved.shape and not resized:
                raise ModelError(f"{where} replaces {_unlike(name, tensor.shape, saved.shape)}", hint=hint)
        for name, change in self._changes.items():
            tensor = self._saved.get(name) or self.tensors.get(name)
            if tensor is None:
                raise ModelError(f"{where} adapts {name.removesuffix('.weight')}, which {missing}", hint=hint)
            if name in (EMBEDDING, HEAD) and tensor.shape[0] != change.shape[0] and tensor.shape[1] == change.shape[1]:
                raise ModelError(
                    f"{adapter.folder} was trained with a vocabulary of {change.shape[0]} tokens, {base} "
                    f"has {tensor.shape[0]}, and the resized embeddings were not saved with the adapter",
                    hint="save it again from the training, with PEFT's save_embedding_layers=True",
                )
            if tensor.shape != change.shape:
                raise ModelError(f"{where} adapts {_unlike(name, tensor.shape, change.shape)}", hint=hint)

    def _check_vocabulary(self) -> None:
        """Each token of the tokenizer that the merged folder gets has a row, of both embeddings."""
        adapter, base = self.adapter.folder, self._base.folder
        own = num_tokens(adapter)
        asked = num_tokens(base) if own is None else own
        if asked is None:
            return
        # A tensor that is not there is not this family's, or the other's twin.
        rows = min((self.tensors[name].shape[0] for name in (EMBEDDING, HEAD) if name in self.tensors), default=asked)
        if asked <= rows:
            return
        if own is None:
            raise ModelError(f"{base}: the tokenizer has {asked} tokens, but the model only {rows}")
        raise ModelError(
            f"{adapter} was trained with a tokenizer of {asked} tokens, {base} has {rows}, and the embeddings of the "
            "others were not saved with the adapter",
            hint="save the adapter with save_embedding_layers=True",
        )

    @property
    def changed(self) -> frozenset[str]:
        """Names of the tensors that differ from the base's."""
        return frozenset(self._changes) | frozenset(self._saved)

    def base_rows(self, tensor: StoredTensor, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """Rows without the low-rank change (a replaced tensor is read as replaced)."""
        if self._transform is None or tensor.name in self._saved:
            return self._base.rows(tensor, start, stop)
        transform = self._transform
        return self._once(tensor.name, "base", lambda: transform(tensor, self._base.rows(tensor)))[start:stop]

    def rows(self, tensor: StoredTensor, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """Rows ``start`` to ``stop`` of the merged tensor, float32.

        Raises:
            ModelError: A file ended early.
            ResourceError: DoRA or a rank above 128 without torch.
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
        """The base's own rows, None where the adapter has more of them than the base."""
        stored = self._base.tensors.get(name) or self._base.tensors[EMBEDDING]
        return self._base.rows(stored, start, stop) if stop <= stored.shape[0] else None

    def shard_of(self, name: str) -> str:
        """Name of the base's file that holds the tensor, or did before it was replaced."""
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

    def _once(self, name: str, what: str, make: Callable[[], NDArray[np.float32]]) -> NDArray[np.float32]:
        """What all rows of a tensor share, made once while its rows are read; that of the oldest tensor is dropped."""
        with self._lock:
            if name not in self._whole and len(self._whole) >= _NUM_REMEMBERED:
                del self._whole[next(iter(self._whole))]
            known = self._whole.setdefault(name, {})
            if what not in known:
                known[what] = make()
            return known[what]

    def __enter__(self) -> MergedWeights:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._whole.clear()
        self._base.__exit__(kind, error, trace)


def _unlike(name: str, here: Sequence[int], there: Sequence[int]) -> str:
    return f"{name}, which has the shape {list(here)} here and {list(there)} in the adapter"


def _norms(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Length of each row; torch's, because each library sums in an order of its own."""
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
