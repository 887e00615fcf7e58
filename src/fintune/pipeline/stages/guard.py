"""``fintune guard``: fixed finance questions and FinQA pages before and after training, and what got worse."""

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
"""Tokens of a program; the longest of the set needs 30 where a digit is a token."""
_NUM_NAMED = 3


class Measured(Record):
    """A prompt before and after training.

    Attributes:
        id: Of the prompt.
        group: Its group.
        question: What is asked.
        before: AnswerLoss of the reference answer, in nats a token.
        after: Likewise.
        right_before: Whether the model's own program executes to the gold result; None where none is asked for.
        right_after: Likewise.
    """

    id: str
    group: str
    question: str
    before: float
    after: float
    right_before: bool | None = None
    right_after: bool | None = None


class Group(Record):
    """Prompts of one kind.

    Attributes:
        name: ``finance`` or ``statements``.
        num_prompts: So many.
        before: Mean loss over all tokens of the reference answers, in nats.
        after: Likewise.
        right_before: Programs that execute to the gold result; None where none is asked for.
        right_after: Likewise.
    """

    name: str
    num_prompts: int
    before: float
    after: float
    right_before: int | None = None
    right_after: int | None = None

    def told(self) -> str:
        """``finance 2.31 to 2.44 nats a token``."""
        line = f"{self.name} {self.before:.2f} to {self.after:.2f} nats a token"
        if self.right_before is None:
            return line
        return f"{line}, {self.right_before} of {self.num_prompts} right before, {self.right_after} after"


class GuardReport(Record):
    """What ``guard.json`` holds.

    Attributes:
        threshold: ``guard.threshold``.
        groups: In the order of the set.
        worse: Ids of prompts whose loss rose by more than the threshold, the most first.
        lost: Ids of those that were answered right and no longer are.
        prompts: All of them.
    """

    threshold: float
    groups: tuple[Group, ...]
    worse: tuple[str, ...]
    lost: tuple[str, ...]
    prompts: tuple[Measured, ...]


def guard(config: Config, inputs: Mapping[str, Path], folder: Path) -> Facts:
    """Measure the fixed set on the base and on what was trained.

    Args:
        config: The run.
        inputs: Needs ``train``.
        folder: Gets ``guard.json``.

    Returns:
        The groups' figures, and the prompts that got worse.

    Raises:
        FintuneError: A group's loss rose by more than ``guard.max_rise``.
        ModelError: The base model or what was trained cannot be loaded.
        ResourceError: Memory ran out.
    """
    import torch

    torch.set_num_threads(config.predict.threads or os.cpu_count() or 1)
    ref = models.fetch_base(config)
    tokenizer = models.load_tokenizer(ref, trust_remote_code=config.model.trust_remote_code)
    prompts = regression_prompts()
    rows = _rows(tokenizer, prompts)
    with advice_on_memory(_less_memory(config, prompts), during="asking the guard's prompts"):
        model: PreTrainedModel | PeftModel = _load(config, ref)
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
    # As training held it: a model that was trained in 4 bits may fit no other way.
    return models.load_model(
        ref,
        dtype=config.train.dtype,
        quantization=config.model.quantization,
        trust_remote_code=config.model.trust_remote_code,
    )


def _rows(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[RegressionPrompt]) -> list[TokenRow]:
    """Each prompt with its reference answer, as training would encode it."""
    encoder = ConversationEncoder(tokenizer, system="", train_on="last", max_length=_MAX_TOKENS)
    rows: list[TokenRow] = []
    for each in prompts:
        turns = [*each.messages, Message(role="assistant", content=each.answer)]
        rows += encoder.encode(each.id, turns).rows
    return rows


