"""Preference training: the losses of DPO, ORPO and KTO in TRL's loop, on tokenised rows.

A batch of the trainer is a whole step, which is scored in passes of ``train.per_device_train_batch_size`` rows. Every
pair weighs the same in its step, and so does every answer with KTO, whatever the size of the passes. KTO's estimate of
the divergence is one figure of a step.

The reference is the model before training: the model with its adapter switched off, or with the adapter's first
weights. So no second model is held.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

from fintune.config import TrainOptions
from fintune.errors import ArtifactError
from fintune.training.batches import IGNORED, PreferenceCollator
from fintune.training.evaluate import non_finite_error

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
    "aux_loss",
)
"""Figures that are logged for every step besides the loss, and written to metrics.jsonl.

A reward is beta times the log-probability that an answer has gained over the reference. With ORPO, which has no
reference, it is beta times the mean log-probability of a token. A margin is the chosen reward less the rejected one.
The accuracy is the share of pairs with a positive margin. Of unpaired answers, the desired ones count as chosen and the
undesired ones as rejected. With KTO, ``..._right`` is the share of answers on the right side of the reference.
``aux_loss`` is the router loss of a mixture of experts, before its coefficient."""

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


def row_labels(rows: Dataset) -> list[bool] | None:
    """Return whether each row's own answer is desired; None if all rows are pairs, or no preferences."""
    return list(rows["label"]) if "label" in rows.column_names else None


def count_labels(rows: Dataset) -> tuple[int, int]:
    """Count desired and undesired answers. A pair has one of each."""
    labels = row_labels(rows)
    if labels is None:
        return len(rows), len(rows)
    return sum(labels), len(rows) - sum(labels) + sum(bool(rejected) for rejected in rows["rejected_ids"])


def label_weights(options: TrainOptions, num_desired: int, num_undesired: int) -> tuple[float, float]:
    """Return the weights of desired and undesired answers in KTO's loss, from at least one answer of each.

    A weight that the options leave open is chosen as close to 1 as possible, such that the desired answers together
    weigh as much as the undesired ones, or up to a third more. If both are open, the weight of the fewer answers is
    raised.
    """
    ratio = num_desired / num_undesired
    desired, undesired = options.desirable_weight, options.undesirable_weight
    if desired is None and undesired is None:
        desired = max(1.0, 1 / ratio)
    if desired is None:
        assert undesired is not None, "one of them is set"
        desired = min(max(1.0, undesired / ratio), MAX_DESIRED_RATIO * undesired / ratio)
    elif undesired is None:
        undesired = min(max(1.0, desired * ratio / MAX_DESIRED_RATIO), desired * ratio)
    return desired, undesired


def with_label_weights(options: TrainOptions, rows: Dataset) -> TrainOptions:
    """Fill in both label weights of KTO; the options of other objectives are unchanged."""
    if options.objective != "kto":
        return options
    desired, undesired = label_weights(options, *count_labels(rows))
    return options.model_copy(update={"desirable_weight": desired, "undesirable_weight": undesired})


def label_facts(options: TrainOptions, rows: Dataset) -> dict[str, float]:
    """Return for KTO the number and weight of the answers with each label; nothing for other objectives."""
    if options.objective != "kto":
        return {}
    counts = count_labels(rows)
    names = ("num_desired", "num_undesired", "desirable_weight", "undesirable_weight")
    weights = (round(weight, 6) for weight in label_weights(options, *counts))
    return dict(zip(names, (*counts, *weights), strict=True))


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


# -- losses


class Scores(NamedTuple):
    """What the losses of some answers are computed from; shape [answers] each.

    Attributes:
        policy: Log-probability of the answer.
        reference: The same of the reference; zero with ORPO.
        lengths: Number of tokens.
        desired: Whether the answer is desired. If all rows are pairs, the chosen and the rejected answers are in the
            same order.
    """

    policy: torch.Tensor
    reference: torch.Tensor
    lengths: torch.Tensor
    desired: torch.Tensor


