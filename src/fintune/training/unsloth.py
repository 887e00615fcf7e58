"""Unsloth as the trainer, in its own process, because Unsloth changes the libraries that are imported after it.

The process is ``PYTHON -m fintune.training.unsloth_worker JOB``, where PYTHON is ``train.backend_python``. The files
in the stage's folder::

    unsloth/job.json      for the process: {config, model, tokens, eval_tokens, folder, compute}, with absolute paths
    unsloth/error-0.json  from the process, with status 2: an error that the user can fix
    unsloth.json          from the process: {versions, peak_gib}
    metrics.jsonl, checkpoints/, best/, adapter/   as the builtin training writes them

``PYTHON -m fintune.training.unsloth_worker --check`` prints one line of JSON, {versions, problem}. The
problem is empty if Unsloth can train.
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

from fintune.config import Config
from fintune.errors import ConfigError, ResourceError
from fintune.training import distributed
from fintune.util.console import say

WORKER = "fintune.training.unsloth_worker"
VERSIONS_FILE = "unsloth.json"
"""Name of the file in the stage's folder with the versions of the libraries and the peak memory."""
_FOLDER = "unsloth"
_CHECK_SECONDS = 300


def check_environment(config: Config) -> None:
    """Refuse to train where Unsloth cannot work.

    Raises:
        ConfigError: ``train.backend_python`` does not exist.
        ResourceError: There is no CUDA GPU, or Unsloth is missing, or installed libraries are too new or old for it.
    """
    problem = _ask_worker(_python(config))["problem"]
    if not problem:
        return
    hint = (
        "install Unsloth in an environment with versions that it supports, and set train.backend_python to its python"
    )
    if "CUDA" in problem:
        hint = "set train.backend to builtin, which also trains on a CPU"
    raise ResourceError(f"train.backend: unsloth cannot work here: {problem}", hint=hint, option="train.backend")


def train_with_unsloth(config: Config, *, model: Path, prepare: Path, folder: Path, compute: str) -> None:
    """Train in the other process; resumes from the last complete checkpoint in ``folder/checkpoints``.

    Args:
        config: The run. :func:`check_environment` has passed.
        model: Folder of the base model.
        prepare: Folder with ``tokens/train`` and ``tokens/eval``.
        folder: The stage's folder.
        compute: Name of the torch type of matrix products.

    Raises:
        FintuneError: The error that stopped the process.
    """
    job_folder = folder / _FOLDER
    shutil.rmtree(job_folder, ignore_errors=True)
    job_folder.mkdir(parents=True)
    job = {
        "config": config.model_dump(mode="json"),
        "model": str(model.resolve()),
        "tokens": str((prepare / "tokens" / "train").resolve()),
        "eval_tokens": str((prepare / "tokens" / "eval").resolve()),
        "folder": str(folder.resolve()),
        "compute": compute,
    }
    job_file = job_folder.resolve() / "job.json"
    job_file.write_text(json.dumps(job), encoding="utf-8")
    say("train: by Unsloth, in its own process")
    environment = _environment() | {"UNSLOTH_COMPILE_LOCATION": str(job_file.parent / "compiled")}
    try:
        status = _wait([_python(config), "-m", WORKER, str(job_file)], environment)
        if status != 0:
            raise _error_of_worker(job_folder, status)
    finally:
        shutil.rmtree(job_folder, ignore_errors=True)


def read_versions(folder: Path) -> dict[str, Any]:
    """Read what the process recorded for the manifest; an empty dictionary if Unsloth did not train."""
    path = folder / VERSIONS_FILE
    return {"unsloth": json.loads(path.read_text(encoding="utf-8"))} if path.is_file() else {}


def _python(config: Config) -> str:
    python = config.train.backend_python
    if python is not None and not python.is_file():
        raise ConfigError(
            f"train.backend_python: {python} does not exist",
            hint="set it to the python of an environment",
            option="train.backend_python",
        )
    return str(python) if python is not None else sys.executable


def _ask_worker(python: str) -> dict[str, Any]:
    command = [python, "-m", WORKER, "--check"]
    try:
        done = subprocess.run(  # noqa: S603
            command, capture_output=True, text=True, timeout=_CHECK_SECONDS, check=False, env=_environment()
        )
        answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ResourceError(
            f"train.backend_python: {python} does not run ({error})", option="train.backend_python"
        ) from None
    except (ValueError, IndexError):
        last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        hint = "install fintune and its training packages in that environment"
        raise ResourceError(
            f"train.backend_python: {python} cannot run fintune ({last[:200]})",
            hint=hint,
            option="train.backend_python",
        ) from None
    return answer


def _environment() -> dict[str, str]:
    source = str(Path(__file__).resolve().parents[2])
    path = os.environ.get("PYTHONPATH", "")
    # The model is in a folder. Without these variables, Unsloth would report its use and look for copies of the model.
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([source, *([path] if path else [])]),
        "UNSLOTH_DISABLE_STATISTICS": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
    }


def _wait(command: list[str], environment: dict[str, str]) -> int:
    # The process prints to standard error, as this one does. In its own session, it does not get a terminal's Ctrl-C
    # directly but once, from here: a second one would stop it before it has saved a checkpoint.
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


def _error_of_worker(job_folder: Path, status: int) -> Exception:
    path = job_folder / "error-0.json"
    if path.is_file():
        return distributed.read_error(path)
    if status < 0:
        name = signal.Signals(-status).name
        hint = "check whether the machine ran out of memory, and rerun to resume from the last checkpoint"
        return ResourceError(f"Unsloth's process was ended by {name}", hint=hint)
    hint = "read its last lines above, or set train.backend to builtin to train without it"
    return ResourceError(f"Unsloth's process failed with status {status}", hint=hint)
