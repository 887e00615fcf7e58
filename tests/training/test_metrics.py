from __future__ import annotations

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
