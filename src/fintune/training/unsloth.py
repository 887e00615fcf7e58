"""Unsloth as the trainer, in its own process, because Unsloth changes the libraries that are imported after it.

The process is ``PYTHON -m fintune.training.unsloth JOB``, where PYTHON is ``train.backend_python``. Unsloth makes the
model and its adapter. Order, masks, loop, log and checkpoints are those of :func:`fintune.training.sft.train_model`.
The files in the stage's folder::

    unsloth/job.json      for the process: {config, model, tokens, eval_tokens, folder, compute}, with absolute paths
    unsloth/error-0.json  from the process, with status 2: an error that the user can fix
    unsloth.json          from the process: {versions, peak_gib}
    metrics.jsonl, checkpoints/, best/, adapter/   as the builtin training writes them

With ``--check`` instead of JOB, the process prints one line of JSON, {versions, problem}. The problem is empty if
Unsloth can train.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from fintune.config import Config
from fintune.errors import ConfigError, FintuneError, ResourceError
from fintune.training import distributed
from fintune.training.memory.model import GIB, LINEAR_LAYERS
from fintune.util.console import say
from fintune.util.memory import advice_on_memory
from fintune.util.sampling import draw_indices

WORKER = "fintune.training.unsloth"
_FOLDER, _VERSIONS_FILE = "unsloth", "unsloth.json"
_CHECK_SECONDS = 300
_LIBRARIES = (
    "unsloth",
    "unsloth_zoo",
    "torch",
    "transformers",
    "trl",
    "peft",
    "datasets",
    "accelerate",
    "bitsandbytes",
)
_EXTRAS = ("", "huggingface", "huggingfacenotorch")
"""Extras under which Unsloth's metadata lists its requirements."""


