"""The data of a run's page. The report stage collects it; :mod:`fintune.report.run_page` draws it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fintune.config import Config
from fintune.evaluation.metrics import Score
from fintune.finqa.verdict import OfficialVerdict
from fintune.manifest import Manifest
from fintune.records import FinQARecord, Prediction
from fintune.report.formatting import kind_label


@dataclass(frozen=True)
class ModelResults:
    """The answers of one kind of model in one decoding mode.

    Attributes:
        kind: A key of `fintune.report.formatting.KIND_LABELS`.
        mode: The decoding mode; "" for the first one of ``predict.constrain``.
        predictions: Predictions by example id.
        verdicts: Verdicts by example id; empty if nothing was scored.
        score: The official figures; None if nothing was scored.
        weights_bytes: Size of the weight files, or None if the run has none of this kind.
    """

    kind: str
    mode: str
    predictions: Mapping[str, Prediction]
    verdicts: Mapping[str, OfficialVerdict] = field(default_factory=dict)
    score: Score | None = None
    weights_bytes: int | None = None

    @property
    def label(self) -> str:
        """The kind's label, with the mode if it is not the first."""
        return kind_label(self.kind, self.mode)

    @property
    def figures(self) -> Score:
        """The official figures of scored results."""
        assert self.score is not None, "the results were scored"
        return self.score

    @property
    def correct(self) -> dict[str, bool]:
        """The execution verdict by example id."""
        return {id_: verdict.exe_correct for id_, verdict in self.verdicts.items()}

    @property
    def num_cut_off(self) -> int:
        """Number of completions that reached the token limit."""
        return sum(prediction.finish_reason == "length" for prediction in self.predictions.values())

    @property
    def seconds(self) -> float:
        """Time of generating all completions."""
        return sum(prediction.seconds for prediction in self.predictions.values())


@dataclass(frozen=True)
class RunData:
    """The content of a run's page. A part of a stage that was skipped is empty.

    Attributes:
        config: The run's options.
        results: Results by kind and mode, the first mode first, the kinds of a mode in the order of the chain.
        metrics: The lines of ``train/metrics.jsonl``.
        replay: The content of ``replay/replay.json``; likewise ``guard``.
        data: The content of ``prepare/report.json``.
        records: The evaluation records.
        num_cut: Number of sentences and rows that were cut from the prompt, by example id.
        manifests: Step name -> manifest, in the order of the run.
        token_names: Text of a token by its id, if the tokenizer is available.
    """

    config: Config
    results: Sequence[ModelResults] = ()
    metrics: Sequence[Mapping[str, Any]] = ()
    replay: Mapping[str, Any] = field(default_factory=dict)
    guard: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    records: Sequence[FinQARecord] = ()
    num_cut: Mapping[str, int] = field(default_factory=dict)
    manifests: Mapping[str, Manifest] = field(default_factory=dict)
    token_names: Mapping[int, str] = field(default_factory=dict)

    @property
    def first_mode(self) -> list[ModelResults]:
        """The results of the first decoding mode, which most of the page is about."""
        return [results for results in self.results if not results.mode]

    @property
    def scored(self) -> list[ModelResults]:
        """The scored results of the first mode."""
        return [results for results in self.first_mode if results.score is not None]
