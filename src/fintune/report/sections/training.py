"""Training: the loss curve and the speed, and the regression check before and after it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import exp
from typing import Any

from fintune.evaluation.statistics import summarize_losses
from fintune.report.formatting import HtmlTable, format_seconds
from fintune.report.plots import Curve, loss_plot

_SFT_LOSS = "The loss is the mean negative log-likelihood of the completion's tokens. The prompt is not trained."
_PAIR_LOSS = (
    "The loss is the preference loss of pairs of answers. A margin is the reward of the chosen answer minus that of "
    "the rejected one. A pair is ranked correctly if its margin is positive."
)
_LABEL_LOSS = (
    "The loss is the preference loss of single answers, desired and undesired. A reward is beta times the "
    "log-probability that an answer has gained since training started. A margin is the mean reward of the desired "
    "answers minus that of the undesired ones."
)
_METHODS = {
    ("lora", "none"): "LoRA",
    ("lora", "nf4"): "QLoRA",
    ("dora", "none"): "DoRA",
    ("dora", "nf4"): "QDoRA",
}
_GROUP_LABELS = {"finance": "finance questions", "statements": "FinQA pages, with programs"}


def training_method(kind: str, quantization: str) -> str:
    """LoRA, QLoRA, DoRA, QDoRA or full fine-tuning, by ``adapter.kind`` and ``model.quantization``."""
    return _METHODS.get((kind, quantization), "full fine-tuning")


def training_section(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Variables of the template; nothing if nothing was trained.

    Each line of ``metrics.jsonl`` has ``step`` and any of ``loss``, ``learning_rate`` and ``eval_loss``; ``tokens`` and
    ``seconds`` count from the start of training.
    """
    train, evaluation, rate = (_curve(lines, key) for key in ("loss", "eval_loss", "learning_rate"))
    if not train.steps:
        return {}
    losses = summarize_losses(train.values)
    first, last = f"{losses.first:.3f}", f"{losses.last:.3f}"
    legend = [("s1", f"training loss{', with its moving average' if len(train.steps) > 60 else ''}")]
    if evaluation.steps:
        legend.append(("s4", "evaluation loss"))
    logged = f"{losses.num} logged" if losses.num > 1 else "logged one"
    rows = [
        ("optimizer steps", f"{train.steps[-1]:,}"),
        *_speed_rows(lines),
        *_evaluation_rows(lines, evaluation),
        (f"mean loss, first {logged}", first),
        (f"mean loss, last {logged}", last),
        *_preference_rows(lines),
    ]
    if rate.steps:
        rows.append(("peak learning rate", f"{max(rate.values):.2g}"))
    # Losses that round to the same figure neither rise nor fall.
    went = "fell" if float(last) < float(first) else "rose"
    change = f"{first} at the start and at the end," if first == last else f"{went} from {first} to {last} in"
    means = f", means of {losses.num} logged losses" if losses.num > 1 else ""
    # Only the trainer of labelled answers logs an estimate of the divergence.
    is_labelled = any("kl" in line for line in lines)
    is_paired = any("rewards/margins" in line for line in lines)
    title = f"Loss {change} {train.steps[-1]:,} steps{means}"
    return {
        "words": _LABEL_LOSS if is_labelled else _PAIR_LOSS if is_paired else _SFT_LOSS,
        "plot": loss_plot("loss-plot", title, train, evaluation, rate),
        "legend": legend,
        "table": HtmlTable("Training", (), rows),
    }


def _speed_rows(lines: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    timed = [(line["tokens"], line["seconds"]) for line in lines if line.get("seconds") and line.get("tokens")]
    if not timed:
        return []
    tokens, seconds = timed[-1]
    speed = f"{tokens / seconds:,.0f}"
    return [("tokens trained", f"{tokens:,}"), ("seconds", format_seconds(seconds)), ("tokens per second", speed)]


def _evaluation_rows(lines: Sequence[Mapping[str, Any]], evaluation: Curve) -> Iterator[tuple[str, str]]:
    if evaluation.steps:
        yield "last evaluation loss", f"{evaluation.values[-1]:.4f}"
        lowest, step = min(zip(evaluation.values, evaluation.steps, strict=True))
        yield "lowest evaluation loss", f"{lowest:.4f} at step {step:,}"
        accuracy = _curve(lines, "eval_accuracy")
        if accuracy.steps:
            highest, step = max(zip(accuracy.values, (-step for step in accuracy.steps), strict=True))
            yield "highest execution accuracy", f"{highest:.1%} at step {-step:,}"


def _preference_rows(lines: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """Margins between chosen and rejected answers, for preference training."""

    def row(name: str, key: str, form: str) -> Iterator[tuple[str, str]]:
        if values := _curve(lines, key).values:
            yield name, f"{values[0]:{form}} first, {values[-1]:{form}} last"

    is_labelled = any(f"eval_rewards/{name}_right" in line for line in lines for name in ("chosen", "rejected"))
    held_out = "held-out answers" if is_labelled else "held-out pairs"
    for prefix, split in (("", "training"), ("eval_", held_out)):
        yield from row(f"reward margin, {split}", f"{prefix}rewards/margins", ".3f")
        yield from row(f"ranked correctly, {split}", f"{prefix}rewards/accuracies", ".1%")
    yield from row(f"desired above the reference, {held_out}", "eval_rewards/chosen_right", ".1%")
    yield from row(f"undesired below the reference, {held_out}", "eval_rewards/rejected_right", ".1%")


def _curve(lines: Sequence[Mapping[str, Any]], key: str) -> Curve:
    points = [(line["step"], line[key]) for line in lines if isinstance(line.get(key), (int, float))]
    return Curve([step for step, _ in points], [value for _, value in points])


def regression_section(report: Mapping[str, Any]) -> dict[str, Any]:
    """Variables of the template, from ``guard/guard.json``; nothing without a regression check."""
    if not report:
        return {}
    by_id = {prompt["id"]: prompt for prompt in report["prompts"]}
    worse = [by_id[id_] for id_ in report["worse"]]
    columns = ("prompts", "n", "loss before", "after", "perplexity", "right")
    worse_rows = [[p["question"], _format_loss(p["before"]), _format_loss(p["after"])] for p in worse]
    return {
        "sentence": regression_sentence(report),
        "table": HtmlTable("Regression check", columns, [_group_row(group) for group in report["groups"]]),
        "worse": HtmlTable("Prompts that got worse", ("question", "loss before", "after"), worse_rows),
        "lost": [by_id[id_]["question"] for id_ in report["lost"]],
    }


def regression_sentence(report: Mapping[str, Any]) -> str:
    """Say how many prompts got worse, "" without a regression check."""
    if not report:
        return ""
    number, total = len(report["worse"]), len(report["prompts"])
    count = f"{number} of {total} prompts" if number else f"No prompt of {total}"
    return f"{count} got worse by more than {report['threshold']:g} nats per token."


def _group_row(group: Mapping[str, Any]) -> list[str]:
    before, after = group["before"], group["after"]
    is_known = before is not None and after is not None
    return [
        _GROUP_LABELS.get(group["name"], group["name"]),
        f"{group['num_prompts']:,}",
        _format_loss(before),
        _format_loss(after),
        f"{exp(before):.1f} \u2192 {exp(after):.1f}" if is_known and max(before, after) < 50 else "",
        "" if group["right_before"] is None else f"{group['right_before']} \u2192 {group['right_after']}",
    ]


def _format_loss(nats: float | None) -> str:
    return "not a number" if nats is None else f"{nats:.3f}"
