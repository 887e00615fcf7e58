from __future__ import annotations

import gzip
import json

import pytest

from fintune.finqa.distribution import FINQA_TEST, distribution, operations
from support.paths import ROOT

SHARED = ROOT.parent / "shared" / "finqa"


def test_operations_are_in_order() -> None:
    assert operations("subtract(5829, 5735), divide(#0, 5735)") == ["subtract", "divide"]
    assert operations("table_sum(sales (net), none)") == ["table_sum"]


def test_distribution_counts_programs_and_steps() -> None:
    shares = distribution(["add(1, 2)", "add(1, 2), add(#0, 3)", ", ".join(["divide(1, 2)"] * 5)])
    assert shares.steps == {"1": pytest.approx(1 / 3), "2": pytest.approx(1 / 3), "3": 0, "4+": pytest.approx(1 / 3)}
    assert shares.operations["divide"] == 5 / 8
    assert shares.operations["exp"] == 0


def test_distribution_of_no_programs_is_zero() -> None:
    shares = distribution([])
    assert set(shares.steps.values()) == set(shares.operations.values()) == {0.0}


def test_published_shares_add_up() -> None:
    assert sum(FINQA_TEST.steps.values()) == pytest.approx(1)
    assert sum(FINQA_TEST.operations.values()) == pytest.approx(1)


@pytest.mark.skipif(not SHARED.is_dir(), reason="no FinQA files beside the repository")
def test_distribution_of_dev_is_the_published_one() -> None:
    rows = json.loads(gzip.decompress((SHARED / "dev.json.gz").read_bytes()))
    shares = distribution(row["qa"]["program"] for row in rows)
    assert {key: round(100 * share, 1) for key, share in shares.steps.items()} == {
        "1": 59.2,
        "2": 32.5,
        "3": 4.9,
        "4+": 3.4,
    }