def preference_losses(options: TrainOptions, scores: Scores, kl: torch.Tensor | float = 0.0) -> torch.Tensor:
    """Compute the loss of each pair, or with KTO of each answer.

    DPO is equation 7 of arXiv 2305.18290, with the chosen answer's mean loss of a token as in arXiv 2404.19733. KTO is
    equation 8 of arXiv 2402.01306. ORPO is equations 1 and 6 of arXiv 2403.07691.

    Args:
        options: Objective, beta and weights. With KTO, both label weights are set.
        scores: Chosen and rejected answers of the same pairs; with KTO any answers.
        kl: KTO's estimate of the divergence from the reference, in nats per answer.
    """
    import torch

    logsigmoid, desired, beta = torch.nn.functional.logsigmoid, scores.desired, options.beta
    means = scores.policy / scores.lengths
    if options.objective == "orpo":
        # log odds(p) = log p - log(1 - p). The mean over tokens is below zero, but rounds to zero for a certain answer.
        odds = means - torch.log(-torch.expm1(means.clamp(max=-1e-6)))
        return -means[desired] - beta * logsigmoid(odds[desired] - odds[~desired])
    gains = scores.policy - scores.reference
    if options.objective == "kto":
        assert options.desirable_weight and options.undesirable_weight, "filled in before training"
        losses = 1 - torch.sigmoid(beta * (gains[desired] - kl)), 1 - torch.sigmoid(beta * (kl - gains[~desired]))
        return torch.cat([options.desirable_weight * losses[0], options.undesirable_weight * losses[1]])
    losses_of_pairs = -logsigmoid(beta * (gains[desired] - gains[~desired]))
    return losses_of_pairs - options.rpo_alpha * means[desired] if options.rpo_alpha else losses_of_pairs


def preference_figures(
    options: TrainOptions, scores: Scores, kl: torch.Tensor | float, *, paired: bool
) -> dict[str, float]:
    """Return what :data:`FIGURES` names, without the figures of a label that no answer has.

    Args:
        options: Objective and beta.
        scores: Scores of a step, or of all held-out answers. Every answer counts the same.
        kl: KTO's estimate of the divergence.
        paired: Whether all rows are pairs.
    """
    values = scores.policy / scores.lengths if options.objective == "orpo" else scores.policy
    rewards = options.beta * (values - scores.reference)
    figures = {"kl": float(kl)} if options.objective == "kto" else {}
    for name, members, sign in (("chosen", scores.desired, 1), ("rejected", ~scores.desired, -1)):
        if bool(members.any()):
            figures[f"rewards/{name}"] = float(rewards[members].mean())
            figures[f"logps/{name}"] = float(values[members].mean())
            if options.objective == "kto":
                figures[f"rewards/{name}_right"] = float((sign * rewards[members] > 0).float().mean())
    if "rewards/chosen" in figures and "rewards/rejected" in figures:
        figures["rewards/margins"] = figures["rewards/chosen"] - figures["rewards/rejected"]
    if paired:
        wins = rewards[scores.desired] > rewards[~scores.desired]
        figures["rewards/accuracies"] = float(wins.float().mean())
    return figures


