from __future__ import annotations

import pytest

from fintune.report.sections.training import training_section


def test_evaluations_are_drawn_and_the_best_of_them_named() -> None:
    lines = [{"step": step, "loss": 2.0 / step, "tokens": 10 * step, "seconds": 1.0 * step} for step in range(1, 7)]
    found = ((2, 0.9, 0.1), (4, 0.5, 0.3), (6, 0.7, 0.3))
    lines += [{"step": s, "eval_loss": loss, "eval_accuracy": right, "seconds": 1.0 * s} for s, loss, right in found]
    shown = training_section(lines)
    rows = dict(shown["table"].texts())
    assert rows["last evaluation loss"] == "0.7000"
    assert rows["lowest evaluation loss"] == "0.5000 at step 4"
    assert rows["highest execution accuracy"] == "30.0% at step 4"
    assert ("s4", "evaluation loss") in shown["legend"]
    assert "var(--s4)" in str(shown["plot"])


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ((5.88, 5.932), "Loss rose from 5.880 to 5.932 in 2 steps"),
        ((2.0, 1.0), "Loss fell from 2.000 to 1.000 in 2 steps"),
        ((0.69321, 0.69318), "Loss 0.693 at the start and at the end, 2 steps"),
    ],
)
def test_the_curve_is_told_as_it_went(values: tuple[float, float], told: str) -> None:
    shown = training_section([{"step": step, "loss": loss} for step, loss in enumerate(values, 1)])
    assert told in str(shown["plot"])


def test_a_hard_last_example_does_not_make_the_loss_rise() -> None:
    losses = [1.4, 3.6, 3.4, 3.0, 2.6, 2.0, 1.8, 1.0, 1.2, 4.19]
    shown = training_section([{"step": step, "loss": loss} for step, loss in enumerate(losses, 1)])
    assert "Loss fell from 2.800 to 2.130 in 10 steps, means of 3 logged losses" in str(shown["plot"])
    rows = dict(shown["table"].texts())
    assert (rows["mean loss, first 3 logged"], rows["mean loss, last 3 logged"]) == ("2.800", "2.130")


def test_without_evaluations_none_is_spoken_of() -> None:
    shown = training_section([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}])
    assert not [name for name, _ in shown["table"].rows if "evaluation" in name or "accuracy" in name]
    assert shown["legend"] == [("s1", "training loss")]


def test_training_section_of_preference_pairs() -> None:
    lines = [
        {"step": step, "loss": 0.69 / step, "rewards/margins": 0.1 * step, "rewards/accuracies": 0.5 + 0.1 * step}
        for step in range(1, 4)
    ]
    lines.append({"step": 3, "eval_loss": 0.5, "eval_rewards/margins": 0.25, "eval_rewards/accuracies": 0.75})
    shown = training_section(lines)
    rows = dict(shown["table"].texts())
    assert rows["reward margin, training"] == "0.100 first, 0.300 last"
    assert rows["ranked correctly, training"] == "60.0% first, 80.0% last"
    assert rows["reward margin, held-out pairs"] == "0.250 first, 0.250 last"
    assert shown["words"].startswith("The loss is the preference loss")
    assert not training_section([{"step": 1, "loss": 2.0}])["words"].startswith("The loss is the preference loss")


def test_training_section_of_labelled_answers() -> None:
    lines = [{"step": 1, "loss": 0.5, "kl": 0.0}, {"step": 2, "loss": 0.4, "kl": 0.1, "rewards/margins": 0.2}]
    lines += [
        {"step": step, "eval_loss": 0.5, "eval_rewards/margins": 0.1 * step, "eval_rewards/chosen_right": 0.5 * step}
        for step in (1, 2)
    ]
    shown = training_section(lines)
    rows = dict(shown["table"].texts())
    assert shown["words"].startswith("The loss is the preference loss of single answers")
    assert rows["reward margin, held-out answers"] == "0.100 first, 0.200 last"
    assert rows["desired above the reference, held-out answers"] == "50.0% first, 100.0% last"
    assert not [name for name in rows if "undesired" in name or "ranked" in name]
