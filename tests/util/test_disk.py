"""Room on the disk: what is refused before the work, and what is told where it runs out."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from fintune.errors import ResourceError
from fintune.util.disk import name_full_disk, require_space


def test_require_space_names_both_sizes_and_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []

    def usage(place: Path) -> SimpleNamespace:
        asked.append(place)
        return SimpleNamespace(free=1_000_000)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    folder = tmp_path / "runs" / "not" / "there" / "yet"
    require_space(folder, 1_000_000, "train")
    for way_out, advice in (("", "free some"), ("set X to another disk", "free some, or set X to another disk")):
        with pytest.raises(ResourceError) as caught:
            require_space(folder, 2_500_000, "train", way_out=way_out)
        assert str(caught.value) == f"no space for train: it needs about 2.5 MB in {folder}, 1.0 MB is free: {advice}"
    assert asked == [tmp_path] * 3


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_error_names_the_folder(tmp_path: Path, number: int) -> None:
    with pytest.raises(ResourceError) as caught, name_full_disk(tmp_path, "the model", way_out="leave it"):
        raise OSError(number, os.strerror(number))
    assert str(caught.value) == f"no space for the model in {tmp_path}: the disk is full: free some, or leave it"


def test_what_else_the_file_system_refuses_keeps_its_own_error(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), name_full_disk(tmp_path, "the model"):
        raise PermissionError(errno.EACCES, "not yours")
