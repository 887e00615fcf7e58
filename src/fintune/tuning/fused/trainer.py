"""TRL's trainer with the loss taken through this package's layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from trl import SFTTrainer

from fintune.tuning.fused.attend import Sequences
from fintune.tuning.fused.model import FusedModel


class FusedTrainer(SFTTrainer):  # type: ignore[misc]
    """SFTTrainer on batches of :class:`fintune.tuning.fused.batch.PackedCollator`.

    Args:
        options: Keywords of :class:`FusedModel`.
        arguments: Of SFTTrainer.
    """

    def __init__(self, *, options: dict[str, Any], **arguments: Any) -> None:
        super().__init__(**arguments)
        self._options = options
        self._fused: FusedModel | None = None
        self._losses: list[tuple[tuple[str, ...], Tensor]] = []

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """Loss of a batch; what SFTTrainer measures besides is left out, since each figure makes the GPU wait."""
        assert not return_outputs, "the layers give a loss, no logits"
        if self._fused is None:
            # Now, and not before: resuming puts the checkpoint's adapter into the model when training begins.
            self._fused = FusedModel(self.accelerator.unwrap_model(model), **self._options)
        num_labels = num_items_in_batch if num_items_in_batch is not None else len(inputs["targets"])
        with torch.autocast(inputs["input_ids"].device.type, enabled=False):
            loss = self._fused.loss(
                inputs["input_ids"][0],
                inputs["position_ids"][0],
                Sequences(inputs["lengths"], inputs["offsets"]),
                inputs["rows"],
                inputs["targets"],
                num_labels,
            )
        if model.training:
            self._losses.append((inputs["ids"], loss.mean.detach()))
        return loss.mean

    def examples_of_bad_losses(self) -> list[str]:
        """Examples of the batches since the last call whose loss is not finite; waits for the GPU once."""
        seen, self._losses = self._losses, []
        if not seen or bool(torch.stack([loss for _, loss in seen]).isfinite().all()):
            return []
        return [example for ids, loss in seen if not bool(loss.isfinite()) for example in ids]
