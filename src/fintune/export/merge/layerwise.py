"""Two models compared on a few prompts with one decoder layer of one of them in memory at a time, in float32.

transformers' own layers compute, and PEFT's own for an adapter that is not merged: the model is built without weights,
its forward pass is run once with layers that only write down what they are given (masks, rotary embeddings), and then
each layer gets its weights, sees all prompts, and loses them again. Of the embedding only the rows of the prompts'
tokens are read; the output matrix is read in slabs, over which differences and best tokens are kept, so that the
logits are never there as a whole. Only an embedding or output matrix that the adapter changes is loaded entirely.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from fintune.errors import ModelError
from fintune.export.gguf.families import FAMILIES
from fintune.export.merge.adapter_reader import Adapter, read_adapter_header
from fintune.export.merge.safetensor_reader import SafetensorFolder, StoredTensor

if TYPE_CHECKING:
    import torch

_SLAB_ROWS = 4096
_EMBEDDING = "model.embed_tokens."
_HEAD = "lm_head."
_ADAPTER = "base_model.model."
_ACTIVE = "default"
"""PEFT's name of an adapter that was given none."""
_MATRICES = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")


@dataclass(frozen=True)
class Agreement:
    """How far two models agree.

    Attributes:
        max_difference: Largest difference of a logit; not finite where one of the logits is not.
        num_same: Positions at which the best token is the same.
        num_positions: All of them.
        max_logit: Largest absolute logit of the first model.
    """

    max_difference: float
    num_same: int
    num_positions: int
    max_logit: float


def can_compare(folder: Path, adapter: Path | None = None) -> bool:
    """Whether a model can go layer by layer: a family whose layers are known, an adapter that keeps the vocabulary.

    Raises:
        ModelError: An unreadable configuration, adapter or weight file.
    """
    config = _config(folder)
    if config.get("model_type") not in FAMILIES:
        return False
    if adapter is None:
        return True
    found = Adapter(adapter)
    with SafetensorFolder(folder) as base:
        shapes = {name: tensor.shape for name, tensor in base.tensors.items()}
    shapes.setdefault(f"{_HEAD}weight", shapes.get(f"{_EMBEDDING}weight", ()))
    # Weights that PEFT keeps tied while it trains them are found under one of two names only.
    return not found.ties_weights and all(shapes.get(name) == saved.shape for name, saved in found.saved.items())


def compare(
    expected: tuple[Path, Path | None],
    found: tuple[Path, Path | None],
    prompts: Sequence[Sequence[int]],
    *,
    progress: Callable[[float], None] | None = None,
) -> Agreement:
    """Run prompts through both models.

    Args:
        expected: Folder and adapter (or None) of the first.
        found: Those of the second.
        prompts: Token ids.
        progress: Called with the share that was done since the last call.

    Raises:
        ModelError: Weights that are missing or do not fit the configuration.
    """
    import torch

    with torch.inference_mode(), _Layers(*expected) as one, _Layers(*found) as other:
        share = 0.5 / (one.num_layers + 1)
        advance = progress or (lambda _: None)
        ones = one.last_hidden(prompts, lambda: advance(share))
        others = other.last_hidden(prompts, lambda: advance(0.5 / (other.num_layers + 1)))
        agreement = _over_vocabulary(one.head(ones), other.head(others), ones[0].shape[0])
        advance(share * 2)
    return agreement


def _over_vocabulary(ones: Iterator[torch.Tensor], others: Iterator[torch.Tensor], num_positions: int) -> Agreement:
    """Compare slabs of logits, [positions, rows of the slab]."""
    import torch

    difference, largest = torch.zeros(()), torch.zeros(())
    best = [torch.full((num_positions,), float("-inf")) for _ in range(2)]
    token = [torch.zeros(num_positions, dtype=torch.long) for _ in range(2)]
    start = 0
    for one, other in zip(ones, others, strict=True):
        # Python's max would lose what is no number.
        difference = torch.maximum(difference, (one - other).abs().max())
        largest = torch.maximum(largest, one.abs().max())
        for which, logits in enumerate((one, other)):
            values, ids = logits.max(-1)
            better = values > best[which]
            best[which] = torch.where(better, values, best[which])
            token[which] = torch.where(better, ids + start, token[which])
        start += one.shape[1]
    return Agreement(float(difference), int((token[0] == token[1]).sum()), num_positions, float(largest))


