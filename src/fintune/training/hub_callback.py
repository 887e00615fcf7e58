"""``PushToHubEachEpoch``: a callback for transformers' Trainer that pushes the adapter while training goes on."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fintune.config import PublishOptions, is_hub_name
from fintune.errors import ConfigError
from fintune.util.console import quiet_libraries
from fintune.util.hub import MAIN, Target
from fintune.util.hub_background import GOES_ON, BackgroundPush

if TYPE_CHECKING:
    from transformers import TrainerCallback

_ENDED = "what training ended with was not pushed: {error}"
_ENDED_IN_RUN = "the adapter was not pushed: {error}; it is in the run's folder, push it with `fintune publish`"


@cache
def callback_class() -> type[TrainerCallback]:
    """The class, made when transformers is needed."""
    from transformers import TrainerCallback

    class PushToHubEachEpoch(TrainerCallback):  # type: ignore[misc]
        """Pushes the adapter (of another model, all of it) behind each epoch and at the end of training.

        A snapshot is saved at once and sent in the background. Where that fails, a line says so, training goes on and
        the next epoch is tried; a token is never shown.

        Args:
            repo_id: ``OWNER/NAME``, or ``NAME`` for one of yours; made where there is none.
            private: Only you can read it; one that everybody can read already is then refused.
            branch: Made where there is none.

        Raises:
            ConfigError: ``repo_id`` is no name of a repository.
        """

        def __init__(self, repo_id: str, *, private: bool = True, branch: str = MAIN) -> None:
            if not is_hub_name(repo_id):
                raise ConfigError(f"repo_id: {repo_id!r} is no name on the hub", hint="write OWNER/NAME")
            self._pushes = BackgroundPush(Target(repo_id, private, branch, must_be_private=private))

        def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            self._push(state, model, f"epoch {state.epoch:.0f}, step {state.global_step}")

        def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            self._pushes.finish()
            # The weights need not be those of the last epoch (load_best_model_at_end); if they are, no commit is made.
            self._push(state, model, f"end of training, step {state.global_step}", _ENDED)
            self._pushes.finish()

        def _push(self, state: Any, model: Any, label: str, failure: str = GOES_ON) -> None:
            if state.is_world_process_zero:
                self._pushes.push(lambda folder: _save(model, folder), label, failure)

    return PushToHubEachEpoch


class EpochPushes:
    """The same for this package's own training, whose epochs are steps of one long pass.

    Args:
        options: Where to.
        save: Writes the adapter as it is now into a folder that it makes.
        steps: Optimiser steps an epoch.
    """

    def __init__(self, options: PublishOptions, save: Callable[[Path], None], steps: int) -> None:
        target = Target(options.repo_id or "", options.private, options.branch, must_be_private=options.private)
        self._pushes = BackgroundPush(target, options.adapter_folder)
        self._save, self._steps = save, steps

    def callback(self) -> TrainerCallback:
        """Pushes behind each epoch but the last, whose weights are not yet those that are kept."""
        from transformers import TrainerCallback

        pushes, save, steps = self._pushes, self._save, self._steps

        class Push(TrainerCallback):  # type: ignore[misc]
            """Behind every so many steps."""

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                epoch, rest = divmod(state.global_step, steps)
                if not rest and state.global_step < state.max_steps:
                    pushes.push(save, f"epoch {epoch}, step {state.global_step}")

        return Push()

    def finish(self) -> None:
        """Push what training kept, and wait for it."""
        self._pushes.push(self._save, "end of training", _ENDED_IN_RUN)
        self._pushes.finish()


def _save(model: Any, folder: Path) -> None:
    with quiet_libraries():
        model.save_pretrained(str(folder))
    (folder / "README.md").unlink(missing_ok=True)  # an empty form
