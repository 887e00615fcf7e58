"""Few-shot prompts: solved questions of the training data, the most similar ones, before the question.

A shot is a turn of its own: the evidence of a training question with the question, answered by its gold program. Only
the evidence is shown, because a whole page is as long as the prompt it would help. No shot comes from a page or has the
id of a question that is scored, so that no answer is shown. Shots give way before the page does: where they do not all
fit, the least similar are left out.
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
    """A solved question.

    Attributes:
        id: The training record's.
        turns: The user's and the assistant's.
    """

    id: str
    turns: tuple[Message, Message]


@dataclass
class Prompts:
    """What became of the shots of all prompts.

    Attributes:
        used: Ids of the shots by the id of the question, the most similar first.
        num_left_out: Shots that did not fit.
    """

    used: dict[str, tuple[str, ...]] = field(default_factory=dict)
    num_left_out: int = 0

    def facts(self) -> dict[str, object]:
        """For the manifest."""
        times = Counter(shot for shots in self.used.values() for shot in shots)
        return {
            "num_shots_used": times.total(),
            "num_shots_left_out": self.num_left_out,
            "shot_ids": sorted(times),
        }


class Shots:
    """Chooses and inserts shots.

    Args:
        train: Training records.
        scored: Ids of all questions that are scored.
        number: Shots of a prompt.

    Raises:
        DataError: No training record is left that is on none of the scored pages.
    """

    def __init__(self, train: Sequence[FinQARecord], scored: Iterable[str], number: int) -> None:
        pages = {group_of(each, "page") for each in scored}
        self._records = [each for each in train if group_of(each.id, "page") not in pages]
        self.num_excluded = len(train) - len(self._records)
        if not self._records:
            raise DataError(
                f"no shots can be chosen: all {len(train)} training records ask about pages that are scored",
                hint="give other training data, or set the number of shots to 0",
            )
        self._number = number
        self._similar = SimilarTexts([each.qa.question for each in self._records])
        self._made: dict[int, Shot | None] = {}
        self.prompts = Prompts()

    def choose(self, question: str) -> list[Shot]:
        """The shots for a question, the most similar first."""
        chosen: list[Shot] = []
        for place, _ in self._similar.nearest(question):
            if len(chosen) == self._number:
                break
            if place not in self._made:
                self._made[place] = _shot(self._records[place])
            shot = self._made[place]
            if shot is not None:
                chosen.append(shot)
        return chosen

    def insert(
        self,
        record_id: str,
        question: str,
        messages: Sequence[Message],
        *,
        budget: int,
        count: Callable[[Sequence[Message]], int],
    ) -> tuple[Message, ...]:
        """A prompt with as many shots as fit, the most similar nearest to the question.

        Args:
            record_id: The question's.
            question: What is asked.
            messages: System message, where there is one, and the user's; cut to the budget already.
            budget: Tokens that the prompt may have.
            count: Tokens of rendered messages.
        """
        chosen = self.choose(question)
        fitting = len(chosen)
        while fitting:
            turns = [turn for shot in reversed(chosen[:fitting]) for turn in shot.turns]
            whole = (*messages[:-1], *turns, messages[-1])
            if count(whole) <= budget:
                break
            fitting -= 1
        else:
            whole = tuple(messages)
        self.prompts.used[record_id] = tuple(shot.id for shot in chosen[:fitting])
        self.prompts.num_left_out += len(chosen) - fitting
        return whole


def _shot(record: FinQARecord) -> Shot | None:
    """None where the gold program has no result, or an operand that stands nowhere on the page."""
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
) -> tuple[list[Example], Prompts]:
    """The evaluation examples of a run with shots from its training data.

    Args:
        config: The run; ``predict.num_fewshot`` is not 0.
        prepare: Its finished folder.
        examples: All evaluation examples.
        count: Tokens of rendered messages.

    Raises:
        ArtifactError: The training data is not what the folder was made from.
        DataError: It cannot be read, or all of it asks about pages that are scored.
    """
    with (prepare / "train.jsonl").open(encoding="utf-8") as lines:
        trained = {each.id for each in map(Example.model_validate_json, lines)}
    records = [each for each in load_finqa_splits(config)["train"].records if each.id in trained]
    if len(records) != len(trained):
        raise ArtifactError(
            f"{prepare} was made from other training data: {len(trained) - len(records)} of its examples are not there",
            hint="put the files back, or run fintune prepare again",
        )
    gold = json.loads((prepare / "gold.json").read_text(encoding="utf-8"))
    questions = {each.id: each.qa.question for each in map(FinQARecord.model_validate, gold)}
    shots = Shots(records, [each.id for each in examples], config.predict.num_fewshot)
    budget = prompt_budget(config.prompt.max_length)
    made = [
        each.model_copy(
            update={"messages": shots.insert(each.id, questions[each.id], each.messages, budget=budget, count=count)}
        )
        for each in track(examples, "choose shots", len(examples))
    ]
    return made, shots.prompts
