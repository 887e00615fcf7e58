"""Preference training: TRL's DPOTrainer and KTOTrainer on tokenised rows, and ORPO in the same loop.

The reference is the model with its adapter switched off, so no second model is held. TRL 1.16 has ORPO only among its
experiments, where it also trains the prompt and holds the logits of every position. Here its loss is computed from the
answers alone, in DPOTrainer's loop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from fintune.config import TrainOptions
from fintune.errors import ArtifactError
from fintune.training.batches import IGNORED, PreferenceCollator, batch_preference_rows
from fintune.training.evaluate import bad_loss_error, check_eval_loss

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from peft import PeftModel
    from torch import nn
    from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments

    Batch = dict[str, Any]

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
"""Figures that are logged for every step besides the loss, and written to metrics.jsonl.

A reward is beta times the log-probability that an answer has gained over the reference. With ORPO, which has no
reference, it is beta times the mean log-probability of a token. A margin is the chosen reward less the rejected one.
The accuracy is the share of pairs with a positive margin; it is not logged while KTO trains. Of unpaired answers, the
desired ones count as chosen and the undesired ones as rejected. ``..._right`` is the share of answers on the right side
of the reference, measured on held-out answers only."""

MAX_DESIRED_RATIO = 4 / 3
"""Largest total weight of the desired answers, relative to the undesired ones (arXiv 2402.01306, section 4)."""


# -- labels and their weights


def preference_lengths(rows: Dataset) -> list[int]:
    """Return the tokens that the model reads for each row: for a pair, the prompt twice and both answers.

    Raises:
        ArtifactError: The rows are neither pairs nor labelled answers.
    """
    if "rejected_ids" not in rows.column_names:
        raise ArtifactError("the prepared rows are not preference pairs", hint="rerun prepare")
    masks = zip(rows["input_ids"], rows["completion_mask"], rows["rejected_ids"], strict=True)
    return [len(ids) + (mask.index(1) + len(rejected) if rejected else 0) for ids, mask, rejected in masks]


def is_all_pairs(rows: Dataset) -> bool:
    """Whether every row has both answers."""
    return "label" not in rows.column_names


def row_labels(rows: Dataset) -> list[bool] | None:
    """Return whether each row's own answer is desired; None if all rows are pairs, or no preferences."""
    return None if is_all_pairs(rows) else list(rows["label"])


def count_labels(rows: Dataset) -> tuple[int, int]:
    """Count desired and undesired answers. A pair has one of each."""
    if is_all_pairs(rows):
        return len(rows), len(rows)
    num_desired = sum(rows["label"])
    return num_desired, len(rows) - num_desired + sum(bool(rejected) for rejected in rows["rejected_ids"])


def label_weights(options: TrainOptions, num_desired: int, num_undesired: int) -> tuple[float, float]:
    """Return the weights of desired and undesired answers in KTO's loss.

    A weight that the options leave open is chosen as close to 1 as possible, such that the desired answers together
    weigh as much as the undesired ones, or up to a third more. If both are open, the weight of the fewer answers is
    raised.

    Args:
        options: Options with ``desirable_weight`` and ``undesirable_weight``.
        num_desired: Number of desired answers, at least one.
        num_undesired: Number of undesired answers, at least one.
    """
    ratio = num_desired / num_undesired
    desired, undesired = options.desirable_weight, options.undesirable_weight
    if desired is None and undesired is None:
        desired = max(1.0, 1 / ratio)
    if desired is None:
        assert undesired is not None, "one of them is set"
        desired = _closest_to_one(undesired / ratio, MAX_DESIRED_RATIO * undesired / ratio)
    elif undesired is None:
        undesired = _closest_to_one(desired * ratio / MAX_DESIRED_RATIO, desired * ratio)
    return desired, undesired


def _closest_to_one(low: float, high: float) -> float:
    return min(max(1.0, low), high)


def with_label_weights(options: TrainOptions, rows: Dataset) -> TrainOptions:
    """Fill in both label weights of KTO; the options of other objectives are unchanged."""
    if options.objective != "kto":
        return options
    desired, undesired = label_weights(options, *count_labels(rows))
    return options.model_copy(update={"desirable_weight": desired, "undesirable_weight": undesired})


def label_facts(options: TrainOptions, rows: Dataset) -> dict[str, float]:
    """Return for KTO the number and weight of the answers with each label; nothing for other objectives.

    Args:
        options: Training options.
        rows: Rows to train on.
    """
    if options.objective != "kto":
        return {}
    num_desired, num_undesired = count_labels(rows)
    desired, undesired = label_weights(options, num_desired, num_undesired)
    return {
        "num_desired": num_desired,
        "num_undesired": num_undesired,
        "desirable_weight": round(desired, 6),
        "undesirable_weight": round(undesired, 6),
    }


