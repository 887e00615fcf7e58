"""The training run: TRL's trainer of the objective on rows that are tokenised already.

TRL owns the loop. This package adds the order of the examples, the collators, the memory plan, and callbacks that log,
evaluate, write checkpoints and stop at a loss that is not finite.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fintune.config import TrainOptions
from fintune.errors import ConfigError
from fintune.training import checkpoints, distributed, metrics, preference
from fintune.training.batches import make_schedule
from fintune.training.callbacks import make_recorder
from fintune.training.evaluate import Evaluation, Evaluator
from fintune.training.interrupt import StopAfterStep, stopping_after_step
from fintune.training.lora import adapter_in_float32
from fintune.training.memory import planner
from fintune.training.memory.model import MemoryPlan
from fintune.training.trainers import make_arguments, make_fused_trainer, make_trainer
from fintune.training.verify import probe_tokens
from fintune.util.console import bar, quiet_libraries, say

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def train_model(
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
    after_epoch: Callable[[int, int], None] | None = None,
    extra_callbacks: Sequence[object] = (),
) -> int:
    """Train the model in place, resuming from the last complete checkpoint in ``folder/checkpoints``.

    Args:
        model: A model from :func:`fintune.training.lora.attach_adapter` or
            :func:`fintune.training.full.train_all_weights`, on the device to train on.
        tokenizer: A tokenizer with a padding token.
        rows: Rows with the columns ``id``, ``input_ids``, ``completion_mask``.
        options: Training options.
        compute: Type of matrix products, ``float32``, ``bfloat16`` or ``float16``. Autocast casts weights of another
            type when they are used.
        seed: Seed of the order and of dropout.
        folder: Gets ``metrics.jsonl``, ``checkpoints/`` and, if the best weights are kept, ``best/``.
        evaluation: Evaluation data, needed if ``options.has_evaluations``.
        reporters: Makes callbacks for TensorBoard and W&B from the number of steps of earlier attempts.
        after_epoch: As in :func:`fintune.training.callbacks.make_recorder`.
        extra_callbacks: More callbacks for transformers' Trainer.

    Returns:
        The step whose weights the model has now, as selected by ``train.select_checkpoint``.

    Raises:
        FintuneError: Loss or gradient is not finite; with the step and the examples.
        DataError: A row trains nothing or everything.
        ConfigError: ``train.fused_layers: always`` with a model or adapter that the fused layers do not support.
        KeyboardInterrupt: SIGINT or SIGTERM. A single process writes a checkpoint first.
    """
    supervised = options.objective == "sft"
    lengths = [len(ids) for ids in rows["input_ids"]] if supervised else preference.preference_lengths(rows)
    schedule = make_schedule(lengths, options, seed, labels=preference.row_labels(rows))
    fused = supervised and _uses_fused_layers(model, options.fused_layers, probe_tokens(rows), compute)
    options, plan = _fit_memory(model, options, lengths, folder, fused=fused)
    checkpoint, earlier = _read_progress(folder)
    done = checkpoints.step_of(checkpoint) if checkpoint else 0
    with quiet_libraries(), bar("train", schedule.steps, done=done) as progress:
        args = make_arguments(model, options, schedule.steps, compute, seed, folder / "checkpoints")
        order = schedule.order
        if metrics.is_out_of_patience(earlier, options):  # training was over; only the work after it is left
            args.max_steps, order = done, order[: done * schedule.step_size]
        stop = StopAfterStep()
        recorder = make_recorder(
            options,
            folder=folder,
            schedule=schedule,
            rows=rows,
            bar=progress,
            seconds=earlier[-1]["seconds"] if earlier else 0.0,
            stop=stop,
            after_epoch=after_epoch,
        )
        callbacks = [recorder, *(reporters(done) if reporters else ()), *extra_callbacks]
        ordered_rows = rows.select(order)
        with adapter_in_float32(model):
            if fused:
                trainer = make_fused_trainer(model, tokenizer, ordered_rows, args, callbacks, plan)
            else:
                trainer = make_trainer(model, tokenizer, ordered_rows, args, callbacks, options)
        if options.has_evaluations:
            assert evaluation is not None, "evaluations need an evaluation split"
            recorder.evaluator = trainer.evaluate = Evaluator(
                trainer, evaluation, options, folder, measure=None if supervised else trainer.measure
            )
        _run(trainer, options, stop, folder, checkpoint)
    if trainer.args.device.type == "cuda" and distributed.is_main():
        planner.record_peak(folder)
    lines = metrics.read(folder / "metrics.jsonl")
    best = metrics.best_step(lines, options.select_checkpoint) if options.select_checkpoint != "last" else None
    if best is None:
        return int(trainer.state.global_step)
    checkpoints.load_best(trainer.model, folder / checkpoints.BEST_FOLDER, best)
    return best


def _run(trainer: Any, options: TrainOptions, stop: StopAfterStep, folder: Path, checkpoint: Path | None) -> None:
    from transformers import PrinterCallback

    # Otherwise every checkpoint would get a model card, which nobody reads.
    trainer.create_model_card = lambda *_args, **_kwargs: None
    trainer.remove_callback(PrinterCallback)
    if distributed.is_sharded(options):
        distributed.shard_frozen_weights(trainer.model)
    distributed.average_gradients(trainer)
    with stopping_after_step(stop, folder / "checkpoints"):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)


def _fit_memory(
    model: PeftModel | PreTrainedModel, options: TrainOptions, lengths: Sequence[int], folder: Path, *, fused: bool
) -> tuple[TrainOptions, MemoryPlan | None]:
    """Choose recomputed layers and, with the fused layers on a GPU, the passes of a step; the step stays the same."""
    if not fused:
        return planner.resolve_checkpointing(model, options, lengths), None
    if model.device.type != "cuda":
        return options, None
    plan = planner.plan_for_model(model, options, lengths)
    if distributed.is_main():
        planner.write_plan(plan, folder)
    passes = {
        "per_device_train_batch_size": plan.batch_size,
        "gradient_accumulation_steps": plan.accumulation,
    }
    return options.model_copy(update=passes), plan


def _read_progress(folder: Path) -> tuple[Path | None, list[dict[str, Any]]]:
    """Return the last complete checkpoint and the log lines up to it. Later lines and checkpoints are removed."""
    checkpoints_folder, metrics_file = folder / "checkpoints", folder / "metrics.jsonl"
    if distributed.is_main():
        checkpoint = checkpoints.latest_checkpoint(checkpoints_folder)
        metrics.truncate(metrics_file, checkpoints.step_of(checkpoint) if checkpoint else 0)
    distributed.barrier()
    return checkpoints.latest_checkpoint(checkpoints_folder), metrics.read(metrics_file)


def _uses_fused_layers(model: PeftModel | PreTrainedModel, choice: str, ids: Sequence[int], compute: str) -> bool:
    """Whether to train through the fused layers, which are tried on a row; prints the choice if it was left open.

    Raises:
        ConfigError: The option requires them, and they do not support the model or its adapter.
    """
    if choice == "never" or (choice == "auto" and model.device.type != "cuda"):
        return False
    from peft import PeftModel

    from fintune.training.fused.model import differing_reason, unsupported_reason

    reason: str | None = "every weight is trained"
    if isinstance(model, PeftModel):
        reason = unsupported_reason(model) or differing_reason(model, ids, compute)
    if choice == "always":
        if reason is not None:
            raise ConfigError(
                f"train.fused_layers: always is not possible: {reason}",
                hint="set it to auto or never",
                option="train.fused_layers",
            )
        return True
    say("layers: fused" if reason is None else f"layers: those of transformers, because {reason}")
    return reason is None
