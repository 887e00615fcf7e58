from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from fintune.data.disjoint import Disjoint, divide
from fintune.finqa.identity import group_of
from fintune.records import FinQAQuestion, FinQARecord

QA = FinQAQuestion(question="q", program="add(1, 2)", exe_ans=3.0)


def record(record_id: str) -> FinQARecord:
    return FinQARecord(id=record_id, pre_text=(), post_text=(), table=(), qa=QA)


def ids(divided: Disjoint) -> dict[str, list[str]]:
    return {name: [each.id for each in records] for name, records in divided.splits.items()}


def files(**splits: str) -> dict[str, list[FinQARecord]]:
    return {name: [record(each) for each in listed.split()] for name, listed in splits.items()}


def test_what_stands_in_one_file_stays_there() -> None:
    divided = divide(files(train="A/1/p-1 B/1/p-1", dev="C/1/p-1"), "company")
    assert ids(divided) == {"train": ["A/1/p-1", "B/1/p-1"], "dev": ["C/1/p-1"]}
    assert divided.num_came == {"train": 0, "dev": 0}


def test_what_stands_in_two_goes_where_records_are_wanting() -> None:
    splits = files(train="A/1/p-1 A/1/p-2 B/1/p-1 X/1/p-1", dev="A/1/p-3 B/1/p-2 C/1/p-1")
    divided = divide(splits, "company")
    assert ids(divided) == {
        "train": ["A/1/p-1", "A/1/p-2", "A/1/p-3", "X/1/p-1"],
        "dev": ["B/1/p-1", "B/1/p-2", "C/1/p-1"],
    }
    assert divided.num_came == {"train": 1, "dev": 1}
    assert divided.groups == {"train": ["A", "X"], "dev": ["B", "C"]}


def test_by_report_companies_may_be_shared() -> None:
    splits = files(train="A/1/p-1 A/2/p-1", dev="A/3/p-1")
    assert ids(divide(splits, "report")) == {"train": ["A/1/p-1", "A/2/p-1"], "dev": ["A/3/p-1"]}
    assert sorted(map(len, ids(divide(splits, "company")).values())) == [0, 3]


def test_an_id_that_comes_again_is_left_out_and_counted() -> None:
    divided = divide(files(train="A/1/p-1", dev="A/1/p-1 B/1/p-1"), "report")
    assert ids(divided) == {"train": ["A/1/p-1"], "dev": ["B/1/p-1"]}
    assert divided.num_repeated == 1


IDS = st.lists(st.builds("{}/{}/p{}-{}".format, *[st.integers(0, 4)] * 4), unique=True, max_size=40)


@settings(deadline=None)
@given(train=IDS, dev=IDS, test=IDS, by=st.sampled_from(["report", "company"]))
def test_no_record_is_lost_and_nothing_is_shared(train: list[str], dev: list[str], test: list[str], by: str) -> None:
    splits = {name: list(map(record, each)) for name, each in {"train": train, "dev": dev, "test": test}.items()}
    divided = divide(splits, by)
    kept = [each for listed in ids(divided).values() for each in listed]
    assert sorted(kept) == sorted({*train, *dev, *test})
    groups = [group for name, listed in ids(divided).items() for group in {group_of(each, by) for each in listed}]
    assert len(groups) == len(set(groups))
    assert len(kept) + divided.num_repeated == len(train) + len(dev) + len(test)
