"""One training in several processes, a GPU each: the processes, what they exchange, and divided weights.

The command that was typed starts the processes through torchrun's agent (:func:`launch`) and waits for them. In a
process that never called :func:`init_process_group`, the world has one rank and all exchanges are free.
"""

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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fintune import errors
from fintune.config import Config, TrainOptions
from fintune.errors import ConfigError, FintuneError, ResourceError
from fintune.util.console import say
from fintune.util.files import write_atomically
from fintune.util.signals import Terminated

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import Trainer

T = TypeVar("T")

RANKS_FOLDER = "ranks"
"""Folder below that of ``train``, during training: the job for the processes, and the error that stopped one."""
WORKER = "fintune.pipeline.train_worker"
_PORT = 29400
_BUCKET_NUMBERS = 2**26
_TIMEOUT_HOURS = 3


# -- the processes


class _World:
    """This process's rank and the number of processes."""

    rank, size = 0, 1


_world = _World()


def init_process_group() -> None:
    """Join the other processes that torchrun started; its environment variables name the rank."""
    import datetime

    import torch
    import torch.distributed as dist

    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else None
    if device is not None:
        torch.cuda.set_device(device)
    # An evaluation by generation, or a first step that compiles, keeps the other processes waiting for long.
    timeout = datetime.timedelta(hours=_TIMEOUT_HOURS)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timeout, device_id=device)
    _world.rank, _world.size = dist.get_rank(), dist.get_world_size()


def destroy_process_group() -> None:
    """Leave the other processes."""
    import torch.distributed as dist

    dist.destroy_process_group()
    _world.rank, _world.size = 0, 1


def process_rank() -> int:
    """Return the rank of this process, from 0."""
    return _world.rank


def world_size() -> int:
    """Return the number of processes."""
    return _world.size


def is_main() -> bool:
    """Whether this process writes files and prints."""
    return _world.rank == 0


def local_device() -> str:
    """Return the device for :func:`fintune.models.load.load_model` in this process."""
    import torch

    return f"cuda:{torch.cuda.current_device()}" if _world.size > 1 and torch.cuda.is_available() else "auto"


def local_threads() -> int:
    """Return the number of CPU threads for this process: its share of the machine's cores."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if _world.size > 1 else 1
    return max(1, (os.cpu_count() or 1) // processes)


# -- exchanges


def barrier() -> None:
    """Wait until all processes arrive here."""
    if _world.size > 1:
        import torch.distributed as dist

        dist.barrier()


def all_reduce_sum(values: Sequence[float]) -> list[float]:
    """Add the values of all processes, position by position."""
    return _all_reduce(values, "SUM")


def all_reduce_min(value: int) -> int:
    """Return the smallest of all processes' values; a number of bytes is exact."""
    return int(_all_reduce([value], "MIN")[0])


def _all_reduce(values: Sequence[float], operation: str) -> list[float]:
    if _world.size == 1:
        return list(values)
    import torch
    import torch.distributed as dist

    reduced = torch.tensor(list(values), dtype=torch.float64, device="cuda" if torch.cuda.is_available() else "cpu")
    dist.all_reduce(reduced, op=getattr(dist.ReduceOp, operation))
    return [float(value) for value in reduced]


def rank_share(items: Sequence[T]) -> list[T]:
    """Return this process's share of items that all processes have."""
    return list(items[_world.rank :: _world.size])


