"""Answers with a label, without a partner, for tests of preference training."""

from __future__ import annotations

from support.pair_rows import pair_rows


def labelled_rows(num_desired: int, num_undesired: int) -> list[dict[str, object]]:
    """Rows of TRL's unpaired form, desired and undesired ones mixed, each with a question of its own."""
    pairs = pair_rows(num_desired + num_undesired)
    rows: list[dict[str, object]] = []
    for number, pair in enumerate(pairs):
        desired = number * num_desired // len(pairs) < (number + 1) * num_desired // len(pairs)
        answer = pair["chosen"] if desired else pair["rejected"]
        rows.append({"prompt": pair["prompt"], "completion": answer, "label": desired})
    return rows
