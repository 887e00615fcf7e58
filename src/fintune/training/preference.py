"""Preference training: TRL's DPOTrainer and KTOTrainer on rows that are tokenised already, and ORPO in the same loop.

The reference is the model with its adapter switched off, so no second model is held. TRL 1.16 has ORPO among its
experiments only, where it also trains the prompt and holds the logits of every position; here its loss is taken from
the answers alone, in DPOTrainer's loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from fintune.config import TrainOptions
from fintune.errors import FintuneError
from fintune.training.answer_figures import AnswerFigures
from fintune.training.collate import IGNORED
from fintune.training.evaluate import check_loss
from fintune.training.preference_rows import PairCollator, all_pairs, batches

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from peft import PeftModel
    from torch import nn
    from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments

    Batch = dict[str, Any]
    BadLoss = Callable[[int, Sequence[str], TrainingArguments], FintuneError]

FIGURES = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "rewards/chosen_right",
    "rewards/rejected_right",
    "logps/chosen",
    "logps/rejected",
    "kl",
)
"""What the trainers log of every step besides the loss, and what goes into metrics.jsonl: rewards are beta times the
log-probability that an answer has won over the reference (with orpo: over none, and a mean of its tokens), a margin is
chosen less rejected, accuracy the share of pairs with a positive one (not logged while kto trains). Of answers without
a partner the desired count as chosen, the undesired as rejected; the shares on the right side of zero are measured of
held-out answers alone."""


def arguments(options: TrainOptions) -> Callable[..., TrainingArguments]:
    """TRL's arguments, to be completed by those that every way of training has.

    Args:
        options: Objective, beta, weight of the chosen answers' loss; for ``kto`` both weights of the labels.
    """
    from trl import DPOConfig, KTOConfig

    # What is too long was left out when it was prepared; nothing is cut here.
    if options.objective == "kto":
        return partial(
            KTOConfig,
            max_length=None,
            beta=options.beta,
            desirable_weight=options.desirable_weight,
            undesirable_weight=options.undesirable_weight,
        )
    with_chosen = options.rpo_alpha > 0
    return partial(
        DPOConfig,
        max_length=None,
        beta=options.beta,
        loss_type=["sigmoid", "sft"] if with_chosen else ["sigmoid"],
        loss_weights=[1.0, options.rpo_alpha] if with_chosen else None,
    )


def make_trainer(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    args: TrainingArguments,
    options: TrainOptions,
    callbacks: Sequence[object],
    *,
    multiple: int,
    bad_loss: BadLoss,
) -> Trainer:
    """The trainer of a preference objective; its ``measure`` is for held-out pairs.

    Args:
        model: With a fresh adapter, whose first update is zero.
        tokenizer: With a padding token.
        rows: Columns ``id``, ``input_ids``, ``completion_mask`` (the chosen answer) and ``rejected_ids``, in the order
            of training; with answers that have no partner also ``label``.
        args: From :func:`arguments`.
        options: How to train.
        callbacks: Of transformers' Trainer.
        multiple: The width of a batch is rounded up to a multiple of this.
        bad_loss: Makes the error for a loss that is not finite, of the step, the pairs' ids and ``args``.
    """
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    trainer = _trainer_class(options, bad_loss)(
        model=model,
        args=args,
        data_collator=PairCollator(tokenizer.pad_token_id, multiple=multiple, single=options.objective == "kto"),
        train_dataset=rows,
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )
    # TRL keeps a copy of the adapter as the reference. Switched off, a fresh one is the same without the memory, and
    # the copy would be written into every checkpoint.
    if "ref" in model.peft_config:
        model.delete_adapter("ref")
    for weight in trained:
        weight.requires_grad_(True)
    return trainer


def _trainer_class(options: TrainOptions, bad_loss: BadLoss) -> type[Trainer]:
    import torch
    from trl import DPOTrainer, KTOTrainer

    base = KTOTrainer if options.objective == "kto" else DPOTrainer

    class PreferenceTrainer(base):  # type: ignore[misc, valid-type]
        """TRL's loop and losses, on rows of ``prepare``."""

        def _prepare_dataset(self, dataset: Dataset, *_: object) -> Dataset:
            return dataset  # tokenised by this package's one path

        def compute_loss(
            self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: object = None
        ) -> torch.Tensor:
            batch = {name: value for name, value in inputs.items() if name != "ids"}
            if options.objective == "orpo":
                mode = "train" if self.model.training else "eval"
                loss, figures = odds_ratio_loss(model, batch, options.beta)
                for name, value in figures.items():
                    self._metrics[mode][name].append(value)
            else:
                loss = super().compute_loss(model, batch)
            if self.model.training and not bool(loss.isfinite()):
                raise bad_loss(self.state.global_step + 1, inputs["ids"], self.args)
            return loss

        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            for metrics in self._metrics.values():
                for name in [name for name in metrics if name not in FIGURES]:
                    del metrics[name]  # of some, the head on a CPU computes nothing
            super().log(logs, start_time)

        def measure(self, model: nn.Module, rows: Dataset, order: Sequence[int], size: int) -> dict[str, float]:
            """Loss and figures over held-out rows: each pair counts the same, or for ``kto`` each answer.

            Args:
                model: In evaluation mode.
                rows: Pairs, or labelled answers.
                order: Their indices.
                size: Rows a forward pass.
            """
            found = self._of_answers if options.objective == "kto" else self._of_pairs
            return {f"eval_{name}": value for name, value in found(model, rows, order, size).items()}

        def _of_pairs(self, model: nn.Module, rows: Dataset, order: Sequence[int], size: int) -> dict[str, float]:
            totals: dict[str, float] = {}
            for batch_rows in batches(rows, order, size):
                found = self._evaluated(model, self.data_collator(batch_rows))
                check_loss(found["loss"], self.state.global_step, batch_rows, self.args)
                for name, value in found.items():
                    if name == "loss" or name in FIGURES:
                        totals[name] = totals.get(name, 0.0) + value * len(batch_rows)
            return {name: total / len(order) for name, total in totals.items()}

        def _of_answers(self, model: nn.Module, rows: Dataset, order: Sequence[int], size: int) -> dict[str, float]:
            answers, num_ranked = AnswerFigures(), 0
            for batch_rows in batches(rows, order, max(size, 2)):
                batch = self.data_collator(batch_rows)
                found = self._evaluated(model, batch)
                check_loss(found["loss"], self.state.global_step, batch_rows, self.args)
                logps, gained = self._gained(model, batch)
                rewards = (options.beta * gained).tolist()
                answers.add(batch["label"].tolist(), rewards, logps.tolist(), loss=found["loss"], kl=found["kl"])
                if all_pairs(rows):
                    chosen, rejected = gained.chunk(2)
                    num_ranked += int((chosen > rejected).sum())
            ranked = {"rewards/accuracies": num_ranked / len(order)} if all_pairs(rows) else {}
            return answers.figures() | ranked

        def _evaluated(self, model: nn.Module, batch: Batch) -> dict[str, float]:
            loss, *_ = self.prediction_step(model, batch, prediction_loss_only=True)
            found = {name: sum(values) / len(values) for name, values in self._metrics["eval"].items()}
            self._metrics["eval"].clear()
            return found | {"loss": float(loss)}

        def _gained(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
            """Log-probabilities of the answers, and what they have gained over the reference; shape [answers]."""
            inputs = self._prepare_inputs(batch)
            with torch.no_grad(), self.compute_loss_context_manager():
                policy = answer_logps(model, inputs).sum(1)
                with self.accelerator.unwrap_model(self.model).disable_adapter():
                    reference = answer_logps(model, inputs).sum(1)
            return policy, policy - reference

    return PreferenceTrainer


def answer_logps(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Log-probability of each token of the answers.

    Args:
        model: With TRL's head, which scores the labelled positions alone.
        batch: ``input_ids``, ``attention_mask``, ``completion_mask``, each of shape [answers, width].

    Returns:
        Shape [answers, width - 1], zero where there is no answer.
    """
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORED)
    output = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels, fused_lm_head=True
    )
    log_probs: torch.Tensor = output.log_probs
    return log_probs


def odds_ratio_loss(model: nn.Module, batch: Batch, weight: float) -> tuple[torch.Tensor, dict[str, float]]:
    """ORPO (arXiv 2403.07691, equations 1 and 6): the chosen answer's loss, and the odds of chosen against rejected.

    Args:
        model: With TRL's head.
        batch: Chosen answers in the first half of the rows, rejected ones in the second.
        weight: Of the odds ratio, the paper's lambda.

    Returns:
        The loss, a mean over pairs in which each answer counts by the mean of its tokens; and figures to log.
    """
    import torch

    logps = answer_logps(model, batch).float()
    means = logps.sum(1) / batch["completion_mask"][:, 1:].sum(1)
    chosen, rejected = means.chunk(2)
    # log odds(p) = log p - log(1 - p); a mean over tokens is below zero, but rounds to it for a sure answer.
    odds = [mean - torch.log(-torch.expm1(mean.clamp(max=-1e-6))) for mean in (chosen, rejected)]
    ratio = torch.nn.functional.logsigmoid(odds[0] - odds[1])
    loss = (-chosen - weight * ratio).mean()
    with torch.no_grad():
        figures = {
            "rewards/chosen": weight * chosen.mean(),
            "rewards/rejected": weight * rejected.mean(),
            "rewards/margins": weight * (chosen - rejected).mean(),
            "rewards/accuracies": (chosen > rejected).float().mean(),
            "logps/chosen": chosen.mean(),
            "logps/rejected": rejected.mean(),
        }
    return loss, {name: float(value) for name, value in figures.items()}
