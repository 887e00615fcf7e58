"""Files that a training writes: checkpoints that are complete or ignored, the best weights so far, whole folders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from fintune.models.safetensors_files import read_safetensors_header
from fintune.util.console import say
from fintune.util.files import flush_to_disk, sha256_file, write_atomically

if TYPE_CHECKING:
    from torch import nn

MARK = "complete"
"""Name of the file that is written last into a checkpoint: the hash of each other file."""
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
    """Flush every file of the checkpoint to the disk, and then write their hashes, which mark it as complete."""
    files = [path for path in sorted(checkpoint.iterdir()) if path.is_file()]
    for path in files:
        flush_to_disk(path)
    write_atomically(checkpoint / MARK, json.dumps({path.name: sha256_file(path) for path in files}))


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the last checkpoint that is complete and intact.

    Later ones are removed: an interruption left them incomplete, or the disk returns other bytes than were written. A
    line names each damaged one.
    """
    complete = complete_checkpoints(folder)
    for path in folder.glob("checkpoint-*"):
        if path not in complete:
            shutil.rmtree(path)
    while complete:
        problem = _damage(complete[-1])
        if problem is None:
            return complete[-1]
        damaged = complete.pop()
        goal = f"resumes from step {step_of(complete[-1])}" if complete else "starts again"
        say(f"{damaged}: {problem}; this checkpoint is removed, and training {goal}")
        shutil.rmtree(damaged)
    return None


def _damage(checkpoint: Path) -> str | None:
    try:
        hashes = json.loads((checkpoint / MARK).read_text(encoding="utf-8"))
        bad = next((name for name, sha in hashes.items() if sha256_file(checkpoint / name) != sha), None)
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, AttributeError):
        return f"{MARK} cannot be read"
    return None if bad is None else f"{bad} is damaged"


def drop_old_checkpoints(folder: Path, num_kept: int) -> None:
    """Remove all complete checkpoints but the newest ``num_kept``."""
    for path in complete_checkpoints(folder)[:-num_kept]:
        (path / MARK).unlink()  # first, so that a half-removed checkpoint is ignored
        shutil.rmtree(path)


def save_best(model: nn.Module, folder: Path, step: int) -> None:
    """Save the weights that require a gradient in the folder ``step-N``, which appears when it is complete."""
    from safetensors.torch import save_file

    weights = {name: weight.detach().contiguous() for name, weight in model.named_parameters() if weight.requires_grad}
    with replaced_folder(folder / f"step-{step}") as temporary:
        temporary.mkdir(parents=True)
        save_file(weights, temporary / _WEIGHTS_FILE)
        flush_to_disk(temporary / _WEIGHTS_FILE)


def load_best(model: nn.Module, folder: Path, step: int) -> None:
    """Put the saved weights of a step back into the model."""
    import torch
    from safetensors.torch import load_file

    saved = load_file(folder / f"step-{step}" / _WEIGHTS_FILE)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                weight.copy_(saved[name])


def drop_other_best(folder: Path, steps: Collection[int | None]) -> None:
    """Remove all saved weights but those of some steps."""
    for path in folder.glob("*"):
        if path.name not in {f"step-{step}" for step in steps}:
            shutil.rmtree(path)


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """Yield a hidden folder, which the block has to make. When complete, it gets its name and replaces an older one."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    yield temporary
    shutil.rmtree(folder, ignore_errors=True)
    temporary.replace(folder)


def count_saved_numbers(folder: Path) -> int:
    """Count the numbers in the safetensors files of an adapter or model folder."""
    return sum(prod(tensor.shape) for path in folder.glob("*.safetensors") for tensor in read_safetensors_header(path))
