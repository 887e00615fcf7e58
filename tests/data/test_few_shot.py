from __future__ import annotations

import pytest

from fintune.data.few_shot import ShotSelector
from fintune.errors import DataError
from fintune.records import FinQAQuestion, FinQARecord, Message

TABLE = (("in millions", "2019", "2018"), ("net revenue", "120", "100"), ("operating income", "30", "20"))


def record(record_id, question, program="subtract(120, 100)", **qa):
    return FinQARecord(
        id=record_id,
        pre_text=("the company grew .", "cash was 55 in 2019 ."),
        post_text=(),
        table=TABLE,
        qa=FinQAQuestion(question=question, program=program, exe_ans=20.0, **qa),
    )


TRAIN = [
    record("A/2019/page_1.pdf-1", "what was the change in net revenue?", gold_inds={"table_1": "..."}),
    record("B/2019/page_2.pdf-1", "what was the change in operating income?", "subtract(30, 20)"),
    record("C/2019/page_3.pdf-1", "how much cash was there in 2019?", "add(55, const_1)", gold_inds={"text_1": "..."}),
    record("D/2019/page_4.pdf-1", "what was the change in net revenue?", "subtract(999, 100)"),
    record("E/2019/page_5.pdf-1", "what was the change in net revenue?", "subtract(120)"),
]
ASKED = [Message(role="system", content="Answer."), Message(role="user", content="page\n\nQuestion: x")]


def words(messages):
    return sum(len(message.content.split()) for message in messages)


def insert(shots, question="what was the change in net revenue?", budget=10_000, record_id="Z/2019/page_9.pdf-1"):
    return shots.insert(record_id, question, ASKED, budget=budget, count=words)


def test_shots_come_before_question_most_similar_last():
    shots = ShotSelector(TRAIN, [], 2)
    system, *turns, asked = insert(shots)
    assert [system, asked] == ASKED
    assert [turn.role for turn in turns] == ["user", "assistant", "user", "assistant"]
    assert [turn.content for turn in turns[1::2]] == ["subtract(30, 20)", "subtract(120, 100)"]
    assert shots.use.used == {"Z/2019/page_9.pdf-1": ("A/2019/page_1.pdf-1", "B/2019/page_2.pdf-1")}


def test_shot_shows_evidence_and_header_only():
    user, _ = ShotSelector(TRAIN, [], 1).select("what was the change in net revenue?")[0].turns
    assert user.content == (
        "in millions\nnet revenue | 2019: 120 | 2018: 100\n\nQuestion: what was the change in net revenue?"
    )
    user, _ = ShotSelector(TRAIN, [], 1).select("how much cash was there?")[0].turns
    assert user.content == "cash was 55 in 2019 .\n\nQuestion: how much cash was there in 2019?"


def test_unusable_gold_programs_are_no_shots():
    chosen = {shot.id for shot in ShotSelector(TRAIN, [], 9).select("what was the change in net revenue? cash")}
    assert chosen == {"A/2019/page_1.pdf-1", "B/2019/page_2.pdf-1", "C/2019/page_3.pdf-1"}


@pytest.mark.parametrize("scored", ["A/2019/page_1.pdf-1", "A/2019/page_1.pdf-7"])
def test_no_shot_comes_from_a_page_that_is_scored(scored):
    shots = ShotSelector(TRAIN, ["Y/2019/page_1.pdf-1", scored], 1)
    insert(shots)
    assert shots.num_excluded == 1
    assert shots.use.used["Z/2019/page_9.pdf-1"] == ("B/2019/page_2.pdf-1",)


def test_the_least_similar_shots_give_way_and_are_counted():
    shots = ShotSelector(TRAIN, [], 2)
    both, one = words(insert(shots)), words(insert(ShotSelector(TRAIN, [], 1)))
    assert words(ASKED) < one < both
    assert words(insert(shots, budget=both - 1, record_id="Z/1-1")) == one
    assert insert(shots, budget=one - 1, record_id="Z/1-2") == tuple(ASKED)
    assert [len(shots.use.used[each]) for each in ("Z/2019/page_9.pdf-1", "Z/1-1", "Z/1-2")] == [2, 1, 0]
    assert shots.use.facts() == {
        "num_shots_used": 3,
        "num_shots_left_out": 3,
        "shot_ids": ["A/2019/page_1.pdf-1", "B/2019/page_2.pdf-1"],
    }


def test_training_data_on_scored_pages_alone_is_refused():
    with pytest.raises(DataError, match="no shots can be chosen: all 1 training records"):
        ShotSelector(TRAIN[:1], ["A/2019/page_1.pdf-2"], 1)
