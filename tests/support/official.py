"""The official comparison written the direct way, as an oracle: text to sympy, nothing spared. From finqa/SPEC.md."""

from __future__ import annotations

import gzip
import json
from functools import lru_cache
from typing import Any

import pytest

from support.paths import ROOT

SHARED = ROOT.parent / "shared" / "finqa"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/finqa beside the repository")

SIGNS = {"add": "+", "subtract": "-", "multiply": "*", "divide": "/", "exp": "**", "greater": ">"}


@lru_cache(maxsize=2)
def split(name: str) -> list[dict[str, Any]]:
    with gzip.open(SHARED / f"{name}.json.gz", "rt", encoding="utf-8") as file:
        records: list[dict[str, Any]] = json.load(file)
    return records


@lru_cache(maxsize=1)
def vectors() -> list[dict[str, Any]]:
    with gzip.open(SHARED / "evaluator_vectors_dev.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


Steps = list[tuple[str, str, str]]


def tokens(steps: Steps) -> list[str]:
    return [token for name, first, second in steps for token in (f"{name}(", first, second, ")")] + ["EOF"]


def equal(gold: Steps, predicted: Steps) -> bool:
    """Arithmetic steps only."""
    from sympy import simplify

    symbols: dict[str, str] = {}
    for argument in (argument for step in gold for argument in step[1:] if not argument.startswith("#")):
        symbols.setdefault(argument, f"a{len(symbols)}")
    if any(not argument.startswith("#") and argument not in symbols for step in predicted for argument in step[1:]):
        return False
    simplified = simplify(_infix(gold, symbols), evaluate=False)
    try:
        return bool(simplified == simplify(_infix(predicted, symbols), evaluate=False))
    except Exception:
        return False


def _infix(steps: Steps, symbols: dict[str, str]) -> str:
    forms: list[str] = []
    for name, *arguments in steps:
        first, second = (forms[int(a[1:])] if a.startswith("#") else symbols[a] for a in arguments)
        forms.append(f"( {first} {SIGNS[name]} {second} )")
    return forms[-1]
