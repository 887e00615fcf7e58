"""What happens beside TRL's loop: the log, the bar, the checkpoints' marks, the check of the gradients, evaluations."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fintune.config import TrainOptions
from fintune.training import checkpoints, metrics, ranks
from fintune.training.answer_figures import right_sides, told_right_sides
from fintune.training.evaluate import BEST, Evaluator, best_step, drop_others, not_finite
from fintune.training.preference import FIGURES
from fintune.util.console import Bar

if TYPE_CHECKING:
    from transformers import TrainerCallback


def make_callback(
    options: TrainOptions,
    *,
    folder: Path,
    plan_tokens: Sequence[int],
    bar: Bar,
    seconds: float,
    examples_of: Callable[[int], Sequence[str]],
) -> TrainerCallback:
    """A callback for transformers' Trainer.

    Args:
        options: When to evaluate and what to keep.
        folder: Gets ``metrics.jsonl``; its ``checkpoints/`` are marked.
        plan_tokens: Tokens behind each step.
        bar: Moves one a step.
        seconds: Training time of earlier attempts.
        examples_of: Ids of the examples of a step, over all processes; steps count from 1.
    """
    import torch
    from transformers import TrainerCallback

    class Recorder(TrainerCallback):  # type: ignore[misc]
        """Logs, shows, marks."""

        check_losses: Callable[[int], None] | None = None
        """Called with the step before its optimiser runs; raises where a loss is not finite."""

        evaluator: Evaluator | None = None
        """What the trainer evaluates with."""

        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            self.started, self.first_step = time.monotonic(), state.global_step
            # Walking the modules of an adapted model takes longer than the norms.
            self.trained = [weight for weight in model.parameters() if weight.requires_grad]

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if self.check_losses is not None:
                self.check_losses(state.global_step + 1)
            if args.fp16:  # the scaler meets infinite gradients on purpose, and skips those steps
                return
            grads = [weight.grad for weight in self.trained if weight.grad is not None]
            if not bool(torch.stack(torch._foreach_norm(grads)).isfinite().all()):
                step = state.global_step + 1
                raise not_finite(f"the gradient is not finite at step {step}", examples_of(step), args)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            bar.advance()
            step = state.global_step
            last = step == len(plan_tokens) - 1
            if options.eval_steps is not None and (last or step % options.eval_steps == 0):
                control.should_evaluate = True
            may_end = last or (control.should_evaluate and options.early_stopping_patience is not None)
            # Beside the multiples of train.logging_steps: the run's figures are read from the line of its last step,
            # and the losses since the last line are no part of a checkpoint.
            if may_end or step % options.save_steps == 0:
                control.should_log = True

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
            if "eval_loss" in logs:
                self._note_evaluation(state.global_step, logs)
            if "loss" not in logs:  # an evaluation, or the summary at the end of training
                return
            here = self._seconds()
            tokens = plan_tokens[state.global_step]
            rate = (tokens - plan_tokens[self.first_step]) / max(here, 1e-9)
            bar.note(f"loss {logs['loss']:.3f}  {rate:.0f} tok/s")
            line = {"step": state.global_step}
            line |= {key: logs[key] for key in ("loss", "learning_rate", "grad_norm", *FIGURES) if key in logs}
            line |= {"tokens": tokens, "seconds": round(seconds + here, 3)}
            if ranks.leads():
                metrics.append(folder / "metrics.jsonl", line)

        def _seconds(self) -> float:
            """Time of training in this attempt, without evaluations."""
            return time.monotonic() - self.started - (self.evaluator.seconds if self.evaluator else 0.0)

        def _note_evaluation(self, step: int, logs: dict[str, Any]) -> None:
            line: dict[str, Any] = {"step": step}
            kept = ("eval_loss", "eval_accuracy", *(f"eval_{name}" for name in FIGURES))
            line |= {key: logs[key] for key in kept if key in logs}
            told = f"eval loss {logs['eval_loss']:.3f}"
            if "eval_accuracy" in logs:
                told += f"  {logs['eval_accuracy']:.1%} right"
            if "eval_rewards/accuracies" in logs:
                told += f"  {logs['eval_rewards/accuracies']:.1%} of the pairs ranked right"
            elif rights := right_sides(logs):
                told += f"  {told_right_sides(rights)}"
            bar.note(told)
            line["seconds"] = round(seconds + self._seconds(), 3)
            if ranks.leads():
                metrics.append(folder / "metrics.jsonl", line)

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            ranks.wait()  # each process has written its random state
            if not ranks.leads():
                return
            where = folder / "checkpoints"
            checkpoints.mark_complete(where / f"checkpoint-{state.global_step}")
            checkpoints.drop_old(where, options.save_total_limit)
            if options.select_checkpoint != "last":
                drop_others(folder / BEST, best_step(metrics.read(folder / "metrics.jsonl"), options.select_checkpoint))

    return Recorder()