def format_label_facts(facts: Mapping[str, float]) -> str:
    """Format the result of :func:`label_facts` as a line for the user."""
    share = facts["num_desired"] * facts["desirable_weight"] / (facts["num_undesired"] * facts["undesirable_weight"])
    is_within = 0.995 < share < MAX_DESIRED_RATIO + 0.005
    remark = "" if is_within else " (the paper keeps this between 1 and 1.33)"
    desired, undesired = (
        f"{facts[f'num_{label}']} {label} answers of weight {facts[weight]:.3g}"
        for label, weight in (("desired", "desirable_weight"), ("undesired", "undesirable_weight"))
    )
    return f"kto: {desired}, {undesired}, together {share:.2f} to 1{remark}"


# -- the trainer


def partial_arguments(options: TrainOptions) -> Callable[..., TrainingArguments]:
    """Return TRL's arguments class with what is special to a preference objective filled in.

    Args:
        options: Objective, beta, weight of the chosen answers' loss; for KTO both label weights.
    """
    from trl import DPOConfig, KTOConfig

    # max_length=None: rows that are too long were dropped by prepare, and nothing is truncated here.
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


def make_preference_trainer(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    args: TrainingArguments,
    options: TrainOptions,
    callbacks: Sequence[object],
    *,
    multiple: int,
) -> Trainer:
    """Make the trainer of a preference objective. Its method ``measure`` evaluates held-out rows.

    Args:
        model: A model with a new adapter, whose update is zero.
        tokenizer: A tokenizer with a padding token.
        rows: Rows with the columns ``id``, ``input_ids``, ``completion_mask`` (the chosen answer) and
            ``rejected_ids``, in the order of training; also ``label`` if some answers are unpaired.
        args: Arguments made with :func:`partial_arguments`.
        options: Training options.
        callbacks: Callbacks for transformers' Trainer.
        multiple: The width of a batch is rounded up to a multiple of this.
    """
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    trainer = _trainer_class(options)(
        model=model,
        args=args,
        data_collator=PreferenceCollator(
            tokenizer.pad_token_id, multiple=multiple, unpaired=options.objective == "kto"
        ),
        train_dataset=rows,
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )
    # TRL copies the adapter as the reference. A new adapter that is switched off is the same without the memory, and
    # the copy would be written into every checkpoint.
    if "ref" in model.peft_config:
        model.delete_adapter("ref")
    for weight in trained:
        weight.requires_grad_(True)
    return trainer


