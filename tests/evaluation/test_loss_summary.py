from __future__ import annotations

import pytest

from fintune.evaluation.loss_summary import loss_ends


@pytest.mark.parametrize(
    ("losses", "ends"),
    [
        ([2.0], (2.0, 2.0, 1)),
        ([2.0, 5.0, 1.0], (2.0, 1.0, 1)),
        ([1.4, 3.6, 3.0, 1.0, 4.2], (2.5, 2.6, 2)),
        ([3.0] * 20 + [2.0] * 20 + [1.0] * 20, (3.0, 1.0, 6)),
    ],
)
def test_ends_are_means_of_a_tenth_at_least_three_and_never_overlap(losses, ends):
    assert loss_ends(losses) == pytest.approx(ends)
