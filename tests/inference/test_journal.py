from __future__ import annotations

import pytest

from fintune.errors import ArtifactError
from fintune.inference.journal import Journal
from fintune.records import Prediction

KEY = {"model": "a", "prompts": "b"}


def prediction(name):
    return Prediction(id=name, text="", program="", finish_reason="stop", seconds=0.0, num_prompt_tokens=1)


def test_what_was_written_is_there_again(tmp_path):
    path = tmp_path / "predictions.jsonl"
    journal = Journal(path, KEY)
    journal.append(prediction("x"))
    journal.close()
    again = Journal(path, KEY)
    assert list(again.done) == ["x"]
    again.close()


def test_a_line_is_in_the_file_before_the_next_one_is_made(tmp_path):
    path = tmp_path / "predictions.jsonl"
    journal = Journal(path, KEY)
    for number, name in enumerate("xyz", 1):
        journal.append(prediction(name))
        lines = path.read_text(encoding="utf-8").splitlines()
        assert [Prediction.model_validate_json(line).id for line in lines] == [*"xyz"[:number]]
    journal.close()


def test_a_torn_last_line_is_cut_off(tmp_path):
    path = tmp_path / "predictions.jsonl"
    journal = Journal(path, KEY)
    journal.append(prediction("x"))
    journal.close()
    with path.open("a") as file:
        file.write('{"id": "y"')
    again = Journal(path, KEY)
    again.append(prediction("z"))
    again.close()
    last = Journal(path, KEY)
    assert list(last.done) == ["x", "z"]
    last.close()


def test_another_model_is_refused_by_name(tmp_path):
    path = tmp_path / "predictions.jsonl"
    Journal(path, KEY).close()
    with pytest.raises(ArtifactError, match="begun with another model:"):
        Journal(path, KEY | {"model": "c"})


def test_predictions_of_nobody_knows_which_model_are_refused(tmp_path):
    path = tmp_path / "predictions.jsonl"
    path.write_text(prediction("x").model_dump_json() + "\n")
    with pytest.raises(ArtifactError, match="does not say which model"):
        Journal(path, KEY)


def test_a_broken_line_in_the_middle_is_refused(tmp_path):
    path = tmp_path / "predictions.jsonl"
    Journal(path, KEY).close()
    path.write_text("{}\n")
    with pytest.raises(ArtifactError, match="no prediction"):
        Journal(path, KEY)
