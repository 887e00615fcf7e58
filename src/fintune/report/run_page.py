"""What the page of a run shows, as plain data: made by the report stage, drawn by :mod:`fintune.report.page`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from fintune.config import GGUF_KINDS, Config, DecodingMode
from fintune.evaluation.agreement import Agreement, compare
from fintune.evaluation.metrics import Rates, Score
from fintune.finqa.verdict import OfficialVerdict
from fintune.records import FinQARecord, Prediction

KINDS: Mapping[str, str] = {
    "base": "base",
    "adapter": "adapter",
    "adapter_4bit": "adapter, 4 bits",
    "merged": "merged",
    "merged_4bit": "merged, 4 bits",
    **{kind: f"GGUF {kind}" for kind in GGUF_KINDS},
    "endpoint": "served",
}
"""Kinds of model in the order of the chain, with the name that the page gives them."""
_USUAL = ("base", "adapter", "adapter_4bit", "merged", "merged_4bit", "F16", "Q4_K_M", "endpoint")
_COLOURS = {kind: number for number, kind in enumerate([*_USUAL, *(kind for kind in KINDS if kind not in _USUAL)])}
WAYS: Mapping[DecodingMode, str] = {
    "none": "free",
    "general": "programs only",
    "page": "only programs of the page's numbers and rows",
}
"""What completions may say, with the words of the page for it."""


@dataclass(frozen=True)
class Measured:
    """The figures of one kind of model.

    Attributes:
        kind: Key of KINDS.
        score: Official figures.
        num_unended: Completions that reached the token limit.
        predict_seconds: Generating all completions.
        weights_bytes: Size of the weight files, or None where the run holds none of this kind.
    """

    kind: str
    score: Score
    num_unended: int
    predict_seconds: float
    weights_bytes: int | None


@dataclass(frozen=True)
class ModeResults:
    """The same kinds of model, their completions constrained otherwise; fields as those of :class:`RunPage`."""

    way: DecodingMode
    measured: Sequence[Measured]
    predictions: Mapping[str, Mapping[str, Prediction]]
    verdicts: Mapping[str, Mapping[str, OfficialVerdict]]


@dataclass(frozen=True)
class Made:
    """What the manifest of one stage says."""

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
class RunPage:
    """All that the page shows.

    Attributes:
        name: The run's.
        config: Its options.
        measured: One for each kind that was scored, in the order of the chain.
        metrics: Lines of ``metrics.jsonl``.
        replay: ``replay/replay.json``.
        guard: ``guard/guard.json``.
        data: ``prepare/report.json``.
        records: The evaluation records.
        num_cut: Units cut from the prompt, by example id.
        predictions: By kind, then by id.
        verdicts: By kind, then by id.
        made: One for each stage, in the order of the run.
        token_names: Text of a token by its id, where the tokenizer is at hand.
        other_modes: The ways of ``predict.constrain`` behind the first, which is what all of the above is of.
    """

    name: str
    config: Config
    measured: Sequence[Measured] = ()
    metrics: Sequence[Mapping[str, Any]] = ()
    replay: Mapping[str, Any] = field(default_factory=dict)
    guard: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    records: Sequence[FinQARecord] = ()
    num_cut: Mapping[str, int] = field(default_factory=dict)
    predictions: Mapping[str, Mapping[str, Prediction]] = field(default_factory=dict)
    verdicts: Mapping[str, Mapping[str, OfficialVerdict]] = field(default_factory=dict)
    made: Sequence[Made] = ()
    token_names: Mapping[int, str] = field(default_factory=dict)
    other_modes: Sequence[ModeResults] = ()

    @property
    def agreements(self) -> list[tuple[str, str, Agreement]]:
        """Every pair of trained kinds, compared; none where tokens were drawn, which differ by chance."""
        if self.config.predict.strategy != "greedy":
            return []
        trained = [kind for kind in self.predictions if kind != "base"]
        right = {kind: {id_: v.exe_correct for id_, v in by_id.items()} for kind, by_id in self.verdicts.items()}
        return [
            (
                a,
                b,
                compare(
                    list(self.predictions[a].values()),
                    list(self.predictions[b].values()),
                    verdicts_a=right.get(a),
                    verdicts_b=right.get(b),
                ),
            )
            for a, b in combinations(trained, 2)
        ]


def colour(kind: str) -> int:
    """Number of a kind's colour, ``--s0`` to ``--s7``; those that are seldom measured share with the usual ones."""
    return _COLOURS[kind] % 8


def span(interval: tuple[float, float]) -> str:
    """``58.1–66.7``, the ends of an interval of fractions in percent."""
    return f"{100 * interval[0]:.1f}\u2013{100 * interval[1]:.1f}"


def told_invalid(score: Rates) -> str:
    """The invalid rate, and beside it what officially is not invalid: ``0.0 % + 100.0 % no program``."""
    none = f" + {percent(score.no_program_rate)} no program" if score.no_program_rate else ""
    return f"{percent(score.invalid_rate)}{none}"


def percent(value: float) -> str:
    """``62.5 %``, with a space that does not break."""
    return f"{100 * value:.1f}\u00a0%"
