"""What the program that measures every kind of model asks of fintune; nothing is trained."""

from __future__ import annotations

import runpy

import pytest

from fintune.config.load import load
from fintune.pipeline.steps import build_steps
from support.paths import ROOT

REPO = ROOT


@pytest.mark.parametrize("run", ["lora", "dora"])
def test_six_kinds_names_existing_steps_and_inputs(run: str) -> None:
    bench = runpy.run_path(str(REPO / "bench" / "six_kinds.py"))
    _, config, *words = bench["words"](run, list(bench["OPTIONS"]))
    at = words.index("--only")
    overrides, only = words[:at], words[at + 1 :: 2]
    steps = {step.name: step for step in build_steps(load(REPO / config, overrides).config)}
    assert set(only) <= set(steps)
    assert {name for step in only for name in steps[step].inputs} <= set(only)
    measured = {**bench["KINDS"], **bench["CONSTRAINED"]}
    asked = {f"{verb}/{step}" for of, step in measured.values() if of == run for verb in ("predict", "score")}
    assert {step for step in only if "/" in step} == asked
    assert ("predict/adapter+page" in only) == (run == "lora")
