from __future__ import annotations

import json

from fintune.data.predictions import read_predictions


def test_prediction_with_bad_seconds_counts(tmp_path):
    times = (2, 0.5, -1, "2", 10**400, float("inf"), float("nan"))
    rows = [{"id": f"r{number}", "program": "add(1, 2)", "seconds": told} for number, told in enumerate(times)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_predictions(tmp_path / "p.jsonl")
    assert [each.seconds for each in found.predictions] == [2.0, 0.5, None, None, None, None, None]
    assert not found.problems
