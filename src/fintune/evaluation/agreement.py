"""Compare the answers of two copies of one model, example by example.

Merging, a 16-bit GGUF file or another engine should change only the last bits of the arithmetic. Greedy decoding shows
such a change only if the two best tokens are almost equally probable. Any other difference is a fault in the chain: a
template, a stop token, a weight. So every difference carries the log-probability gap at the token where the two
completions diverge.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from fintune.errors import DataError
from fintune.records import Prediction

_Value = TypeVar("_Value")

NEAR_TIE_NATS = 0.1
"""Default threshold: at 0.1 nats the best token is at most 1.105 times as likely as the second."""


@dataclass(frozen=True)
class Difference:
    """An example with different completions of the models ``a`` and ``b``.

    Attributes:
        id: The example's id.
        position: 0-based index of the first generated token that differs, or None if token ids are not known.
        token_a: Token id of ``a`` at that position, or None if its completion has ended.
        token_b: Token id of ``b`` there.
        margin_a: Gap between the best and the second-best token of ``a`` there, in nats.
        margin_b: The gap of ``b`` there. Both models have the same prefix, so the sum of the gaps is the least by which
            the log-probabilities of the two tokens moved.
        near_tie: Whether both gaps are below the threshold; None if one of them is not known.
        same_program: Whether only the text outside the program differs, or the end.
        correct_a: Official execution verdict on ``a``, or None if it was not scored.
        correct_b: Official execution verdict on ``b``.
    """

    id: str
    position: int | None
    token_a: int | None
    token_b: int | None
    margin_a: float | None
    margin_b: float | None
    near_tie: bool | None
    same_program: bool
    correct_a: bool | None
    correct_b: bool | None


@dataclass(frozen=True)
class ModelAgreement:
    """The comparison of two models: the examples that both answered (common), and those that only one answered.

    The same completion means identical tokens (identical text if token ids are missing). ``num_scored`` and
    ``num_same_verdict`` count common examples that were scored on both sides. ``differences`` are the common examples
    with different completions, in the order of the first model.
    """

    num_common: int
    num_only_a: int
    num_only_b: int
    num_same_completion: int
    num_same_program: int
    num_same_verdict: int
    num_scored: int
    differences: tuple[Difference, ...]

    @property
    def program_differences(self) -> tuple[Difference, ...]:
        """The differences that changed the program."""
        return tuple(difference for difference in self.differences if not difference.same_program)

    @property
    def unexplained(self) -> tuple[Difference, ...]:
        """The changed programs that no near-tie explains. An unknown gap explains nothing."""
        return tuple(difference for difference in self.program_differences if difference.near_tie is not True)

    @property
    def faithful(self) -> bool:
        """Whether both answered the same examples and every changed program starts at a near-tie."""
        return not (self.num_only_a or self.num_only_b or self.unexplained)


def compare_predictions(
    a: Sequence[Prediction],
    b: Sequence[Prediction],
    *,
    verdicts_a: Mapping[str, bool] | None = None,
    verdicts_b: Mapping[str, bool] | None = None,
    threshold_nats: float = NEAR_TIE_NATS,
) -> ModelAgreement:
    """Compare the predictions of a reference ``a`` with those of its copy ``b`` by example id.

    The verdicts are whether the program executes to the gold result, by id. A difference is a near-tie if the gap of
    both models is below ``threshold_nats``.

    Raises:
        DataError: An id occurs twice on one side.
    """
    by_id_a, by_id_b = _by_id(a), _by_id(b)
    right_a, right_b = verdicts_a or {}, verdicts_b or {}
    common = [id_ for id_ in by_id_a if id_ in by_id_b]
    scored = [id_ for id_ in common if id_ in right_a and id_ in right_b]
    differences = tuple(
        _difference(by_id_a[id_], by_id_b[id_], right_a.get(id_), right_b.get(id_), threshold_nats)
        for id_ in common
        if not _same_completion(by_id_a[id_], by_id_b[id_])
    )
    return ModelAgreement(
        num_common=len(common),
        num_only_a=len(by_id_a) - len(common),
        num_only_b=len(by_id_b) - len(common),
        num_same_completion=len(common) - len(differences),
        num_same_program=sum(by_id_a[id_].program == by_id_b[id_].program for id_ in common),
        num_same_verdict=sum(right_a[id_] == right_b[id_] for id_ in scored),
        num_scored=len(scored),
        differences=differences,
    )


def _by_id(predictions: Sequence[Prediction]) -> dict[str, Prediction]:
    by_id: dict[str, Prediction] = {}
    for row, prediction in enumerate(predictions, start=1):
        if prediction.id in by_id:
            raise DataError(
                "a second prediction for this id", row=row, record_id=prediction.id, hint="keep one prediction per id"
            )
        by_id[prediction.id] = prediction
    return by_id


def _same_completion(a: Prediction, b: Prediction) -> bool:
    if a.token_ids and b.token_ids and a.token_ids == b.token_ids:
        return True
    # Some engines return the end token and others do not, so the same text and end also count.
    return a.text == b.text and (a.finish_reason == b.finish_reason or not (a.token_ids and b.token_ids))


def _difference(
    a: Prediction, b: Prediction, correct_a: bool | None, correct_b: bool | None, threshold_nats: float
) -> Difference:
    position = None
    if a.token_ids and b.token_ids:
        pairs = zip(a.token_ids, b.token_ids, strict=False)
        shorter = min(len(a.token_ids), len(b.token_ids))
        position = next((index for index, (one, other) in enumerate(pairs) if one != other), shorter)
    margin_a, margin_b = _at(a.margins, position), _at(b.margins, position)
    near_tie = None if margin_a is None or margin_b is None else max(margin_a, margin_b) < threshold_nats
    tokens = _at(a.token_ids, position), _at(b.token_ids, position)
    return Difference(
        a.id, position, *tokens, margin_a, margin_b, near_tie, a.program == b.program, correct_a, correct_b
    )


def _at(values: Sequence[_Value], position: int | None) -> _Value | None:
    return values[position] if position is not None and position < len(values) else None
