"""Computes an importance matrix: texts run through a model, the inputs of each matrix are squared and summed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fintune.errors import DataError
from fintune.export.gguf.families import gguf_name
from fintune.export.gguf.importance import write_importance

if TYPE_CHECKING:
    import torch
    from torch import nn

_CHUNK_TOKENS = 512
"""The run that llama.cpp's tool counts in by default."""


def collect_importance(
    model: nn.Module, texts: Iterable[Sequence[int]], path: Path, *, dataset: str, max_tokens: int
) -> int:
    """Write the importance matrix of a model over texts.

    Args:
        model: A causal model of a family that can be exported, whose weights are those that will be.
        texts: Token ids of each text, run from its beginning.
        path: The file, in llama.cpp's GGUF format.
        dataset: What the file says that it was computed on.
        max_tokens: No further text is begun after so many tokens.

    Returns:
        The number of tokens.

    Raises:
        DataError: No text.
    """
    import torch

    sums: dict[str, torch.Tensor] = {}
    hooks = []
    num_layers = _num_layers(model)
    for module_name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        name = gguf_name(f"{module_name}.weight", num_layers)
        # As llama.cpp does, which leaves the output embedding alone.
        if name is not None and name.startswith("blk."):
            hooks.append(module.register_forward_pre_hook(_summing(sums, name)))
    num_tokens = 0
    try:
        with torch.inference_mode():
            for ids in texts:
                if num_tokens >= max_tokens:
                    break
                model(input_ids=torch.tensor([list(ids)], device=next(model.parameters()).device), logits_to_keep=1)
                num_tokens += len(ids)
    finally:
        for hook in hooks:
            hook.remove()
    if not num_tokens:
        raise DataError(f"{dataset} holds no text to compute an importance matrix on")
    totals = {name: total.float().cpu().numpy() for name, total in sums.items()}
    write_importance(
        path, totals, dict.fromkeys(totals, num_tokens), datasets=[dataset], chunk_size=min(_CHUNK_TOKENS, num_tokens)
    )
    return num_tokens


def _summing(sums: dict[str, torch.Tensor], name: str) -> Any:
    def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        rows = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).double()
        total = rows.square().sum(0)
        sums[name] = sums[name] + total if name in sums else total

    return hook


def _num_layers(model: nn.Module) -> int:
    numbers = [int(found[1]) for name, _ in model.named_modules() if (found := re.search(r"\.layers\.(\d+)\.", name))]
    return 1 + max(numbers, default=-1)
