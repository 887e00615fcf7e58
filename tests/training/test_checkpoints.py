from __future__ import annotations

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