def padded_rank_share(items: Sequence[T]) -> list[tuple[T, bool]]:
    """Return a share of the same length in every process, each item with True, or False if it only pads the share."""
    own = [(item, True) for item in rank_share(items)]
    return own + [(items[0], False)] * (-(-len(items) // _world.size) - len(own))


def all_reduce_mean(gradients: Sequence[torch.Tensor]) -> None:
    """Replace gradients by their mean over all processes, in messages of limited size and one type."""
    import torch
    import torch.distributed as dist

    bucket: list[torch.Tensor] = []
    for gradient, following in zip(gradients, [*gradients[1:], None], strict=True):
        bucket.append(gradient)
        num_bucket = sum(tensor.numel() for tensor in bucket)
        fits = following is not None and num_bucket + following.numel() <= _BUCKET_NUMBERS
        if following is not None and fits and following.dtype == gradient.dtype:
            continue
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
        dist.all_reduce(flat)
        flat /= _world.size
        for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
            tensor.copy_(part.view_as(tensor))
        bucket = []


def average_gradients(trainer: Trainer) -> None:
    """Let the trainers of all processes take their steps together.

    The trained part is a small adapter that every process has as a whole. Its gradients are averaged by one message a
    step, and the model needs no wrapper that would hide it from the fused layers.
    """
    if _world.size == 1:
        return
    trained = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    clip = trainer._clip_grad_norm

    def average_and_clip(model: object) -> object:
        all_reduce_mean([weight.grad for weight in trained if weight.grad is not None])
        return clip(model)

    trainer._clip_grad_norm = average_and_clip
    prepare = trainer.accelerator.prepare_model
    # With autocast, as on one GPU, but without DDP.
    trainer.accelerator.prepare_model = lambda model, **_: prepare(model, device_placement=False, evaluation_mode=True)


# -- frozen weights divided among the GPUs (FSDP2)


def is_sharded(options: TrainOptions) -> bool:
    """Whether this training divides the frozen weights among several processes."""
    return options.sharding == "full" and _world.size > 1


def shard_frozen_weights(model: PeftModel) -> int:
    """Divide the frozen weights among the processes. The weights of a layer are gathered while it computes.

    Only the base is divided. Every process keeps whole adapters, so optimizer, checkpoints and the saved adapter are
    those of a training on one GPU. The model is whole at first. Its shard ends up on this process's GPU.

    Returns:
        Number of decoder layers that were divided.

    Raises:
        ConfigError: The layers are not at ``model.layers``, where decoders of transformers have them.
    """
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    layers = getattr(getattr(model.get_base_model(), "model", None), "layers", None)
    if layers is None or len(layers) == 0:
        raise ConfigError(
            f"train.sharding: full cannot find the layers of {type(model.get_base_model()).__name__}",
            hint="set train.sharding to none",
            option="train.sharding",
        )
    cuda = torch.cuda.is_available()
    mesh = init_device_mesh("cuda" if cuda else "cpu", (_world.size,))
    trained = {weight for weight in model.parameters() if weight.requires_grad}
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    for weight in trained:  # FSDP moves only the weights that it divides
        weight.data = weight.data.to(device)
    for layer in layers:
        fully_shard(layer, mesh=mesh, ignored_params=trained)
    # Otherwise the weights outside the layers would stay gathered, and only the process that saves would free them.
    fully_shard(model, mesh=mesh, ignored_params=trained, reshard_after_forward=True)
    return len(layers)


# -- starting the processes


def require_gpus(number: int) -> None:
    """Refuse more processes than this machine has GPUs. If it has none, the processes share the CPU.

    Raises:
        ResourceError: The machine has fewer GPUs.
    """
    if number == 1:
        return
    import torch  # takes seconds

    available = torch.cuda.device_count()
    if 0 < available < number:
        raise ResourceError(
            f"train.gpus is {number}, but this machine has {available}",
            hint=f"set train.gpus to {available}",
            option="train.gpus",
        )


def launch(config: Config, prepare: Path, folder: Path) -> None:
    """Train in ``train.gpus`` processes on this machine, and wait for as many on each of the other machines.

    All machines have to see the folders of the prepared data and of the stage.

    Raises:
        FintuneError: The error that stopped a process; the others are ended too.
    """
    import torch

    if not torch.cuda.is_available():
        say(f"no CUDA GPU: {config.train.gpus} processes share this CPU, which is useful for a trial only")
    ranks_folder = folder / RANKS_FOLDER
    shutil.rmtree(ranks_folder, ignore_errors=True)
    ranks_folder.mkdir(parents=True)
    job_file = (ranks_folder / "job.json").resolve()
    job = {"config": config.model_dump(mode="json"), "prepare": str(prepare), "folder": str(folder)}
    job_file.write_text(json.dumps(job), encoding="utf-8")
    try:
        _run_agent(config, job_file)
    finally:
        shutil.rmtree(ranks_folder, ignore_errors=True)


def read_job(path: Path) -> tuple[Config, Path, Path]:
    """Read what :func:`launch` wrote for its processes: the run, the prepared data, the stage's folder."""
    job = json.loads(path.read_text(encoding="utf-8"))
    return Config.model_validate(job["config"]), Path(job["prepare"]), Path(job["folder"])


def _run_agent(config: Config, job_file: Path) -> None:
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
    processes = f"{train.gpus} processes" + (f" on each of {train.machines} machines" if train.machines > 1 else "")
    examples = train.per_device_train_batch_size * train.gradient_accumulation_steps * train.gpus * train.machines
    say(f"train: {processes}, {examples} examples a step")
    if train.machines > 1:
        command = torchrun_command(config, host, port, job_file)
        say(f"run this on each of the {train.machines - 1} other machines: {command}")
    # The agent reports a dead process in forty lines; _error_of_ranks makes one line of it.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    logging.getLogger("torch.distributed.launcher").setLevel(logging.CRITICAL)
    try:
        with _restored_signal_handlers():
            elastic_launch(settings, sys.executable)("-m", WORKER, str(job_file))
    except ChildFailedError as error:
        raise _error_of_ranks(job_file.parent, error, train.gpus * train.machines) from None
    except SignalException as error:
        raise (Terminated if error.sigval == signal.SIGTERM else KeyboardInterrupt) from error


@contextmanager
def _restored_signal_handlers() -> Iterator[None]:
    """The agent sets handlers and leaves them: Ctrl-C in a stage after the training would print a traceback."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    handlers = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                signal.signal(number, handler)


def torchrun_command(config: Config, host: str, port: int, job_file: Path) -> str:
    """Return the command that starts the processes of another machine, which has to see the same paths."""
    train, name = config.train, shlex.quote(config.run.name or "fintune")
    return (
        f"torchrun --nnodes {train.machines} --nproc-per-node {train.gpus} --rdzv-backend c10d "
        f"--rdzv-endpoint {host}:{port} --rdzv-id {name} -m {WORKER} {shlex.quote(str(job_file))}"
    )


def write_error(job_file: Path, rank: int, error: FintuneError) -> None:
    """Write the error that stopped this process for the process that started it."""
    record = {"kind": type(error).__name__, "message": str(error)}
    write_atomically(job_file.parent / f"error-{rank}.json", json.dumps(record))


def read_error(path: Path) -> FintuneError:
    """Read an error that :func:`write_error` wrote."""
    record = json.loads(path.read_text(encoding="utf-8"))
    error: FintuneError = getattr(errors, record["kind"], FintuneError)(record["message"])
    return error


def _error_of_ranks(ranks_folder: Path, failure: Any, num_ranks: int) -> Exception:
    records = [read_error(path) for path in sorted(ranks_folder.glob("error-*.json"))]
    if records:
        # A loss that is not finite spoils the gradient of every process. The process with the loss names the examples.
        return min(records, key=lambda error: str(error).startswith("the gradient"))
    rank, first = min(failure.failures.items(), key=lambda item: item[1].timestamp)
    if first.exitcode >= 0:
        return RuntimeError(f"process {rank} of {num_ranks} failed with status {first.exitcode}; see its traceback")
    name = signal.Signals(-first.exitcode).name
    return ResourceError(
        f"process {rank} of {num_ranks} was ended by {name}, and the others with it",
        hint="check whether the machine ran out of memory, and rerun to resume from the last checkpoint",
    )


def exit_with_parent(interval_seconds: float = 1.0) -> None:
    """End this process when the process that started it is gone, whatever ended it."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(interval_seconds)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
