from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fintune.cli.audit import Resplit, resplit
from fintune.errors import DataError
from fintune.finqa.page import group_of
from fintune.records import FinQAQuestion, FinQARecord

QA = FinQAQuestion(question="q", program="add(1, 2)", exe_ans=3.0)


def record(record_id: str) -> FinQARecord:
    return FinQARecord(id=record_id, pre_text=(), post_text=(), table=(), qa=QA)


def ids(divided: Resplit) -> dict[str, list[str]]:
    return {name: [each.id for each in records] for name, records in divided.splits.items()}


def files(**splits: str) -> dict[str, list[FinQARecord]]:
    return {name: [record(each) for each in listed.split()] for name, listed in splits.items()}


def test_resplit_keeps_groups_of_one_file() -> None:
    divided = resplit(files(train="A/1/p-1 B/1/p-1", dev="C/1/p-1"), "company")
    assert ids(divided) == {"train": ["A/1/p-1", "B/1/p-1"], "dev": ["C/1/p-1"]}
    assert divided.num_moved == {"train": 0, "dev": 0}


def test_resplit_moves_shared_groups_to_the_smaller_split() -> None:
    splits = files(train="A/1/p-1 A/1/p-2 B/1/p-1 X/1/p-1", dev="A/1/p-3 B/1/p-2 C/1/p-1")
    divided = resplit(splits, "company")
    assert ids(divided) == {
        "train": ["A/1/p-1", "A/1/p-2", "A/1/p-3", "X/1/p-1"],
        "dev": ["B/1/p-1", "B/1/p-2", "C/1/p-1"],
    }
    assert divided.num_moved == {"train": 1, "dev": 1}
    assert divided.groups == {"train": ["A", "X"], "dev": ["B", "C"]}


def test_resplit_by_report_may_share_companies() -> None:
    splits = files(train="A/1/p-1 A/2/p-1", dev="A/3/p-1")
    assert ids(resplit(splits, "report")) == {"train": ["A/1/p-1", "A/2/p-1"], "dev": ["A/3/p-1"]}
    with pytest.raises(DataError, match="no records left"):
        resplit(splits, "company")


def test_resplit_counts_repeated_ids() -> None:
    divided = resplit(files(train="A/1/p-1", dev="A/1/p-1 B/1/p-1"), "report")
    assert ids(divided) == {"train": ["A/1/p-1"], "dev": ["B/1/p-1"]}
    assert divided.num_repeated == 1


IDS = st.lists(st.builds("{}/{}/p{}-{}".format, *[st.integers(0, 4)] * 4), unique=True, max_size=40)


@settings(deadline=None)
@given(train=IDS, dev=IDS, test=IDS, by=st.sampled_from(["report", "company"]))
def test_resplit_loses_no_record_and_shares_no_group(
    train: list[str], dev: list[str], test: list[str], by: str
) -> None:
    splits = {name: list(map(record, each)) for name, each in {"train": train, "dev": dev, "test": test}.items()}
    try:
        divided = resplit(splits, by)
    except DataError:  # a split would be empty
        return
    kept = [each for listed in ids(divided).values() for each in listed]
    assert sorted(kept) == sorted({*train, *dev, *test})
    groups = [group for name, listed in ids(divided).items() for group in {group_of(each, by) for each in listed}]
    assert len(groups) == len(set(groups))
    assert len(kept) + divided.num_repeated == len(train) + len(dev) + len(test)
