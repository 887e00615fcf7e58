"""Compare two models on a few prompts in float32, with one decoder layer in memory at a time.

transformers' own layers compute, and PEFT's own layers for an adapter that is not merged. The model is built without
weights. Its forward pass runs once with layers that only record their arguments (masks, rotary embeddings). Then every
layer gets its weights, computes all prompts, and releases the weights.

Only the embedding rows of the prompts' tokens are read. The output matrix is read in slabs, and only differences and
best tokens are kept, so the logits are never in memory as a whole. An embedding or output matrix that the adapter
changes is loaded entirely.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fintune.errors import ModelError
from fintune.export.gguf.architectures import ARCHITECTURES
from fintune.export.merge.adapter_reader import Adapter, read_adapter_tensors
from fintune.models.adapter import check_patterns, read_adapter_config
from fintune.models.folder import read_model_config
from fintune.models.load import library_errors
from fintune.models.safetensors_files import SafetensorFolder, StoredTensor

if TYPE_CHECKING:
    import torch

_SLAB_ROWS = 4096
_EMBEDDING = "model.embed_tokens."
_HEAD = "lm_head."
_ADAPTER = "base_model.model."
_ACTIVE = "default"
"""PEFT's default name of an adapter."""
_INSERTED = ("base_layer", "original_module", "modules_to_save")
"""Parts that PEFT inserts into the name of a parameter."""
_MATRICES = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")


@dataclass(frozen=True)
class LogitAgreement:
    """The agreement of the logits of two models."""

    max_difference: float
    """Largest absolute difference of a logit; not finite if a logit is not finite."""
    num_same: int
    """Number of positions at which the best token is the same."""
    num_positions: int
    max_logit: float
    """Largest absolute logit of the first model."""


def can_compare_layers(folder: Path, adapter: Path | None = None) -> bool:
    """Return whether a model can be compared layer by layer.

    The export must support its architecture, and the adapter must keep the size of the vocabulary.

    Raises:
        ModelError: A configuration, adapter or weight file is unreadable.
    """
    if read_model_config(folder).get("model_type") not in ARCHITECTURES:
        return False
    if adapter is None:
        return True
    contents = Adapter(adapter)
    with SafetensorFolder(folder) as base:
        shapes = {name: tensor.shape for name, tensor in base.tensors.items()}
    shapes.setdefault(f"{_HEAD}weight", shapes.get(f"{_EMBEDDING}weight", ()))
    # Weights that PEFT keeps tied during training are stored under only one of their two names.
    return not contents.ties_weights and all(shapes.get(name) == saved.shape for name, saved in contents.saved.items())


def compare_layers(
    expected: tuple[Path, Path | None],
    actual: tuple[Path, Path | None],
    prompts: Sequence[Sequence[int]],
    *,
    progress: Callable[[float], None] | None = None,
) -> LogitAgreement:
    """Compare the logits of two models, each a folder with an adapter or None, layer by layer on rows of token ids.

    ``progress`` is called with the share of the work since the last call.

    Raises:
        ModelError: Weights are missing or do not fit the configuration.
    """
    import torch

    with torch.inference_mode(), _LayeredModel(*expected) as first, _LayeredModel(*actual) as second:
        share = 0.5 / (first.num_layers + 1)
        advance = progress or (lambda _: None)
        first_states = first.last_hidden(prompts, lambda: advance(share))
        second_states = second.last_hidden(prompts, lambda: advance(0.5 / (second.num_layers + 1)))
        agreement = _compare_logits(first.head(first_states), second.head(second_states), first_states.shape[0])
        advance(share * 2)
    return agreement


def _compare_logits(ones: Iterator[torch.Tensor], others: Iterator[torch.Tensor], num_positions: int) -> LogitAgreement:
    """Compare slabs of logits, [positions, rows of the slab]."""
    import torch

    difference, largest = torch.zeros(()), torch.zeros(())
    best = [torch.full((num_positions,), float("-inf")) for _ in range(2)]
    token = [torch.zeros(num_positions, dtype=torch.long) for _ in range(2)]
    start = 0
    for one, other in zip(ones, others, strict=True):
        # torch's maximum keeps NaN; Python's max could drop it.
        difference = torch.maximum(difference, (one - other).abs().max())
        largest = torch.maximum(largest, one.abs().max())
        for index, logits in enumerate((one, other)):
            values, ids = logits.max(-1)
            better = values > best[index]
            best[index] = torch.where(better, values, best[index])
            token[index] = torch.where(better, ids + start, token[index])
        start += one.shape[1]
    return LogitAgreement(float(difference), int((token[0] == token[1]).sum()), num_positions, float(largest))


