"""Rows of pairs and of labelled answers: their lengths, how they come into batches, how labels are balanced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fintune.config import TrainOptions
from fintune.errors import ArtifactError
from fintune.training.collate import check_mask

if TYPE_CHECKING:
    from datasets import Dataset

    Batch = dict[str, Any]

MOST_DESIRED = 4 / 3
"""So much more than the undesired answers the desired ones weigh together at most (arXiv 2402.01306, section 4)."""


def lengths(rows: Dataset) -> list[int]:
    """Tokens that a row reads: of a pair, the prompt twice.

    Raises:
        ArtifactError: The rows are no pairs and no labelled answers.
    """
    if "rejected_ids" not in rows.column_names:
        raise ArtifactError("the prepared rows are no preference pairs", hint="run prepare again")
    masks = zip(rows["input_ids"], rows["completion_mask"], rows["rejected_ids"], strict=True)
    return [len(ids) + (mask.index(1) + len(rejected) if rejected else 0) for ids, mask, rejected in masks]


def all_pairs(rows: Dataset) -> bool:
    """Whether every row has both answers."""
    return "label" not in rows.column_names


def labels_of(rows: Dataset) -> list[bool] | None:
    """Whether each row's own answer is desired; None where all are pairs, or no preferences."""
    return None if all_pairs(rows) else list(rows["label"])


def count_labels(rows: Dataset) -> tuple[int, int]:
    """Desired and undesired answers; a pair holds one of each."""
    if all_pairs(rows):
        return len(rows), len(rows)
    num_desired = sum(rows["label"])
    return num_desired, len(rows) - num_desired + sum(bool(rejected) for rejected in rows["rejected_ids"])


def label_weights(options: TrainOptions, num_desired: int, num_undesired: int) -> tuple[float, float]:
    """Weights of desired and undesired answers in KTO's loss.

    What the options leave open is chosen nearest to 1 such that the desired answers together weigh as much as the
    undesired ones, or up to a third more; of two open weights, that of the fewer answers is raised.

    Args:
        options: ``desirable_weight`` and ``undesirable_weight``.
        num_desired: Desired answers, at least one.
        num_undesired: Undesired answers, at least one.
    """
    ratio = num_desired / num_undesired
    desired, undesired = options.desirable_weight, options.undesirable_weight
    if desired is None and undesired is None:
        desired = max(1.0, 1 / ratio)
    if desired is None:
        assert undesired is not None, "one of them is given"
        desired = _nearest_to_one(undesired / ratio, MOST_DESIRED * undesired / ratio)
    elif undesired is None:
        undesired = _nearest_to_one(desired * ratio / MOST_DESIRED, desired * ratio)
    return desired, undesired


def _nearest_to_one(low: float, high: float) -> float:
    return min(max(1.0, low), high)


def with_label_weights(options: TrainOptions, rows: Dataset) -> TrainOptions:
    """The options with both weights of KTO filled in; those of other objectives as they are."""
    if options.objective != "kto":
        return options
    desired, undesired = label_weights(options, *count_labels(rows))
    return options.model_copy(update={"desirable_weight": desired, "undesirable_weight": undesired})


def label_facts(options: TrainOptions, rows: Dataset) -> dict[str, float]:
    """How many answers KTO learns from by label, and what each weighs; nothing for other objectives.

    Args:
        options: How to train.
        rows: To train on.
    """
    if options.objective != "kto":
        return {}
    num_desired, num_undesired = count_labels(rows)
    desired, undesired = label_weights(options, num_desired, num_undesired)
    return {
        "num_desired": num_desired,
        "num_undesired": num_undesired,
        "desirable_weight": round(desired, 6),
        "undesirable_weight": round(undesired, 6),
    }


def told_labels(facts: Mapping[str, float]) -> str:
    """A line for the user of what :func:`label_facts` gave."""
    share = facts["num_desired"] * facts["desirable_weight"] / (facts["num_undesired"] * facts["undesirable_weight"])
    outside = "" if 0.995 < share < MOST_DESIRED + 0.005 else "; the paper keeps it within 1 and 1.33"
    desired = f"{facts['num_desired']} desired answers of weight {facts['desirable_weight']:.3g}"
    undesired = f"{facts['num_undesired']} undesired answers of weight {facts['undesirable_weight']:.3g}"
    return f"kto: {desired}, {undesired}, together {share:.2f} to 1{outside}"


def batches(rows: Dataset, order: Sequence[int], size: int) -> list[list[dict[str, Any]]]:
    """Rows in their order, so many a pass; a lone one goes with those before it.

    KTO compares answers of different prompts, of which a single row has none.
    """
    starts = list(range(0, len(order), size))
    if len(starts) > 1 and len(order) - starts[-1] == 1:
        starts.pop()
    ends = [*starts[1:], len(order)]
    return [[rows[index] for index in order[start:end]] for start, end in zip(starts, ends, strict=True)]


class PairCollator:
    """Rows of pairs to one batch, chosen answers in the first half of its rows and rejected ones in the second.

    Args:
        pad_token_id: Id that fills the shorter rows, on the right.
        multiple: The width is rounded up to a multiple of this.
        single: Label each answer and add, for KTO's estimate of the divergence, each prompt with an answer that was
            given to another one. Rows may then be answers without a partner, too.
    """

    def __init__(self, pad_token_id: int, *, multiple: int = 1, single: bool = False) -> None:
        self.pad_token_id, self.multiple, self.single = pad_token_id, multiple, single

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        """``input_ids``, ``attention_mask``, ``completion_mask``, shape [answers, width], and the rows' ``ids``.

        Raises:
            DataError: A row in which nothing or everything is trained.
        """
        from trl.trainer.dpo_trainer import DataCollatorForPreference
        from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

        ids = [str(row["id"]) for row in rows]
        split = [_split(row) for row in rows]
        if not self.single:
            collate = DataCollatorForPreference(self.pad_token_id, pad_to_multiple_of=self.multiple)
            return {**collate(split), "ids": ids}
        answers = [
            {"prompt_ids": row["prompt_ids"], "completion_ids": row["chosen_ids"], "label": row["label"]}
            for row in split
        ]
        answers += [
            {"prompt_ids": row["prompt_ids"], "completion_ids": row["rejected_ids"], "label": False}
            for row in split
            if row["rejected_ids"]
        ]
        shift = _shift([row["prompt_ids"] for row in answers])
        for place, answer in enumerate(answers):
            answer["KL_completion_ids"] = answers[place - shift]["completion_ids"]
        collate = DataCollatorForUnpairedPreference(self.pad_token_id, pad_to_multiple_of=self.multiple)
        return {**collate(answers), "ids": ids}


def _shift(prompts: Sequence[Sequence[int]]) -> int:
    """How far answers are moved so that the fewest come behind their own prompt; the least of equals.

    Answers to one prompt are of like length and so stand beside each other, since a batch is ordered by it.
    """
    keys = [tuple(prompt) for prompt in prompts]

    def num_own(shift: int) -> int:
        return sum(keys[place] == keys[place - shift] for place in range(len(keys)))

    return min(range(1, len(keys)), key=num_own, default=0)


def _split(row: Mapping[str, Any]) -> dict[str, Any]:
    mask, tokens = row["completion_mask"], row["input_ids"]
    check_mask(str(row["id"]), tokens, mask)
    start = mask.index(1)
    return {
        "prompt_ids": tokens[:start],
        "chosen_ids": tokens[start:],
        "rejected_ids": row["rejected_ids"],
        "label": row.get("label", True),
    }
