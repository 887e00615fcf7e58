from __future__ import annotations

import pytest

from fintune.training import metrics


def test_truncate_drops_lines_after_the_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2, 3):
        metrics.append(path, {"step": step})
    assert metrics.truncate(path, 2) == [{"step": 1}, {"step": 2}] == metrics.read(path)


def test_a_torn_last_line_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st')
    assert metrics.read(path) == [{"step": 1}]
    metrics.truncate(path, 1)
    metrics.append(path, {"step": 2})
    assert metrics.read(path) == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize("damaged", ["[1]", "{}", '{"step": "2"}', "[" * 100_000, "\x00", "null"])
def test_lines_after_a_damaged_one_are_left_out(tmp_path, damaged):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{damaged}\n{{"step": 3}}\n')
    assert metrics.read(path) == [{"step": 1}]


def test_evaluations_are_formatted_by_what_they_measure():
    pairs = {"eval_loss": 0.6931, "eval_rewards/accuracies": 0.957, "eval_rewards/chosen_right": 0.5}
    assert metrics.format_evaluation(pairs) == "eval loss 0.693 and 95.7% of held-out pairs ranked right"
    answers = {"eval_loss": 0.5, "eval_rewards/chosen_right": 0.5, "eval_rewards/rejected_right": 1.0}
    assert metrics.format_evaluation(answers) == (
        "eval loss 0.500 and 50.0% of the desired answers above, 100.0% of the undesired answers below the reference"
    )
    assert metrics.format_evaluation({"eval_loss": 0.5, "eval_accuracy": 0.25}) == "eval loss 0.500 and 25.0% right"
