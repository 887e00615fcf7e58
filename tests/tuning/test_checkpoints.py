from __future__ import annotations

from fintune.tuning import checkpoints


def make(folder, step, *, complete=True):
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "optimizer.pt").write_bytes(b"x")
    if complete:
        checkpoints.mark_complete(path)
    return path


def test_a_half_written_checkpoint_is_not_taken_and_is_removed(tmp_path):
    good = make(tmp_path, 9)
    torn = make(tmp_path, 10, complete=False)
    assert checkpoints.latest(tmp_path) == good
    assert not torn.exists()


def test_steps_are_compared_as_numbers(tmp_path):
    make(tmp_path, 9)
    assert checkpoints.latest(tmp_path).name == "checkpoint-9"
    make(tmp_path, 100)
    assert checkpoints.latest(tmp_path).name == "checkpoint-100"


def test_no_folder_means_no_checkpoint(tmp_path):
    assert checkpoints.latest(tmp_path / "absent") is None


def test_two_checkpoints_are_kept(tmp_path):
    for step in (1, 2, 3):
        make(tmp_path, step)
    checkpoints.drop_old(tmp_path)
    assert [checkpoints.step_of(path) for path in checkpoints.complete(tmp_path)] == [2, 3]
