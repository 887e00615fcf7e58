from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from fintune.config import Config
from fintune.errors import ResourceError
from fintune.pipeline.stages.train import train
from fintune.training import callbacks, metrics
from fintune.training.callbacks import make_reporters
from support.prepared_rows import prepared

pytest.importorskip("torch")


def config(model, *report_to) -> Config:
    return Config.model_validate(
        {
            "model": {"name": str(model)},
            "adapter": {"r": 4},
            "run": {"name": "mine"},
            "train": {
                "dtype": "float32",
                "per_device_train_batch_size": 4,
                "max_steps": 4,
                "save_steps": 2,
                "eval_steps": 2,
                "report_to": report_to,
            },
        }
    )


@pytest.fixture
def inputs(tmp_path, tiny_model):
    (tmp_path / "train").mkdir()
    return {"prepare": prepared(tmp_path / "prepare", tiny_model)}


def written(folder, key):
    return {line["step"]: line[key] for line in metrics.read(folder / "metrics.jsonl") if key in line}


def shown(folder, name):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(name)}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_shows_the_metrics(tiny_model, inputs, tmp_path):
    train(config(tiny_model, "tensorboard"), inputs, tmp_path / "train")
    for name, key in (("train/loss", "loss"), ("eval/loss", "eval_loss"), ("train/learning_rate", "learning_rate")):
        expected = written(tmp_path / "train", key)
        assert shown(tmp_path / "train", name) == pytest.approx(expected, rel=1e-6)
        assert expected


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_replaces_repeated_steps(tmp_path):
    logs = {"loss": 1.0}
    state = SimpleNamespace(global_step=0)
    for done, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        (callback,) = make_reporters(("tensorboard",), folder=tmp_path, run_name="", options={}, done=done)
        for state.global_step in steps:
            logs["loss"] = float(10 * done + state.global_step)
            callback.on_log(None, state, None, logs)
        callback.on_train_end(None, state, None)
    assert shown(tmp_path, "train/loss") == {1: 1, 2: 2, 3: 23, 4: 24}


def test_missing_reporter_is_refused_first(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(callbacks.importlib.util, "find_spec", lambda name: None if name == "wandb" else object())
    with pytest.raises(ResourceError, match=r"train.report_to: wandb is not installed: pip install wandb"):
        train(config(tiny_model, "wandb"), {"prepare": tmp_path / "none"}, tmp_path)


class FakeWandb:
    """As much of wandb as is used."""

    class Error(Exception):
        pass

    def __init__(self, refuse: str = "") -> None:
        self.refuse, self.begun, self.logged, self.finished = refuse, [], {}, 0

    def Settings(self, **settings):  # noqa: N802
        return settings

    def init(self, **options):
        if self.refuse:
            raise self.Error(self.refuse)
        self.begun.append(options)
        return self

    def log(self, figures, step):
        self.logged.setdefault(step, {}).update(figures)

    def finish(self):
        self.finished += 1


def use(monkeypatch, fake):
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(callbacks, "check_reporters", lambda _names: None)


def test_wandb_gets_options_figures_and_resumed_id(tiny_model, inputs, tmp_path, monkeypatch):
    fake = FakeWandb()
    use(monkeypatch, fake)
    train(config(tiny_model, "wandb"), inputs, tmp_path / "train")
    assert {step: found["train/loss"] for step, found in fake.logged.items()} == written(tmp_path / "train", "loss")
    assert fake.logged[2]["eval/loss"] == written(tmp_path / "train", "eval_loss")[2]
    (begun,) = fake.begun
    assert (begun["name"], begun["project"], begun["resume"]) == ("mine", "fintune", "allow")
    assert begun["config"]["train"]["max_steps"] == 4
    assert fake.finished == 1
    make_reporters(("wandb",), folder=tmp_path / "train", run_name="mine", options={}, done=2)
    assert fake.begun[1]["id"] == begun["id"]


def test_wandb_error_is_one_line_with_a_hint(tiny_model, inputs, tmp_path, monkeypatch):
    use(monkeypatch, FakeWandb(refuse="api_key not configured (no-tty)\nmore"))
    with pytest.raises(ResourceError, match=r"wandb does not start \(api_key not configured \(no-tty\)\): run `wandb"):
        train(config(tiny_model, "wandb"), inputs, tmp_path / "train")


def test_wandb_itself_works_offline(tiny_model, inputs, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is an optional extra")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    train(config(tiny_model, "wandb"), inputs, tmp_path / "train")
    runs = list((tmp_path / "train" / "wandb").glob("offline-run-*"))
    assert len(runs) == 1
    assert (tmp_path / "train" / "wandb_id").read_text() in runs[0].name
    assert next(iter(runs[0].glob("*.wandb"))).stat().st_size > 0
    assert sorted(written(tmp_path / "train", "eval_loss")) == [2, 4]