def _measure(
    config: Config,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[RegressionPrompt],
    rows: Sequence[TokenRow],
    when: str,
) -> tuple[list[AnswerLoss], dict[str, bool]]:
    """AnswerLoss of every reference answer, and which pages' questions the model answers right, by id."""
    each_row = track([(row.input_ids, row.completion_mask) for row in rows], f"guard {when} training", len(rows))
    losses = list(answer_losses(model, each_row))
    asked = [(each, each.record) for each in prompts if each.record is not None]
    language_model = wrap_model(model, tokenizer, batch_size=min(config.predict.batch_size, len(asked)))
    answers = language_model.complete([each.messages for each, _ in asked], Decoding(_NEW_TOKENS))
    right = {
        each.id: GoldQuestion(each.messages, record).is_correct(completion.text)
        for (each, record), completion in zip(asked, sorted_by_prompt(answers), strict=True)
    }
    return losses, right


def _less_memory(config: Config, prompts: Sequence[RegressionPrompt]) -> str:
    # Its prompts are fixed, and it loads the model as training did.
    num_together = min(config.predict.batch_size, sum(each.record is not None for each in prompts))
    smaller = f"set predict.batch_size={num_together // 2}, or " if num_together > 1 else ""
    return f"{smaller}go on without it (guard.enabled=false)"


def _report(
    prompts: Sequence[RegressionPrompt],
    before: tuple[list[AnswerLoss], dict[str, bool]],
    after: tuple[list[AnswerLoss], dict[str, bool]],
    threshold: float,
) -> GuardReport:
    measured = [
        Measured(
            id=each.id,
            group=each.group,
            question=each.messages[-1].content if each.record is None else each.record.qa.question,
            before=was.mean,
            after=now.mean,
            right_before=before[1].get(each.id),
            right_after=after[1].get(each.id),
        )
        for each, was, now in zip(prompts, before[0], after[0], strict=True)
    ]
    groups = []
    for name in dict.fromkeys(each.group for each in prompts):
        places = [place for place, each in enumerate(prompts) if each.group == name]
        programs = [measured[place] for place in places if measured[place].right_before is not None]
        groups.append(
            Group(
                name=name,
                num_prompts=len(places),
                before=_mean([before[0][place] for place in places]),
                after=_mean([after[0][place] for place in places]),
                right_before=sum(bool(each.right_before) for each in programs) if programs else None,
                right_after=sum(bool(each.right_after) for each in programs) if programs else None,
            )
        )
    rises = sorted(measured, key=lambda each: each.before - each.after)
    return GuardReport(
        threshold=threshold,
        groups=tuple(groups),
        # A loss that is no number any more is above every threshold.
        worse=tuple(each.id for each in rises if not each.after - each.before <= threshold),
        lost=tuple(each.id for each in measured if each.right_before and not each.right_after),
        prompts=tuple(measured),
    )


def _mean(losses: Sequence[AnswerLoss]) -> float:
    return sum(each.total for each in losses) / sum(each.num_tokens for each in losses)


def _summary(report: GuardReport) -> str:
    told = "; ".join(group.told() for group in report.groups)
    if not report.worse and not report.lost:
        return f"{told}; no prompt got worse by more than {report.threshold:g}"
    named = ", ".join(report.worse[:_NUM_NAMED]) + (" ..." if len(report.worse) > _NUM_NAMED else "")
    lost = f"; no longer right: {', '.join(report.lost[:_NUM_NAMED])}" if report.lost else ""
    worse = f"{len(report.worse)} of {len(report.prompts)} prompts worse by more than {report.threshold:g}"
    return f"{told}; {worse}{f' ({named})' if named else ''}{lost}"


def _judge(report: GuardReport, max_rise: float | None) -> None:
    for group in report.groups:
        rise = group.after - group.before
        if max_rise is not None and (rise > max_rise or math.isnan(rise)):
            raise FintuneError(
                f"the {group.name} prompts lost {rise:.3f} nats a token by training ({group.before:.3f} to "
                f"{group.after:.3f}), guard.max_rise allows {max_rise:g}",
                hint="lower train.learning_rate or train.num_train_epochs and --redo train, or raise guard.max_rise",
            )
