"""Supervised fine-tuning: TRL's SFTTrainer on rows that are tokenised already.

TRL owns the loop. What is added: the order of the examples, the collator, callbacks that log, checkpoint, evaluate and
stop on a loss that is not finite.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fintune.config import TrainOptions
from fintune.errors import ConfigError
from fintune.training import checkpoints, metrics, planned, preference_rows, ranks, recompute, shard
from fintune.training.adapter import in_float32
from fintune.training.callbacks import make_callback
from fintune.training.collate import num_steps, training_order
from fintune.training.evaluate import BEST, Evaluation, Evaluator, best_step, load_best, out_of_patience
from fintune.training.interruption import Stop, behind_the_step
from fintune.training.trainers import make_arguments, make_fused_trainer, make_trainer, stop_at_bad_losses
from fintune.util.console import bar, quiet_libraries, say

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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


def make_plan(
    lengths: Sequence[int], options: TrainOptions, seed: int, *, labels: Sequence[bool] | None = None
) -> Plan:
    """Lay the whole run out.

    Args:
        lengths: Tokens of each example.
        options: Epochs, batch size and accumulation.
        seed: Seed of the order.
        labels: Of answers that are desired or not, which every step mixes.
    """
    batch_size = options.per_device_train_batch_size * options.gradient_accumulation_steps * ranks.count()
    num_examples, steps = num_steps(len(lengths), options.num_train_epochs, batch_size, options.max_steps)
    if options.objective == "kto":
        num_examples = steps * batch_size  # it compares answers of different prompts, and a rest may be a single one
    if ranks.count() > 1:  # every process has a part of every step, so the last one is filled up
        num_examples = steps * batch_size
    order = training_order(lengths, num_examples, batch_size, seed, labels=labels)
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
        model: From :func:`fintune.training.adapter.attach` or :func:`fintune.training.full.prepare`, on the device
            to train on.
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
        The step whose weights the model has now, according to ``train.select_checkpoint``.

    Raises:
        FintuneError: Loss or gradient is not finite; with the step and the examples.
        DataError: A row in which nothing or everything is trained.
        ConfigError: ``train.fused_layers: always`` for a model or adapter that they do not know.
        KeyboardInterrupt: SIGINT or SIGTERM; behind a checkpoint, where one process trains.
    """
    from transformers import PrinterCallback

    supervised = options.objective == "sft"
    lengths = [len(ids) for ids in rows["input_ids"]] if supervised else preference_rows.lengths(rows)
    plan = make_plan(lengths, options, seed, labels=preference_rows.labels_of(rows))
    fused, memory = supervised and _is_fused(model, options.fused_layers), None
    if fused and model.device.type == "cuda":
        memory = planned.plan_model(model, options, lengths)
        if ranks.leads():
            planned.write(memory, folder)
        # The same examples a step, in as many passes as memory demands.
        passes = {
            "per_device_train_batch_size": memory.batch_size,
            "gradient_accumulation_steps": memory.accumulation,
        }
        options = options.model_copy(update=passes)
    elif not fused:
        options = recompute.settle(model, options, lengths)
    step_size = options.per_device_train_batch_size * options.gradient_accumulation_steps * ranks.count()

    def examples_of(step: int) -> list[str]:
        return [str(rows[index]["id"]) for index in plan.order[(step - 1) * step_size : step * step_size]]

    resume, earlier = _where_it_stopped(folder)
    done = checkpoints.step_of(resume) if resume else 0
    with quiet_libraries(), bar("train", plan.steps, done=done) as shown:
        args = make_arguments(model, options, plan.steps, compute, seed, folder / "checkpoints")
        order = plan.order
        if out_of_patience(earlier, options):  # it was over; only what comes behind training is left to do
            args.max_steps, order = done, order[: done * step_size]
        callback = make_callback(
            options,
            folder=folder,
            plan_tokens=plan.tokens,
            bar=shown,
            seconds=earlier[-1]["seconds"] if earlier else 0.0,
            examples_of=examples_of,
        )
        stop = Stop()
        callbacks = [callback, stop.callback(), *(reporters(done) if reporters else ()), *extra_callbacks]
        trained = rows.select(order)
        with in_float32(model):
            if fused:
                trainer = make_fused_trainer(model, tokenizer, trained, args, callbacks, memory)
            else:
                trainer = make_trainer(model, tokenizer, trained, args, callbacks, options)
        if supervised and not fused:
            stop_at_bad_losses(trainer, rows)
        if options.eval_steps is not None:
            assert evaluation is not None, "train.eval_steps needs an evaluation split"
            callback.evaluator = trainer.evaluate = Evaluator(
                trainer, evaluation, options, folder, measure=None if supervised else trainer.measure
            )
        # One would be written for every checkpoint, of which nobody reads any.
        trainer.create_model_card = lambda *_args, **_kwargs: None
        trainer.remove_callback(PrinterCallback)
        if shard.is_divided(options):
            shard.divide(trainer.model)
        ranks.train_together(trainer)
        with behind_the_step(stop, folder / "checkpoints"):
            trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    if trainer.args.device.type == "cuda" and ranks.leads():
        planned.write_peak(folder)
    best = (
        best_step(metrics.read(folder / "metrics.jsonl"), options.select_checkpoint)
        if options.select_checkpoint != "last"
        else None
    )
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


def _is_fused(model: PeftModel | PreTrainedModel, choice: str) -> bool:
    """Whether to train through this package's layers; says so where the choice was left to it.

    Raises:
        ConfigError: They are asked for, and the model or its adapter does not allow it.
    """
    if choice == "never":
        return False
    from peft import PeftModel

    from fintune.training.fused.model import obstacle

    found = obstacle(model) if isinstance(model, PeftModel) else "every weight is trained"
    if choice == "always":
        if found is not None:
            raise ConfigError(
                f"train.fused_layers: always, but {found}", hint="set it to auto or never", option="train.fused_layers"
            )
        return True
    if model.device.type != "cuda":
        return False
    say("layers: fused" if found is None else f"layers: transformers' own, since {found}")
    return found is None
