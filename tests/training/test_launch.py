"""Several processes of one training: what is refused, what is said, what each gets."""

from __future__ import annotations

import json
import shlex
from types import SimpleNamespace

import pytest

from fintune.config import Config
from fintune.errors import ConfigError, DataError, FintuneError, ResourceError
from fintune.pipeline.stages.train import check
from fintune.training import launch, ranks


def config(**changes):
    told: dict[str, dict[str, object]] = {"model": {"name": "x"}, "train": {"gpus": 2}}
    for key, value in changes.items():
        section, _, name = key.partition("__")
        told.setdefault(section, {})[name] = value
    return Config.model_validate(told)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"adapter__kind": "full"}, "adapter.kind: full"),
        ({"adapter__init_lora_weights": "pissa"}, "adapter.init_lora_weights: pissa"),
        ({"train__backend": "unsloth"}, "train.backend: unsloth"),
        (
            {"train__sharding": "full", "model__quantization": "nf4"},
            "train.sharding: full with model.quantization: nf4",
        ),
        ({"train__sharding": "full", "train__fused_layers": "always"}, "with train.fused_layers: always"),
        (
            {"train__sharding": "full", "train__select_checkpoint": "best_accuracy", "train__eval_steps": 5},
            "with train.select_checkpoint: best_accuracy",
        ),
    ],
)
def test_what_is_not_proven_is_refused_by_name(changes, named):
    divided = "train__sharding" in changes
    hint = r"train\.sharding to none$" if divided else r"train\.gpus and train\.machines to 1$"
    with pytest.raises(ConfigError, match=f"is not proven on several GPUs: set {hint}") as raised:
        launch.check(config(**changes))
    assert named in str(raised.value)
    if divided:
        launch.check(config(**{**changes, "train__sharding": "none"}))
    # On one GPU each goes, but for the division itself.
    launch.check(config(**{**changes, "train__gpus": 1, "train__sharding": "auto"}))


def test_what_is_proven_passes():
    for kind in ("lora", "dora"):
        launch.check(config(adapter__kind=kind, train__sharding="full"))
        launch.check(config(adapter__kind=kind, model__quantization="nf4"))
        launch.check(config(adapter__kind=kind, train__machines=4, train__fused_layers="always"))


def test_one_gpu_divides_nothing():
    with pytest.raises(ConfigError, match=r"train\.sharding: full divides weights among GPUs: set train\.gpus"):
        launch.check(config(train__gpus=1, train__sharding="full"))


def test_more_gpus_than_there_are_name_how_many(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ResourceError, match=r"train.gpus is 2, but this machine has 1: set train.gpus to 1"):
        check(config())  # before anything is prepared
    launch.check(config())  # fintune plan may speak of GPUs that are elsewhere


def test_paths_with_spaces_stay_one_word_of_the_printed_line(tmp_path):
    order = tmp_path / "my runs" / "order.json"
    line = launch.torchrun_line(config(train__machines=3, run__name="a b"), "host7", 29400, order)
    words = shlex.split(line)
    assert words[-1] == str(order)
    assert words[words.index("--rdzv-id") + 1] == "a b"


def test_another_machine_is_told_the_whole_line(tmp_path):
    line = launch.torchrun_line(config(train__machines=3, run__name="big"), "host7", 29400, tmp_path / "order.json")
    assert line == (
        "torchrun --nnodes 3 --nproc-per-node 2 --rdzv-backend c10d --rdzv-endpoint host7:29400 --rdzv-id big "
        f"-m fintune.pipeline.train_worker {tmp_path / 'order.json'}"
    )


def failure(exitcode):
    return SimpleNamespace(failures={1: SimpleNamespace(exitcode=exitcode, timestamp=1)})


def test_the_error_of_a_process_is_raised_as_it_was(tmp_path):
    order = tmp_path / "order.json"
    launch.write_error(order, 0, FintuneError("the gradient is not finite at step 3; examples x0, x1"))
    launch.write_error(order, 1, DataError("no token is trained", record_id="x1"))
    told = launch._told_by_ranks(tmp_path, failure(2), 2)
    assert type(told) is DataError
    assert str(told) == "id x1: no token is trained"
    assert json.loads((tmp_path / "error-0.json").read_text())["kind"] == "FintuneError"


def test_a_process_that_said_nothing_is_named_with_its_signal(tmp_path):
    told = launch._told_by_ranks(tmp_path, failure(-9), 4)
    assert isinstance(told, ResourceError)
    assert str(told).startswith("process 1 of 4 was ended by SIGKILL, and the others with it: see whether")
    assert type(launch._told_by_ranks(tmp_path, failure(1), 4)) is RuntimeError  # a bug of ours keeps its traceback


def test_parts_cover_everything_once(monkeypatch):
    seen, lengths = [], set()
    for number in range(3):
        monkeypatch.setattr(ranks._here, "number", number, raising=False)
        monkeypatch.setattr(ranks._here, "count", 3, raising=False)
        padded = ranks.padded_share(range(7))
        lengths.add(len(padded))
        assert [item for item, counts in padded if counts] == ranks.share(range(7))
        seen += ranks.share(range(7))
    assert sorted(seen) == list(range(7))
    assert lengths == {3}


def test_alone_everything_is_free():
    assert (ranks.number(), ranks.count(), ranks.leads(), ranks.device()) == (0, 1, True, "auto")
    ranks.wait()
    assert ranks.total([1.5, 2.0]) == [1.5, 2.0]
    assert ranks.least(7) == 7
    assert ranks.share("abc") == ["a", "b", "c"]