class _LayeredModel(ExitStack):
    """A model without weights and the files of its weights; use it as a context manager."""

    def __init__(self, folder: Path, adapter: Path | None) -> None:
        super().__init__()
        self._folder = self.enter_context(SafetensorFolder(folder))
        self._tied = bool(read_model_config(folder).get("tie_word_embeddings"))
        self._adapter: dict[str, StoredTensor] = {}
        for tensor in read_adapter_tensors(adapter) if adapter is not None else ():
            # Later versions of PEFT end the name of the magnitude with .weight.
            name = tensor.name + ".weight" * tensor.name.endswith("lora_magnitude_vector")
            self._adapter[name] = replace(tensor, name=name)
        self._model = _build_without_weights(folder, adapter)
        self.num_layers = len(self._model.model.layers)

    def last_hidden(self, prompts: Sequence[Sequence[int]], layer_done: Callable[[], None]) -> torch.Tensor:
        """Return the inputs of the output matrix for all prompts, [positions, width]."""
        import torch

        inner = self._model.model
        states = [self._embed(ids) for ids in prompts]
        arguments = [_record_layer_arguments(inner, state) for state in states]
        for number, layer in enumerate(inner.layers):
            calls = [((state,), found[number]) for state, found in zip(states, arguments, strict=True)]
            states = self._call(layer, f"model.layers.{number}.", calls)
            layer_done()
        return torch.cat([state[0] for state in self._call(inner.norm, "model.norm.", [((s,), {}) for s in states])])

    def head(self, states: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield logits in slabs of the vocabulary, [positions, rows of the slab]."""
        import torch

        module = self._model.lm_head
        if type(module) is not torch.nn.Linear:
            yield from self._call(module, _HEAD, [((states,), {})])[0].split(_SLAB_ROWS, dim=-1)
            return
        stored = self._stored(f"{_HEAD}weight")
        for start in range(0, stored.shape[0], _SLAB_ROWS):
            rows = self._folder.rows(stored, start, min(stored.shape[0], start + _SLAB_ROWS))
            yield states @ torch.from_numpy(rows).T

    def _embed(self, ids: Sequence[int]) -> torch.Tensor:
        import torch

        module = self._model.model.embed_tokens
        if type(module) is not torch.nn.Embedding:
            return self._call(module, _EMBEDDING, [((torch.tensor([list(ids)]),), {})])[0]
        stored = self._stored(f"{_EMBEDDING}weight")
        rows = {token: torch.from_numpy(self._folder.rows(stored, token, token + 1)[0]) for token in set(ids)}
        return torch.stack([rows[token] for token in ids])[None]

    def _call(
        self, module: torch.nn.Module, prefix: str, calls: Sequence[tuple[tuple[torch.Tensor, ...], Mapping[str, Any]]]
    ) -> list[torch.Tensor]:
        """Read every parameter of a module, and call it with each pair of arguments."""
        import torch
        from torch.func import functional_call

        weights: dict[str, torch.Tensor] = {}
        for name, parameter in module.named_parameters():
            key = ".".join(part for part in (prefix + name).split(".") if part not in (*_INSERTED, _ACTIVE))
            if any(f".{part}." in name for part in _MATRICES) and _ADAPTER + key not in self._adapter:
                # PEFT starts a matrix that is not in the adapter's file without change.
                weights[name] = torch.zeros(parameter.shape)
                continue
            stored = self._stored(prefix + name)
            weights[name] = torch.from_numpy(self._folder.rows(stored))
            if weights[name].shape != parameter.shape:
                raise ModelError(
                    f"{stored.path}: {stored.name} has the shape {list(stored.shape)}, but config.json needs "
                    f"{list(parameter.shape)}",
                    hint="copy weights and config.json from the same model",
                )
        return [functional_call(module, weights, arguments, dict(options)) for arguments, options in calls]

    def _stored(self, name: str) -> StoredTensor:
        """Return the stored tensor of a parameter by its name in PEFT and transformers."""
        parts = [part for part in name.split(".") if part not in _INSERTED]
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


def _build_without_weights(folder: Path, adapter: Path | None) -> Any:
    """Build the model, with PEFT's layers if there is an adapter, on torch's meta device."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with library_errors(f"{folder}: the model cannot be built"), torch.device("meta"):
        config = AutoConfig.from_pretrained(folder)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    # The rotary embedding is no weight; it is computed from the configuration.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
    if adapter is not None:
        from peft import PeftConfig, get_peft_model

        check_patterns(adapter, read_adapter_config(adapter), [name for name, _ in model.named_modules()])
        with library_errors(f"{adapter}: PEFT cannot build the adapter"), torch.device("meta"):
            options = PeftConfig.from_pretrained(str(adapter))
            options.inference_mode = True
            options.base_model_name_or_path = None  # PEFT must not look for the base
            get_peft_model(model, options, adapter_name=_ACTIVE, low_cpu_mem_usage=True)
        model.eval()
    return model


def _record_layer_arguments(inner: Any, state: torch.Tensor) -> list[dict[str, Any]]:
    """Run the model's forward pass and return the keyword arguments of every layer."""
    import torch

    class Recorder(torch.nn.Module):  # type: ignore[misc]
        arguments: Mapping[str, Any] = {}

        def forward(self, hidden: torch.Tensor, **arguments: Any) -> torch.Tensor:
            self.arguments = arguments
            return hidden

    layers, norm = inner.layers, inner.norm
    recorders = [Recorder() for _ in layers]
    inner.layers, inner.norm = torch.nn.ModuleList(recorders), torch.nn.Identity()
    try:
        inner(inputs_embeds=state, use_cache=False)
    finally:
        inner.layers, inner.norm = layers, norm
    return [dict(recorder.arguments) for recorder in recorders]
