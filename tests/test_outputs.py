from __future__ import annotations

from pathlib import Path

import pytest

from fintune import outputs
from fintune.errors import FintuneError


def test_a_file_that_is_read_is_no_target_by_whatever_name(tmp_path: Path) -> None:
    (tmp_path / "gold.json").write_text("[]")
    (tmp_path / "link.json").symlink_to(tmp_path / "gold.json")
    for name in ("gold.json", "x/../gold.json", "link.json"):
        (tmp_path / "x").mkdir(exist_ok=True)
        with pytest.raises(FintuneError, match="is read, and would be overwritten"):
            outputs.check([tmp_path / name], read=[tmp_path / "gold.json"])


def test_two_targets_of_one_place_a_folder_and_a_missing_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FintuneError, match=r"a\.csv: would be written twice"):
        outputs.check([tmp_path / "a.csv", None, tmp_path / "a.csv"], read=[])
    with pytest.raises(FintuneError, match="a folder, and no file"):
        outputs.check([tmp_path], read=[])
    with pytest.raises(FintuneError, match="its folder does not exist"):
        outputs.check([tmp_path / "no" / "a.csv"], read=[])
    outputs.check([tmp_path / "a.csv", tmp_path / "b.csv"], read=[tmp_path / "c"])


def test_a_file_that_cannot_be_written_leaves_nothing_beside(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(FintuneError, match="taken: cannot be written"):
        outputs.write(tmp_path / "taken", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
    with pytest.raises(FintuneError, match="cannot be made"):
        (tmp_path / "file").write_text("")
        outputs.make_folder(tmp_path / "file" / "below")


def test_of_many_remarks_the_first_are_shown_and_the_others_counted() -> None:
    lines = [f"row {k}" for k in range(outputs.MAX_REMARKS + 5)]
    shown = outputs.abridged(lines, "--json writes all of them")
    assert shown == [*lines[: outputs.MAX_REMARKS], "and 5 more remarks; --json writes all of them"]
    assert outputs.abridged(lines[:-4]) == lines[:-4]
