"""The processes of one training, a GPU each: who this one is, and what they tell each other.

A process that :func:`join` was not called in is alone, and everything here is then free.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch
    from transformers import Trainer

T = TypeVar("T")

_BUCKET_NUMBERS = 2**26
_HOURS_UNTIL_HUNG = 3


class _Place:
    number, count = 0, 1


_here = _Place()


def join() -> None:
    """Meet the others that torchrun started; its environment says who this is."""
    import datetime

    import torch
    import torch.distributed as dist

    cuda = torch.cuda.is_available()
    place = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else None
    if place is not None:
        torch.cuda.set_device(place)
    # An evaluation by generation, or a first step that compiles, keeps the others waiting for long.
    patience = datetime.timedelta(hours=_HOURS_UNTIL_HUNG)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=patience, device_id=place)
    _here.number, _here.count = dist.get_rank(), dist.get_world_size()


def leave() -> None:
    """Part from the others."""
    import torch.distributed as dist

    dist.destroy_process_group()
    _here.number, _here.count = 0, 1


def number() -> int:
    """Of this process, from 0."""
    return _here.number


def count() -> int:
    """Of processes."""
    return _here.count


def leads() -> bool:
    """Whether this process is the one that writes and speaks."""
    return _here.number == 0


def device() -> str:
    """Where this process loads its model, for :func:`fintune.models.load.load_model`."""
    import torch

    return f"cuda:{torch.cuda.current_device()}" if _here.count > 1 and torch.cuda.is_available() else "auto"


def threads() -> int:
    """CPU threads for this process: its part of the machine's."""
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if _here.count > 1 else 1
    return max(1, (os.cpu_count() or 1) // beside)


def wait() -> None:
    """Until all are here."""
    if _here.count > 1:
        import torch.distributed as dist

        dist.barrier()


def total(values: Sequence[float]) -> list[float]:
    """The values of all processes, added up one by one."""
    if _here.count == 1:
        return list(values)
    import torch
    import torch.distributed as dist

    place = "cuda" if torch.cuda.is_available() else "cpu"
    joined = torch.tensor(list(values), dtype=torch.float64, device=place)
    dist.all_reduce(joined)
    return [float(value) for value in joined]


def least(value: int) -> int:
    """The smallest of all processes' values."""
    if _here.count == 1:
        return value
    import torch
    import torch.distributed as dist

    place = "cuda" if torch.cuda.is_available() else "cpu"
    joined = torch.tensor([value], dtype=torch.int64, device=place)
    dist.all_reduce(joined, op=dist.ReduceOp.MIN)
    return int(joined)


def share(items: Sequence[T]) -> list[T]:
    """This process's part of what all have."""
    return list(items[_here.number :: _here.count])


def padded_share(items: Sequence[T]) -> list[tuple[T, bool]]:
    """As :func:`share`, but of the same length everywhere; False stands beside what is there for that only."""
    own = [(item, True) for item in share(items)]
    return own + [(items[0], False)] * (-(-len(items) // _here.count) - len(own))


def average(gradients: Sequence[torch.Tensor]) -> None:
    """Replace gradients by their mean over all processes, in messages of some size."""
    import torch
    import torch.distributed as dist

    bucket: list[torch.Tensor] = []

    def send() -> None:
        if not bucket:
            return
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
        dist.all_reduce(flat)
        flat /= _here.count
        for gradient, part in zip(bucket, flat.split([each.numel() for each in bucket]), strict=True):
            gradient.copy_(part.view_as(gradient))
        bucket.clear()

    for gradient in gradients:
        full = sum(each.numel() for each in bucket) + gradient.numel() > _BUCKET_NUMBERS
        if full or (bucket and gradient.dtype != bucket[0].dtype):
            send()
        bucket.append(gradient)
    send()


def train_together(trainer: Trainer) -> None:
    """Let a trainer's processes take their steps together.

    What is trained is small, an adapter that every process has as a whole; so its gradients are averaged by one message
    a step, and the model needs no wrapper that would hide it from the written-out layers.
    """
    if _here.count == 1:
        return
    trained = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    clip = trainer._clip_grad_norm

    def average_and_clip(model: object) -> object:
        average([weight.grad for weight in trained if weight.grad is not None])
        return clip(model)

    trainer._clip_grad_norm = average_and_clip
    prepare = trainer.accelerator.prepare_model
    # With autocast, as on one GPU, but without DDP.
    trainer.accelerator.prepare_model = lambda model, **_: prepare(model, device_placement=False, evaluation_mode=True)
