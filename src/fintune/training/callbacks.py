"""Callbacks for transformers' Trainer: log, checkpoints, evaluations, and TensorBoard and W&B."""

from __future__ import annotations

import importlib.util
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fintune.config import TrainOptions
from fintune.errors import ResourceError
from fintune.training import checkpoints, distributed, metrics
from fintune.training.batches import TrainingSchedule
from fintune.training.evaluate import Evaluator, non_finite_error
from fintune.training.interrupt import StopAfterStep
from fintune.training.preference import FIGURES
from fintune.util.console import Bar
from fintune.util.text import first_line

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import TrainerCallback

# -- the recorder: metrics.jsonl, progress bar, complete checkpoints, check of the gradients, evaluations


def make_recorder(
    options: TrainOptions,
    *,
    folder: Path,
    schedule: TrainingSchedule,
    rows: Dataset,
    bar: Bar,
    seconds: float,
    stop: StopAfterStep,
    after_epoch: Callable[[int, int], None] | None,
) -> TrainerCallback:
    """Make the callback that records a training.

    Args:
        options: When to evaluate and which weights to keep.
        folder: Gets ``metrics.jsonl``; complete checkpoints in its ``checkpoints/`` are marked.
        schedule: The examples of each step.
        rows: The examples, for their ``id``.
        bar: Progress bar that advances by one a step.
        seconds: Training time of earlier attempts.
        stop: Once it is requested, the step ends with a checkpoint.
        after_epoch: Called with the number of a pass over the rows and the step that completes it, but not after the
            last step.
    """
    import torch
    from transformers import TrainerCallback

    class Recorder(TrainerCallback):  # type: ignore[misc]
        """Logs, shows and marks what happens."""

        check_losses: Callable[[int], None] | None = None
        """Called with the step before its optimizer runs. Raises if a loss is not finite."""

        evaluator: Evaluator | None = None
        """The evaluator of the trainer."""

        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            self.started, self.first_step = time.monotonic(), state.global_step
            # Walking over the modules of an adapted model takes longer than the norms.
            self.trained = [weight for weight in model.parameters() if weight.requires_grad]

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            step = state.global_step + 1
            if self.check_losses is not None:
                self.check_losses(step)
            if args.fp16:  # the gradient scaler expects infinite gradients and skips those steps
                return
            grads = [weight.grad for weight in self.trained if weight.grad is not None]
            if not bool(torch.stack(torch._foreach_norm(grads)).isfinite().all()):
                ids = [str(rows[index]["id"]) for index in schedule.rows_of(step)]
                raise non_finite_error(f"the gradient is not finite at step {step}", ids, args)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            bar.advance()
            step, is_last = state.global_step, state.global_step == schedule.steps
            state.epoch = schedule.epochs(step)  # transformers takes the run for one pass
            epoch = schedule.completed_epoch(step)
            is_due = epoch is not None if options.eval_strategy == "epoch" else step % (options.eval_steps or 1) == 0
            if options.has_evaluations and (is_last or is_due):
                control.should_evaluate = True
            if options.save_strategy == "epoch" and (is_last or epoch is not None):
                control.should_save = True
            if stop.is_requested:
                control.should_save = control.should_training_stop = True
            # Besides the multiples of train.logging_steps: the run's figures are read from the line of its last step,
            # and a checkpoint does not hold the losses since the last line.
            may_end = is_last or (control.should_evaluate and options.early_stopping_patience is not None)
            if may_end or control.should_save:
                control.should_log = True
            if epoch is not None and not is_last and after_epoch is not None:
                after_epoch(epoch, step)

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
            elapsed = time.monotonic() - self.started - (self.evaluator.seconds if self.evaluator else 0.0)
            line = {"step": state.global_step}
            if "eval_loss" in logs:
                epoch = schedule.completed_epoch(state.global_step)
                line |= {"epoch": epoch} if options.eval_strategy == "epoch" and epoch is not None else {}
                names = ("eval_loss", "eval_accuracy", *(f"eval_{name}" for name in FIGURES))
                bar.note(metrics.format_evaluation(logs))
            elif "loss" in logs:
                tokens = schedule.tokens[state.global_step]
                rate = (tokens - schedule.tokens[self.first_step]) / max(elapsed, 1e-9)
                bar.note(f"loss {logs['loss']:.3f}  {rate:.0f} tok/s")
                logs = logs | {"tokens": tokens}
                names = ("loss", "aux_loss", "learning_rate", "grad_norm", *FIGURES, "tokens")
            else:  # the summary at the end of training
                return
            line |= {name: logs[name] for name in names if name in logs} | {"seconds": round(seconds + elapsed, 3)}
            if distributed.is_main():
                metrics.append(folder / "metrics.jsonl", line)

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            distributed.barrier()  # until every process has written its random state
            if not distributed.is_main():
                return
            checkpoints_folder = folder / "checkpoints"
            checkpoints.mark_complete(checkpoints_folder / f"checkpoint-{state.global_step}")
            checkpoints.drop_old_checkpoints(checkpoints_folder, options.save_total_limit)
            if options.select_checkpoint != "last":
                # A run may resume from any of the checkpoints, and then needs the best weights up to it.
                lines = metrics.read(folder / "metrics.jsonl")
                steps = [checkpoints.step_of(path) for path in checkpoints.complete_checkpoints(checkpoints_folder)]
                before = [[line for line in lines if line["step"] <= step] for step in steps]
                best = {metrics.best_step(earlier, options.select_checkpoint) for earlier in before}
                checkpoints.drop_other_best(folder / checkpoints.BEST_FOLDER, best)

    return Recorder()