# -- the trainer


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
        model: A model with an adapter, as it is before training.
        tokenizer: A tokenizer with a padding token.
        rows: Rows with the columns ``id``, ``input_ids``, ``completion_mask`` (the chosen answer) and
            ``rejected_ids``, in the order of training; also ``label`` if some answers are unpaired.
        args: Arguments of :func:`fintune.training.trainers.make_arguments`.
        options: Training options.
        callbacks: Callbacks for transformers' Trainer.
        multiple: The width of a batch is rounded up to a multiple of this.
    """
    from trl.trainer.utils import disable_dropout_in_model

    disable_dropout_in_model(model)  # model and reference have to be equal at first
    # Copied before TRL rounds the adapter of 4-bit weights, see lora.adapter_in_float32.
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    starts_at_zero = not any(bool(weight.any()) for name, weight in trained.items() if "lora_B" in name)
    first = {} if starts_at_zero else {name: weight.detach().clone() for name, weight in trained.items()}
    collator = PreferenceCollator(
        tokenizer.pad_token_id,
        options.per_device_train_batch_size,
        multiple=multiple,
        unpaired=options.objective == "kto",
    )
    trainer = _trainer_class(options)(
        model=model,
        args=args,
        data_collator=collator,
        train_dataset=rows,
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )
    trainer.is_paired = row_labels(rows) is None
    trainer.first_weights = [(weight, first[name]) for name, weight in model.named_parameters() if name in first]
    return trainer


def _trainer_class(options: TrainOptions) -> type[Trainer]:
    import torch
    from trl import SFTTrainer

    class PreferenceTrainer(SFTTrainer):  # type: ignore[misc]
        """TRL's loop and output head with the losses of this module, on batches of ``PreferenceCollator``."""

        is_paired: bool
        first_weights: Sequence[tuple[torch.Tensor, torch.Tensor]] = ()
        """Trained weights and their values before training, if the adapter does not start at zero."""

        def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: object = None) -> torch.Tensor:
            """Run the passes of a step, forward and backward."""
            model.train()
            passes, metrics = self._prepare_inputs(inputs)["passes"], self._metrics["train"]
            kl = self._divergence(model, passes)
            num_losses = sum(len(batch["desired"]) for batch in passes) // (1 if options.objective == "kto" else 2)
            done: list[Scores] = []
            total = torch.zeros((), device=self.args.device)
            for batch in passes:
                with self.compute_loss_context_manager():
                    scores, aux_loss = self._score(model, batch)
                    loss = preference_losses(options, scores, kl).sum() / num_losses
                    if aux_loss is not None:
                        metrics["aux_loss"].append(float(aux_loss.detach()))
                        loss = loss + self.router_aux_loss_coef * aux_loss / len(passes)
                self.accelerator.backward(loss)
                total += loss.detach()
                done.append(Scores(*(values.detach() for values in scores)))
            self._check(total, f"the loss is not finite at step {self.state.global_step + 1}", passes, done)
            for name, value in preference_figures(options, _join(done), kl, paired=self.is_paired).items():
                metrics[name].append(value)
            return total

        def measure(self, model: nn.Module, rows: Dataset, order: Sequence[int]) -> dict[str, float]:
            """Compute loss and figures over held-out rows; each pair counts the same, or with KTO each answer."""
            passes = list(self.data_collator.passes([rows[index] for index in order]))
            with torch.no_grad(), self.compute_loss_context_manager():
                kl = self._divergence(model, passes)
                done = [self._score(model, self._prepare_inputs(batch))[0] for batch in passes]
                loss = preference_losses(options, _join(done), kl).mean()
            self._check(loss, f"the evaluation loss is not finite after step {self.state.global_step}", passes, done)
            figures = preference_figures(options, _join(done), kl, paired=row_labels(rows) is None)
            return {"eval_loss": float(loss)} | {f"eval_{name}": value for name, value in figures.items()}

        def floating_point_ops(self, inputs: Batch) -> int:
            """Return nothing: transformers would look for one tensor of tokens, and nobody reads the figure."""
            return 0

        def _divergence(self, model: nn.Module, passes: Sequence[Batch]) -> torch.Tensor | float:
            """Estimate KTO's divergence from answers to other prompts, over all passes."""
            if options.objective != "kto":
                return 0.0
            with torch.no_grad(), self.compute_loss_context_manager():
                batches = [self._prepare_inputs(batch["mismatched"]) for batch in passes]
                gains = [self._log_probs(model, batch)[0] - self._reference(model, batch) for batch in batches]
            return torch.cat(gains).mean().clamp(min=0)

        def _score(self, model: nn.Module, batch: Batch) -> tuple[Scores, torch.Tensor | None]:
            """Score the answers of a pass; also return the router loss of a mixture of experts that trains."""
            answers, needs_router = batch["answers"], self.aux_loss_enabled and model.training
            reference = self._reference(model, answers) if options.objective != "orpo" else None
            policy, aux_loss = self._log_probs(
                model, answers, **({"output_router_logits": True} if needs_router else {})
            )
            lengths = (answers["labels"][:, 1:] != IGNORED).sum(1)
            reference = torch.zeros_like(policy) if reference is None else reference
            return Scores(policy, reference, lengths, batch["desired"]), aux_loss if needs_router else None

        def _log_probs(
            self, model: nn.Module, answers: Batch, **more: object
        ) -> tuple[torch.Tensor, torch.Tensor | None]:
            output = model(**answers, fused_lm_head=True, use_cache=False, **more)
            return output.log_probs.float().sum(1), getattr(output, "aux_loss", None)

        def _reference(self, model: nn.Module, answers: Batch) -> torch.Tensor:
            adapted = self.accelerator.unwrap_model(self.model)
            with torch.no_grad(), nullcontext() if self.first_weights else adapted.disable_adapter():
                last_weights = [weight.data for weight, _ in self.first_weights]
                for weight, first in self.first_weights:
                    weight.data = first
                log_probs: torch.Tensor = self._log_probs(model, answers)[0]
                for (weight, _), last in zip(self.first_weights, last_weights, strict=True):
                    weight.data = last
            return log_probs

        def _check(
            self, loss: torch.Tensor, problem: str, passes: Sequence[Batch], all_scores: Sequence[Scores]
        ) -> None:
            if not bool(loss.isfinite()):
                pairs = list(zip(passes, all_scores, strict=True))
                bad = [id_ for batch, scores in pairs if not scores.policy.isfinite().all() for id_ in batch["ids"]]
                raise non_finite_error(problem, bad or [id_ for batch in passes for id_ in batch["ids"]], self.args)

    return PreferenceTrainer


def _join(parts: Sequence[Scores]) -> Scores:
    import torch

    return Scores(*(torch.cat(values) for values in zip(*parts, strict=True)))
