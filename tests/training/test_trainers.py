"""The libraries' arguments, as this package sets them."""

from __future__ import annotations

import pytest
import torch
import trl

from fintune.config import TrainOptions
from fintune.training.trainers import make_arguments
from fintune.util.console import quiet_libraries


@pytest.mark.parametrize("objective", ["sft", "dpo", "kto"])
def test_one_process_uses_one_gpu(objective, tmp_path, monkeypatch):
    class SeesTwo(trl.SFTConfig):
        def __post_init__(self):
            super().__post_init__()
            self._n_gpu = 2  # what transformers finds on a machine with two, without torchrun

    monkeypatch.setattr(trl, "SFTConfig", SeesTwo)
    options = TrainOptions(objective=objective, per_device_train_batch_size=4)
    with quiet_libraries():  # as train has it
        args = make_arguments(torch.nn.Linear(2, 2), options, 3, "float32", 0, tmp_path)
    assert args.n_gpu == 1  # Trainer wraps its model in nn.DataParallel above that
    assert args.train_batch_size == 4
