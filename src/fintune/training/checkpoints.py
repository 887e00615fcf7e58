"""Files that a training writes: checkpoints that are complete or ignored, the best weights so far, whole folders."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from fintune.models.safetensors_files import read_safetensors_header

if TYPE_CHECKING:
    from torch import nn

MARK = "complete"
"""Name of the empty file that is written last into a checkpoint."""
BEST_FOLDER = "best"
"""Folder of the best weights so far, below that of ``train``, during training."""
_WEIGHTS_FILE = "weights.safetensors"


def step_of(checkpoint: Path) -> int:
    """Return the optimizer steps that were done when the checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])


def complete_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints in a folder, the oldest first."""
    complete = [path for path in folder.glob("checkpoint-*") if (path / MARK).is_file()]
    return sorted(complete, key=step_of)


def mark_complete(checkpoint: Path) -> None:
    """Flush every file of the checkpoint to the disk, and then mark it as complete."""
    for path in checkpoint.iterdir():
        if path.is_file():
            _flush(path)
    with (checkpoint / MARK).open("w") as file:
        os.fsync(file.fileno())


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the last complete checkpoint, and remove those that an interruption left incomplete."""
    complete = complete_checkpoints(folder)
    for path in folder.glob("checkpoint-*"):
        if path not in complete:
            shutil.rmtree(path)
    return complete[-1] if complete else None


def drop_old_checkpoints(folder: Path, num_kept: int) -> None:
    """Remove all complete checkpoints but the newest ``num_kept``."""
    for path in complete_checkpoints(folder)[:-num_kept]:
        (path / MARK).unlink()  # first, so that a half-removed checkpoint is ignored
        shutil.rmtree(path)


def save_best(model: nn.Module, folder: Path, step: int) -> None:
    """Save the trained weights of a step.

    Args:
        model: The weights that require a gradient are saved.
        folder: Gets the folder ``step-N``, which appears when it is complete.
        step: The step N.
    """
    from safetensors.torch import save_file

    weights = {name: weight.detach().contiguous() for name, weight in model.named_parameters() if weight.requires_grad}
    with replaced_folder(folder / f"step-{step}") as temporary:
        temporary.mkdir(parents=True)
        save_file(weights, temporary / _WEIGHTS_FILE)
        _flush(temporary / _WEIGHTS_FILE)


def load_best(model: nn.Module, folder: Path, step: int) -> None:
    """Put the saved weights of a step back into the model."""
    import torch
    from safetensors.torch import load_file

    saved = load_file(folder / f"step-{step}" / _WEIGHTS_FILE)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                weight.copy_(saved[name])


def drop_other_best(folder: Path, step: int | None) -> None:
    """Remove all saved weights but those of a step.

    Call it when a checkpoint at or after that step is complete: a run that resumes from an older checkpoint may need
    older weights.
    """
    for path in folder.glob("*"):
        if path.name != f"step-{step}":
            shutil.rmtree(path)


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """Write a folder that appears when it is complete; an older one is replaced.

    Yields:
        Path of a hidden folder, which the block has to make.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    yield temporary
    shutil.rmtree(folder, ignore_errors=True)
    temporary.replace(folder)


def count_saved_numbers(folder: Path) -> int:
    """Count the numbers in the safetensors files of an adapter or model folder."""
    return sum(prod(tensor.shape) for path in folder.glob("*.safetensors") for tensor in read_safetensors_header(path))


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
