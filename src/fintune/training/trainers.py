"""The trainers of the libraries, with this package's batches, losses and checks.

TRL's SFTTrainer over transformers' layers or over the fused ones, and its preference trainers, from one set of options.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fintune.config import TrainOptions
from fintune.errors import FintuneError
from fintune.training import optimizers, preference, shard
from fintune.training.adapter import compute_in_base_type, store_frozen_weights
from fintune.training.attention import use_short_causal_attention
from fintune.training.collate import CompletionCollator
from fintune.training.evaluate import not_finite
from fintune.training.head import score_trained_positions
from fintune.training.plan import TrainingPlan
from fintune.util.console import say

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from peft import PeftModel
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments
    from trl import SFTConfig, SFTTrainer

WIDTHS = 32
"""Batches are padded to multiples of so many tokens."""


def make_fused_trainer(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    args: SFTConfig,
    callbacks: list[Any],
    memory: TrainingPlan | None,
) -> SFTTrainer:
    """TRL's loop over this package's own layers.

    Args:
        model: With an adapter, one that the fused layers know.
        tokenizer: With a padding token.
        rows: In the order of training.
        args: From :func:`make_arguments`.
        callbacks: The first is told to check the losses behind each step.
        memory: What the planner chose, on a GPU.
    """
    import torch

    from fintune.training.fused.batch import PackedCollator
    from fintune.training.fused.trainer import FusedTrainer

    base = model.get_base_model()
    compute = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    num_checkpointed = 0 if memory is None else memory.setting.num_checkpointed
    if args.gradient_checkpointing:
        num_checkpointed = base.config.num_hidden_layers
    # The layers recompute by themselves; the trainer would switch on transformers' way of it.
    args.gradient_checkpointing = False
    trainer = FusedTrainer(
        options={
            "dtype": compute,
            "keep": memory is None or memory.setting.unpacked,
            "num_checkpointed": num_checkpointed,
        },
        model=model,
        args=args,
        data_collator=PackedCollator(),
        train_dataset=rows,
        processing_class=tokenizer,
        callbacks=callbacks,
    )

    def check(step: int) -> None:
        bad = trainer.examples_of_bad_losses()
        if bad:
            raise bad_loss(step, bad, args)

    callbacks[0].check_losses = check
    return trainer


def make_trainer(
    model: PeftModel | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    args: TrainingArguments,
    callbacks: list[Any],
    options: TrainOptions,
) -> Trainer:
    """The trainer of the objective over transformers' layers; arguments as for :func:`make_fused_trainer`."""
    from trl import SFTTrainer

    if options.objective == "sft":
        trainer = (shard.undivided(SFTTrainer) if shard.is_divided(options) else SFTTrainer)(
            model=model,
            args=args,
            data_collator=CompletionCollator(tokenizer.pad_token_id, multiple=WIDTHS),
            train_dataset=rows,
            processing_class=tokenizer,
            callbacks=callbacks,
        )
    else:
        trainer = preference.make_trainer(
            model, tokenizer, rows, args, options, callbacks, multiple=WIDTHS, bad_loss=bad_loss
        )
    if args.bf16 or args.fp16:
        compute_in_base_type(model)
    if args.device.type == "cpu":
        score_trained_positions(_base(model))
        use_short_causal_attention(_base(model))
        if args.bf16 and _base(model) is not model:
            store_frozen_weights(model, "bfloat16")
    return trainer


def _warmup_steps(options: TrainOptions, num_steps: int) -> int:
    if options.warmup_steps is None:
        return round(options.warmup_ratio * num_steps)
    if options.warmup_steps >= num_steps:
        say(f"train.warmup_steps is {options.warmup_steps} of {num_steps} steps: train.learning_rate is never reached")
    return options.warmup_steps


def make_arguments(
    model: PeftModel | PreTrainedModel, options: TrainOptions, num_steps: int, compute: str, seed: int, folder: Path
) -> TrainingArguments:
    """Arguments of the objective's trainer.

    Args:
        model: On the device to train on.
        options: How to train.
        num_steps: Optimiser steps of the whole run.
        compute: Type in which products are taken.
        seed: Seed of dropout.
        folder: Gets the checkpoints.
    """
    import torch
    from trl import SFTConfig

    weights = next(model.parameters())
    made = preference.arguments(options)
    if options.objective == "sft":
        made = partial(SFTConfig, dataset_kwargs={"skip_prepare_dataset": True}, max_length=None)
    args = made(
        output_dir=str(folder),
        use_cpu=weights.device.type == "cpu" and not (shard.is_divided(options) and torch.cuda.is_available()),
        max_steps=num_steps,
        num_train_epochs=1,
        per_device_train_batch_size=options.per_device_train_batch_size,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        learning_rate=options.learning_rate,
        lr_scheduler_type=options.lr_scheduler_type,
        warmup_steps=_warmup_steps(options, num_steps),
        weight_decay=options.weight_decay,
        adam_beta2=options.adam_beta2,
        max_grad_norm=options.max_grad_norm,
        optim=optimizers.NAMES[options.optim],
        bf16=compute == "bfloat16",
        fp16=compute == "float16",
        gradient_checkpointing=bool(options.gradient_checkpointing),
        # The order is laid out already; a sampler of the trainer's would shuffle it again.
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        logging_strategy="steps",
        logging_steps=options.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=options.save_steps,
        save_total_limit=None,  # the callback removes old ones, after the new one is known to be complete
        seed=seed,
        data_seed=seed,
        report_to="none",
        disable_tqdm=True,
    )
    if args.n_gpu > 1:
        # Else a single process would spread over all GPUs that it sees (nn.DataParallel); that is train.gpus' matter.
        args._n_gpu = 1
    return args


def _base(model: PeftModel | PreTrainedModel) -> PreTrainedModel:
    from peft import PeftModel

    return model.get_base_model() if isinstance(model, PeftModel) else model


def bad_loss(step: int, examples: Sequence[str], args: TrainingArguments) -> FintuneError:
    """What stops a run whose loss is not finite; arguments as for :func:`~fintune.training.evaluate.not_finite`."""
    return not_finite(f"the loss is not finite at step {step}", examples, args)


def stop_at_bad_losses(trainer: SFTTrainer, rows: Dataset) -> None:
    """Let the run end at a loss that is not finite, before the optimiser takes the step.

    Args:
        trainer: Over transformers' layers.
        rows: The examples, to name those in the batch.
    """
    trainer.model.register_forward_hook(_LossGuard(rows, trainer), with_kwargs=True)


class _LossGuard:
    """Forward hook; arguments as for :func:`stop_at_bad_losses`."""

    def __init__(self, rows: Dataset, trainer: SFTTrainer) -> None:
        self._rows, self._trainer = rows, trainer

    def __call__(self, model: nn.Module, _args: object, kwargs: dict[str, Any], output: Any) -> None:
        log_probs = getattr(output, "log_probs", None) if model.training else None  # evaluations name their own rows
        if log_probs is None or bool(log_probs.isfinite().all()):
            return
        raise bad_loss(self._trainer.state.global_step + 1, self._ids(kwargs), self._trainer.args)

    def _ids(self, inputs: dict[str, torch.Tensor]) -> list[str]:
        batch = [
            tuple(ids[mask.bool()].tolist())
            for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        ]
        known = {tuple(row["input_ids"]): str(row["id"]) for row in self._rows if tuple(row["input_ids"]) in set(batch)}
        return [known.get(ids, "?") for ids in batch]
