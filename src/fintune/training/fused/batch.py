"""Rows of tokens as one batch without padding, with what the loss needs to know of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fintune.training.batches import IGNORED, check_mask


class PackedCollator:
    """Rows of token ids behind each other.

    All that depends on the labels' values is worked out here, on the CPU: asking a GPU for it would make it wait.
    """

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A batch.

        Returns:
            ``input_ids``, ``position_ids`` and ``labels``, [1, tokens]; ``offsets``, the borders of the rows, int32
            [rows + 1]; ``rows`` and ``targets``, the positions that predict a label and the labels, [labels];
            ``lengths`` and ``ids`` of the rows, tuples.

        Raises:
            DataError: A row in which nothing or everything is trained, or whose columns differ in length.
        """
        ids: list[int] = []
        labels: list[int] = []
        lengths = []
        for row in rows:
            tokens, mask = row["input_ids"], row["completion_mask"]
            check_mask(str(row.get("id", "?")), tokens, mask)
            ids += tokens
            # The first token of a row is predicted by nothing.
            labels += [IGNORED, *(token if kept else IGNORED for token, kept in zip(tokens[1:], mask[1:], strict=True))]
            lengths.append(len(tokens))
        all_labels = torch.tensor(labels)
        places = (all_labels != IGNORED).nonzero()[:, 0]
        return {
            "input_ids": torch.tensor([ids]),
            "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
            "labels": all_labels[None],
            "offsets": torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32),
            "rows": places - 1,
            "targets": all_labels[places],
            "lengths": tuple(lengths),
            "ids": tuple(str(row.get("id", "?")) for row in rows),
        }