def _trainer_class(options: TrainOptions) -> type[Trainer]:
    import torch
    from trl import DPOTrainer, KTOTrainer

    base = KTOTrainer if options.objective == "kto" else DPOTrainer

    class PreferenceTrainer(base):  # type: ignore[misc, valid-type]
        """TRL's loop and losses on prepared rows."""

        def _prepare_dataset(self, dataset: Dataset, *_: object) -> Dataset:
            return dataset  # it is tokenised already

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
                raise bad_loss_error(self.state.global_step + 1, inputs["ids"], self.args)
            return loss

        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            for metrics in self._metrics.values():
                for name in [name for name in metrics if name not in FIGURES]:
                    del metrics[name]  # the head on a CPU leaves some of them at zero
            super().log(logs, start_time)

        def measure(self, model: nn.Module, rows: Dataset, order: Sequence[int], size: int) -> dict[str, float]:
            """Compute loss and figures over held-out rows; each pair counts the same, or with KTO each answer.

            Args:
                model: A model in evaluation mode.
                rows: Pairs or labelled answers.
                order: Indices of the rows.
                size: Rows of a forward pass.
            """
            measure = self._measure_answers if options.objective == "kto" else self._measure_pairs
            return {f"eval_{name}": value for name, value in measure(model, rows, order, size).items()}

        def _measure_pairs(self, model: nn.Module, rows: Dataset, order: Sequence[int], size: int) -> dict[str, float]:
            totals: dict[str, float] = {}
            for batch_rows in batch_preference_rows(rows, order, size):
                figures = self._evaluate_batch(model, self.data_collator(batch_rows))
                check_eval_loss(figures["loss"], self.state.global_step, batch_rows, self.args)
                for name, value in figures.items():
                    if name == "loss" or name in FIGURES:
                        totals[name] = totals.get(name, 0.0) + value * len(batch_rows)
            return {name: total / len(order) for name, total in totals.items()}

        def _measure_answers(
            self, model: nn.Module, rows: Dataset, order: Sequence[int], size: int
        ) -> dict[str, float]:
            answers, num_ranked = AnswerFigures(), 0
            for batch_rows in batch_preference_rows(rows, order, max(size, 2)):
                batch = self.data_collator(batch_rows)
                figures = self._evaluate_batch(model, batch)
                check_eval_loss(figures["loss"], self.state.global_step, batch_rows, self.args)
                logps, gains = self._gains(model, batch)
                rewards = (options.beta * gains).tolist()
                answers.add(batch["label"].tolist(), rewards, logps.tolist(), loss=figures["loss"], kl=figures["kl"])
                if is_all_pairs(rows):
                    chosen, rejected = gains.chunk(2)
                    num_ranked += int((chosen > rejected).sum())
            ranked = {"rewards/accuracies": num_ranked / len(order)} if is_all_pairs(rows) else {}
            return answers.figures() | ranked

        def _evaluate_batch(self, model: nn.Module, batch: Batch) -> dict[str, float]:
            loss, *_ = self.prediction_step(model, batch, prediction_loss_only=True)
            figures = {name: sum(values) / len(values) for name, values in self._metrics["eval"].items()}
            self._metrics["eval"].clear()
            return figures | {"loss": float(loss)}

        def _gains(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
            """Return log-probabilities of the answers, and their gain over the reference; shape [answers]."""
            inputs = self._prepare_inputs(batch)
            with torch.no_grad(), self.compute_loss_context_manager():
                policy = answer_logps(model, inputs).sum(1)
                with self.accelerator.unwrap_model(self.model).disable_adapter():
                    reference = answer_logps(model, inputs).sum(1)
            return policy, policy - reference

    return PreferenceTrainer


def answer_logps(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Compute the log-probability of each token of the answers.

    Args:
        model: A model with TRL's head, which scores the labelled positions alone.
        batch: ``input_ids``, ``attention_mask``, ``completion_mask``, each of shape [answers, width].

    Returns:
        Shape [answers, width - 1], zero outside the answers.
    """
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORED)
    output = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels, fused_lm_head=True
    )
    log_probs: torch.Tensor = output.log_probs
    return log_probs


def odds_ratio_loss(model: nn.Module, batch: Batch, weight: float) -> tuple[torch.Tensor, dict[str, float]]:
    """Compute ORPO's loss (arXiv 2403.07691, equations 1 and 6): the chosen answer's loss, and chosen against rejected.

    Args:
        model: A model with TRL's head.
        batch: Chosen answers in the first half of the rows, rejected ones in the second.
        weight: Weight of the odds ratio, the paper's lambda.

    Returns:
        The loss, a mean over pairs in which each answer counts by the mean of its tokens; and figures to log.
    """
    import torch

    logps = answer_logps(model, batch).float()
    means = logps.sum(1) / batch["completion_mask"][:, 1:].sum(1)
    chosen, rejected = means.chunk(2)
    # log odds(p) = log p - log(1 - p). The mean over tokens is below zero, but rounds to zero for a certain answer.
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


@dataclass
class AnswerFigures:
    """Sums up batches of labelled held-out answers; every answer counts the same.

    A reward is beta times the log-probability that an answer has gained over the reference. Desired answers belong
    above zero, undesired ones below.
    """

    _rewards: dict[bool, list[float]] = field(default_factory=lambda: {True: [], False: []})
    _logps: dict[bool, list[float]] = field(default_factory=lambda: {True: [], False: []})
    _loss: float = 0.0
    _kl: float = 0.0

    def add(
        self, labels: Sequence[bool], rewards: Sequence[float], logps: Sequence[float], *, loss: float, kl: float
    ) -> None:
        """Add a batch.

        Args:
            labels: Label of each answer.
            rewards: Reward of each answer.
            logps: Log-probability of each answer.
            loss: Mean loss of the answers.
            kl: Estimate of the divergence from the reference, in nats per answer.
        """
        for label, reward, logp in zip(labels, rewards, logps, strict=True):
            self._rewards[label].append(reward)
            self._logps[label].append(logp)
        self._loss += loss * len(labels)
        self._kl += kl * len(labels)

    def figures(self) -> dict[str, float]:
        """Return the loss and what :data:`FIGURES` names, without the figures of a label that no answer has.

        ``rewards/chosen_right`` and ``rewards/rejected_right`` are the shares on the right side of zero.
        """
        num_answers = sum(map(len, self._rewards.values()))
        figures = {"loss": self._loss / num_answers, "kl": self._kl / num_answers}
        for label, name, sign in ((True, "chosen", 1), (False, "rejected", -1)):
            rewards = self._rewards[label]
            if rewards:
                figures[f"rewards/{name}"] = sum(rewards) / len(rewards)
                figures[f"rewards/{name}_right"] = sum(sign * reward > 0 for reward in rewards) / len(rewards)
                figures[f"logps/{name}"] = sum(self._logps[label]) / len(rewards)
        if all(self._rewards.values()):
            figures["rewards/margins"] = figures["rewards/chosen"] - figures["rewards/rejected"]
        return figures
