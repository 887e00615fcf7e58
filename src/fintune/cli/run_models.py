"""A run's folder in the place of a model's name, for ``fintune ask`` and ``fintune predict --model``."""

from __future__ import annotations

import shlex
from pathlib import Path

from fintune.cli.commands.serve import gguf_of
from fintune.errors import ArtifactError, ModelError
from fintune.manifest import Slot
from fintune.models.folder import adapter_base_name
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
    if not folder.is_dir() or (folder / "config.json").is_file():
        return name, []
    if (folder / "adapter_config.json").is_file():
        base = adapter_base_name(folder)
        raise ModelError(f"{name} holds an adapter, not a model", hint=f"name its base: {base} --adapter {name}")
    if (folder / "train" / "adapter" / "adapter_config.json").is_file() or Slot(folder, "prepare").manifest():
        return _of_run(name, folder, with_adapter=with_adapter)
    return name, []


def _of_run(name: str, run: Path, *, with_adapter: bool) -> tuple[str, list[str]]:
    if with_adapter:
        raise ModelError(f"{name} is a run's folder, which takes no adapter", hint="name the adapter's base model")
    if Slot(run, "export").manifest() is not None:
        found = gguf_of(run)
    elif (run / "merge" / "config.json").is_file():
        found = run / "merge"
    else:
        adapter = run / "train" / "adapter"
        hint = "fintune run CONFIG makes one"
        if (adapter / "adapter_config.json").is_file():
            hint = f"name the adapter and its base: {adapter_base_name(adapter)} --adapter {adapter}"
        raise ArtifactError(f"{name} holds no merged or exported model", hint=hint)
    say(f"{name} is a run's folder; its model is {found}")
    options = overrides_of(run)
    if 'data.source="chat"' in options:
        say(
            f"{name} was trained on conversations, not on programs: its answers here mean little; "
            f"for free chat: fintune serve {shlex.quote(name)}"
        )
    return str(found), [each for each in options if each.startswith("prompt.")]
