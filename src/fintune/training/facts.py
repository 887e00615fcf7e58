"""A finished training in figures, for its manifest and the summary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fintune.config import Config
from fintune.evaluation.statistics import summarize_losses
from fintune.training import adapter, full, metrics, planned, unsloth
from fintune.training.answer_figures import right_sides, told_right_sides
from fintune.training.evaluate import best_step, out_of_patience


def trained_facts(config: Config, folder: Path, result: Path) -> dict[str, Any]:
    """Steps, tokens, losses, speed, trained parameters, the evaluation of the kept step, and a line of all that.

    Args:
        config: The run.
        folder: Holds ``metrics.jsonl``, and what the planner and Unsloth wrote.
        result: Adapter, or the folder of all weights.
    """
    lines = metrics.read(folder / "metrics.jsonl")
    trained = [line for line in lines if "loss" in line]
    last, ends = trained[-1], summarize_losses([line["loss"] for line in trained])
    rate = last["tokens"] / max(last["seconds"], 1e-9)
    saved = full.num_saved(result) if config.adapter.kind == "full" else adapter.num_saved(result)
    facts = {
        "num_steps": last["step"],
        "num_tokens": last["tokens"],
        "num_trainable": saved,
        "mean_first_loss": ends.first,
        "mean_last_loss": ends.last,
        "num_mean_losses": ends.num,
        "train_seconds": last["seconds"],
        "tokens_per_second": round(rate, 1),
    }
    steps = f"{last['step']} steps"
    told = f"loss {ends.first:.2f} (first steps) to {ends.last:.2f} (last), {rate:.0f} tok/s"
    if config.train.objective != "sft":
        facts["objective"] = config.train.objective
        # A step of kto may hold answers of one label alone, and then has none.
        margins = [line["rewards/margins"] for line in trained if "rewards/margins" in line]
        if margins:
            facts["reward_margin"] = margins[-1]
            told += f", {config.train.objective} reward margin {margins[0]:.2f} to {margins[-1]:.2f}"
    best = best_step(lines, config.train.select_checkpoint)
    if best is not None:
        kept = best if config.train.select_checkpoint != "last" else last["step"]
        at_kept = next(line for line in lines if "eval_loss" in line and line["step"] == kept)
        facts |= {"kept_step": kept, "eval_loss": at_kept["eval_loss"]}
        held_out = f"step {kept} kept with eval loss {at_kept['eval_loss']:.3f}"
        if "eval_accuracy" in at_kept:
            facts["eval_accuracy"] = at_kept["eval_accuracy"]
            held_out += f" and {at_kept['eval_accuracy']:.1%} right"
        if "eval_rewards/accuracies" in at_kept:
            ranked = at_kept["eval_rewards/accuracies"]
            facts |= {"eval_reward_accuracy": ranked, "eval_reward_margin": at_kept["eval_rewards/margins"]}
            held_out += f" and {ranked:.1%} of held-out pairs ranked right"
        elif rights := right_sides(at_kept):
            facts |= {f"eval_{name}_right": share for name, share in rights.items()}
            if "eval_rewards/margins" in at_kept:
                facts["eval_reward_margin"] = at_kept["eval_rewards/margins"]
            held_out += f" and {told_right_sides(rights)}"
        told = f"{held_out}, {told}"
    facts |= planned.read(folder) | unsloth.read(folder)
    return facts | {"stopped_early": out_of_patience(lines, config.train), "summary": f"{steps}, {told}"}
