"""What the planner leaves for the manifest, and the largest allocation beside it."""

from __future__ import annotations

import torch

from fintune.training import planned
from fintune.training.memory import Setting
from fintune.training.plan import GIB, TrainingPlan

PLAN = TrainingPlan(Setting(3, False, 4096), 2, 4, 9 * GIB, 12 * GIB, True, ())


def test_the_peak_is_said_and_kept_beside_the_prediction(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: int(8.5 * GIB))
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: int(9.5 * GIB))
    planned.write(PLAN, tmp_path)
    planned.write_peak(tmp_path)
    found = planned.read(tmp_path)
    assert (found["peak_gib"], found["predicted_peak_gib"], found["recomputed_layers"]) == (8.5, 9.0, 3)
    assert found["held_peak_gib"] == 9.5
    assert "8.5 GiB at most, 9.0 predicted; 9.5 held" in capsys.readouterr().err


def test_a_training_without_a_plan_tells_its_peak_too(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2 * GIB)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 3 * GIB)
    planned.write_peak(tmp_path)
    assert planned.read(tmp_path) == {"peak_gib": 2.0, "held_peak_gib": 3.0}
    told = capsys.readouterr().err
    assert "2.0 GiB at most" in told and "predicted" not in told