def check_environment(config: Config) -> None:
    """Refuse to train where Unsloth cannot work.

    Raises:
        ConfigError: ``train.backend_python`` does not exist.
        ResourceError: There is no CUDA GPU, or Unsloth is missing, or installed libraries are too new or old for it.
    """
    python = _python(config)
    try:
        done = subprocess.run(  # noqa: S603
            [python, "-m", WORKER, "--check"],
            capture_output=True, text=True, timeout=_CHECK_SECONDS, check=False, env=_environment(),
        )  # fmt: skip
        problem = json.loads(done.stdout.strip().splitlines()[-1])["problem"]
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ResourceError(
            f"train.backend_python: {python} does not run ({error})", option="train.backend_python"
        ) from None
    except (ValueError, IndexError):
        last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise ResourceError(
            f"train.backend_python: {python} cannot run fintune ({last[:200]})",
            hint="install fintune and its training packages in that environment",
            option="train.backend_python",
        ) from None
    if problem:
        hint = "set train.backend to builtin, which also trains on a CPU"
        if "CUDA" not in problem:
            hint = "install Unsloth in an environment with versions that it supports, and set train.backend_python"
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
    job_folder = folder.resolve() / _FOLDER
    shutil.rmtree(job_folder, ignore_errors=True)
    job_folder.mkdir(parents=True)
    tokens = prepare.resolve() / "tokens"
    paths = {"model": model.resolve(), "tokens": tokens / "train", "eval_tokens": tokens / "eval", "folder": folder}
    job: dict[str, Any] = {name: str(path.resolve()) for name, path in paths.items()}
    job |= {"config": config.model_dump(mode="json"), "compute": compute}
    (job_folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    say("train: by Unsloth, in its own process")
    environment = _environment() | {"UNSLOTH_COMPILE_LOCATION": str(job_folder / "compiled")}
    try:
        status = _wait([_python(config), "-m", WORKER, str(job_folder / "job.json")], environment)
        if status != 0:
            raise _error_of_worker(job_folder, status)
    finally:
        shutil.rmtree(job_folder, ignore_errors=True)


def read_versions(folder: Path) -> dict[str, Any]:
    """Read what the process recorded for the manifest; an empty dictionary if Unsloth did not train."""
    path = folder / _VERSIONS_FILE
    return {"unsloth": json.loads(path.read_text(encoding="utf-8"))} if path.is_file() else {}


def _python(config: Config) -> str:
    python = config.train.backend_python
    if python is not None and not python.is_file():
        raise ConfigError(
            f"train.backend_python: {python} does not exist",
            hint="set it to the python of an environment",
            option="train.backend_python",
        )
    return str(python or sys.executable)


def _environment() -> dict[str, str]:
    paths = (str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", ""))
    # The model is in a folder. Without these variables, Unsloth would report its use and look for copies of the model.
    offline = {"UNSLOTH_DISABLE_STATISTICS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **offline}


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


# -- in the other process


def run_worker() -> None:
    """Check or train; write the error that stopped it for the process that started this one."""
    if sys.argv[1] == "--check":
        installed = _installed_versions()
        sys.stdout.write(json.dumps({"versions": installed, "problem": _environment_problem(installed)}) + "\n")
        return
    job_file = Path(sys.argv[1])
    distributed.exit_with_parent()
    try:
        _run_job(json.loads(job_file.read_text(encoding="utf-8")))
    except FintuneError as error:
        distributed.write_error(job_file, 0, error)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _installed_versions() -> dict[str, str]:
    found = {each.name.replace("-", "_").lower(): each.version for each in metadata.distributions()}
    return {name: found[name] for name in _LIBRARIES if name in found}


def _environment_problem(installed: dict[str, str]) -> str:
    """Return why Unsloth cannot work here; an empty string if it can."""
    from packaging.requirements import Requirement

    if "unsloth" not in installed:
        return "unsloth is not installed"
    unmet: dict[str, str] = {}
    for package in ("unsloth", "unsloth_zoo"):
        for line in (metadata.requires(package) or []) if package in installed else []:
            required = Requirement(line)
            name = required.name.replace("-", "_").lower()
            applies = required.marker is None or any(required.marker.evaluate({"extra": extra}) for extra in _EXTRAS)
            if name in installed and applies and not required.specifier.contains(installed[name], prereleases=True):
                unmet[name] = f"{name} {installed[name]} (it requires {required.specifier})"
    if unmet:
        return f"unsloth {installed['unsloth']} does not support {', '.join(unmet.values())}"
    return "" if _has_cuda() else "there is no CUDA GPU"


def _has_cuda() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def _run_job(job: dict[str, Any]) -> None:
    import unsloth  # noqa: F401, I001 - before the libraries that it changes
    import torch
    from datasets import load_from_disk

    from fintune.models import load as models
    from fintune.training import lora, sft
    from fintune.training.evaluate import Evaluation

    config, folder = Config.model_validate(job["config"]), Path(job["folder"])
    rows, eval_rows = load_from_disk(job["tokens"]), load_from_disk(job["eval_tokens"])
    eval_rows = eval_rows.select(draw_indices(len(eval_rows), config.train.max_eval_samples, config.run.seed))
    # Unsloth recomputes activations by default.
    recomputes = config.train.gradient_checkpointing is not False
    hint = "lower train.per_device_train_batch_size and raise train.gradient_accumulation_steps"
    hint += "" if recomputes else ", or leave train.gradient_checkpointing empty"
    with advice_on_memory(hint, during="training with Unsloth"):
        longest = max(len(ids) for split in (rows, eval_rows) for ids in split["input_ids"])
        model = _load_model(config, job["model"], job["compute"], longest, recomputes=recomputes)
        sft.train_model(
            model,
            models.load_tokenizer(models.fetch(job["model"])),
            rows,
            config.train.model_copy(update={"fused_layers": "never", "gradient_checkpointing": recomputes}),
            compute=job["compute"],
            seed=config.run.seed,
            folder=folder,
            evaluation=Evaluation(eval_rows) if config.train.has_evaluations else None,
        )
    peak = round(torch.cuda.max_memory_allocated() / GIB, 2) if torch.cuda.is_available() else None
    facts = {"versions": _installed_versions(), "peak_gib": peak}
    (folder / _VERSIONS_FILE).write_text(json.dumps(facts) + "\n", encoding="utf-8")
    lora.save_adapter(model, config.model.name, config.model.revision, folder / "adapter", base=Path(job["model"]))


def _load_model(config: Config, folder: str, compute: str, longest: int, *, recomputes: bool) -> Any:
    """Load the base model with a new adapter through Unsloth."""
    import torch
    from transformers import set_seed
    from unsloth import FastLanguageModel

    from fintune.training.batches import WIDTH_MULTIPLE

    set_seed(config.run.seed)
    options = config.adapter
    model, _ = FastLanguageModel.from_pretrained(
        model_name=folder,
        # Unsloth truncates longer inputs but not their labels, and batches are padded to a multiple.
        max_seq_length=max(-(-longest // WIDTH_MULTIPLE) * WIDTH_MULTIPLE, 64),
        dtype=getattr(torch, compute),
        load_in_4bit=config.model.quantization == "nf4",
        use_exact_model_name=True,
        local_files_only=True,
    )
    return FastLanguageModel.get_peft_model(
        model,
        r=options.r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        bias="none",
        target_modules=list(LINEAR_LAYERS if "all-linear" in options.target_modules else options.target_modules),
        use_gradient_checkpointing="unsloth" if recomputes else False,
        use_rslora=options.use_rslora,
        use_dora=options.kind == "dora",
        random_state=config.run.seed,
    )


if __name__ == "__main__":
    run_worker()
