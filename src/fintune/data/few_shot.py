"""Few-shot prompts: solved questions of the training data before the question, the most similar ones.

A shot is the evidence of a training question with the question, answered by its gold program. It shows the evidence
alone, because a whole page is as long as the prompt that it would help. No shot is about the page of a scored question,
so no answer is shown. The page has priority: if not all shots fit, the least similar are left out.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fintune.config import Config
from fintune.data.dataset import load_finqa_splits
from fintune.errors import ArtifactError, DataError
from fintune.finqa.evidence import derive
from fintune.finqa.execute import execute
from fintune.finqa.page import group_of
from fintune.finqa.program import tokenize
from fintune.finqa.prompt import excerpt, prompt_budget
from fintune.finqa.text_similarity import SimilarTexts
from fintune.records import Example, FinQARecord, Message
from fintune.util.console import track


@dataclass(frozen=True)
class Shot:
    """A solved question: the id of the training record, and the turns of user and assistant."""

    id: str
    turns: tuple[Message, Message]


@dataclass
class ShotUse:
    """Which shots were used.

    Attributes:
        used: Ids of the shots by the id of the question, the most similar first.
        num_left_out: Shots that did not fit.
    """

    used: dict[str, tuple[str, ...]] = field(default_factory=dict)
    num_left_out: int = 0

    def facts(self) -> dict[str, object]:
        """Return the facts for the manifest."""
        counts = Counter(shot for shots in self.used.values() for shot in shots)
        return {
            "num_shots_used": counts.total(),
            "num_shots_left_out": self.num_left_out,
            "shot_ids": sorted(counts),
        }


class ShotSelector:
    """Select shots and insert them into prompts.

    Args:
        train: Training records.
        scored: Ids of all questions that are scored.
        number: Number of shots in a prompt.

    Raises:
        DataError: Every training record is about the page of a scored question.
    """

    def __init__(self, train: Sequence[FinQARecord], scored: Iterable[str], number: int) -> None:
        pages = {group_of(record_id, "page") for record_id in scored}
        self._records = [record for record in train if group_of(record.id, "page") not in pages]
        self.num_excluded = len(train) - len(self._records)
        if not self._records:
            raise DataError(
                f"no shots can be chosen: all {len(train)} training records ask about pages that are scored",
                hint="give other training data, or set the number of shots to 0",
            )
        self._number = number
        self._similar = SimilarTexts([record.qa.question for record in self._records])
        self._shots: dict[int, Shot | None] = {}
        self.use = ShotUse()

    def select(self, question: str) -> list[Shot]:
        """Return the shots for a question, the most similar first."""
        selected: list[Shot] = []
        for index, _ in self._similar.nearest(question):
            if len(selected) == self._number:
                break
            if index not in self._shots:
                self._shots[index] = _make_shot(self._records[index])
            shot = self._shots[index]
            if shot is not None:
                selected.append(shot)
        return selected

    def insert(
        self,
        record_id: str,
        question: str,
        messages: Sequence[Message],
        *,
        budget: int,
        count: Callable[[Sequence[Message]], int],
    ) -> tuple[Message, ...]:
        """Return the prompt with as many shots as fit, the most similar next to the question.

        Args:
            record_id: Id of the question.
            question: The question.
            messages: System message, if there is one, and the user's, which fits the budget.
            budget: Maximum number of tokens of the prompt.
            count: Returns the number of tokens of rendered messages.
        """
        selected = self.select(question)
        num_fitting = len(selected)
        while num_fitting:
            turns = [turn for shot in reversed(selected[:num_fitting]) for turn in shot.turns]
            prompt = (*messages[:-1], *turns, messages[-1])
            if count(prompt) <= budget:
                break
            num_fitting -= 1
        else:
            prompt = tuple(messages)
        self.use.used[record_id] = tuple(shot.id for shot in selected[:num_fitting])
        self.use.num_left_out += len(selected) - num_fitting
        return prompt


def _make_shot(record: FinQARecord) -> Shot | None:
    """Return None if the gold program has no result, or one of its operands is not on the page."""
    tokens = tokenize(record.qa.program)
    if execute(tokens, record.table).invalid:
        return None
    keys = list(record.qa.gold_inds or ())
    if not keys:
        derived = derive(tokens, record.table, (*record.pre_text, *record.post_text), record.qa.question)
        if not derived.complete:
            return None
        keys = list(derived.units)
    user = Message(role="user", content=excerpt(record, keys))
    return Shot(record.id, (user, Message(role="assistant", content=record.qa.program.strip())))


def examples_with_shots(
    config: Config, prepare: Path, examples: Sequence[Example], count: Callable[[Sequence[Message]], int]
) -> tuple[list[Example], ShotUse]:
    """Insert shots from a run's training data into its evaluation examples.

    Args:
        config: The configuration of the run, with ``predict.num_fewshot`` above 0.
        prepare: The finished ``prepare`` folder of the run.
        examples: All evaluation examples.
        count: Returns the number of tokens of rendered messages.

    Raises:
        ArtifactError: The folder was made from other training data.
        DataError: The data cannot be read, or all of it is about pages that are scored.
    """
    with (prepare / "train.jsonl").open(encoding="utf-8") as lines:
        trained = {Example.model_validate_json(line).id for line in lines}
    records = [record for record in load_finqa_splits(config)["train"].records if record.id in trained]
    if len(records) != len(trained):
        raise ArtifactError(
            f"{prepare} was made from other training data: {len(trained) - len(records)} of its examples are missing",
            hint="put the files back, or run fintune prepare again",
        )
    gold = json.loads((prepare / "gold.json").read_text(encoding="utf-8"))
    questions = {record.id: record.qa.question for record in map(FinQARecord.model_validate, gold)}
    selector = ShotSelector(records, [example.id for example in examples], config.predict.num_fewshot)
    budget = prompt_budget(config.prompt.max_length)
    prompts = [
        selector.insert(example.id, questions[example.id], example.messages, budget=budget, count=count)
        for example in track(examples, "choose shots", len(examples))
    ]
    with_shots = [
        example.model_copy(update={"messages": messages}) for example, messages in zip(examples, prompts, strict=True)
    ]
    return with_shots, selector.use
