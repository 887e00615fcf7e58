"""Two proofs on one row: what trains computes what the model computes, and what was saved is what was trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fintune.errors import ArtifactError, FintuneError
from fintune.util.text import first_line

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from torch import nn

_MAX_TOKENS = 256
_FLOAT32_SHARE = 2e-5
_ROUNDED_TIMES = 3
"""How much 4-bit rounding may grow while an adapter trains."""


def probe_tokens(rows: Dataset) -> list[int]:
    """Return the tokens of the first row, at most 256, whose logits fit beside any model."""
    return list(rows[0]["input_ids"][:_MAX_TOKENS])


def own_logits(model: nn.Module, ids: Sequence[int], *, compute: str | None = None) -> torch.Tensor:
    """Return the model's own logits of a row, float32 [tokens, vocabulary] on the CPU, without dropout.

    Args:
        model: A causal language model.
        ids: Tokens of the row.
        compute: Name of autocast's type; None or ``float32`` for none.
    """
    import torch

    device = next(model.parameters()).device
    is_16_bit = compute in ("bfloat16", "float16")
    was_training = model.training
    model.eval()
    try:
        with (
            torch.no_grad(),
            torch.autocast(device.type, getattr(torch, compute or "float32") if is_16_bit else None, enabled=is_16_bit),
        ):
            logits: torch.Tensor = model(input_ids=torch.tensor([list(ids)], device=device)).logits[0]
        return logits.float().cpu()
    finally:
        model.train(was_training)


def own_log_probs(model: nn.Module, ids: Sequence[int], *, compute: str | None = None) -> torch.Tensor:
    """Return the log-probability of each token after the first by the model's own logits, float32 [tokens - 1]."""
    import torch

    logits = own_logits(model, ids, compute=compute)
    return logits[:-1].log_softmax(-1).gather(1, torch.tensor(list(ids[1:]))[:, None])[:, 0]


def allowed_difference(values: torch.Tensor, dtype: torch.dtype) -> float:
    """Return the mean absolute difference from some values that rounding in a type explains."""
    import torch

    share = _FLOAT32_SHARE if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    return share * (1 + float(values.abs().mean()))


def check_saved(
    folder: Path,
    expected: torch.Tensor,
    ids: Sequence[int],
    load: Callable[[], Any],
    *,
    compute: str,
    start: torch.Tensor | None = None,
) -> None:
    """Check that a saved adapter or model has the logits of the trained model in memory.

    Args:
        folder: What was saved.
        expected: The trained model's logits, from :func:`own_logits`.
        ids: Their tokens.
        load: Loads the model again from its files.
        compute: Name of the torch type of matrix products.
        start: With LoftQ, the logits before training. How far they are from the base's is 4-bit rounding.

    Raises:
        ArtifactError: It does not load, or gives other logits; with the difference.
    """
    import torch

    try:
        model = load()
    except (FintuneError, RuntimeError, ValueError, KeyError, OSError) as error:
        raise ArtifactError(f"{folder}: what was trained cannot be loaded again ({first_line(error)})") from error
    difference = float((own_logits(model, ids, compute=compute) - expected).abs().mean())
    allowed = allowed_difference(expected, getattr(torch, compute))
    if start is not None:
        with model.disable_adapter():
            allowed += _ROUNDED_TIMES * float((own_logits(model, ids, compute=compute) - start).abs().mean())
    if not difference <= allowed:
        raise ArtifactError(
            f"{folder}: the logits of what was saved differ from the trained model by {difference:.2g} (rounding "
            f"explains {allowed:.2g})",
            hint="train with other adapter options, or report this as a bug",
        )