# -- TensorBoard and Weights & Biases

_WANDB_PROJECT = "fintune"
_WANDB_ID_FILE = "wandb_id"


def check_reporters(names: Sequence[str]) -> None:
    """Refuse a reporter whose package is not installed, before anything is loaded.

    Raises:
        ResourceError: A package is missing.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ResourceError(
                f"train.report_to: {name} is not installed",
                hint=f"pip install {name}, or remove it from train.report_to",
                option="train.report_to",
            )


def make_reporters(
    names: Sequence[str], *, folder: Path, run_name: str, options: Mapping[str, Any], done: int
) -> list[TrainerCallback]:
    """Make callbacks that pass every logged figure to TensorBoard or Weights & Biases.

    Args:
        names: ``tensorboard``, ``wandb``.
        folder: Gets ``tensorboard/`` or ``wandb/``.
        run_name: Name of the run in W&B.
        options: Options of the run for W&B, without secrets.
        done: Steps of earlier attempts. Their figures stay, and later figures are replaced.

    Raises:
        ResourceError: A package is missing, or W&B cannot be reached or needs a login.
    """
    check_reporters(names)
    from transformers import TrainerCallback

    class Reporter(TrainerCallback):  # type: ignore[misc]
        def __init__(self, write: Callable[[int, dict[str, float]], None], close: Callable[[], None]) -> None:
            self.write, self.close = write, close

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
            figures = {name: value for name, value in logs.items() if isinstance(value, (int, float))}
            if "loss" in figures or "eval_loss" in figures:  # not the summary at the end
                # train/loss and eval/loss, which both programs show in groups
                names = {
                    name: name.replace("eval_", "eval/") if "eval_" in name else f"train/{name}" for name in figures
                }
                self.write(state.global_step, {names[name]: value for name, value in figures.items()})

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.close()

    makers = {
        "tensorboard": lambda: _start_tensorboard(folder / "tensorboard", done),
        "wandb": lambda: _start_wandb(folder, run_name, options),
    }
    return [Reporter(*makers[name]()) for name in names]


def _start_tensorboard(folder: Path, done: int) -> tuple[Callable[[int, dict[str, float]], None], Callable[[], None]]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder), purge_step=done + 1 if done else None)

    def write(step: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            writer.add_scalar(name, value, step)

    return write, writer.close


def _start_wandb(
    folder: Path, run_name: str, options: Mapping[str, Any]
) -> tuple[Callable[[int, dict[str, float]], None], Callable[[], None]]:
    import wandb

    # With the same id, a resumed run continues its curves.
    id_file = folder / _WANDB_ID_FILE
    if not id_file.exists():
        id_file.write_text(secrets.token_hex(4), encoding="ascii")
    try:
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _WANDB_PROJECT),
            name=run_name or None,
            id=id_file.read_text(encoding="ascii"),
            resume="allow",
            dir=str(folder),
            config=dict(options),
            settings=wandb.Settings(silent=True, console="off"),
        )
    except wandb.Error as error:
        raise ResourceError(
            f"train.report_to: wandb does not start ({first_line(error)})",
            hint="run `wandb login`, or set WANDB_MODE=offline",
            option="train.report_to",
        ) from None
    return lambda step, figures: run.log(figures, step=step), run.finish
