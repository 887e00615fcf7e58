"""TensorBoard and Weights & Biases beside ``metrics.jsonl``."""

from __future__ import annotations

import importlib.util
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fintune.errors import ResourceError

if TYPE_CHECKING:
    from transformers import TrainerCallback

_PROJECT = "fintune"
_ID_FILE = "wandb_id"


def check(names: Sequence[str]) -> None:
    """Refuse, before anything is loaded, what is not installed.

    Raises:
        ResourceError: A package is missing.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ResourceError(
                f"train.report_to: {name} is not installed",
                hint=f"pip install {name}, or remove it from train.report_to",
                option="train.report_to",
            )


def make_callbacks(
    names: Sequence[str], *, folder: Path, run_name: str, options: Mapping[str, Any], done: int
) -> list[TrainerCallback]:
    """Callbacks for transformers' Trainer that hand every logged figure on.

    Args:
        names: ``tensorboard``, ``wandb``.
        folder: Gets ``tensorboard/`` or ``wandb/``.
        run_name: For W&B.
        options: Of the run, for W&B; no secret is among them.
        done: Steps of earlier attempts, whose figures stay; those behind are replaced.

    Raises:
        ResourceError: A package is missing, or W&B cannot be reached or wants a login.
    """
    check(names)
    from transformers import TrainerCallback

    class Reporter(TrainerCallback):  # type: ignore[misc]
        """Hands figures on."""

        def __init__(self, sink: _TensorBoard | _Wandb) -> None:
            self.sink = sink

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
            figures = {name: value for name, value in logs.items() if isinstance(value, (int, float))}
            if "loss" in figures or "eval_loss" in figures:  # not the summary at the end
                self.sink.write(state.global_step, figures)

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.sink.close()

    sinks: dict[str, Any] = {
        "tensorboard": lambda: _TensorBoard(folder / "tensorboard", done),
        "wandb": lambda: _Wandb(folder, run_name, options),
    }
    return [Reporter(sinks[name]()) for name in names]


def _grouped(figures: Mapping[str, float]) -> dict[str, float]:
    """``train/loss``, ``eval/loss``: names that both sinks lay out in groups."""
    return {
        f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}": value
        for name, value in figures.items()
    }


class _TensorBoard:
    def __init__(self, folder: Path, done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=done + 1 if done else None)

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in _grouped(figures).items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, folder: Path, run_name: str, options: Mapping[str, Any]) -> None:
        import wandb

        # A resumed run goes on with the same page.
        id_file = folder / _ID_FILE
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4), encoding="ascii")
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", _PROJECT),
                name=run_name or None,
                id=id_file.read_text(encoding="ascii"),
                resume="allow",
                dir=str(folder),
                config=dict(options),
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.Error as error:
            raise ResourceError(
                f"train.report_to: wandb does not start ({str(error).splitlines()[0]})",
                hint="run `wandb login`, or set WANDB_MODE=offline",
                option="train.report_to",
            ) from None

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log(_grouped(figures), step=step)

    def close(self) -> None:
        self._run.finish()