class _Layers:
    """A model without weights, and where its weights lie; use it as a context manager."""

    def __init__(self, folder: Path, adapter: Path | None) -> None:
        self._folder = SafetensorFolder(folder)
        self._tied = bool(_config(folder).get("tie_word_embeddings"))
        self._adapter = {} if adapter is None else {each.name: each for each in _adapter_tensors(adapter)}
        self._model = _without_weights(folder, adapter)
        self.num_layers = len(self._model.model.layers)

    def last_hidden(self, prompts: Sequence[Sequence[int]], done: Callable[[], None]) -> list[torch.Tensor]:
        """States before the output matrix of all prompts together, [positions, width], as a list of one."""
        import torch
        from torch.func import functional_call

        inner = self._model.model
        states = [self._embed(ids) for ids in prompts]
        given = [_given_to_layers(inner, state) for state in states]
        for number, layer in enumerate(inner.layers):
            weights = self._weights(layer, f"model.layers.{number}.")
            for which, state in enumerate(states):
                states[which] = functional_call(layer, weights, (state,), given[which][number])
            del weights
            done()
        weights = self._weights(inner.norm, "model.norm.")
        together = torch.cat([functional_call(inner.norm, weights, (state,))[0] for state in states])
        return [together]

    def head(self, states: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Logits in slabs of the vocabulary, [positions, rows of the slab]."""
        import torch
        from torch.func import functional_call

        (state,) = states
        module = self._model.lm_head
        if type(module) is not torch.nn.Linear:
            logits = functional_call(module, self._weights(module, _HEAD), (state,))
            yield from logits.split(_SLAB_ROWS, dim=-1)
            return
        stored = self._stored(f"{_HEAD}weight")
        for start in range(0, stored.shape[0], _SLAB_ROWS):
            rows = self._folder.rows(stored, start, min(stored.shape[0], start + _SLAB_ROWS))
            yield state @ torch.from_numpy(rows).T

    def _embed(self, ids: Sequence[int]) -> torch.Tensor:
        import torch
        from torch.func import functional_call

        module = self._model.model.embed_tokens
        if type(module) is not torch.nn.Embedding:
            embedded: torch.Tensor = functional_call(
                module, self._weights(module, _EMBEDDING), (torch.tensor([list(ids)]),)
            )
            return embedded
        stored = self._stored(f"{_EMBEDDING}weight")
        rows = {each: torch.from_numpy(self._folder.rows(stored, each, each + 1)[0]) for each in set(ids)}
        return torch.stack([rows[each] for each in ids])[None]

    def _weights(self, module: torch.nn.Module, prefix: str) -> dict[str, torch.Tensor]:
        """Every parameter of a module, read now."""
        import torch

        found: dict[str, torch.Tensor] = {}
        for name, parameter in module.named_parameters():
            if self._is_absent(prefix + name):
                found[name] = torch.zeros(parameter.shape)
                continue
            stored = self._stored(prefix + name)
            values = torch.from_numpy(self._folder.rows(stored))
            if values.shape != parameter.shape:
                raise ModelError(
                    f"{stored.path}: {stored.name} has the shape {list(stored.shape)}, config.json asks for "
                    f"{list(parameter.shape)}",
                    hint="take weights and config.json from the same model",
                )
            found[name] = values
        return found

    def _is_absent(self, name: str) -> bool:
        """A matrix of a target that the adapter's file leaves out: PEFT starts it at no change, so that zeros do."""
        low_rank = any(f".{part}." in name for part in _MATRICES)
        return low_rank and _ADAPTER + ".".join(_parts(name, _ACTIVE)) not in self._adapter

    def _stored(self, name: str) -> StoredTensor:
        """Where the parameter that PEFT and transformers call so lies."""
        parts = _parts(name)
        tensors: Mapping[str, StoredTensor] = self._folder.tensors
        if _ACTIVE in parts:
            parts.remove(_ACTIVE)
            key, tensors = _ADAPTER + ".".join(parts), self._adapter
        else:
            key = ".".join(parts)
        if key == f"{_HEAD}weight" and (self._tied or key not in tensors):
            key = f"{_EMBEDDING}weight"
        if key not in tensors:
            raise ModelError(f"{self._folder.folder}: the weights lack {key}", hint="copy or download the folder again")
        return tensors[key]

    def __enter__(self) -> _Layers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._folder.__exit__(kind, error, trace)


def _parts(name: str, *more: str) -> list[str]:
    """A parameter's name without what PEFT puts into it."""
    return [part for part in name.split(".") if part not in ("base_layer", "original_module", "modules_to_save", *more)]


def _config(folder: Path) -> Mapping[str, Any]:
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder / 'config.json'} cannot be read: {error}") from error
    return content if isinstance(content, dict) else {}


def _adapter_tensors(folder: Path) -> Iterator[StoredTensor]:
    for tensor in read_adapter_header(folder / "adapter_model.safetensors"):
        # The magnitude's ending came with a later version of PEFT.
        name = tensor.name + ".weight" * tensor.name.endswith("lora_magnitude_vector")
        yield replace(tensor, name=name)


def _without_weights(folder: Path, adapter: Path | None) -> Any:
    """The model of transformers on torch's device without memory, with PEFT's layers where there is an adapter."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    # It is no weight and computed from the configuration.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
    if adapter is not None:
        from peft import PeftConfig, get_peft_model

        options = PeftConfig.from_pretrained(str(adapter))
        options.inference_mode = True
        options.base_model_name_or_path = None  # where it is found now is no news
        with torch.device("meta"):
            get_peft_model(model, options, adapter_name=_ACTIVE, low_cpu_mem_usage=True)
        model.eval()
    return model


def _given_to_layers(inner: Any, state: torch.Tensor) -> list[dict[str, Any]]:
    """What the model's own forward pass gives each layer beside the states."""
    import torch

    class Noting(torch.nn.Module):  # type: ignore[misc]
        given: Mapping[str, Any] = {}

        def forward(self, hidden: torch.Tensor, **given: Any) -> torch.Tensor:
            self.given = given
            return hidden

    noting = [Noting() for _ in inner.layers]
    with _replaced(inner, layers=torch.nn.ModuleList(noting), norm=torch.nn.Identity()):
        inner(inputs_embeds=state, use_cache=False)
    return [dict(each.given) for each in noting]


@contextmanager
def _replaced(module: Any, **parts: Any) -> Iterator[None]:
    before = {name: getattr(module, name) for name in parts}
    for name, part in parts.items():
        setattr(module, name, part)
    try:
        yield
    finally:
        for name, part in before.items():
            setattr(module, name, part)
