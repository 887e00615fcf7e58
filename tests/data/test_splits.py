from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fintune.config.load import load as load_config
from fintune.data import splits
from fintune.data.synthetic import company_of
from fintune.errors import DataError


def rows(name: str, number: int) -> list[dict[str, Any]]:
    qa = {"question": "how much ?", "program": "add(1, 2)", "exe_ans": 3.0}
    page = {"pre_text": ["a ."], "post_text": [], "table": [["", "2009"], ["cash", "1"]]}
    return [{"id": f"{name}/2009/page_{n}.pdf-1", **page, "qa": qa} for n in range(number)]


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    (tmp_path / "train.json").write_text(json.dumps([*rows("A", 20), {"id": "A/none"}]), encoding="utf-8")
    (tmp_path / "eval.json").write_text(json.dumps(rows("B", 10)), encoding="utf-8")
    return ["data.source=finqa", f"data.train={tmp_path / 'train.json'}", f"data.eval={tmp_path / 'eval.json'}"]


def load(overrides: Sequence[str], limit: int | None = None) -> dict[str, splits.Split]:
    return splits.load(load_config(None, overrides).config, limit=limit)


def test_files_give_their_records_and_what_was_dropped(files: list[str]) -> None:
    found = load(files)
    assert [len(found[name].records) for name in ("train", "eval")] == [20, 10]
    assert found["train"].dropped == {"no question": 1}
    (unused,) = found["train"].unused
    assert (Path(unused.file), unused.row) == (Path(files[1].partition("=")[2]), 21)


def test_a_sample_keeps_the_order_and_depends_on_the_seed_alone(files: list[str]) -> None:
    one, again, other = (
        [r.id for r in load([*files, "data.max_train_samples=8", f"run.seed={seed}"])["train"].records]
        for seed in (1, 1, 2)
    )
    everything = [r.id for r in load(files)["train"].records]
    assert len(one) == 8
    assert one == again == sorted(one, key=everything.index)
    assert one != other


def test_a_limit_comes_on_top_and_never_adds(files: list[str]) -> None:
    found = load([*files, "data.max_train_samples=8"], limit=9)
    assert [len(found["train"].records), len(found["eval"].records)] == [8, 9]
    assert found["train"].num_read == 20


def test_strict_reaches_the_reader(files: list[str]) -> None:
    with pytest.raises(DataError, match="row 21, id A/none"):
        load([*files, "data.strict=true"])


def test_generated_companies_are_trained_on_or_scored_never_both() -> None:
    sizes = {"train_companies": 5, "eval_companies": 3, "pages_per_company": 2, "questions_per_page": 2}
    found = load([f"data.statements.{key}={value}" for key, value in sizes.items()])
    train, evaluation = ({company_of(r.id) for r in found[name].records} for name in ("train", "eval"))
    assert (len(train), len(evaluation)) == (5, 3)
    assert not train & evaluation
