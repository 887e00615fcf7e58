"""Unsloth as the trainer: a process of its own, because Unsloth changes the libraries that are imported after it.

The process is ``PYTHON -m fintune.training.unsloth_worker ORDER``, where PYTHON is ``train.backend_python``. Its
files::

    unsloth/order.json    to it: {config, model, tokens, eval_tokens, folder, compute}; paths are absolute
    unsloth/error-0.json  from it: {kind, message}, with status 2, for what the user can change
    unsloth.json          from it: {versions, peak_gib}
    metrics.jsonl, checkpoints/, best/, adapter/   as this package's own training leaves them

``PYTHON -m fintune.training.unsloth_worker --check`` prints one line of JSON: {versions, obstacle}, obstacle empty
where Unsloth can work.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from fintune import errors
from fintune.config import Config
from fintune.errors import ConfigError, FintuneError, ResourceError
from fintune.util.console import say

CHILD = "fintune.training.unsloth_worker"
FILE = "unsloth.json"
"""In the stage's folder: with which versions it trained, and the memory that it took."""
_FOLDER = "unsloth"
_CHECK_SECONDS = 300


def check(config: Config) -> None:
    """Refuse what this backend cannot do, and where it cannot work.

    Raises:
        ConfigError: An option that it does not have here.
        ResourceError: No CUDA GPU, Unsloth missing, or beside versions that it does not take.
    """
    train, adapter = config.train, config.adapter
    refused = {
        "adapter.kind: full": adapter.kind == "full",
        f"adapter.init_lora_weights: {adapter.init_lora_weights}": adapter.init_lora_weights != "default",
        f"train.objective: {train.objective}": train.objective != "sft",
        "train.select_checkpoint: best_accuracy": train.select_checkpoint == "best_accuracy",
        "train.fused_layers: always": train.fused_layers == "always",
        f"train.gpus: {train.gpus}": train.gpus * train.machines > 1,
        "publish.each_epoch": config.publish.each_epoch,
        "model.trust_remote_code": config.model.trust_remote_code,
    }
    for what, here in refused.items():
        if here:
            raise ConfigError(
                f"train.backend: unsloth is not proven with {what}",
                hint="set train.backend to builtin",
                option="train.backend",
            )
    found = _ask(_python(config))
    if found["obstacle"]:
        raise ResourceError(
            f"train.backend: unsloth cannot work: {found['obstacle']}",
            hint=_remedy(found["obstacle"]),
            option="train.backend",
        )


def train(config: Config, *, model: Path, prepare: Path, folder: Path, compute: str) -> None:
    """Train in the other process; it goes on from the last complete checkpoint in ``folder/checkpoints``.

    Args:
        config: The run; :func:`check` has passed.
        model: Folder of the base model.
        prepare: Folder with ``tokens/train`` and ``tokens/eval``.
        folder: The stage's.
        compute: Name of the type in which products are taken.

    Raises:
        FintuneError: What stopped the process.
    """
    place = folder / _FOLDER
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    order = {
        "config": config.model_dump(mode="json"),
        "model": str(model.resolve()),
        "tokens": str((prepare / "tokens" / "train").resolve()),
        "eval_tokens": str((prepare / "tokens" / "eval").resolve()),
        "folder": str(folder.resolve()),
        "compute": compute,
    }
    path = place / "order.json"
    path.write_text(json.dumps(order), encoding="utf-8")
    say("train: by Unsloth, in a process of its own")
    try:
        status = _wait([_python(config), "-m", CHILD, str(path.resolve())], _environment(place))
        if status != 0:
            raise _told(place, status)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def read(folder: Path) -> dict[str, Any]:
    """What the process left about itself, for the manifest; nothing where this package's own training ran."""
    path = folder / FILE
    return {"unsloth": json.loads(path.read_text(encoding="utf-8"))} if path.is_file() else {}


def _python(config: Config) -> str:
    given = config.train.backend_python
    if given is not None and not given.is_file():
        raise ConfigError(
            f"train.backend_python: there is no {given}",
            hint="name the python of an environment",
            option="train.backend_python",
        )
    return str(given) if given is not None else sys.executable


def _ask(python: str) -> dict[str, Any]:
    command = [python, "-m", CHILD, "--check"]
    try:
        done = subprocess.run(  # noqa: S603
            command, capture_output=True, text=True, timeout=_CHECK_SECONDS, check=False, env=_environment(None)
        )
        found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ResourceError(
            f"train.backend_python: {python} does not run ({error})", option="train.backend_python"
        ) from None
    except (ValueError, IndexError):
        last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        hint = "fintune and its training packages must be installed there, too"
        raise ResourceError(
            f"train.backend_python: {python} cannot run fintune ({last[:200]})",
            hint=hint,
            option="train.backend_python",
        ) from None
    return found


def _remedy(obstacle: str) -> str:
    if "CUDA" in obstacle:
        return "set train.backend to builtin, which trains on a CPU, too"
    if "not installed" in obstacle:
        return "pip install unsloth, or name the python of an environment that has it in train.backend_python"
    return "give Unsloth an environment of its own and name its python in train.backend_python"


def _environment(place: Path | None) -> dict[str, str]:
    source = str(Path(__file__).resolve().parents[2])
    path = os.environ.get("PYTHONPATH", "")
    found = {**os.environ, "PYTHONPATH": os.pathsep.join([source, *([path] if path else [])])}
    # Model and tokenizer lie in a folder; Unsloth would count its users and look for other copies of the model.
    found |= {"UNSLOTH_DISABLE_STATISTICS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    if place is not None:
        found["UNSLOTH_COMPILE_LOCATION"] = str(place.resolve() / "compiled")  # else it writes where the user stands
    return found


def _wait(command: list[str], environment: dict[str, str]) -> int:
    # Its words go where this process's own notes go. It has a session of its own, so that a terminal's Ctrl-C reaches
    # it once, from here: a second one would stop it before it has kept its step.
    with subprocess.Popen(command, stdout=2, env=environment, start_new_session=True) as process:  # noqa: S603
        try:
            try:
                return process.wait()
            except KeyboardInterrupt:
                process.send_signal(signal.SIGINT)
                process.wait()
                raise
        except BaseException:
            process.terminate()
            process.wait()
            raise


def _told(place: Path, status: int) -> Exception:
    path = place / "error-0.json"
    if path.is_file():
        told = json.loads(path.read_text(encoding="utf-8"))
        kind = getattr(errors, told["kind"], FintuneError)
        found: Exception = kind(told["message"])
        return found
    if status < 0:
        name = signal.Signals(-status).name
        hint = "see whether the machine ran out of memory; the same command goes on from the last checkpoint"
        return ResourceError(f"Unsloth's process was ended by {name}", hint=hint)
    hint = "its last lines stand above; train.backend: builtin trains without it"
    return ResourceError(f"Unsloth's process failed with status {status}", hint=hint)
