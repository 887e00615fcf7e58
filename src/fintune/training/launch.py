"""The same training in several processes, a GPU each: started by torchrun's agent, watched, and ended together."""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fintune import errors
from fintune.config import Config
from fintune.errors import ConfigError, FintuneError, ResourceError
from fintune.util.console import say
from fintune.util.signals import Terminated

FOLDER = "ranks"
"""Below that of ``train`` while it works: what the processes are told, and what stopped one."""

ENTRY = "fintune.pipeline.train_worker"
_PORT = 29400
_ORDER = "order.json"


def check(config: Config) -> None:
    """Refuse by name what is not known to give the losses of one GPU.

    Raises:
        ConfigError: A combination with ``train.gpus`` or ``train.machines``.
    """
    train = config.train
    if train.gpus * train.machines == 1:
        if train.sharding == "full":
            raise ConfigError(
                "train.sharding: full divides weights among GPUs",
                hint="set train.gpus to 2 or more",
                option="train.sharding",
            )
        return
    sharded = train.sharding == "full"
    refused = {
        "adapter.kind: full": config.adapter.kind == "full",
        f"adapter.init_lora_weights: {config.adapter.init_lora_weights}": config.adapter.init_lora_weights != "default",
        f"train.objective: {train.objective}": train.objective != "sft",
        f"train.backend: {train.backend}": train.backend != "builtin",
        "train.sharding: full with model.quantization: nf4": sharded and config.model.quantization == "nf4",
        "train.sharding: full with train.fused_layers: always": sharded and train.fused_layers == "always",
        "train.sharding: full with train.select_checkpoint: best_accuracy": sharded
        and train.select_checkpoint == "best_accuracy",
    }
    for what, here in refused.items():
        if here:
            hint = "train.sharding to none" if "train.sharding" in what else "train.gpus and train.machines to 1"
            raise ConfigError(
                f"{what} is not proven on several GPUs", hint=f"set {hint}", option=what.partition(":")[0]
            )


def run(config: Config, prepare: Path, folder: Path) -> None:
    """Train in ``train.gpus`` processes on this machine, and wait for as many on each of the other machines.

    Args:
        config: The run.
        prepare: Folder of the prepared data; on several machines a path that all of them see.
        folder: The stage's; likewise.

    Raises:
        FintuneError: What stopped a process; all others are ended.
    """
    import torch

    if not torch.cuda.is_available():
        say(f"no CUDA GPU: {config.train.gpus} processes share this processor, which is of use for a trial only")
    place = folder / FOLDER
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    order = place / _ORDER
    told = {"config": config.model_dump(mode="json"), "prepare": str(prepare), "folder": str(folder)}
    order.write_text(json.dumps(told), encoding="utf-8")
    try:
        _launch(config, order.resolve())
    finally:
        shutil.rmtree(place, ignore_errors=True)


def require_gpus(wanted: int) -> None:
    """Refuse more processes than this machine has GPUs; where it has none, they share the processor.

    Raises:
        ResourceError: Fewer GPUs than asked for.
    """
    if wanted == 1:
        return
    import torch  # takes seconds

    found = torch.cuda.device_count()
    if 0 < found < wanted:
        raise ResourceError(
            f"train.gpus is {wanted}, but this machine has {found}",
            hint=f"set train.gpus to {found}",
            option="train.gpus",
        )


def _launch(config: Config, order: Path) -> None:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    train = config.train
    host = "localhost" if train.machines == 1 else socket.getfqdn()
    port = 0 if train.machines == 1 else _PORT
    settings = LaunchConfig(
        min_nodes=train.machines,
        max_nodes=train.machines,
        nproc_per_node=train.gpus,
        run_id=config.run.name or "fintune",
        rdzv_backend="c10d",
        rdzv_endpoint=f"{host}:{port}",
        rdzv_configs={"is_host": True, "join_timeout": 24 * 3600},
        max_restarts=0,
        monitor_interval=0.2,
    )
    what = f"{train.gpus} processes" + (f" on each of {train.machines} machines" if train.machines > 1 else "")
    examples = train.per_device_train_batch_size * train.gradient_accumulation_steps * train.gpus * train.machines
    say(f"train: {what}, {examples} examples a step")
    if train.machines > 1:
        say(f"run this on each of the {train.machines - 1} other machines: {torchrun_line(config, host, port, order)}")
    # The agent tells of a dead process in forty lines; here it becomes one.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    logging.getLogger("torch.distributed.launcher").setLevel(logging.CRITICAL)
    try:
        with _signals_given_back():
            elastic_launch(settings, sys.executable)("-m", ENTRY, str(order))
    except ChildFailedError as error:
        raise _told_by_ranks(order.parent, error, train.gpus * train.machines) from None
    except SignalException as error:
        raise (Terminated if error.sigval == signal.SIGTERM else KeyboardInterrupt) from error


@contextmanager
def _signals_given_back() -> Iterator[None]:
    """The agent takes these for itself, and keeps them: Ctrl-C in a stage behind the training would be a traceback."""
    taken = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    before = {each: signal.getsignal(each) for each in taken}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for each, handler in before.items():
                signal.signal(each, handler)


def torchrun_line(config: Config, host: str, port: int, order: Path) -> str:
    """What starts the processes of another machine, which has to see the same paths."""
    train, name = config.train, shlex.quote(config.run.name or "fintune")
    return (
        f"torchrun --nnodes {train.machines} --nproc-per-node {train.gpus} --rdzv-backend c10d "
        f"--rdzv-endpoint {host}:{port} --rdzv-id {name} -m {ENTRY} {shlex.quote(str(order))}"
    )


def read_order(path: Path) -> tuple[Config, Path, Path]:
    """What :func:`run` wrote for its processes: the run, the prepared data, the stage's folder."""
    told = json.loads(path.read_text(encoding="utf-8"))
    return Config.model_validate(told["config"]), Path(told["prepare"]), Path(told["folder"])


def write_error(order: Path, number: int, error: FintuneError) -> None:
    """Leave what stopped this process for the one that started it."""
    told = {"kind": type(error).__name__, "message": str(error)}
    path = order.parent / f"error-{number}.json"
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(told), encoding="utf-8")
    beside.replace(path)


def _told_by_ranks(place: Path, failure: Any, num_ranks: int) -> Exception:
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(place.glob("error-*.json"))]
    if found:
        # A loss that is not finite makes every process's gradient so; the one that knows its examples is heard.
        told = min(found, key=lambda each: each["message"].startswith("the gradient"))
        kind = getattr(errors, told["kind"], FintuneError)
        failed: Exception = kind(told["message"])
        return failed
    number, first = min(failure.failures.items(), key=lambda item: item[1].timestamp)
    if first.exitcode >= 0:
        return RuntimeError(f"process {number} of {num_ranks} failed with status {first.exitcode}; see its traceback")
    name = signal.Signals(-first.exitcode).name
    return ResourceError(
        f"process {number} of {num_ranks} was ended by {name}, and the others with it",
        hint="see whether the machine ran out of memory; the same command goes on from the last checkpoint",
    )


def end_with_parent(interval_seconds: float = 1.0) -> None:
    """End this process when the one that started it is gone, however it went."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(interval_seconds)
        os._exit(1)

    _in_background(watch)


def _in_background(target: Callable[[], None]) -> None:
    threading.Thread(target=target, daemon=True).start()
