"""The compiler takes every Triton kernel as a training step launches it. The interpreter accepts more."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from support.paths import ROOT

pytest.importorskip("torch")
pytest.importorskip("triton")


@pytest.mark.slow
def test_kernels_compile_for_a_gpu():
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'tests'}"}
    script = ROOT / "tests" / "support" / "compile_kernels.py"
    run = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    assert {line.split()[0] for line in run.stdout.splitlines()} >= {
        "add_norm_program",
        "norm_backward_program",
        "split_heads_program",
        "join_heads_program",
        "gate_program",
        "gate_backward_program",
        "scale_grad_program",
        "cross_entropy_program",
    }
