from __future__ import annotations

from contextlib import contextmanager

import pytest

from fintune.config import PredictOptions
from fintune.finqa.execute import execute
from fintune.finqa.program import tokenize
from fintune.inference.generate import PredictionLog, generate_all, memory_hint
from fintune.inference.protocol import Completion, PromptResult
from support.example_run import records

RECORDS = records(4)
QUIET = PredictOptions(max_new_tokens=8)


class Bar:
    """Records the notes of a progress bar."""

    def __init__(self, title, total, done):
        self.title, self.total, self.done, self.notes = title, total, done, []

    def advance(self, amount=1):
        self.done += amount

    def note(self, text):
        self.notes.append(text)


@pytest.fixture
def bars(monkeypatch):
    made = []

    @contextmanager
    def bar(title, total, *, done=0, slow=False):
        made.append(Bar(title, total, done))
        yield made[-1]

    monkeypatch.setattr("fintune.inference.generate.bar", bar)
    return made


@pytest.fixture
def log(tmp_path):
    opened = PredictionLog(tmp_path / "predictions.jsonl", {"model": "m"})
    yield opened
    opened.close()


def backwards(text_of):
    """An engine that answers the last question first, with ten tokens in half a second each."""

    def ask(ids, decoding, done):
        for place in reversed(range(len(ids))):
            if place not in done:
                text = text_of(ids[place])
                yield PromptResult(place, (Completion((1,) * 10, text, "stop", (), 5, 0.5, (-0.1,) * 10),))

    return ask


def gold(record_id):
    return next(each.qa.program for each in RECORDS if each.id == record_id)


def test_generate_all_assigns_results_by_id(bars, log):
    generate_all("predict", RECORDS, QUIET, log, backwards(gold))
    assert len(log.done) == 4
    for record in RECORDS:
        assert log.done[record.id].text == record.qa.program
        assert execute(tokenize(log.done[record.id].program), record.table).result == record.qa.exe_ans


def test_generate_all_reports_speed_and_accuracy(bars, log):
    first = RECORDS[0]
    generate_all("predict", [first], QUIET, log, backwards(lambda _: "add(1, 1)"))
    generate_all("predict", RECORDS, QUIET, log, backwards(gold))
    (one, rest) = bars
    assert (one.title, one.total, one.done, one.notes) == ("predict", 1, 1, ["20 tok/s, 0.0% right"])
    assert (rest.total, rest.done) == (4, 4)
    assert rest.notes == ["20 tok/s, 50.0% right", "20 tok/s, 66.7% right", "20 tok/s, 75.0% right"]


def test_generate_all_reports_speed_without_gold(bars, log):
    plain = [
        each.model_copy(update={"qa": each.qa.model_copy(update={"program": "", "exe_ans": None})}) for each in RECORDS
    ]
    generate_all("predict", plain, QUIET, log, backwards(lambda _: "add(1, 1)"))
    assert bars[0].notes == ["20 tok/s"] * 4


def test_generate_all_with_complete_log_asks_nothing(bars, log):
    generate_all("predict", RECORDS, QUIET, log, backwards(gold))

    def ask(*_):
        raise AssertionError("asked")

    generate_all("predict", RECORDS, QUIET, log, ask)
    assert len(bars) == 1


def test_memory_hint_names_smallest_change_first():
    assert memory_hint(16, 2048, "add --load-in-4bit") == (
        "set predict.batch_size=8, or add --load-in-4bit, or lower prompt.max_length (now 2048)"
    )
    assert memory_hint(1, 512, None) == "lower prompt.max_length (now 512)"
