"""The order of the examples and how a batch is put together."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from fintune.errors import DataError

if TYPE_CHECKING:
    import torch

IGNORED = -100
"""Label of a position that is not trained."""

# Batches of like length waste little on padding; sorting only within a window keeps the order close to random.
_WINDOW_BATCHES = 32


def training_order(
    lengths: Sequence[int], num_examples: int, batch_size: int, seed: int, *, labels: Sequence[bool] | None = None
) -> list[int]:
    """Which example comes when, for the whole run at once, so that a resumed run only has to count.

    Every pass over the data is shuffled anew. Within a window of some batches of a pass the examples are sorted by
    length, then the batches are shuffled. What a pass leaves over begins the first batch of the next, which is filled
    up with other examples: no batch holds one twice, unless there are fewer than a batch. Only the last batch of the
    run may be smaller.

    Args:
        lengths: Tokens of each example.
        num_examples: How many to see in the run; more than there are means several passes.
        batch_size: Examples an optimiser step, over all devices and accumulated passes.
        seed: Seed of the order.
        labels: Of the examples; every batch then holds both labels in the proportion of its window, as nearly as whole
            examples allow. Where a label goes with a length, batches of like length would hold one label alone.

    Returns:
        ``num_examples`` indices into ``lengths``.
    """
    draw = random.Random(seed)  # noqa: S311 - an order, not a secret
    order: list[int] = []
    left: list[int] = []
    while len(order) + len(left) < num_examples:
        one_pass = list(range(len(lengths)))
        draw.shuffle(one_pass)
        if left:
            num_wanted = min(batch_size, num_examples - len(order)) - len(left)
            left += _others(one_pass, left, num_wanted, labels)
            if len(left) < batch_size:
                continue  # fewer examples than a batch, or the end
            taken = set(left[-num_wanted:])
            order += left
            one_pass = [index for index in one_pass if index not in taken]
        batches, left = _batches(one_pass[: num_examples - len(order)], lengths, batch_size, draw, labels)
        order += batches
    return order + left


def _batches(
    one_pass: list[int], lengths: Sequence[int], batch_size: int, draw: random.Random, labels: Sequence[bool] | None
) -> tuple[list[int], list[int]]:
    """Whole batches one behind the other, and what is left over."""
    window = _WINDOW_BATCHES * batch_size
    order: list[int] = []
    left: list[int] = []
    for start in range(0, len(one_pass), window):
        part = sorted(one_pass[start : start + window], key=lambda index: lengths[index])
        part = part if labels is None else _mixed(part, labels)
        # The remainder, of the last window alone, comes off a random place, not always off the longest ones.
        num_left = len(part) % batch_size
        cut = draw.randrange(len(part) - num_left + 1)
        left, part = part[cut : cut + num_left], part[:cut] + part[cut + num_left :]
        batches = [part[at : at + batch_size] for at in range(0, len(part), batch_size)]
        draw.shuffle(batches)
        order += [index for batch in batches for index in batch]
    return order, left


def _others(one_pass: list[int], left: list[int], number: int, labels: Sequence[bool] | None) -> list[int]:
    """The first so many of a pass that are not left over from the one before, copies where there are no others."""
    there = set(left)
    others = sorted(one_pass, key=lambda index: index in there)
    if labels is None or len(one_pass) - len(there) < number:
        return others[:number]
    others = others[: len(one_pass) - len(there)]
    wanted = round(sum(labels) / len(labels) * (len(left) + number)) - sum(labels[index] for index in left)
    sides = [[index for index in others if labels[index] == label] for label in (True, False)]
    num_desired = min(max(wanted, number - len(sides[1]), 0), number, len(sides[0]))
    return sides[0][:num_desired] + sides[1][: number - num_desired]


def _mixed(part: Sequence[int], labels: Sequence[bool]) -> list[int]:
    """Both labels spread evenly over the whole, each in the order that it had."""
    places: list[tuple[float, int]] = []
    for label in (True, False):
        members = [index for index in part if labels[index] == label]
        places += [((place + 0.5) / len(members), index) for place, index in enumerate(members)]
    return [index for _, index in sorted(places, key=lambda each: each[0])]


def num_steps(num_rows: int, epochs: float, batch_size: int, max_steps: int | None) -> tuple[int, int]:
    """Examples and optimiser steps of a run.

    Returns:
        Number of examples seen, and of optimiser steps.
    """
    if max_steps is not None:
        return max_steps * batch_size, max_steps
    num_examples = max(1, round(num_rows * epochs))
    return num_examples, math.ceil(num_examples / batch_size)


class CompletionCollator:
    """Rows of token ids to one batch, padded on the right; only the completion is trained, padding never.

    Args:
        pad_token_id: Id that fills the shorter rows.
        multiple: The width of a batch is rounded up to a multiple of this. Matrix products are set up anew for every
            width, which on a CPU costs more than the padding: 32 makes a run over report pages a fifth faster.
    """

    def __init__(self, pad_token_id: int, *, multiple: int = 1) -> None:
        self.pad_token_id, self.multiple = pad_token_id, multiple

    def __call__(self, rows: Sequence[Mapping[str, object]]) -> dict[str, torch.Tensor]:
        """``input_ids``, ``attention_mask`` and ``labels``, each of shape [batch, width].

        Raises:
            DataError: A row in which nothing or everything is trained, or whose columns differ in length.
        """
        import torch

        longest = max(len(_ints(row, "input_ids")) for row in rows)
        width = -(-longest // self.multiple) * self.multiple
        shape = (len(rows), width)
        input_ids = torch.full(shape, self.pad_token_id)
        attention_mask = torch.zeros(shape, dtype=torch.long)
        labels = torch.full(shape, IGNORED)
        for at, row in enumerate(rows):
            ids, mask = _ints(row, "input_ids"), _ints(row, "completion_mask")
            check_mask(str(row.get("id", "?")), ids, mask)
            tokens = torch.tensor(ids)
            input_ids[at, : len(ids)] = tokens
            attention_mask[at, : len(ids)] = 1
            labels[at, : len(ids)] = torch.where(torch.tensor(mask) == 1, tokens, IGNORED)
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def check_mask(record_id: str, input_ids: Sequence[int], completion_mask: Sequence[int]) -> None:
    """Refuse a row that would train nothing, or the prompt as well.

    Raises:
        DataError: With the row's id.
    """
    if len(input_ids) != len(completion_mask):
        raise DataError(
            f"{len(input_ids)} tokens but a mask of {len(completion_mask)}", record_id=record_id, hint="prepare again"
        )
    num_trained = sum(completion_mask)
    if num_trained == 0:
        raise DataError("no token of this example is trained", record_id=record_id, hint="prepare again")
    if num_trained == len(completion_mask):
        raise DataError("every token is trained, the prompt too", record_id=record_id, hint="prepare again")


def _ints(row: Mapping[str, object], column: str) -> list[int]:
    values = row[column]
    assert isinstance(values, list), f"column {column} holds lists of numbers"
    return values
