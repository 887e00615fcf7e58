from __future__ import annotations

import pytest

from fintune.errors import ArtifactError
from fintune.inference.generate import PredictionLog
from fintune.records import Prediction

KEY = {"model": "a", "prompts": "b"}


def prediction(name):
    return Prediction(id=name, text="", program="", finish_reason="stop", seconds=0.0, num_prompt_tokens=1)


def test_log_is_read_again(tmp_path):
    path = tmp_path / "predictions.jsonl"
    log = PredictionLog(path, KEY)
    log.append(prediction("x"))
    log.close()
    again = PredictionLog(path, KEY)
    assert list(again.done) == ["x"]
    again.close()


def test_append_writes_the_line_at_once(tmp_path):
    path = tmp_path / "predictions.jsonl"
    log = PredictionLog(path, KEY)
    for number, name in enumerate("xyz", 1):
        log.append(prediction(name))
        lines = path.read_text(encoding="utf-8").splitlines()
        assert [Prediction.model_validate_json(line).id for line in lines] == [*"xyz"[:number]]
    log.close()


def test_torn_last_line_is_removed(tmp_path):
    path = tmp_path / "predictions.jsonl"
    log = PredictionLog(path, KEY)
    log.append(prediction("x"))
    log.close()
    with path.open("a") as file:
        file.write('{"id": "y"')
    again = PredictionLog(path, KEY)
    again.append(prediction("z"))
    again.close()
    last = PredictionLog(path, KEY)
    assert list(last.done) == ["x", "z"]
    last.close()


def test_other_model_is_refused(tmp_path):
    path = tmp_path / "predictions.jsonl"
    PredictionLog(path, KEY).close()
    with pytest.raises(ArtifactError, match="another model"):
        PredictionLog(path, KEY | {"model": "c"})


def test_file_without_key_is_refused(tmp_path):
    path = tmp_path / "predictions.jsonl"
    path.write_text(prediction("x").model_dump_json() + "\n")
    with pytest.raises(ArtifactError, match="does not say which model"):
        PredictionLog(path, KEY)


def test_broken_line_is_refused(tmp_path):
    path = tmp_path / "predictions.jsonl"
    PredictionLog(path, KEY).close()
    path.write_text("{}\n")
    with pytest.raises(ArtifactError, match="not a prediction"):
        PredictionLog(path, KEY)
