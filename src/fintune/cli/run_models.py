"""A run's folder in the place of a model's name, for ``fintune ask`` and ``fintune predict --model``."""

from __future__ import annotations

import shlex
from pathlib import Path

from fintune.errors import ModelError
from fintune.inference.run_models import find_run_model, is_run_folder
from fintune.pipeline.run_folder import overrides_of
from fintune.util.console import say


def model_of(name: str, *, with_adapter: bool = False) -> tuple[str, list[str]]:
    """The model that is meant: a run's last GGUF file, else its merged folder; any other name as it is.

    Args:
        name: As the user wrote it.
        with_adapter: Whether an adapter was named beside it.

    Returns:
        The name of the model and, for a run, its prompt options as overrides: what it was trained to read.

    Raises:
        ModelError: An adapter in the place of a model, or a run beside an adapter.
        ArtifactError: A run that holds no model, or has lost it.
    """
    folder = Path(name).expanduser()
    if not is_run_folder(folder):
        return name, []
    if with_adapter:
        raise ModelError(f"{name} is a run's folder, which takes no adapter", hint="name the adapter's base model")
    model = find_run_model(folder)
    say(f"{name} is a run's folder; its model is {model}")
    options = overrides_of(folder)
    if 'data.source="chat"' in options:
        say(
            f"{name} was trained on conversations, not on programs: its answers here mean little; "
            f"for free chat: fintune serve {shlex.quote(name)}"
        )
    return str(model), [option for option in options if option.startswith("prompt.")]
