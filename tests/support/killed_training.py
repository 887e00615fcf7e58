"""Trainings that are killed without warning and begun again until they are done, each in a fork of this process.

python killed_training.py CONFIG_JSON PREPARE FOLDER SEED

The libraries are imported once. Prints one line a kill: how the attempt ended and the steps that were logged.
"""

from __future__ import annotations

import io
import os
import random
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import peft.peft_model
import torch

from fintune.config import Config
from fintune.pipeline.stages.train import train
from fintune.training import checkpoints, metrics


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def after(number: int, act: Callable[[], None]) -> Callable[[], None]:
    """A function that acts when it is called for the so many-th time."""
    calls = [0]

    def count() -> None:
        calls[0] += 1
        if calls[0] == number:
            act()

    return count


def half_a_pickle(number: int) -> None:
    """Optimiser, scheduler and random states of a checkpoint are written by torch.save; one of them to its half."""
    original = torch.save
    calls = [0]

    def save(obj: object, where: object, *rest: object, **options: object) -> None:
        calls[0] += 1
        if calls[0] != number:
            original(obj, where, *rest, **options)
            return
        whole = io.BytesIO()
        original(obj, whole)
        Path(str(where)).write_bytes(whole.getvalue()[: whole.tell() // 2])
        die()

    torch.save = save


def half_an_adapter(number: int) -> None:
    """The weights of a checkpoint, of which the second half is missing."""
    original = peft.peft_model.safe_save_file
    calls = [0]

    def save(weights: object, where: str, **options: object) -> None:
        original(weights, where, **options)
        calls[0] += 1
        if calls[0] == number:
            os.truncate(where, Path(where).stat().st_size // 2)
            die()

    peft.peft_model.safe_save_file = save


def before_the_mark(number: int) -> None:
    """A checkpoint that is whole, but not known to be."""
    count, original = after(number, die), checkpoints.mark_complete

    def mark(path: Path) -> None:
        count()
        original(path)

    checkpoints.mark_complete = mark


def while_the_old_one_is_removed(number: int) -> None:
    """Behind the mark of the new checkpoint, with the old one half gone."""
    count, original = after(number, die), checkpoints.shutil.rmtree

    def remove(path: Path, *rest: object, **options: object) -> None:
        if Path(path).name.startswith("checkpoint-"):
            for file in [each for each in Path(path).iterdir() if each.is_file()][:1]:
                file.unlink()
            count()
        original(path, *rest, **options)

    checkpoints.shutil.rmtree = remove


def before_the_best_appears(number: int) -> None:
    """Behind the line of an evaluation, before its weights are kept."""
    count, original = after(number, die), checkpoints.save_best

    def save(*arguments: object) -> None:
        count()
        original(*arguments)

    checkpoints.save_best = save


def at_a_random_moment(draw: random.Random) -> None:
    """Some time behind the first line of this attempt."""
    timer = threading.Timer(draw.uniform(0.0, 0.4), die)
    timer.daemon = True
    begin, original = after(1, timer.start), metrics.append

    def append(*arguments: object) -> None:
        begin()
        original(*arguments)

    metrics.append = append


def attempt(config: Config, prepare: Path, folder: Path, how: Callable[[], None] | None) -> bool:
    """Whether the training came to its end."""
    child = os.fork()
    if child == 0:
        if how is not None:
            how()
        try:
            train(config, {"prepare": prepare}, folder)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return False
    assert os.waitstatus_to_exitcode(status) == 0, "the training failed by itself"
    return True


def tell(*words: object) -> None:
    sys.stdout.write(" ".join(map(str, words)) + "\n")
    sys.stdout.flush()  # a fork would write it once more


def main() -> None:
    config = Config.model_validate_json(sys.argv[1])
    prepare, folder, draw = Path(sys.argv[2]), Path(sys.argv[3]), random.Random(int(sys.argv[4]))
    ways: list[tuple[str, Callable[[], None]]] = [
        ("half_a_pickle", lambda: half_a_pickle(2)),
        ("half_a_pickle", lambda: half_a_pickle(5)),
        ("half_an_adapter", lambda: half_an_adapter(2)),
        ("before_the_mark", lambda: before_the_mark(2)),
        ("while_the_old_one_is_removed", lambda: while_the_old_one_is_removed(2)),
        ("before_the_best_appears", lambda: before_the_best_appears(1)),
        *(("at_a_random_moment", lambda: at_a_random_moment(draw)) for _ in range(3)),
    ]
    draw.shuffle(ways)
    for name, way in ways:
        draw.random()  # each fork draws on from here
        if attempt(config, prepare, folder, way):
            tell("done", name)
            return
        steps = [line["step"] for line in metrics.read(folder / "metrics.jsonl") if "loss" in line]
        tell("killed", name, steps[-1] if steps else 0)
    assert attempt(config, prepare, folder, None)


if __name__ == "__main__":
    main()
