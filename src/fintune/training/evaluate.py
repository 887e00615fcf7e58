"""Evaluations while training: loss and accuracy on the evaluation split, the best weights, the end of patience.

What has been evaluated stands in ``metrics.jsonl`` alone, which a resumed run cuts behind its checkpoint; so it decides
as the uninterrupted run does.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fintune.config import TrainOptions
from fintune.errors import FintuneError
from fintune.training import metrics, ranks
from fintune.training.collate import IGNORED

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import nn
    from transformers import Trainer, TrainingArguments

BEST = "best"
"""Folder of the best weights so far, below that of ``train``, while it works."""

_WEIGHTS = "weights.safetensors"
_NUM_NAMED = 32


@dataclass(frozen=True)
class Evaluation:
    """What is evaluated.

    Attributes:
        rows: Columns ``id``, ``input_ids``, ``completion_mask``.
        accuracy: Execution accuracy of a model, from 0 to 1; None where it is not asked for.
    """

    rows: Dataset
    accuracy: Callable[[Any], float] | None = None


def best_step(lines: Sequence[Mapping[str, Any]], keep: str) -> int | None:
    """Step of the best evaluation, the first of equals; None before the first.

    Args:
        lines: Of ``metrics.jsonl``.
        keep: ``train.select_checkpoint``; ``last`` goes by the loss.
    """
    evaluated = [line for line in lines if "eval_loss" in line]
    if not evaluated:
        return None
    if keep == "best_accuracy":
        return int(max(evaluated, key=lambda line: line["eval_accuracy"])["step"])
    return int(min(evaluated, key=lambda line: line["eval_loss"])["step"])


def out_of_patience(lines: Sequence[Mapping[str, Any]], options: TrainOptions) -> bool:
    """Whether the last ``train.early_stopping_patience`` evaluations were no better than one before them."""
    best = best_step(lines, options.select_checkpoint)
    if options.early_stopping_patience is None or best is None:
        return False
    behind = [line for line in lines if "eval_loss" in line and line["step"] > best]
    return len(behind) >= options.early_stopping_patience


class Evaluator:
    """Takes the place of the trainer's own ``evaluate``, whose loss is a mean of the batches' means.

    Args:
        trainer: Whose model and collator are used.
        evaluation: What is evaluated.
        options: Batch size, what to keep, patience.
        folder: Holds ``metrics.jsonl``; gets ``best/``.
        measure: ``eval_loss`` and other figures of a model on rows in an order, so many a pass; the loss of the
            completions where None.
    """

    def __init__(
        self,
        trainer: Trainer,
        evaluation: Evaluation,
        options: TrainOptions,
        folder: Path,
        *,
        measure: Callable[[nn.Module, Dataset, Sequence[int], int], dict[str, float]] | None = None,
    ) -> None:
        self._trainer, self._evaluation, self._options, self._folder = trainer, evaluation, options, folder
        self._measure = measure
        lengths = [len(ids) for ids in evaluation.rows["input_ids"]]
        self._order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
        self.seconds = 0.0
        """Time of all evaluations since the start."""

    def __call__(self, *_: object, **__: object) -> dict[str, float]:
        """Evaluate, log, keep the weights where they are the best so far, stop training where patience is over.

        Raises:
            FintuneError: The loss is not finite.
        """
        started = time.monotonic()
        trainer, step = self._trainer, self._trainer.state.global_step
        trainer.control.should_evaluate = False  # else the end of the epoch evaluates once more
        model = trainer.model_wrapped
        model.eval()
        try:
            if self._measure is None:
                found = {"eval_loss": self._loss(model)}
            else:
                found = self._measure(
                    model, self._evaluation.rows, self._order, self._options.per_device_train_batch_size
                )
            if self._evaluation.accuracy is not None:
                found["eval_accuracy"] = self._accuracy(self._evaluation.accuracy)
            self.seconds += time.monotonic() - started
            trainer.log(dict(found))
        finally:
            model.train()
        ranks.wait()  # the line is written
        lines = metrics.read(self._folder / "metrics.jsonl")
        if (
            self._options.select_checkpoint != "last"
            and best_step(lines, self._options.select_checkpoint) == step
            and ranks.leads()
        ):
            save_best(trainer.model, self._folder / BEST, step)
        if out_of_patience(lines, self._options):
            # The checkpoint makes sure that a resumed run knows that it is over.
            trainer.control.should_training_stop = trainer.control.should_save = True
        return found

    def _loss(self, model: nn.Module) -> float:
        """Mean over all trained tokens of the split."""
        import torch

        total, num_tokens = 0.0, 0
        rows, size = self._evaluation.rows, self._options.per_device_train_batch_size
        for start, counts in ranks.padded_share(range(0, len(self._order), size)):
            members = [rows[index] for index in self._order[start : start + size]]
            batch = self._trainer.data_collator(members)
            num_labels = int((batch["labels"][:, 1:] != IGNORED).sum())
            with torch.no_grad():
                loss = self._trainer.prediction_step(model, batch, prediction_loss_only=True)[0]
            check_loss(float(loss), self._trainer.state.global_step, members, self._trainer.args)
            total += float(loss) * num_labels * counts
            num_tokens += num_labels * counts
        total, num_all = ranks.total([total, num_tokens])
        return total / num_all

    def _accuracy(self, accuracy: Callable[[Any], float]) -> float:
        import torch

        args, model = self._trainer.args, self._trainer.model
        dtype = torch.float16 if args.fp16 else torch.bfloat16
        with torch.autocast(model.device.type, dtype, enabled=args.bf16 or args.fp16):
            return accuracy(model)


def not_finite(what: str, examples: Sequence[str], args: TrainingArguments) -> FintuneError:
    """What stops a run whose figures are not finite.

    Args:
        what: That they are not, and when.
        examples: Ids of those that the figures are from.
        args: The trainer's, which name a type of 16 bits where it computes in one.
    """
    told = ", ".join(examples[:_NUM_NAMED])
    more = f" and {len(examples) - _NUM_NAMED} more" if len(examples) > _NUM_NAMED else ""
    wider = ", or set train.dtype to float32" if args.bf16 or args.fp16 else ""
    return FintuneError(
        f"{what}; examples {told}{more}", hint=f"lower train.learning_rate{wider}", option="train.learning_rate"
    )


def check_loss(loss: float, step: int, rows: Sequence[Mapping[str, Any]], args: TrainingArguments) -> None:
    """Stop at an evaluation loss that is not finite.

    Args:
        loss: Of one batch.
        step: Behind which it is taken.
        rows: Of the batch, with their ``id``.
        args: The trainer's.

    Raises:
        FintuneError: With the step and the ids.
    """
    if not isfinite(loss):
        ids = [str(row["id"]) for row in rows]
        raise not_finite(f"the evaluation loss is not finite behind step {step}", ids, args)


def save_best(model: nn.Module, folder: Path, step: int) -> None:
    """Keep the trained weights of a step.

    Args:
        model: Those of its weights that take a gradient are kept.
        folder: Gets ``step-N``, which appears at once.
        step: N.
    """
    from safetensors.torch import save_file

    beside, there = folder / f".step-{step}.tmp", folder / f"step-{step}"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    weights = {name: weight.detach().contiguous() for name, weight in model.named_parameters() if weight.requires_grad}
    save_file(weights, beside / _WEIGHTS)
    with (beside / _WEIGHTS).open("rb") as file:
        os.fsync(file.fileno())
    shutil.rmtree(there, ignore_errors=True)
    beside.replace(there)


def load_best(model: nn.Module, folder: Path, step: int) -> None:
    """Put the kept weights of a step back into the model."""
    import torch
    from safetensors.torch import load_file

    kept = load_file(folder / f"step-{step}" / _WEIGHTS)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                weight.copy_(kept[name])


def drop_others(folder: Path, step: int | None) -> None:
    """Remove all kept weights but those of a step.

    To be called when a checkpoint at or behind that step is complete: from an older one, a resumed run may need older
    weights.
    """
    for path in folder.glob("*"):
        if path.name != f"step-{step}":
            shutil.rmtree(path)
