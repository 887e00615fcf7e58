from __future__ import annotations

from fintune.report.parts.training import context


def test_evaluations_are_drawn_and_the_best_of_them_named() -> None:
    lines = [{"step": step, "loss": 2.0 / step, "tokens": 10 * step, "seconds": 1.0 * step} for step in range(1, 7)]
    found = ((2, 0.9, 0.1), (4, 0.5, 0.3), (6, 0.7, 0.3))
    lines += [{"step": s, "eval_loss": loss, "eval_accuracy": right, "seconds": 1.0 * s} for s, loss, right in found]
    shown = context(lines)
    rows = dict(shown["rows"])
    assert rows["last evaluation loss"] == "0.7000"
    assert rows["lowest evaluation loss"] == "0.5000 at step 4"
    assert rows["highest execution accuracy"] == "30.0% at step 4"
    assert ("s4", "evaluation loss") in shown["legend"]
    assert "var(--s4)" in str(shown["plot"])


def test_without_evaluations_none_is_spoken_of() -> None:
    shown = context([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}])
    assert not [name for name, _ in shown["rows"] if "evaluation" in name or "accuracy" in name]
    assert shown["legend"] == [("s1", "training loss")]
