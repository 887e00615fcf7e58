"""``fintune guard``: check for forgetting on fixed finance questions and FinQA pages, before and after training."""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fintune.config import Config
from fintune.data.tokenize import TokenRow
from fintune.data.tokenize_chat import ConversationEncoder
from fintune.errors import FintuneError
from fintune.evaluation.questions import GoldQuestion, RegressionPrompt, regression_prompts
from fintune.inference.likelihood import AnswerLoss, answer_losses
from fintune.inference.open_model import wrap_model
from fintune.inference.protocol import Decoding, sorted_by_prompt
from fintune.manifest import Facts
from fintune.models import adapter as adapters
from fintune.models import load as models
from fintune.models.folder import full_model_folder
from fintune.records import Message, Record
from fintune.util.console import track
from fintune.util.files import write_atomically
from fintune.util.memory import advice_on_memory

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FILE = "guard.json"
_MAX_TOKENS = 100_000
_NEW_TOKENS = 48
"""Limit for a program in tokens. The longest of the set needs 30 if each digit is a token."""
_MAX_NAMED = 3
"""Number of prompts that the summary names."""


class PromptChange(Record):
    """A prompt before and after training.

    Attributes:
        before: Loss of the reference answer before training, in nats per token; ``after`` likewise.
        right_before: Whether the model's program executed to the gold result; None for prompts without a program.
    """

    id: str
    group: str
    question: str
    before: float
    after: float
    right_before: bool | None = None
    right_after: bool | None = None


class GroupChange(Record):
    """All prompts of one kind (``finance`` or ``statements``), before and after training.

    Attributes:
        before: Mean loss over all tokens of the reference answers before training, in nats per token.
        right_before: Number of programs that executed to the gold result; None for prompts without a program.
    """

    name: str
    num_prompts: int
    before: float
    after: float
    right_before: int | None = None
    right_after: int | None = None

    def __str__(self) -> str:
        line = f"{self.name} {self.before:.2f} to {self.after:.2f} nats a token"
        if self.right_before is None:
            return line
        return f"{line}, {self.right_before} of {self.num_prompts} right before, {self.right_after} after"


class GuardReport(Record):
    """Content of ``guard.json``.

    Attributes:
        worse: Ids of the prompts whose loss rose by more than the threshold, the largest rise first.
        lost: Ids of the prompts that were answered right before training and no longer are.
    """

    threshold: float
    groups: tuple[GroupChange, ...]
    worse: tuple[str, ...]
    lost: tuple[str, ...]
    prompts: tuple[PromptChange, ...]


def guard(config: Config, inputs: Mapping[str, Path], folder: Path) -> Facts:
    """Measure the fixed set on the base model and on the trained one; write ``guard.json``.

    Raises:
        FintuneError: A group's loss rose by more than ``guard.max_rise``.
        ModelError: The base model or the trained one cannot be loaded.
        ResourceError: Memory ran out.
    """
    import torch

    torch.set_num_threads(config.predict.threads or os.cpu_count() or 1)
    ref = models.fetch_base(config)
    tokenizer = models.load_tokenizer(ref, trust_remote_code=config.model.trust_remote_code)
    prompts = regression_prompts()
    # Each prompt with its reference answer, encoded as training would.
    encoder = ConversationEncoder(tokenizer, system="", train_on="last", max_length=_MAX_TOKENS)
    turns = {prompt.id: [*prompt.messages, Message(role="assistant", content=prompt.answer)] for prompt in prompts}
    rows = [row for name, messages in turns.items() for row in encoder.encode(name, messages).rows]
    with advice_on_memory(_memory_hint(config, prompts), during="asking the guard's prompts"):
        model: PreTrainedModel | PeftModel = _load(config, ref)  # a model trained in 4 bits may fit no other way
        before = _measure(config, model, tokenizer, prompts, rows, "before")
        whole = full_model_folder(inputs["train"])
        if whole is None:
            model = adapters.load_adapter(model, inputs["train"] / "adapter")
        else:
            del model
            gc.collect()
            model = _load(config, models.fetch(str(whole)))
        after = _measure(config, model, tokenizer, prompts, rows, "after")
    report = _report(prompts, before, after, config.guard.threshold)
    write_atomically(folder / FILE, report.model_dump_json(indent=1) + "\n")
    _judge(report, config.guard.max_rise)
    return {
        "groups": [group.model_dump(mode="json") for group in report.groups],
        "worse": list(report.worse),
        "lost": list(report.lost),
        "summary": _summary(report),
    }


