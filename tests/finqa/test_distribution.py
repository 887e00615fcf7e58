from __future__ import annotations

import gzip
import json

import pytest

from fintune.finqa.distribution import FINQA_TEST, distribution, operations
from support.paths import ROOT

SHARED = ROOT.parent / "shared" / "finqa"


def test_operations_are_read_in_order_and_not_from_row_names() -> None:
    assert operations("subtract(5829, 5735), divide(#0, 5735)") == ["subtract", "divide"]
    assert operations("table_sum(sales (net), none)") == ["table_sum"]


def test_shares_are_over_programs_and_over_steps() -> None:
    found = distribution(["add(1, 2)", "add(1, 2), add(#0, 3)", ", ".join(["divide(1, 2)"] * 5)])
    assert found.steps == {"1": pytest.approx(1 / 3), "2": pytest.approx(1 / 3), "3": 0, "4+": pytest.approx(1 / 3)}
    assert found.operations["divide"] == 5 / 8
    assert found.operations["exp"] == 0


def test_no_programs_give_no_shares() -> None:
    found = distribution([])
    assert set(found.steps.values()) == set(found.operations.values()) == {0.0}


def test_shares_of_the_published_test_set_add_up() -> None:
    assert sum(FINQA_TEST.steps.values()) == pytest.approx(1)
    assert sum(FINQA_TEST.operations.values()) == pytest.approx(1)


@pytest.mark.skipif(not SHARED.is_dir(), reason="no FinQA files beside the repository")
def test_dev_has_the_published_number_of_steps() -> None:
    rows = json.loads(gzip.decompress((SHARED / "dev.json.gz").read_bytes()))
    found = distribution(row["qa"]["program"] for row in rows)
    assert {key: round(100 * share, 1) for key, share in found.steps.items()} == {
        "1": 59.2,
        "2": 32.5,
        "3": 4.9,
        "4+": 3.4,
    }
