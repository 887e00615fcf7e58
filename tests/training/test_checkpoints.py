from __future__ import annotations

import pytest

from fintune.training import checkpoints


def make(folder, step, *, complete=True):
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "optimizer.pt").write_bytes(b"x")
    if complete:
        checkpoints.mark_complete(path)
    return path


def test_incomplete_checkpoint_is_removed(tmp_path):
    good = make(tmp_path, 9)
    torn = make(tmp_path, 10, complete=False)
    assert checkpoints.latest_checkpoint(tmp_path) == good
    assert not torn.exists()


def test_steps_are_compared_as_numbers(tmp_path):
    make(tmp_path, 9)
    assert checkpoints.latest_checkpoint(tmp_path).name == "checkpoint-9"
    make(tmp_path, 100)
    assert checkpoints.latest_checkpoint(tmp_path).name == "checkpoint-100"


def test_no_folder_means_no_checkpoint(tmp_path):
    assert checkpoints.latest_checkpoint(tmp_path / "absent") is None


def test_drop_old_checkpoints_keeps_the_newest(tmp_path):
    for step in (1, 2, 10, 11):
        make(tmp_path, step)
    for num_kept, steps in ((5, [1, 2, 10, 11]), (3, [2, 10, 11]), (1, [11])):
        checkpoints.drop_old_checkpoints(tmp_path, num_kept)
        assert [checkpoints.step_of(path) for path in checkpoints.complete_checkpoints(tmp_path)] == steps


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "optimizer.pt").write_bytes(b"y"), "optimizer.pt is damaged"),
        (lambda path: (path / "optimizer.pt").write_bytes(b""), "optimizer.pt is damaged"),
        (lambda path: (path / "optimizer.pt").unlink(), "optimizer.pt is missing"),
        (lambda path: (path / "complete").write_text("{"), "complete cannot be read"),
        (lambda path: (path / "complete").write_text("[]"), "complete cannot be read"),
        (lambda path: (path / "complete").write_bytes(b"\xff"), "complete cannot be read"),
    ],
)
def test_damaged_checkpoint_is_passed_over(tmp_path, capsys, damage, message):
    older, newer = make(tmp_path, 9), make(tmp_path, 10)
    damage(newer)
    assert checkpoints.latest_checkpoint(tmp_path) == older
    assert not newer.exists()
    told = " ".join(capsys.readouterr().err.split())
    assert f"checkpoint-10: {message}; this checkpoint is removed, and training resumes from step 9" in told
    damage(older)
    assert checkpoints.latest_checkpoint(tmp_path) is None
    assert "training starts again" in " ".join(capsys.readouterr().err.split())
