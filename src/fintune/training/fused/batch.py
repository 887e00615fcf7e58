"""Rows of tokens as one batch without padding, with everything that the loss needs to know about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fintune.training.batches import IGNORED, check_mask


@dataclass(frozen=True)
class SequenceBounds:
    """Bounds of the sequences in a batch.

    Attributes:
        lengths: Tokens of each sequence.
        offsets: Start of each sequence and the end of the last one, on the device, int32 [sequences + 1].
    """

    lengths: tuple[int, ...]
    offsets: Tensor

    @property
    def is_same_length(self) -> bool:
        """Whether all sequences have one length."""
        return len(set(self.lengths)) == 1


class PackedCollator:
    """Concatenates rows of token ids.

    Everything that depends on the values of the labels is computed here, on the CPU. A question to the GPU would make
    the CPU wait for it.
    """

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return a batch.

        Returns:
            ``input_ids``, ``position_ids`` and ``labels``, [1, tokens]; ``offsets`` of the rows, int32 [rows + 1];
            ``rows`` and ``targets``, the positions that predict a label and the labels, [labels]; ``lengths`` and
            ``ids`` of the rows, tuples.

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
            # No position predicts the first token of a row.
            labels += [
                IGNORED,
                *(token if is_trained else IGNORED for token, is_trained in zip(tokens[1:], mask[1:], strict=True)),
            ]
            lengths.append(len(tokens))
        all_labels = torch.tensor(labels)
        labelled = (all_labels != IGNORED).nonzero()[:, 0]
        return {
            "input_ids": torch.tensor([ids]),
            "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
            "labels": all_labels[None],
            "offsets": torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32),
            "rows": labelled - 1,
            "targets": all_labels[labelled],
            "lengths": tuple(lengths),
            "ids": tuple(str(row.get("id", "?")) for row in rows),
        }
