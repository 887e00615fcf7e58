from __future__ import annotations

from contextlib import contextmanager

import pytest

from fintune.config import PredictOptions
from fintune.errors import ArtifactError
from fintune.finqa.execute import execute
from fintune.finqa.program import tokenize
from fintune.inference import answering
from fintune.inference.answering import answer_all, less_memory
from fintune.inference.journal import Journal
from fintune.inference.protocol import Answered, Completion
from support.example_run import records

RECORDS = records(4)
QUIET = PredictOptions(max_new_tokens=8)


class Bar:
    """Keeps what was told."""

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

    monkeypatch.setattr(answering, "bar", bar)
    return made


@pytest.fixture
def journal(tmp_path):
    opened = Journal(tmp_path / "predictions.jsonl", {"model": "m"})
    yield opened
    opened.close()


def backwards(text_of):
    """An engine that answers the last question first, each of ten tokens in half a second."""

    def ask(ids, decoding, done):
        for place in reversed(range(len(ids))):
            if place not in done:
                text = text_of(ids[place])
                yield Answered(place, (Completion((1,) * 10, text, "stop", (), 5, 0.5, (-0.1,) * 10),))

    return ask


def gold(record_id):
    return next(each.qa.program for each in RECORDS if each.id == record_id)


def test_answers_go_to_their_questions_in_whatever_order_they_come(bars, journal):
    answer_all("predict", RECORDS, QUIET, journal, backwards(gold), None)
    assert len(journal.done) == 4
    for record in RECORDS:
        assert journal.done[record.id].text == record.qa.program
        assert execute(tokenize(journal.done[record.id].program), record.table).result == record.qa.exe_ans


def test_the_bar_tells_speed_and_accuracy_of_what_is_there(bars, journal):
    first = RECORDS[0]
    answer_all("predict", [first], QUIET, journal, backwards(lambda _: "add(1, 1)"), None)
    answer_all("predict", RECORDS, QUIET, journal, backwards(gold), None)
    (one, rest) = bars
    assert (one.title, one.total, one.done, one.notes) == ("predict", 1, 1, ["20 tok/s, 0.0% right"])
    assert (rest.total, rest.done) == (4, 4)
    assert rest.notes == ["20 tok/s, 50.0% right", "20 tok/s, 66.7% right", "20 tok/s, 75.0% right"]


def test_without_gold_the_bar_tells_the_speed_alone(bars, journal):
    plain = [
        each.model_copy(update={"qa": each.qa.model_copy(update={"program": "", "exe_ans": None})}) for each in RECORDS
    ]
    answer_all("predict", plain, QUIET, journal, backwards(lambda _: "add(1, 1)"), None)
    assert bars[0].notes == ["20 tok/s"] * 4


def test_where_all_is_done_nothing_is_asked(bars, journal):
    answer_all("predict", RECORDS, QUIET, journal, backwards(gold), None)

    def ask(*_):
        raise AssertionError("asked")

    answer_all("predict", RECORDS, QUIET, journal, ask, None)
    assert len(bars) == 1


def resumed(journal, text, options=QUIET, **served):
    """The places that are asked for, call by call, when an attempt with one answer goes on with another text."""
    answer_all("predict", RECORDS[:1], QUIET, journal, backwards(lambda _: "add(1, 1)"), None)
    asked = []

    def ask(ids, decoding, done):
        asked.append([ids[place] for place in range(len(ids)) if place not in done])
        return backwards(lambda _: text)(ids, decoding, done)

    try:
        answer_all("predict", RECORDS, options, journal, ask, None, **served)
    finally:
        asked = [sorted(each) for each in asked]
        assert len(journal.done) == (4 if len(asked[-1]) == 3 else 1)
    return asked


FIRST, REST = RECORDS[0].id, sorted(each.id for each in RECORDS[1:])


def test_a_server_is_asked_its_first_answer_again_before_it_goes_on(bars, journal):
    assert resumed(journal, "add(1, 1)", is_served=True) == [[FIRST], REST]


def test_a_server_that_answers_otherwise_than_before_is_refused_and_nothing_is_mixed(bars, journal):
    with pytest.raises(ArtifactError, match=r"when .* was begun: 'add\(2, 2\)', not 'add\(1, 1\)'") as caught:
        resumed(journal, "add(2, 2)", is_served=True)
    assert FIRST in str(caught.value)
    assert "remove that file to begin anew" in str(caught.value)
    assert list(journal.done) == [FIRST]


@pytest.mark.parametrize(("num_other", "refused"), [(1, False), (2, True)])
def test_a_single_answer_that_falls_otherwise_may_be_a_near_tie(bars, journal, num_other, refused):
    answer_all("predict", RECORDS[:3], QUIET, journal, backwards(lambda _: "add(1, 1)"), None)
    other = {each.id for each in RECORDS[:num_other]}

    ask = backwards(lambda id_: "add(2, 2)" if id_ in other else "add(1, 1)")
    if refused:
        with pytest.raises(ArtifactError, match="2 of 3 questions asked again"):
            answer_all("predict", RECORDS, QUIET, journal, ask, None, is_served=True)
    else:
        answer_all("predict", RECORDS, QUIET, journal, ask, None, is_served=True)
    assert len(journal.done) == (3 if refused else 4)


@pytest.mark.parametrize(
    ("options", "is_served"), [(QUIET, False), (QUIET.model_copy(update={"strategy": "sample"}), True)]
)
def test_a_model_in_this_process_and_drawn_answers_are_not_asked_again(bars, journal, options, is_served):
    assert resumed(journal, "add(2, 2)", options, is_served=is_served) == [REST]


def test_what_needs_less_memory_is_named_with_its_numbers():
    assert less_memory(16, 2048, "add --load-in-4bit") == (
        "set predict.batch_size=8, or add --load-in-4bit, or lower prompt.max_length (now 2048)"
    )
    assert less_memory(1, 512, None) == "lower prompt.max_length (now 512)"