def _load(config: Config, ref: models.ModelFolder) -> PreTrainedModel:
    return models.load_model(
        ref,
        dtype=config.train.dtype,
        quantization=config.model.quantization,
        trust_remote_code=config.model.trust_remote_code,
    )


_Measured = tuple[list[AnswerLoss], dict[str, bool]]


def _measure(
    config: Config,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[RegressionPrompt],
    rows: Sequence[TokenRow],
    when: str,
) -> _Measured:
    """Return the loss of every reference answer, and which questions about pages are answered right, by id."""
    tracked = track([(row.input_ids, row.completion_mask) for row in rows], f"guard {when} training", len(rows))
    losses = list(answer_losses(model, tracked))
    questions = [(prompt, prompt.record) for prompt in prompts if prompt.record is not None]
    language_model = wrap_model(model, tokenizer, batch_size=min(config.predict.batch_size, len(questions)))
    answers = language_model.complete([prompt.messages for prompt, _ in questions], Decoding(_NEW_TOKENS))
    is_right = {
        prompt.id: GoldQuestion(prompt.messages, record).is_correct(completion.text)
        for (prompt, record), completion in zip(questions, sorted_by_prompt(answers), strict=True)
    }
    return losses, is_right


def _memory_hint(config: Config, prompts: Sequence[RegressionPrompt]) -> str:
    # The prompts are fixed, and the model is loaded as training loaded it.
    num_together = min(config.predict.batch_size, sum(prompt.record is not None for prompt in prompts))
    smaller = f"set predict.batch_size={num_together // 2}, or " if num_together > 1 else ""
    return f"{smaller}continue without it (guard.enabled=false)"


def _report(prompts: Sequence[RegressionPrompt], before: _Measured, after: _Measured, threshold: float) -> GuardReport:
    changes = [
        PromptChange(
            id=prompt.id,
            group=prompt.group,
            question=prompt.messages[-1].content if prompt.record is None else prompt.record.qa.question,
            before=loss_before.mean,
            after=loss_after.mean,
            right_before=before[1].get(prompt.id),
            right_after=after[1].get(prompt.id),
        )
        for prompt, loss_before, loss_after in zip(prompts, before[0], after[0], strict=True)
    ]
    groups = []
    for name in dict.fromkeys(prompt.group for prompt in prompts):
        indices = [index for index, prompt in enumerate(prompts) if prompt.group == name]
        programs = [changes[index] for index in indices if changes[index].right_before is not None]
        groups.append(
            GroupChange(
                name=name,
                num_prompts=len(indices),
                before=_mean_loss([before[0][index] for index in indices]),
                after=_mean_loss([after[0][index] for index in indices]),
                right_before=sum(bool(change.right_before) for change in programs) if programs else None,
                right_after=sum(bool(change.right_after) for change in programs) if programs else None,
            )
        )
    by_rise = sorted(changes, key=lambda change: change.before - change.after)
    return GuardReport(
        threshold=threshold,
        groups=tuple(groups),
        # A loss of NaN is above every threshold.
        worse=tuple(change.id for change in by_rise if not change.after - change.before <= threshold),
        lost=tuple(change.id for change in changes if change.right_before and not change.right_after),
        prompts=tuple(changes),
    )


def _mean_loss(losses: Sequence[AnswerLoss]) -> float:
    return sum(loss.total for loss in losses) / sum(loss.num_tokens for loss in losses)


def _summary(report: GuardReport) -> str:
    groups = "; ".join(map(str, report.groups))
    if not report.worse and not report.lost:
        return f"{groups}; no prompt got worse by more than {report.threshold:g}"
    names = ", ".join(report.worse[:_MAX_NAMED]) + (" ..." if len(report.worse) > _MAX_NAMED else "")
    lost = f"; no longer right: {', '.join(report.lost[:_MAX_NAMED])}" if report.lost else ""
    worse = f"{len(report.worse)} of {len(report.prompts)} prompts worse by more than {report.threshold:g}"
    return f"{groups}; {worse}{f' ({names})' if names else ''}{lost}"


def _judge(report: GuardReport, max_rise: float | None) -> None:
    for group in report.groups:
        rise = group.after - group.before
        if max_rise is not None and (rise > max_rise or math.isnan(rise)):
            raise FintuneError(
                f"the {group.name} prompts lost {rise:.3f} nats a token by training ({group.before:.3f} to "
                f"{group.after:.3f}), guard.max_rise allows {max_rise:g}",
                hint="lower train.learning_rate or train.num_train_epochs and --redo train, or raise guard.max_rise",
            )
