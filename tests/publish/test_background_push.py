"""Pushes in the background of training: no error of the hub stops training."""

from __future__ import annotations

import importlib
import json
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from fintune.config import Config
from fintune.errors import ConfigError
from fintune.publish import push as module
from fintune.publish.push import BackgroundPush, EpochPushes, PushTarget
from support.model_hub import LIBRARY_WARNS, TOKEN, ModelHub, Repository, connected
from support.paths import ROOT
from support.prepared_rows import prepared

torch = pytest.importorskip("torch")
pytestmark = [
    LIBRARY_WARNS,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
SCRIPTS = ROOT / "scripts"
ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}


@pytest.fixture
def hub(monkeypatch) -> Iterator[ModelHub]:
    with connected(monkeypatch) as running:
        yield running


@pytest.fixture
def push_class(monkeypatch) -> type:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("save_to_HF").PushToHubEachEpoch


def train(tiny_model: Path, folder: Path, callback: object, epochs: int = 2, **more: Any) -> Any:
    """Two steps an epoch by transformers' own Trainer, which is given back."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_model),
        LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear"),
    )
    ids = list(range(5, 25))
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **{"save_strategy": "no", **more},
    )
    rows = [{"input_ids": ids, "labels": ids}] * 4
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:1])
    trainer.add_callback(callback)
    trainer.train()
    return trainer


def test_callback_pushes_every_epoch(tiny_model, hub, push_class, tmp_path, capsys, caplog):
    caplog.set_level(logging.DEBUG)
    assert train(tiny_model, tmp_path, push_class(repo_id="ann/llama-finqa-dora")).state.global_step == 4
    repo = hub.repositories["ann/llama-finqa-dora"]
    assert repo.private
    assert repo.commits["main"] == ["initial commit", "epoch 1, step 2", "epoch 2, step 4"]
    assert set(repo.branches["main"]) == ADAPTER
    message = capsys.readouterr()
    assert message.err.count("step 4 pushed: http") == 2  # behind the epoch, and at the end, where nothing was new
    assert TOKEN not in message.err + message.out + caplog.text


def test_callback_pushes_best_weights_at_the_end(tiny_model, hub, push_class, tmp_path):
    from peft import get_peft_model_state_dict
    from safetensors.torch import load

    best = {
        "save_strategy": "epoch",
        "eval_strategy": "epoch",
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": True,  # so that the first epoch is the best
        "learning_rate": 0.1,
    }
    trainer = train(tiny_model, tmp_path, push_class(repo_id="ann/model"), **best)
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    pushed = load(hub.files("ann/model")["adapter_model.safetensors"])
    kept = get_peft_model_state_dict(trainer.model)
    assert pushed.keys() == kept.keys()
    assert all(torch.equal(pushed[name], kept[name]) for name in kept)
    assert hub.repositories["ann/model"].commits["main"][-1] == "end of training, step 4"


@pytest.mark.parametrize("name", ["ann/bad name", "a/b/c", ""])
def test_callback_refuses_an_invalid_name(push_class, name):
    with pytest.raises(ConfigError, match="is no valid name on the hub: write OWNER/NAME"):
        push_class(repo_id=name)


def test_callback_pushes_next_epoch_after_a_failure(tiny_model, hub, push_class, tmp_path, capsys):
    hub.fail = {"repos/create": [500]}
    assert train(tiny_model, tmp_path, push_class(repo_id="ann/model")).state.global_step == 4
    message = capsys.readouterr().err
    assert message.count(", training continues: ") == 1
    assert "could not push epoch 1, step 2, training continues: ann/model was not pushed: " in message
    assert hub.repositories["ann/model"].commits["main"] == ["initial commit", "epoch 2, step 4"]


def test_callback_repeats_a_failed_last_epoch_at_the_end(tiny_model, hub, push_class, tmp_path, capsys):
    hub.fail = {"repos/create": [500]}
    train(tiny_model, tmp_path, push_class(repo_id="ann/model"), epochs=1)
    assert hub.repositories["ann/model"].commits["main"] == ["initial commit", "end of training, step 2"]


@pytest.mark.parametrize("trouble", ["no token", "wrong token", "public", "away"])
def test_training_ends_whatever_the_hub_answers(tiny_model, hub, push_class, tmp_path, capsys, monkeypatch, trouble):
    message = "the hub refuses the token (status 401)"
    if trouble == "no token":
        monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
        message = "needs a token, and there is none"
    elif trouble == "wrong token":
        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    elif trouble == "public":
        hub.repositories["ann/model"] = Repository(private=False)
        message = "can be read by everybody"
    else:
        hub.drop = {"": 99}
        message = "the hub cannot be reached"
    assert train(tiny_model, tmp_path, push_class(repo_id="ann/model"), epochs=1).state.global_step == 2
    err = capsys.readouterr().err
    assert message in err
    assert "could not push epoch 1, step 2, training continues: " in err
    assert "could not push the weights at the end of training: " in err
    assert "hf_wrong" not in err
    assert not any(repo.branches["main"] for repo in hub.repositories.values())


def writer(content: str) -> Callable[[Path], None]:
    def save(folder: Path) -> None:
        folder.mkdir()
        (folder / "adapter.json").write_text(content, encoding="utf-8")

    return save


def test_slow_hub_gets_only_the_newest_waiting_snapshot(hub, monkeypatch, capsys):
    opened, real = threading.Event(), module.push

    def slow(*args: object, **kwargs: object) -> object:
        opened.wait(30)
        return real(*args, **kwargs)

    monkeypatch.setattr(module, "push", slow)
    pushes = BackgroundPush(PushTarget("model"), "adapter")
    for epoch in (1, 2, 3):
        pushes.push(writer(f"{epoch}"), f"epoch {epoch}")
        while epoch == 1 and pushes._waiting is not None:
            pass
    assert not hub.repositories
    pushes.finish(seconds=0.01)
    opened.set()
    pushes.finish()
    assert hub.repositories["ann/model"].commits["main"] == ["initial commit", "epoch 1", "epoch 3"]
    assert hub.files("ann/model") == {"adapter/adapter.json": b"3"}
    message = capsys.readouterr().err
    assert "epoch 2 was not pushed: an earlier push is still running" in message
    assert "is not done after 0.01 s" in message


def test_unexpected_error_shows_its_class_only(hub, monkeypatch, capsys):
    real, errors = module.push, [RuntimeError(f"Authorization: Bearer {TOKEN}")]

    def once(*args: object, **kwargs: object) -> object:
        if errors:
            raise errors.pop()
        return real(*args, **kwargs)

    monkeypatch.setattr(module, "push", once)
    pushes = BackgroundPush(PushTarget("ann/model"))
    for epoch in (1, 2):
        pushes.push(writer(f"{epoch}"), f"epoch {epoch}")
        pushes.finish()
    assert hub.repositories["ann/model"].commits["main"] == ["initial commit", "epoch 2"]
    message = capsys.readouterr().err
    assert "could not push epoch 1, training continues: RuntimeError\n" in message
    assert TOKEN not in message


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (
            SafetensorError("Error while serializing:\nNo space (os error 28)"),
            "Error while serializing: No space (os er",
        ),
        (AssertionError(f"Bearer {TOKEN}"), "AssertionError)"),
    ],
)
def test_snapshot_that_cannot_be_saved_is_skipped(hub, capsys, error, message):
    pushes, folders = BackgroundPush(PushTarget("ann/model")), []

    def full(folder: Path) -> None:
        folders.append(folder.parent)
        raise error

    pushes.push(full, "epoch 1")
    pushes.finish()
    err = capsys.readouterr().err
    assert f"could not push epoch 1, training continues: it could not be saved ({message}" in err
    assert err.count("\n") == 1
    assert not folders[0].exists()
    assert not hub.asked


def test_snapshot_without_temporary_folder_is_skipped(hub, capsys, monkeypatch):
    def full(**_: object) -> str:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(module.tempfile, "mkdtemp", full)
    BackgroundPush(PushTarget("ann/model")).push(writer("1"), "epoch 1")
    message = capsys.readouterr().err
    assert (
        "could not push epoch 1, training continues: it could not be saved (No usable temporary directory found)"
        in message
    )
    assert not hub.asked


@pytest.mark.parametrize("is_full", [False, True])
def test_failure_at_the_end_of_a_run_says_where_the_adapter_is(hub, capsys, monkeypatch, is_full):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)

    def save(folder: Path) -> None:
        if is_full:
            raise OSError(28, "No space left on device")
        writer("1")(folder)

    EpochPushes(Config.model_validate({"publish": {"repo_id": "ann/model"}}).publish, save).finish()
    message = capsys.readouterr().err
    why = "it could not be saved (No space left on device)" if is_full else "pushing to the hub needs a token, and"
    assert f"could not push the adapter: {why}" in message
    assert "; it is in the run's folder and can be pushed with `fintune publish`" in message
    assert "training continues" not in message


def test_run_pushes_every_epoch_and_the_selected_weights(tiny_model, hub, tmp_path, capsys, monkeypatch):
    from fintune.pipeline.stages.train import train as stage

    push = BackgroundPush.push
    (tmp_path / "train").mkdir()
    config = Config.model_validate(
        {
            "model": {"name": str(tiny_model)},
            "adapter": {"r": 2, "init_lora_weights": "pissa"},
            "train": {"dtype": "float32", "per_device_train_batch_size": 4, "num_train_epochs": 3, "save_steps": 100},
            "publish": {
                "repo_id": "ann/model",
                "each_epoch": True,
                "base_model": "acme/tiny",
                "artifacts": ("adapter", "merged"),
            },
        }
    )
    # 5 rows in steps of 4: the first pass is complete after 8 examples, the second after 12.
    monkeypatch.setattr(BackgroundPush, "push", lambda self, *args: (push(self, *args), self.finish()))
    stage(config, {"prepare": prepared(tmp_path / "prepare", tiny_model, 5)}, tmp_path / "train")
    commits = ["initial commit", "epoch 1, step 2", "epoch 2, step 3", "end of training"]
    assert hub.repositories["ann/model"].commits["main"] == commits
    files = hub.files("ann/model")
    assert set(files) == {f"adapter/{name}" for name in ADAPTER}
    assert json.loads(files["adapter/adapter_config.json"])["base_model_name_or_path"] == "acme/tiny"
    weights = tmp_path / "train" / "adapter" / "adapter_model.safetensors"
    assert files["adapter/adapter_model.safetensors"] == weights.read_bytes()
