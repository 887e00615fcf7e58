"""The replay: what each form of the model answers at the same positions, beside its accuracy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fintune.report.run_page import KINDS, RunPage, colour, percent

_REFERENCES = ("adapter", "trained")
_NOTHING = 1e-6
"""Divergence in nats below which single precision says no more."""


def context(page: RunPage) -> dict[str, Any] | None:
    """What the template prints; None where nothing was replayed."""
    replayed: Mapping[str, Mapping[str, float]] = page.replay.get("replayed") or {}
    if not replayed:
        return None
    accuracies = {measured.kind: percent(measured.score.execution_accuracy) for measured in page.measured}
    least: Mapping[str, float] = page.replay.get("min_same_share") or {}
    return {
        "num_positions": f"{page.replay.get('num_positions', 0):,}",
        "num_examples": f"{page.replay.get('num_examples', 0):,}",
        "reference": page.replay.get("reference", "base + adapter"),
        "bounds": ", ".join(
            f"below {percent(share)} {' and '.join(_label(kind) for kind in least if least[kind] == share)}"
            for share in sorted(set(least.values()), reverse=True)
        ),
        "base": "base" in replayed,
        "accuracies": any(kind in accuracies for kind in replayed),
        "rows": [
            {
                "label": _label(kind),
                "colour": colour(kind) if kind in KINDS else None,
                "kl": "reference" if kind in _REFERENCES else _nats(figures["mean_kl"]),
                "same": "" if kind in _REFERENCES else percent(figures["same_best_token_share"]),
                "perplexity": f"{figures['perplexity']:.4f}",
                "exe": accuracies.get("adapter" if kind in _REFERENCES else kind, ""),
            }
            for kind, figures in replayed.items()
        ],
    }


def _label(kind: str) -> str:
    return KINDS.get(kind, kind if kind in _REFERENCES else f"GGUF {kind}")


def _nats(value: float) -> str:
    if value < _NOTHING:
        return "< 0.000001"
    return f"{value:.6f}" if value < 0.001 else f"{value:.4f}"
