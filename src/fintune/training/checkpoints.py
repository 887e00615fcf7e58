"""Checkpoints that are complete or do not count."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

MARK = "complete"
"""Name of the empty file that is written last."""


def step_of(checkpoint: Path) -> int:
    """Optimiser steps that the checkpoint has behind it."""
    return int(checkpoint.name.rpartition("-")[2])


def complete(folder: Path) -> list[Path]:
    """Complete checkpoints below a folder, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if (path / MARK).is_file()]
    return sorted(found, key=step_of)


def mark_complete(checkpoint: Path) -> None:
    """Bring every file of the checkpoint to the disk, then say that it is complete."""
    for path in checkpoint.iterdir():
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    with (checkpoint / MARK).open("w") as file:
        os.fsync(file.fileno())


def latest(folder: Path) -> Path | None:
    """The last complete checkpoint; what an interruption left half-written is removed."""
    kept = complete(folder)
    for path in folder.glob("checkpoint-*"):
        if path not in kept:
            shutil.rmtree(path)
    return kept[-1] if kept else None


def drop_old(folder: Path, num_kept: int) -> None:
    """Remove all but so many complete checkpoints, the newest."""
    for path in complete(folder)[:-num_kept]:
        (path / MARK).unlink()  # first, so that a half-removed one does not count
        shutil.rmtree(path)
