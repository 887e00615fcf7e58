"""The order of the examples in a run, and how rows are collated into batches."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from fintune.config import TrainOptions
from fintune.errors import DataError
from fintune.training import distributed

if TYPE_CHECKING:
    import torch

IGNORED = -100
"""Label of a position that is not trained."""
WIDTH_MULTIPLE = 32
"""Batches for the layers of transformers are padded to a multiple of this many tokens."""

# More shifts are not tried for a whole held-out split, in which one prompt may have hundreds of answers.
_MAX_SHIFT = 1000
# Batches of similar lengths waste little on padding. Sorting within a window only keeps the order close to random.
_WINDOW_BATCHES = 32


# -- the order


@dataclass(frozen=True)
class TrainingSchedule:
    """The examples of a run, step by step.

    Attributes:
        order: Indices of the examples, in the order of training.
        step_size: Examples of an optimizer step, over all processes and accumulated passes.
        tokens: Tokens without padding that are trained up to each step, from step 0; length ``steps + 1``.
        num_rows: Examples of an epoch.
    """

    order: list[int]
    step_size: int
    tokens: list[int]
    num_rows: int

    @property
    def steps(self) -> int:
        """Number of optimizer steps."""
        return len(self.tokens) - 1

    def rows_of(self, step: int) -> list[int]:
        """Return the indices of the examples of a step, over all processes. Steps count from 1."""
        return self.order[(step - 1) * self.step_size : step * self.step_size]

    def epochs(self, step: int) -> float:
        """Return the passes over the rows that are done after a step."""
        return min(step * self.step_size, len(self.order)) / self.num_rows

    def completed_epoch(self, step: int) -> int | None:
        """Return k if this step completes the k-th pass over the rows; the last one if it completes several.

        An epoch need not be a whole number of steps.
        """
        epoch = int(self.epochs(step))
        return epoch if epoch > int(self.epochs(step - 1)) else None


def make_schedule(
    lengths: Sequence[int], options: TrainOptions, seed: int, *, labels: Sequence[bool] | None = None
) -> TrainingSchedule:
    """Fix the examples of every step of the run; arguments as for :func:`training_order`."""
    size = examples_per_step(options)
    num_examples = max(1, round(len(lengths) * options.num_train_epochs))
    steps = options.max_steps or math.ceil(num_examples / size)
    if options.max_steps or options.objective == "kto" or distributed.world_size() > 1:
        # The last step is filled up. KTO compares answers to different prompts, and a rest may be a single answer. And
        # every process needs its share of every step.
        num_examples = steps * size
    order = training_order(lengths, num_examples, size, seed, labels=labels)
    sums = (sum(lengths[index] for index in order[at : at + size]) for at in range(0, len(order), size))
    return TrainingSchedule(order, size, [0, *accumulate(sums)], len(lengths))


def examples_per_step(options: TrainOptions) -> int:
    """Return the examples of an optimizer step, over all processes."""
    return options.per_device_train_batch_size * options.gradient_accumulation_steps * distributed.world_size()


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
        """Return ``input_ids``, ``attention_mask`` and ``labels``, each of shape [batch, width], and the ``ids``.

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
        ids = [str(row.get("id", "?")) for row in rows]
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels, "ids": ids}


# -- preference rows


class PreferenceCollator:
    """The rows of a step, divided into passes of few rows.

    Args:
        pad_token_id: Token id that fills shorter answers, on the right.
        size: Rows of a pass.
        multiple: The width of a pass is rounded up to a multiple of this.
        unpaired: For KTO: rows may be single answers, and each prompt also gets an answer to another prompt of the
            step, from which the divergence is estimated.
    """

    def __init__(self, pad_token_id: int, size: int, *, multiple: int = 1, unpaired: bool = False) -> None:
        self._collate = CompletionCollator(pad_token_id, multiple=multiple)
        self._size, self._unpaired = size, unpaired

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the ``passes`` of a step as a list."""
        return {"passes": list(self.passes(rows))}

    def passes(self, rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        """Yield each pass: the chosen answers of its rows, then the rejected ones.

        Yields:
            ``answers``, a batch of :class:`CompletionCollator`; ``desired``, shape [answers]; ``ids`` of the rows; for
            KTO also ``mismatched``, a batch like ``answers``.

        Raises:
            DataError: A row in which nothing or everything is trained.
        """
        import torch

        answers: list[tuple[int, list[int], list[int], bool]] = []  # pass, prompt, completion, label
        for at, row in enumerate(rows):
            check_mask(str(row["id"]), row["input_ids"], row["completion_mask"])
            start = row["completion_mask"].index(1)
            label = bool(row.get("label", True))
            answers.append((at // self._size, row["input_ids"][:start], row["input_ids"][start:], label))
        own = zip(rows, answers.copy(), strict=True)
        answers += [(at, prompt, row["rejected_ids"], False) for row, (at, prompt, *_) in own if row["rejected_ids"]]
        shift = _mismatching_shift([prompt for _, prompt, *_ in answers]) if self._unpaired else 0
        members: dict[int, list[int]] = {}
        for index, (at, *_) in enumerate(answers):
            members.setdefault(at, []).append(index)
        for at, indices in members.items():
            chosen = [answers[index] for index in indices]
            batch = {
                "answers": self._pad((prompt, completion) for _, prompt, completion, _ in chosen),
                "desired": torch.tensor([label for *_, label in chosen]),
                "ids": [str(row["id"]) for row in rows[at * self._size : (at + 1) * self._size]],
            }
            if self._unpaired:
                batch["mismatched"] = self._pad((answers[index][1], answers[index - shift][2]) for index in indices)
            yield batch

    def _pad(self, answers: Iterable[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
        masks = [(prompt + completion, [0] * len(prompt) + [1] * len(completion)) for prompt, completion in answers]
        batch = self._collate([{"input_ids": ids, "completion_mask": mask} for ids, mask in masks])
        del batch["ids"]
        return batch


def _mismatching_shift(prompts: Sequence[Sequence[int]]) -> int:
    """Return the smallest shift of the answers that gives the fewest prompts one of their own answers.

    Answers to one prompt have similar lengths. A batch is ordered by length, so they are neighbours in it.
    """
    keys = [tuple(prompt) for prompt in prompts]
    best, fewest = 0, len(keys)
    for shift in range(1, min(len(keys), _MAX_SHIFT)):
        num_matches = sum(keys[at] == keys[at - shift] for at in range(len(keys)))
        if num_matches < fewest or best == 0:
            best, fewest = shift, num_matches
        if fewest == 0:
            break
    return best
