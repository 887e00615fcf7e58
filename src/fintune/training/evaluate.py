"""Evaluations during training: loss and accuracy on the evaluation split, the best weights, early stopping.

The record of the evaluations is ``metrics.jsonl`` alone. A resumed run truncates it after its checkpoint, and so it
decides as the uninterrupted run does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fintune.config import TrainOptions
from fintune.errors import FintuneError
from fintune.training import checkpoints, distributed, metrics
from fintune.training.batches import IGNORED

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import nn
    from transformers import Trainer, TrainingArguments

_MAX_NAMED_EXAMPLES = 32


@dataclass(frozen=True)
class Evaluation:
    """The evaluation data.

    Attributes:
        rows: Rows with the columns ``id``, ``input_ids``, ``completion_mask``.
        accuracy: Computes the execution accuracy of a model, from 0 to 1; None if the loss is enough.
    """

    rows: Dataset
    accuracy: Callable[[Any], float] | None = None


class Evaluator:
    """Replaces the trainer's own ``evaluate``, whose loss is a mean of the batches' means.

    Args:
        trainer: Its model and collator are used.
        evaluation: The evaluation data.
        options: Batch size, which weights to keep, patience.
        folder: Folder with ``metrics.jsonl``, which also gets ``best/``.
        measure: Computes ``eval_loss`` and other figures from a model, rows and their order. Default: the loss of the
            completions.
    """

    def __init__(
        self,
        trainer: Trainer,
        evaluation: Evaluation,
        options: TrainOptions,
        folder: Path,
        *,
        measure: Callable[[nn.Module, Dataset, Sequence[int]], dict[str, float]] | None = None,
    ) -> None:
        self._trainer, self._evaluation, self._options, self._folder = trainer, evaluation, options, folder
        self._measure, self._batch_size = measure, options.per_device_train_batch_size
        lengths = [len(ids) for ids in evaluation.rows["input_ids"]]
        self._order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
        self.seconds = 0.0
        """Time of all evaluations in this process."""

    def __call__(self, *_: object, **__: object) -> dict[str, float]:
        """Evaluate and log; save the weights if they are the best so far, and stop if patience has run out.

        Raises:
            FintuneError: The loss is not finite.
        """
        started = time.monotonic()
        trainer, step = self._trainer, self._trainer.state.global_step
        trainer.control.should_evaluate = False  # otherwise the end of the epoch evaluates once more
        model = trainer.model_wrapped
        model.eval()
        # The router loss of a mixture of experts regularizes the training and is no part of a held-out loss.
        routed, trainer.aux_loss_enabled = getattr(trainer, "aux_loss_enabled", False), False
        try:
            if self._measure is None:
                figures = {"eval_loss": self._loss(model)}
            else:
                figures = self._measure(model, self._evaluation.rows, self._order)
            if self._evaluation.accuracy is not None:
                figures["eval_accuracy"] = self._accuracy(self._evaluation.accuracy)
            self.seconds += time.monotonic() - started
            trainer.log(dict(figures))
        finally:
            trainer.aux_loss_enabled = routed
            model.train()
        distributed.barrier()  # until the line is written
        lines = metrics.read(self._folder / "metrics.jsonl")
        select = self._options.select_checkpoint
        if select != "last" and metrics.best_step(lines, select) == step and distributed.is_main():
            checkpoints.save_best(trainer.model, self._folder / checkpoints.BEST_FOLDER, step)
        if metrics.is_out_of_patience(lines, self._options):
            # With a checkpoint, a resumed run knows that training is over.
            trainer.control.should_training_stop = trainer.control.should_save = True
        return figures

    def _loss(self, model: nn.Module) -> float:
        """Return the mean loss over all trained tokens of the split."""
        import torch

        total, num_tokens = 0.0, 0
        rows, size = self._evaluation.rows, self._batch_size
        for start, counts in distributed.padded_rank_share(range(0, len(self._order), size)):
            members = [rows[index] for index in self._order[start : start + size]]
            batch = self._trainer.data_collator(members)
            num_labels = int((batch["labels"][:, 1:] != IGNORED).sum())
            with torch.no_grad():
                loss = self._trainer.prediction_step(model, batch, prediction_loss_only=True)[0]
            if not isfinite(float(loss)):
                problem = f"the evaluation loss is not finite after step {self._trainer.state.global_step}"
                raise non_finite_error(problem, [str(row["id"]) for row in members], self._trainer.args)
            total += float(loss) * num_labels * counts
            num_tokens += num_labels * counts
        total, num_all = distributed.all_reduce_sum([total, num_tokens])
        return total / num_all

    def _accuracy(self, accuracy: Callable[[Any], float]) -> float:
        import torch

        args, model = self._trainer.args, self._trainer.model
        dtype = torch.float16 if args.fp16 else torch.bfloat16
        with torch.autocast(model.device.type, dtype, enabled=args.bf16 or args.fp16):
            return accuracy(model)


def non_finite_error(problem: str, examples: Sequence[str], args: TrainingArguments) -> FintuneError:
    """Make the error for figures that are not finite.

    Args:
        problem: Which figure is not finite, and at which step.
        examples: Ids of the examples that the figure is computed from.
        args: Arguments of the trainer, which show whether it computes in 16 bits.
    """
    names = ", ".join(examples[:_MAX_NAMED_EXAMPLES])
    more = f" and {len(examples) - _MAX_NAMED_EXAMPLES} more" if len(examples) > _MAX_NAMED_EXAMPLES else ""
    wider = ", or set train.dtype to float32" if args.bf16 or args.fp16 else ""
    return FintuneError(
        f"{problem}; examples {names}{more}", hint=f"lower train.learning_rate{wider}", option="train.learning_rate"
    )
