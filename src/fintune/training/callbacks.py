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
from fintune.training.evaluate import Evaluator, non_finite_error
from fintune.training.preference import FIGURES
from fintune.util.console import Bar
from fintune.util.text import first_line

if TYPE_CHECKING:
    from transformers import TrainerCallback

# -- the recorder: metrics.jsonl, progress bar, complete checkpoints, check of the gradients, evaluations


def make_recorder(
    options: TrainOptions,
    *,
    folder: Path,
    plan_tokens: Sequence[int],
    bar: Bar,
    seconds: float,
    examples_of: Callable[[int], Sequence[str]],
) -> TrainerCallback:
    """Make the callback that records a training.

    Args:
        options: When to evaluate and which weights to keep.
        folder: Gets ``metrics.jsonl``; complete checkpoints in its ``checkpoints/`` are marked.
        plan_tokens: Tokens that are trained up to each step, from step 0.
        bar: Progress bar that advances by one a step.
        seconds: Training time of earlier attempts.
        examples_of: Returns the ids of the examples of a step, over all processes. Steps count from 1.
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
            if self.check_losses is not None:
                self.check_losses(state.global_step + 1)
            if args.fp16:  # the gradient scaler expects infinite gradients and skips those steps
                return
            grads = [weight.grad for weight in self.trained if weight.grad is not None]
            if not bool(torch.stack(torch._foreach_norm(grads)).isfinite().all()):
                step = state.global_step + 1
                raise non_finite_error(f"the gradient is not finite at step {step}", examples_of(step), args)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            bar.advance()
            step = state.global_step
            is_last = step == len(plan_tokens) - 1
            if options.eval_steps is not None and (is_last or step % options.eval_steps == 0):
                control.should_evaluate = True
            may_end = is_last or (control.should_evaluate and options.early_stopping_patience is not None)
            # Besides the multiples of train.logging_steps: the run's figures are read from the line of its last step,
            # and a checkpoint does not hold the losses since the last line.
            if may_end or step % options.save_steps == 0:
                control.should_log = True

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
            if "eval_loss" in logs:
                self._record_evaluation(state.global_step, logs)
            if "loss" not in logs:  # an evaluation, or the summary at the end of training
                return
            elapsed = self._elapsed_seconds()
            tokens = plan_tokens[state.global_step]
            rate = (tokens - plan_tokens[self.first_step]) / max(elapsed, 1e-9)
            bar.note(f"loss {logs['loss']:.3f}  {rate:.0f} tok/s")
            line = {"step": state.global_step}
            line |= {key: logs[key] for key in ("loss", "learning_rate", "grad_norm", *FIGURES) if key in logs}
            line |= {"tokens": tokens, "seconds": round(seconds + elapsed, 3)}
            if distributed.is_main():
                metrics.append(folder / "metrics.jsonl", line)

        def _elapsed_seconds(self) -> float:
            """Return the training time of this attempt, without evaluations."""
            return time.monotonic() - self.started - (self.evaluator.seconds if self.evaluator else 0.0)

        def _record_evaluation(self, step: int, logs: dict[str, Any]) -> None:
            line: dict[str, Any] = {"step": step}
            names = ("eval_loss", "eval_accuracy", *(f"eval_{name}" for name in FIGURES))
            line |= {key: logs[key] for key in names if key in logs}
            text = f"eval loss {logs['eval_loss']:.3f}"
            if "eval_accuracy" in logs:
                text += f"  {logs['eval_accuracy']:.1%} right"
            if "eval_rewards/accuracies" in logs:
                text += f"  {logs['eval_rewards/accuracies']:.1%} of the pairs ranked right"
            elif shares := metrics.correct_side_shares(logs):
                text += f"  {metrics.format_correct_sides(shares)}"
            bar.note(text)
            line["seconds"] = round(seconds + self._elapsed_seconds(), 3)
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
                best = metrics.best_step(metrics.read(folder / "metrics.jsonl"), options.select_checkpoint)
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
        def __init__(self, sink: _TensorBoardSink | _WandbSink) -> None:
            self.sink = sink

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
            figures = {name: value for name, value in logs.items() if isinstance(value, (int, float))}
            if "loss" in figures or "eval_loss" in figures:  # not the summary at the end
                self.sink.write(state.global_step, _group_names(figures))

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.sink.close()

    sinks: dict[str, Callable[[], Any]] = {
        "tensorboard": lambda: _TensorBoardSink(folder / "tensorboard", done),
        "wandb": lambda: _WandbSink(folder, run_name, options),
    }
    return [Reporter(sinks[name]()) for name in names]


def _group_names(figures: Mapping[str, float]) -> dict[str, float]:
    """Rename to ``train/loss`` and ``eval/loss``, which both sinks show in groups."""
    return {
        f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}": value
        for name, value in figures.items()
    }


class _TensorBoardSink:
    def __init__(self, folder: Path, done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=done + 1 if done else None)

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WandbSink:
    def __init__(self, folder: Path, run_name: str, options: Mapping[str, Any]) -> None:
        import wandb

        # With the same id, a resumed run continues its curves.
        id_file = folder / _WANDB_ID_FILE
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4), encoding="ascii")
        try:
            self._run = wandb.init(
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

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=step)

    def close(self) -> None:
        self._run.finish()
