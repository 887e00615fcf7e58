"""Several processes of one training: commands, errors and shares."""

from __future__ import annotations

import json
import shlex
from types import SimpleNamespace

import pytest

from fintune.config import Config
from fintune.errors import DataError, FintuneError, ResourceError
from fintune.pipeline.stages.train import check_training
from fintune.training import distributed


def config(**changes):
    told: dict[str, dict[str, object]] = {"model": {"name": "x"}, "train": {"gpus": 2}}
    for key, value in changes.items():
        section, _, name = key.partition("__")
        told.setdefault(section, {})[name] = value
    return Config.model_validate(told)


def test_require_gpus_names_the_available_number(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ResourceError, match=r"train.gpus is 2, but this machine has 1"):
        check_training(config())


def test_torchrun_command_quotes_paths_with_spaces(tmp_path):
    job_file = tmp_path / "my runs" / "job.json"
    line = distributed.torchrun_command(config(train__machines=3, run__name="a b"), "host7", 29400, job_file)
    words = shlex.split(line)
    assert words[-1] == str(job_file)
    assert words[words.index("--rdzv-id") + 1] == "a b"


def test_torchrun_command_for_another_machine(tmp_path):
    line = distributed.torchrun_command(
        config(train__machines=3, run__name="big"), "host7", 29400, tmp_path / "job.json"
    )
    assert line == (
        "torchrun --nnodes 3 --nproc-per-node 2 --rdzv-backend c10d --rdzv-endpoint host7:29400 --rdzv-id big "
        f"-m fintune.pipeline.train_worker {tmp_path / 'job.json'}"
    )


def failure(exitcode):
    return SimpleNamespace(failures={1: SimpleNamespace(exitcode=exitcode, timestamp=1)})


def test_error_of_ranks_keeps_its_class(tmp_path):
    job_file = tmp_path / "job.json"
    distributed.write_error(job_file, 0, FintuneError("the gradient is not finite at step 3; examples x0, x1"))
    distributed.write_error(job_file, 1, DataError("no token is trained", record_id="x1"))
    told = distributed._error_of_ranks(tmp_path, failure(2), 2)
    assert type(told) is DataError
    assert str(told) == "id x1: no token is trained"
    assert json.loads((tmp_path / "error-0.json").read_text())["kind"] == "FintuneError"


def test_error_of_ranks_names_the_signal(tmp_path):
    told = distributed._error_of_ranks(tmp_path, failure(-9), 4)
    assert isinstance(told, ResourceError)
    assert str(told).startswith("process 1 of 4 was ended by SIGKILL, and the others with it")
    assert (
        type(distributed._error_of_ranks(tmp_path, failure(1), 4)) is RuntimeError
    )  # a bug of ours keeps its traceback


def test_rank_shares_cover_everything_once(monkeypatch):
    seen, lengths = [], set()
    for number in range(3):
        monkeypatch.setattr(distributed._world, "rank", number, raising=False)
        monkeypatch.setattr(distributed._world, "size", 3, raising=False)
        padded = distributed.padded_rank_share(range(7))
        lengths.add(len(padded))
        assert [item for item, counts in padded if counts] == distributed.rank_share(range(7))
        seen += distributed.rank_share(range(7))
    assert sorted(seen) == list(range(7))
    assert lengths == {3}


def test_exchanges_are_free_in_one_process():
    assert (
        distributed.process_rank(),
        distributed.world_size(),
        distributed.is_main(),
        distributed.local_device(),
    ) == (
        0,
        1,
        True,
        "auto",
    )
    distributed.barrier()
    assert distributed.all_reduce_sum([1.5, 2.0]) == [1.5, 2.0]
    assert distributed.all_reduce_min(7) == 7
    assert distributed.rank_share("abc") == ["a", "b", "c"]
