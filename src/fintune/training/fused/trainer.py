"""TRL's SFTTrainer with the loss computed through the fused layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from trl import SFTTrainer

from fintune.training.fused.batch import SequenceBounds
from fintune.training.fused.model import FusedModel


class FusedTrainer(SFTTrainer):  # type: ignore[misc]
    """SFTTrainer on batches of :class:`fintune.training.fused.batch.PackedCollator`.

    Args:
        options: Keyword arguments of :class:`FusedModel`.
        arguments: Keyword arguments of SFTTrainer.
    """

    def __init__(self, *, options: dict[str, Any], **arguments: Any) -> None:
        super().__init__(**arguments)
        self._options = options
        self._fused: FusedModel | None = None
        self._losses: list[tuple[tuple[str, ...], Tensor]] = []
        self._num_parameters = 0
        # Walking over the modules of an adapted model for its few parameters takes as long as several layers.
        self._trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.model.zero_grad = self._zero_grad

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """Compute the loss of a batch. SFTTrainer's other figures are left out, because each makes the CPU wait."""
        assert not return_outputs, "prediction_step asks for the loss alone"
        if self._fused is None:
            # Not earlier: when training starts, resuming puts the checkpoint's adapter into the model.
            self._fused = FusedModel(self.accelerator.unwrap_model(model), **self._options)
        num_labels = num_items_in_batch if num_items_in_batch is not None else len(inputs["targets"])
        with torch.autocast(inputs["input_ids"].device.type, enabled=False):
            loss = self._fused.loss(
                inputs["input_ids"][0],
                inputs["position_ids"][0],
                SequenceBounds(inputs["lengths"], inputs["offsets"]),
                inputs["rows"],
                inputs["targets"],
                num_labels,
                training=model.training,
            )
        if not model.training:
            return loss.mean
        self._losses.append((inputs["ids"], loss.mean.detach()))
        # The mean of the processes' gradients has to be the gradient of the sum of their losses.
        return loss.mean * self.args.world_size if self.args.world_size > 1 else loss.mean

    def examples_of_bad_losses(self) -> list[str]:
        """Return the examples of the batches since the last call whose loss is not finite; waits for the GPU once."""
        losses, self._losses = self._losses, []
        if not losses or bool(torch.stack([loss for _, loss in losses]).isfinite().all()):
            return []
        return [example for ids, loss in losses if not bool(loss.isfinite()) for example in ids]

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Run the forward and backward pass, without a walk over all modules to switch them to training."""
        if not model.training:
            model.train()
        inputs = self._prepare_inputs(inputs)
        loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        if num_items_in_batch is None:
            loss = loss / self.current_gradient_accumulation_steps
        self.accelerator.backward(loss)
        return loss.detach()

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, None, None]:
        """Return the loss of a batch and no logits, which TRL before 1.15 would ask for."""
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)), None, None

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Estimate the operations as transformers does, with the parameters counted once a run."""
        if not self._num_parameters:
            self._num_parameters = sum(weight.numel() for weight in self.model.parameters())
        return int(6 * inputs["input_ids"].numel() * self._num_parameters)

    def _clip_grad_norm(self, model: Any) -> Any:
        self.accelerator.unscale_gradients()
        return torch.nn.utils.clip_grad_norm_(self._trained, self.args.max_grad_norm)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        # A number would make the optimizer wait for the GPU. The log converts the tensor when it needs the number.
        return super()._get_grad_norm(model, grad_norm) if grad_norm is None else grad_norm

    def _zero_grad(self, set_to_none: bool = True) -> None:
        for weight in self._trained:
            weight.grad = None
