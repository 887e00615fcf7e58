"""The data of a run's page. The report stage collects it; :mod:`fintune.report.run_page` draws it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from fintune.config import Config, DecodingMode
from fintune.evaluation.agreement import ModelAgreement, compare_predictions
from fintune.evaluation.metrics import Score
from fintune.finqa.verdict import OfficialVerdict
from fintune.records import FinQARecord, Prediction


@dataclass(frozen=True)
class MeasuredKind:
    """The figures of one kind of model.

    Attributes:
        kind: A key of `fintune.report.formatting.KIND_LABELS`.
        score: The official figures.
        num_unended: Number of completions that reached the token limit.
        predict_seconds: Time of generating all completions.
        weights_bytes: Size of the weight files, or None if the run has none of this kind.
    """

    kind: str
    score: Score
    num_unended: int
    predict_seconds: float
    weights_bytes: int | None


@dataclass(frozen=True)
class ModeResults:
    """The results of one decoding mode; the fields are those of :class:`RunData`."""

    mode: DecodingMode
    measured: Sequence[MeasuredKind]
    predictions: Mapping[str, Mapping[str, Prediction]]
    verdicts: Mapping[str, Mapping[str, OfficialVerdict]]


@dataclass(frozen=True)
class Provenance:
    """What the manifest of a stage says."""

    step: str
    finished: str
    fingerprint: str
    seconds: float
    peak_memory_bytes: int
    seed: int
    commit: str | None
    versions: Mapping[str, str]
    machine: Mapping[str, str]


@dataclass(frozen=True)
class RunData:
    """The content of a run's page.

    Attributes:
        name: The run's name.
        config: The run's options.
        measured: The figures of every kind that was scored, in the order of the chain.
        metrics: The lines of ``metrics.jsonl``.
        replay: The content of ``replay/replay.json``.
        guard: The content of ``guard/guard.json``.
        data: The content of ``prepare/report.json``.
        records: The evaluation records.
        num_cut: Number of sentences and rows that were cut from the prompt, by example id.
        predictions: Predictions by kind, then by id.
        verdicts: Verdicts by kind, then by id.
        provenance: One entry for each stage, in the order of the run.
        token_names: Text of a token by its id, if the tokenizer is available.
        other_modes: Results of the other modes of ``predict.constrain``; all other fields are about the first one.
    """

    name: str
    config: Config
    measured: Sequence[MeasuredKind] = ()
    metrics: Sequence[Mapping[str, Any]] = ()
    replay: Mapping[str, Any] = field(default_factory=dict)
    guard: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    records: Sequence[FinQARecord] = ()
    num_cut: Mapping[str, int] = field(default_factory=dict)
    predictions: Mapping[str, Mapping[str, Prediction]] = field(default_factory=dict)
    verdicts: Mapping[str, Mapping[str, OfficialVerdict]] = field(default_factory=dict)
    provenance: Sequence[Provenance] = ()
    token_names: Mapping[int, str] = field(default_factory=dict)
    other_modes: Sequence[ModeResults] = ()

    @property
    def agreements(self) -> list[tuple[str, str, ModelAgreement]]:
        """Every pair of trained kinds, compared; none if tokens were sampled, since samples differ by chance."""
        if self.config.predict.strategy != "greedy":
            return []
        trained = [kind for kind in self.predictions if kind != "base"]
        correct = {kind: {id_: v.exe_correct for id_, v in by_id.items()} for kind, by_id in self.verdicts.items()}
        return [
            (
                first,
                second,
                compare_predictions(
                    list(self.predictions[first].values()),
                    list(self.predictions[second].values()),
                    verdicts_a=correct.get(first),
                    verdicts_b=correct.get(second),
                ),
            )
            for first, second in combinations(trained, 2)
        ]
