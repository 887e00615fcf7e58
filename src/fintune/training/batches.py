"""The order of the examples in a run, and how rows are collated into batches."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fintune.errors import DataError

if TYPE_CHECKING:
    import torch
    from datasets import Dataset

IGNORED = -100
"""Label of a position that is not trained."""
WIDTH_MULTIPLE = 32
"""Batches for the layers of transformers are padded to a multiple of this many tokens."""

# Batches of similar lengths waste little on padding. Sorting within a window only keeps the order close to random.
_WINDOW_BATCHES = 32


# -- the order


def num_steps(num_rows: int, epochs: float, batch_size: int, max_steps: int | None) -> tuple[int, int]:
    """Count a run's examples and steps.

    Returns:
        Number of examples that are trained on, and of optimizer steps.
    """
    if max_steps is not None:
        return max_steps * batch_size, max_steps
    num_examples = max(1, round(num_rows * epochs))
    return num_examples, math.ceil(num_examples / batch_size)


def training_order(
    lengths: Sequence[int], num_examples: int, batch_size: int, seed: int, *, labels: Sequence[bool] | None = None
) -> list[int]:
    """Fix the order of the examples for the whole run, so that a resumed run only has to count steps.

    Every pass over the data is shuffled again. Within a window of some batches, the examples of a pass are sorted by
    length, and then the batches are shuffled. The remainder of a pass starts the first batch of the next pass. Other
    examples fill that batch, so no batch holds an example twice unless there are fewer examples than a batch. Only the
    last batch of the run may be smaller.

    Args:
        lengths: Tokens of each example.
        num_examples: Examples of the run. A number above ``len(lengths)`` means several passes.
        batch_size: Examples of an optimizer step, over all devices and accumulated passes.
        seed: Seed of the order.
        labels: Label of each example, for KTO. Every batch then holds both labels in the proportion of its window, as
            nearly as whole examples allow. Where a label goes with a length, batches of similar lengths would hold one
            label only.

    Returns:
        ``num_examples`` indices into ``lengths``.
    """
    draw = random.Random(seed)  # noqa: S311 - an order, not a secret
    order: list[int] = []
    remainder: list[int] = []
    while len(order) + len(remainder) < num_examples:
        one_pass = list(range(len(lengths)))
        draw.shuffle(one_pass)
        if remainder:
            num_missing = min(batch_size, num_examples - len(order)) - len(remainder)
            remainder += _fill(one_pass, remainder, num_missing, labels)
            if len(remainder) < batch_size:
                continue  # fewer examples than a batch, or the end
            taken = set(remainder[-num_missing:])
            order += remainder
            one_pass = [index for index in one_pass if index not in taken]
        batches, remainder = _sorted_batches(one_pass[: num_examples - len(order)], lengths, batch_size, draw, labels)
        order += batches
    return order + remainder


def _sorted_batches(
    one_pass: list[int], lengths: Sequence[int], batch_size: int, draw: random.Random, labels: Sequence[bool] | None
) -> tuple[list[int], list[int]]:
    """Return the indices of whole batches, one batch after the other, and the remainder."""
    window = _WINDOW_BATCHES * batch_size
    order: list[int] = []
    remainder: list[int] = []
    for start in range(0, len(one_pass), window):
        part = sorted(one_pass[start : start + window], key=lambda index: lengths[index])
        part = part if labels is None else _interleave_labels(part, labels)
        # The remainder (of the last window only) is cut out at a random position, not always at the longest examples.
        num_left = len(part) % batch_size
        cut = draw.randrange(len(part) - num_left + 1)
        remainder, part = part[cut : cut + num_left], part[:cut] + part[cut + num_left :]
        batches = [part[at : at + batch_size] for at in range(0, len(part), batch_size)]
        draw.shuffle(batches)
        order += [index for batch in batches for index in batch]
    return order, remainder


def _fill(one_pass: list[int], remainder: list[int], number: int, labels: Sequence[bool] | None) -> list[int]:
    """Take the first examples of a pass that are not in the remainder; copies if there are no others."""
    excluded = set(remainder)
    others = sorted(one_pass, key=lambda index: index in excluded)
    if labels is None or len(one_pass) - len(excluded) < number:
        return others[:number]
    others = others[: len(one_pass) - len(excluded)]
    target = round(sum(labels) / len(labels) * (len(remainder) + number)) - sum(labels[index] for index in remainder)
    desired, undesired = ([index for index in others if labels[index] == label] for label in (True, False))
    num_desired = min(max(target, number - len(undesired), 0), number, len(desired))
    return desired[:num_desired] + undesired[: number - num_desired]


def _interleave_labels(part: Sequence[int], labels: Sequence[bool]) -> list[int]:
    """Spread both labels evenly over the whole, and keep the order within each label."""
    positions: list[tuple[float, int]] = []
    for label in (True, False):
        members = [index for index in part if labels[index] == label]
        positions += [((at + 0.5) / len(members), index) for at, index in enumerate(members)]
    return [index for _, index in sorted(positions, key=lambda entry: entry[0])]


# -- rows with one completion


def check_mask(record_id: str, input_ids: Sequence[int], completion_mask: Sequence[int]) -> None:
    """Refuse a row that would train nothing, or the prompt as well.

    Raises:
        DataError: With the row's id.
    """
    problem = None
    if len(input_ids) != len(completion_mask):
        problem = f"{len(input_ids)} tokens but a mask of {len(completion_mask)}"
    elif sum(completion_mask) == 0:
        problem = "no token of this example is trained"
    elif sum(completion_mask) == len(completion_mask):
        problem = "every token is trained, the prompt too"
    if problem:
        raise DataError(problem, record_id=record_id, hint="rerun prepare")


class CompletionCollator:
    """Rows of token ids as one batch, padded on the right. Only the completion is trained, padding never.

    Args:
        pad_token_id: Token id that fills shorter rows.
        multiple: The width of a batch is rounded up to a multiple of this. Matrix products are set up again for every
            new width, which costs more on a CPU than the padding: 32 makes a run over report pages a fifth faster.
    """

    def __init__(self, pad_token_id: int, *, multiple: int = 1) -> None:
        self.pad_token_id, self.multiple = pad_token_id, multiple

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Return ``input_ids``, ``attention_mask`` and ``labels``, each of shape [batch, width].

        Raises:
            DataError: A row in which nothing or everything is trained, or whose columns differ in length.
        """
        import torch

        longest = max(len(row["input_ids"]) for row in rows)
        shape = (len(rows), -(-longest // self.multiple) * self.multiple)
        input_ids = torch.full(shape, self.pad_token_id)
        attention_mask = torch.zeros(shape, dtype=torch.long)
        labels = torch.full(shape, IGNORED)
        for at, row in enumerate(rows):
            ids, mask = row["input_ids"], row["completion_mask"]
            check_mask(str(row.get("id", "?")), ids, mask)
            tokens = torch.tensor(ids)
            input_ids[at, : len(ids)] = tokens
            attention_mask[at, : len(ids)] = 1
            labels[at, : len(ids)] = torch.where(torch.tensor(mask) == 1, tokens, IGNORED)
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


# -- preference rows


def batch_preference_rows(rows: Dataset, order: Sequence[int], size: int) -> list[list[dict[str, Any]]]:
    """Divide rows into batches. A single last row joins the batch before it.

    KTO compares answers to different prompts, and a single row has no other prompt.
    """
    starts = list(range(0, len(order), size))
    if len(starts) > 1 and len(order) - starts[-1] == 1:
        starts.pop()
    ends = [*starts[1:], len(order)]
    return [[rows[index] for index in order[start:end]] for start, end in zip(starts, ends, strict=True)]


class PreferenceCollator:
    """Preference rows as one batch, with chosen answers in the first half of its rows and rejected ones in the second.

    Args:
        pad_token_id: Token id that fills shorter rows, on the right.
        multiple: The width is rounded up to a multiple of this.
        unpaired: Give each answer its own label, for KTO. Rows may then be single answers. For KTO's estimate of the
            divergence, each prompt also gets an answer to another prompt.
    """

    def __init__(self, pad_token_id: int, *, multiple: int = 1, unpaired: bool = False) -> None:
        self.pad_token_id, self.multiple, self.unpaired = pad_token_id, multiple, unpaired

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return ``input_ids``, ``attention_mask``, ``completion_mask``, shape [answers, width], and the rows' ``ids``.

        Raises:
            DataError: A row in which nothing or everything is trained.
        """
        from trl.trainer.dpo_trainer import DataCollatorForPreference
        from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

        ids = [str(row["id"]) for row in rows]
        pairs = [_split_answers(row) for row in rows]
        if not self.unpaired:
            collate = DataCollatorForPreference(self.pad_token_id, pad_to_multiple_of=self.multiple)
            return {**collate(pairs), "ids": ids}
        answers = [
            {"prompt_ids": pair["prompt_ids"], "completion_ids": pair["chosen_ids"], "label": pair["label"]}
            for pair in pairs
        ]
        answers += [
            {"prompt_ids": pair["prompt_ids"], "completion_ids": pair["rejected_ids"], "label": False}
            for pair in pairs
            if pair["rejected_ids"]
        ]
        shift = _mismatching_shift([answer["prompt_ids"] for answer in answers])
        for at, answer in enumerate(answers):
            answer["KL_completion_ids"] = answers[at - shift]["completion_ids"]
        collate = DataCollatorForUnpairedPreference(self.pad_token_id, pad_to_multiple_of=self.multiple)
        return {**collate(answers), "ids": ids}


def _mismatching_shift(prompts: Sequence[Sequence[int]]) -> int:
    """Return the smallest shift of the answers that gives the fewest prompts one of their own answers.

    Answers to one prompt have similar lengths. A batch is ordered by length, so they are neighbours in it.
    """
    keys = [tuple(prompt) for prompt in prompts]

    def num_matches(shift: int) -> int:
        return sum(keys[at] == keys[at - shift] for at in range(len(keys)))

    return min(range(1, len(keys)), key=num_matches, default=0)


def _split_answers(row: Mapping[str, Any]) -> dict[str, Any]:
    mask, tokens = row["completion_mask"], row["input_ids"]
    check_mask(str(row["id"]), tokens, mask)
    start = mask.index(1)
    return {
        "prompt_ids": tokens[:start],
        "chosen_ids": tokens[start:],
        "rejected_ids": row["rejected_ids"],
        "label": row.get("label", True),
    }
