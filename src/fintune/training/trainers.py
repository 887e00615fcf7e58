"""The trainers of TRL with this package's batches, losses and checks, made from one set of options."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fintune.config import TrainOptions
from fintune.training import distributed, preference
from fintune.training.batches import WIDTH_MULTIPLE, CompletionCollator, examples_per_step
from fintune.training.cpu_layers import use_cpu_attention, use_label_only_head
from fintune.training.evaluate import non_finite_error
from fintune.training.lora import compute_in_base_type, store_frozen_weights
from fintune.training.memory.model import MemoryPlan
from fintune.training.verify import probe_tokens
from fintune.util.console import say

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from peft import PeftModel
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments
    from trl import SFTConfig, SFTTrainer


def make_arguments(
    model: PeftModel | PreTrainedModel, options: TrainOptions, num_steps: int, compute: str, seed: int, folder: Path
) -> TrainingArguments:
    """Make the arguments of the objective's trainer.

    Args:
        model: A model on the device to train on.
        options: Training options.
        num_steps: Optimizer steps of the whole run.
        compute: Name of the torch type of matrix products.
        seed: Seed of dropout.
        folder: Gets the checkpoints.
    """
    import torch
    from trl import SFTConfig

    weights = next(model.parameters())
    is_sharded_on_gpu = distributed.is_sharded(options) and torch.cuda.is_available()
    # A batch of a preference objective is a whole step, which its trainer divides into passes.
    batch_size, accumulation = examples_per_step(options), 1
    if options.objective == "sft":
        batch_size, accumulation = options.per_device_train_batch_size, options.gradient_accumulation_steps
    args = SFTConfig(
        # max_length=None: rows that are too long were dropped by prepare, and nothing is truncated here.
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        output_dir=str(folder),
        use_cpu=weights.device.type == "cpu" and not is_sharded_on_gpu,
        max_steps=num_steps,
        num_train_epochs=1,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        learning_rate=options.learning_rate,
        lr_scheduler_type=options.lr_scheduler_type,
        warmup_steps=_warmup_steps(options, num_steps),
        weight_decay=options.weight_decay,
        # transformers also gives these to Lion, whose second one is the decay of its momentum (arXiv 2302.06675).
        adam_beta2=0.99 if options.optim == "lion_8bit" else options.adam_beta2,
        max_grad_norm=options.max_grad_norm,
        optim="adamw_torch_fused" if options.optim == "adamw_torch" else options.optim,
        bf16=compute == "bfloat16",
        fp16=compute == "float16",
        gradient_checkpointing=bool(options.gradient_checkpointing),
        # The rows are in the order of training already. A sampler of the trainer would shuffle them again.
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        logging_strategy="steps",
        logging_steps=options.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="steps" if options.save_strategy == "steps" else "no",  # the recorder saves after epochs
        save_steps=options.save_steps,
        save_total_limit=None,  # the recorder removes old checkpoints, after the new one is known to be complete
        seed=seed,
        data_seed=seed,
        report_to="none",
        disable_tqdm=True,
    )
    if args.n_gpu > 1:
        # Otherwise one process would use all GPUs that it sees (nn.DataParallel), which is what train.gpus is for.
        args._n_gpu = 1
    return args


def _warmup_steps(options: TrainOptions, num_steps: int) -> int:
    if options.warmup_steps is None:
        return round(options.warmup_ratio * num_steps)
    if options.warmup_steps >= num_steps:
        say(f"train.warmup_steps is {options.warmup_steps} of {num_steps} steps: train.learning_rate is never reached")
    return options.warmup_steps


def make_fused_trainer(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    args: SFTConfig,
    callbacks: list[Any],
    plan: MemoryPlan | None,
) -> SFTTrainer:
    """Make TRL's SFTTrainer over the fused layers, which have to support the model and its adapter.

    Args:
        model: A model with an adapter.
        tokenizer: A tokenizer with a padding token.
        rows: Rows in the order of training.
        args: Arguments from :func:`make_arguments`.
        callbacks: The first is the recorder, which gets the check of the losses.
        plan: Choice of the memory planner; None on a CPU.
    """
    import torch

    from fintune.training.fused.batch import PackedCollator
    from fintune.training.fused.trainer import FusedTrainer

    base = model.get_base_model()
    compute = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    num_checkpointed = 0 if plan is None else plan.setting.num_checkpointed
    if args.gradient_checkpointing:
        num_checkpointed = base.config.num_hidden_layers
    # The fused layers recompute by themselves. The trainer would switch on recomputation in transformers.
    args.gradient_checkpointing = False
    trainer = FusedTrainer(
        options={
            "dtype": compute,
            "hold": plan is None or plan.setting.unpacked,
            "num_checkpointed": num_checkpointed,
        },
        model=model,
        args=args,
        data_collator=PackedCollator(),
        train_dataset=rows,
        processing_class=tokenizer,
        callbacks=callbacks,
    )

    def check_losses(step: int) -> None:
        bad_examples = trainer.examples_of_bad_losses()
        if bad_examples:
            raise non_finite_error(f"the loss is not finite at step {step}", bad_examples, args)

    callbacks[0].check_losses = check_losses
    return trainer


def make_trainer(
    model: PeftModel | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    args: TrainingArguments,
    callbacks: list[Any],
    options: TrainOptions,
) -> Trainer:
    """Make the objective's trainer over the layers of transformers; arguments as for :func:`make_fused_trainer`."""
    if options.objective == "sft":
        trainer = _completion_trainer_class(is_sharded=distributed.is_sharded(options))(
            model=model,
            args=args,
            data_collator=CompletionCollator(tokenizer.pad_token_id, multiple=WIDTH_MULTIPLE),
            train_dataset=rows,
            processing_class=tokenizer,
            callbacks=callbacks,
        )
    else:
        trainer = preference.make_preference_trainer(
            model, tokenizer, rows, args, options, callbacks, multiple=WIDTH_MULTIPLE
        )
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not distributed.is_sharded(options):  # a sharded model is not on its GPU yet
        use_label_only_head(base, probe_tokens(rows), routed=getattr(trainer, "aux_loss_enabled", False))
    if args.bf16 or args.fp16:
        compute_in_base_type(model)
    if args.device.type == "cpu":
        use_cpu_attention(base)
        if args.bf16 and base is not model:
            store_frozen_weights(model, "bfloat16")
    return trainer


def _completion_trainer_class(*, is_sharded: bool) -> type[SFTTrainer]:
    from trl import SFTTrainer

    class CompletionTrainer(SFTTrainer):  # type: ignore[misc]
        """SFTTrainer that stops at a loss that is not finite, before the optimizer takes the step."""

        def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
            ids = inputs.pop("ids")
            loss: torch.Tensor = super().compute_loss(model, inputs, *args, **kwargs)
            if self.model.training and not bool(loss.isfinite()):  # evaluations check their own rows
                raise non_finite_error(f"the loss is not finite at step {self.state.global_step + 1}", ids, self.args)
            return loss

        def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
            if not is_sharded:  # a sharded model is divided first
                super()._move_model_to_device(model, device)

    return CompletionTrainer
