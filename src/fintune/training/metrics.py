"""metrics.jsonl, one JSON object per line in the order of the steps, and what it says about a training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fintune.config import Config, TrainOptions
from fintune.evaluation.statistics import summarize_losses
from fintune.training import unsloth
from fintune.training.memory.planner import read_plan
from fintune.util.files import write_atomically

_EVALUATION_FACTS = {
    "eval_loss": "eval_loss",
    "eval_accuracy": "eval_accuracy",
    "eval_reward_accuracy": "eval_rewards/accuracies",
    "eval_reward_margin": "eval_rewards/margins",
    "eval_desired_right": "eval_rewards/chosen_right",
    "eval_undesired_right": "eval_rewards/rejected_right",
}
"""Figures of an evaluation by the name of their fact in the manifest."""


def read(path: Path) -> list[dict[str, Any]]:
    """Read all whole lines up to the first one that is damaged. A missing file has no lines."""
    if not path.exists():
        return []
    lines: list[dict[str, Any]] = []
    for text in path.read_bytes().split(b"\n")[:-1]:
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            break
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            break
        lines.append(line)
    return lines


def truncate(path: Path, last_step: int) -> list[dict[str, Any]]:
    """Drop the lines after a step, atomically.

    Returns:
        The remaining lines.
    """
    lines = [line for line in read(path) if line["step"] <= last_step]
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines))
    return lines


def append(path: Path, line: dict[str, Any]) -> None:
    """Append a line and pass it to the operating system at once."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def best_step(lines: Sequence[Mapping[str, Any]], keep: str) -> int | None:
    """Return the step of the best evaluation (the first of equal ones); None before the first evaluation.

    Args:
        lines: Lines of ``metrics.jsonl``.
        keep: Value of ``train.select_checkpoint``. ``last`` compares the losses.
    """
    evaluations = [line for line in lines if "eval_loss" in line]
    if not evaluations:
        return None
    if keep == "best_accuracy":
        return int(max(evaluations, key=lambda line: line["eval_accuracy"])["step"])
    return int(min(evaluations, key=lambda line: line["eval_loss"])["step"])


def is_out_of_patience(lines: Sequence[Mapping[str, Any]], options: TrainOptions) -> bool:
    """Whether the last ``train.early_stopping_patience`` evaluations were not better than an earlier one."""
    best = best_step(lines, options.select_checkpoint)
    if options.early_stopping_patience is None or best is None:
        return False
    later = [line for line in lines if "eval_loss" in line and line["step"] > best]
    return len(later) >= options.early_stopping_patience


def format_evaluation(line: Mapping[str, Any]) -> str:
    """Format an evaluation, such as ``eval loss 0.693 and 95.7% of held-out pairs ranked right``."""
    text = f"eval loss {line['eval_loss']:.3f}"
    if "eval_accuracy" in line:
        text += f" and {line['eval_accuracy']:.1%} right"
    if "eval_rewards/accuracies" in line:
        return f"{text} and {line['eval_rewards/accuracies']:.1%} of held-out pairs ranked right"
    sides = (("desired", "above", "chosen"), ("undesired", "below", "rejected"))
    shares = [
        f"{line[f'eval_rewards/{name}_right']:.1%} of the {label} answers {side}"
        for label, side, name in sides
        if f"eval_rewards/{name}_right" in line
    ]
    return f"{text} and {', '.join(shares)} the reference" if shares else text


def training_facts(config: Config, folder: Path, num_trainable: int) -> dict[str, Any]:
    """Summarise a finished training for its manifest.

    Args:
        config: The run.
        folder: Folder with ``metrics.jsonl`` and the files of the planner and of Unsloth.
        num_trainable: Trained parameters.

    Returns:
        Steps, tokens, losses, speed, the evaluation of the selected step, memory, and ``summary``, a line of text.
    """
    lines = read(folder / "metrics.jsonl")
    trained = [line for line in lines if "loss" in line]
    last, ends = trained[-1], summarize_losses([line["loss"] for line in trained])
    rate = last["tokens"] / max(last["seconds"], 1e-9)
    facts = {
        "num_steps": last["step"],
        "num_tokens": last["tokens"],
        "num_trainable": num_trainable,
        "mean_first_loss": ends.first,
        "mean_last_loss": ends.last,
        "num_mean_losses": ends.num,
        "train_seconds": last["seconds"],
        "tokens_per_second": round(rate, 1),
    }
    summary = f"loss {ends.first:.2f} (first steps) to {ends.last:.2f} (last), {rate:.0f} tok/s"
    if config.train.objective != "sft":
        facts["objective"] = config.train.objective
        # A step of KTO may hold answers of one label only. It then has no margin.
        margins = [line["rewards/margins"] for line in trained if "rewards/margins" in line]
        if margins:
            facts["reward_margin"] = margins[-1]
            summary += f", {config.train.objective} reward margin {margins[0]:.2f} to {margins[-1]:.2f}"
    best = best_step(lines, config.train.select_checkpoint)
    if best is not None:
        selected = best if config.train.select_checkpoint != "last" else last["step"]
        evaluation = next(line for line in lines if "eval_loss" in line and line["step"] == selected)
        facts |= {"kept_step": selected}
        facts |= {fact: evaluation[name] for fact, name in _EVALUATION_FACTS.items() if name in evaluation}
        summary = f"step {selected} kept with {format_evaluation(evaluation)}, {summary}"
    facts |= read_plan(folder) | unsloth.read_versions(folder)
    facts |= {"stopped_early": is_out_of_patience(lines, config.train)}
    return facts | {"summary": f"{last['step']} steps, {summary}"}
