"""Supervised fine-tuning: TRL's SFTTrainer on rows that are tokenised already.

TRL owns the loop. What is added: the order of the examples, the collator, callbacks that log, checkpoint, evaluate and
stop on a loss that is not finite.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fintune.errors import ConfigError, FintuneError
from fintune.options import TrainOptions
from fintune.progress import bar, say
from fintune.tuning import checkpoints, metrics, optimizers, planned, preference, ranks, shard
from fintune.tuning.adapter import compute_in_base_type, in_float32, store_frozen_weights
from fintune.tuning.attention import use_short_causal_attention
from fintune.tuning.callbacks import make_callback
from fintune.tuning.collate import CompletionCollator, num_steps, training_order
from fintune.tuning.evaluate import BEST, Evaluation, Evaluator, best_step, load_best, out_of_patience
from fintune.tuning.head import score_trained_positions
from fintune.tuning.plan import TrainingPlan
from fintune.tuning.quiet import quiet_libraries

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments
    from trl import SFTConfig, SFTTrainer


_WIDTHS = 32
"""Batches are padded to multiples of so many tokens."""


@dataclass(frozen=True)
class Plan:
    """A run in numbers.

    Attributes:
        order: Indices of the examples, in the order of training.
        steps: Optimiser steps.
        tokens: Tokens (padding not counted) behind each step, from step 0; length ``steps + 1``.
    """

    order: list[int]
    steps: int
    tokens: list[int]


def make_plan(lengths: Sequence[int], options: TrainOptions, seed: int) -> Plan:
    """Lay the whole run out.

    Args:
        lengths: Tokens of each example.
        options: Epochs, batch size and accumulation.
        seed: Seed of the order.
    """
    batch_size = options.batch_size * options.accumulation * ranks.count()
    num_examples, steps = num_steps(len(lengths), options.epochs, batch_size, options.max_steps)
    if options.objective == "kto":
        num_examples = steps * batch_size  # it compares answers of different prompts, and a rest may be a single one
    if ranks.count() > 1:  # every process has a part of every step, so the last one is filled up
        num_examples = steps * batch_size
    order = training_order(lengths, num_examples, batch_size, seed)
    tokens = [0]
    for step in range(steps):
        tokens.append(tokens[-1] + sum(lengths[i] for i in order[step * batch_size : (step + 1) * batch_size]))
    return Plan(order, steps, tokens)


def train(
    model: PeftModel | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    options: TrainOptions,
    *,
    compute: str,
    seed: int,
    folder: Path,
    evaluation: Evaluation | None = None,
    reporters: Callable[[int], Sequence[object]] | None = None,
    extra_callbacks: Sequence[object] = (),
) -> int:
    """Train the model in place, going on from the last complete checkpoint in ``folder/checkpoints``.

    Args:
        model: From :func:`fintune.tuning.adapter.attach` or :func:`fintune.tuning.full.prepare`, on the device to train
            on.
        tokenizer: With a padding token.
        rows: Columns ``id``, ``input_ids``, ``completion_mask``.
        options: How to train.
        compute: Type in which products are taken, ``float32``, ``bfloat16`` or ``float16``; weights of another type are
            cast as they are used (autocast).
        seed: Seed of the order and of dropout.
        folder: Gets ``metrics.jsonl``, ``checkpoints/`` and, where the best weights are kept, ``best/``.
        evaluation: Needed where ``train.eval_steps`` is set.
        reporters: Makes callbacks that hand the figures on, given the steps of earlier attempts.
        extra_callbacks: Further callbacks of transformers' Trainer.

    Returns:
        The step whose weights the model has now, according to ``train.keep``.

    Raises:
        FintuneError: Loss or gradient is not finite; with the step and the examples.
        DataError: A row in which nothing or everything is trained.
        ConfigError: ``train.fused_layers: always`` for a model or adapter that they do not know.
    """
    from transformers import PrinterCallback

    supervised = options.objective == "sft"
    lengths = [len(ids) for ids in rows["input_ids"]] if supervised else preference.lengths(rows)
    plan = make_plan(lengths, options, seed)
    fused, memory = supervised and _is_fused(model, options.fused_layers), None
    if fused and model.device.type == "cuda":
        memory = planned.plan_model(model, options, lengths)
        if ranks.leads():
            planned.write(memory, folder, trained=False)
        # The same examples a step, in as many passes as memory demands.
        passes = {"batch_size": memory.batch_size, "accumulation": memory.accumulation}
        options = options.model_copy(update=passes)
    resume, earlier = _where_it_stopped(folder)
    done = checkpoints.step_of(resume) if resume else 0
    with quiet_libraries(), bar("train", plan.steps, done=done) as shown:
        args = _arguments(model, options, plan, compute, seed, folder / "checkpoints")
        order = plan.order
        if out_of_patience(earlier, options):  # it was over; only what comes behind training is left to do
            args.max_steps, order = done, order[: done * options.batch_size * options.accumulation * ranks.count()]
        callback = make_callback(
            options,
            folder=folder,
            plan_tokens=plan.tokens,
            bar=shown,
            seconds=earlier[-1]["seconds"] if earlier else 0.0,
        )
        callbacks = [callback, *(reporters(done) if reporters else ()), *extra_callbacks]
        trained = rows.select(order)
        with in_float32(model):
            if fused:
                trainer = _make_fused_trainer(model, tokenizer, trained, args, callbacks, memory)
            else:
                trainer = _make_trainer(model, tokenizer, trained, args, callbacks, options)
        if supervised and not fused:
            trainer.model.register_forward_hook(_LossGuard(rows, trainer), with_kwargs=True)
        if options.eval_steps is not None:
            assert evaluation is not None, "train.eval_steps needs an evaluation split"
            callback.evaluator = trainer.evaluate = Evaluator(
                trainer, evaluation, options, folder, measure=None if supervised else trainer.measure
            )
        # One would be written for every checkpoint, of which nobody reads any.
        trainer.create_model_card = lambda *_args, **_kwargs: None
        trainer.remove_callback(PrinterCallback)
        if _is_divided(options):
            shard.divide(trainer.model)
        ranks.train_together(trainer)
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    if memory is not None and ranks.leads():
        planned.write(memory, folder, trained=True)
    best = best_step(metrics.read(folder / "metrics.jsonl"), options.keep) if options.keep != "last" else None
    if best is None:
        return int(trainer.state.global_step)
    load_best(trainer.model, folder / BEST, best)
    return best


def _where_it_stopped(folder: Path) -> tuple[Path | None, list[dict[str, Any]]]:
    """The last complete checkpoint, and the lines of the steps before it; what lies behind it is removed."""
    if ranks.leads():
        found = checkpoints.latest(folder / "checkpoints")
        metrics.cut(folder / "metrics.jsonl", checkpoints.step_of(found) if found else 0)
    ranks.wait()
    return checkpoints.latest(folder / "checkpoints"), metrics.read(folder / "metrics.jsonl")


def _is_divided(options: TrainOptions) -> bool:
    return options.sharding == "full" and ranks.count() > 1


def _base(model: PeftModel | PreTrainedModel) -> PreTrainedModel:
    from peft import PeftModel

    return model.get_base_model() if isinstance(model, PeftModel) else model


def _is_fused(model: PeftModel | PreTrainedModel, choice: str) -> bool:
    """Whether to train through this package's layers; says so where the choice was left to it.

    Raises:
        ConfigError: They are asked for, and the model or its adapter does not allow it.
    """
    if choice == "never":
        return False
    from peft import PeftModel

    from fintune.tuning.fused.model import obstacle

    found = obstacle(model) if isinstance(model, PeftModel) else "every weight is trained"
    if choice == "always":
        if found is not None:
            raise ConfigError(f"train.fused_layers: always, but {found}", hint="set it to auto or never")
        return True
    if model.device.type != "cuda":
        return False
    say("layers: fused" if found is None else f"layers: transformers' own, since {found}")
    return found is None


def _make_fused_trainer(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    args: SFTConfig,
    callbacks: list[Any],
    memory: TrainingPlan | None,
) -> SFTTrainer:
    import torch

    from fintune.tuning.fused.batch import PackedCollator
    from fintune.tuning.fused.trainer import FusedTrainer

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
            raise bad_loss(step, bad)

    callbacks[0].check_losses = check
    return trainer


def _make_trainer(
    model: PeftModel | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    args: TrainingArguments,
    callbacks: list[Any],
    options: TrainOptions,
) -> Trainer:
    from trl import SFTTrainer

    if options.objective == "sft":
        trainer = (shard.undivided(SFTTrainer) if _is_divided(options) else SFTTrainer)(
            model=model,
            args=args,
            data_collator=CompletionCollator(tokenizer.pad_token_id, multiple=_WIDTHS),
            train_dataset=rows,
            processing_class=tokenizer,
            callbacks=callbacks,
        )
    else:
        trainer = preference.make_trainer(
            model, tokenizer, rows, args, options, callbacks, multiple=_WIDTHS, bad_loss=bad_loss
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


def _arguments(
    model: PeftModel | PreTrainedModel, options: TrainOptions, plan: Plan, compute: str, seed: int, folder: Path
) -> TrainingArguments:
    import torch
    from trl import SFTConfig

    weights = next(model.parameters())
    schedule = "constant_with_warmup" if options.schedule == "constant" else options.schedule
    made = preference.arguments(options)
    if options.objective == "sft":
        made = partial(SFTConfig, dataset_kwargs={"skip_prepare_dataset": True}, max_length=None)
    return made(
        output_dir=str(folder),
        use_cpu=weights.device.type == "cpu" and not (_is_divided(options) and torch.cuda.is_available()),
        max_steps=plan.steps,
        num_train_epochs=1,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulation,
        learning_rate=options.learning_rate,
        lr_scheduler_type=schedule,
        warmup_steps=_warmup_steps(options, plan.steps),
        weight_decay=options.weight_decay,
        adam_beta2=options.adam_beta2,
        max_grad_norm=options.max_grad_norm,
        optim=optimizers.NAMES[options.optimizer],
        bf16=compute == "bfloat16",
        fp16=compute == "float16",
        gradient_checkpointing=options.gradient_checkpointing,
        # The order is laid out already; a sampler of the trainer's would shuffle it again.
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        logging_strategy="steps",
        logging_steps=options.log_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=options.checkpoint_steps,
        save_total_limit=None,  # the callback removes old ones, after the new one is known to be complete
        seed=seed,
        data_seed=seed,
        report_to="none",
        disable_tqdm=True,
    )


def bad_loss(step: int, examples: Sequence[str]) -> FintuneError:
    """What stops a run whose loss is not finite."""
    return FintuneError(
        f"the loss is not finite at step {step}; examples {', '.join(examples)}",
        hint="lower train.learning_rate, or set train.precision to float32; the last checkpoint is kept",
    )


class _LossGuard:
    """Forward hook that stops the run at a loss that is not finite, before the optimiser takes the step.

    Args:
        rows: The examples, to name those in the batch.
        trainer: For the step.
    """

    def __init__(self, rows: Dataset, trainer: SFTTrainer) -> None:
        self._rows, self._trainer = rows, trainer

    def __call__(self, _model: object, _args: object, kwargs: dict[str, Any], output: Any) -> None:
        log_probs = getattr(output, "log_probs", None)
        if log_probs is None or bool(log_probs.isfinite().all()):
            return
        raise bad_loss(self._trainer.state.global_step + 1, self._ids(kwargs))

    def _ids(self, inputs: dict[str, torch.Tensor]) -> list[str]:
        batch = [
            tuple(ids[mask.bool()].tolist())
            for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        ]
        known = {tuple(row["input_ids"]): str(row["id"]) for row in self._rows if tuple(row["input_ids"]) in set(batch)}
        return [known.get(ids, "?") for ids in batch]
