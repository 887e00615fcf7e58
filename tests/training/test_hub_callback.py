"""The adapter goes to the hub behind each epoch, in the background, and no trouble there stops training."""

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
from fintune.training.hub_callback import EpochPushes
from fintune.util import hub_background
from fintune.util.hub import Target
from fintune.util.hub_background import BackgroundPush
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


def test_the_guides_callback_pushes_each_epoch_and_what_it_pushed_last_is_the_end(
    tiny_model, hub, push_class, tmp_path, capsys, caplog
):
    caplog.set_level(logging.DEBUG)
    assert train(tiny_model, tmp_path, push_class(repo_id="ann/llama-finqa-dora")).state.global_step == 4
    repo = hub.repositories["ann/llama-finqa-dora"]
    assert repo.private
    assert repo.commits["main"] == ["initial commit", "epoch 1, step 2", "epoch 2, step 4"]
    assert set(repo.branches["main"]) == ADAPTER
    told = capsys.readouterr()
    assert told.err.count("step 4 pushed: http") == 2  # behind the epoch, and at the end, where nothing was new
    assert TOKEN not in told.err + told.out + caplog.text


def test_at_the_end_the_hub_has_the_best_weights_that_the_trainer_loaded_again(tiny_model, hub, push_class, tmp_path):
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
def test_a_name_that_no_repository_can_have_is_refused_before_training(push_class, name):
    with pytest.raises(ConfigError, match="is no name on the hub: write OWNER/NAME"):
        push_class(repo_id=name)


def test_a_failure_is_told_once_training_goes_on_and_the_next_epoch_is_tried(
    tiny_model, hub, push_class, tmp_path, capsys
):
    hub.fail = {"repos/create": [500]}
    assert train(tiny_model, tmp_path, push_class(repo_id="ann/model")).state.global_step == 4
    told = capsys.readouterr().err
    assert told.count("was not pushed, and training goes on: ") == 1
    assert "epoch 1, step 2 was not pushed, and training goes on: ann/model was not pushed: " in told
    assert hub.repositories["ann/model"].commits["main"] == ["initial commit", "epoch 2, step 4"]


def test_a_last_epoch_that_failed_is_tried_once_more_at_the_end(tiny_model, hub, push_class, tmp_path, capsys):
    hub.fail = {"repos/create": [500]}
    train(tiny_model, tmp_path, push_class(repo_id="ann/model"), epochs=1)
    assert hub.repositories["ann/model"].commits["main"] == ["initial commit", "end of training, step 2"]


@pytest.mark.parametrize("trouble", ["no token", "wrong token", "public", "away"])
def test_training_ends_whatever_the_hub_says(tiny_model, hub, push_class, tmp_path, capsys, monkeypatch, trouble):
    told = "the hub refuses the token (status 401)"
    if trouble == "no token":
        monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
        told = "needs a token, and there is none"
    elif trouble == "wrong token":
        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    elif trouble == "public":
        hub.repositories["ann/model"] = Repository(private=False)
        told = "can be read by everybody"
    else:
        hub.drop = {"": 99}
        told = "the hub cannot be reached"
    assert train(tiny_model, tmp_path, push_class(repo_id="ann/model"), epochs=1).state.global_step == 2
    err = capsys.readouterr().err
    assert told in err
    assert "epoch 1, step 2 was not pushed, and training goes on: " in err
    assert "what training ended with was not pushed: " in err
    assert "hf_wrong" not in err
    assert not any(repo.branches["main"] for repo in hub.repositories.values())


def writer(content: str) -> Callable[[Path], None]:
    def save(folder: Path) -> None:
        folder.mkdir()
        (folder / "adapter.json").write_text(content, encoding="utf-8")

    return save


def test_a_slow_hub_blocks_nothing_and_of_what_waits_only_the_newest_is_sent(hub, monkeypatch, capsys):
    opened, real = threading.Event(), hub_background.send

    def slow(*args: object, **kwargs: object) -> object:
        opened.wait(30)
        return real(*args, **kwargs)

    monkeypatch.setattr(hub_background, "send", slow)
    pushes = BackgroundPush(Target("model"), "adapter")
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
    told = capsys.readouterr().err
    assert "epoch 2 was not pushed: an earlier one is still on its way" in told
    assert "is not done after 0.01 s" in told


def test_an_error_nobody_foresaw_is_told_by_its_kind_and_the_next_snapshot_is_pushed(hub, monkeypatch, capsys):
    real, errors = hub_background.send, [RuntimeError(f"Authorization: Bearer {TOKEN}")]

    def once(*args: object, **kwargs: object) -> object:
        if errors:
            raise errors.pop()
        return real(*args, **kwargs)

    monkeypatch.setattr(hub_background, "send", once)
    pushes = BackgroundPush(Target("ann/model"))
    for epoch in (1, 2):
        pushes.push(writer(f"{epoch}"), f"epoch {epoch}")
        pushes.finish()
    assert hub.repositories["ann/model"].commits["main"] == ["initial commit", "epoch 2"]
    told = capsys.readouterr().err
    assert "epoch 1 was not pushed, and training goes on: RuntimeError\n" in told
    assert TOKEN not in told


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (
            SafetensorError("Error while serializing:\nNo space (os error 28)"),
            "Error while serializing: No space (os er",
        ),
        (AssertionError(f"Bearer {TOKEN}"), "AssertionError)"),
    ],
)
def test_a_snapshot_that_cannot_be_saved_is_told_in_a_line_and_passed_over(hub, capsys, error, told):
    pushes, folders = BackgroundPush(Target("ann/model")), []

    def full(folder: Path) -> None:
        folders.append(folder.parent)
        raise error

    pushes.push(full, "epoch 1")
    pushes.finish()
    err = capsys.readouterr().err
    assert f"epoch 1 was not pushed, and training goes on: it could not be saved ({told}" in err
    assert err.count("\n") == 1
    assert not folders[0].exists()
    assert not hub.asked


def test_a_snapshot_for_which_there_is_no_folder_is_told_and_passed_over(hub, capsys, monkeypatch):
    def full(**_: object) -> str:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(hub_background.tempfile, "mkdtemp", full)
    BackgroundPush(Target("ann/model")).push(writer("1"), "epoch 1")
    told = capsys.readouterr().err
    assert (
        "epoch 1 was not pushed, and training goes on: it could not be saved (No usable temporary directory found)"
        in told
    )
    assert not hub.asked


@pytest.mark.parametrize("is_full", [False, True])
def test_at_the_end_of_our_own_training_a_failure_says_where_the_adapter_is(hub, capsys, monkeypatch, is_full):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)

    def save(folder: Path) -> None:
        if is_full:
            raise OSError(28, "No space left on device")
        writer("1")(folder)

    EpochPushes(Config.model_validate({"publish": {"repo_id": "ann/model"}}).publish, save, 2).finish()
    told = capsys.readouterr().err
    why = "it could not be saved (No space left on device)" if is_full else "pushing to the hub needs a token, and"
    assert f"the adapter was not pushed: {why}" in told
    assert "; it is in the run's folder, push it with `fintune publish`" in told
    assert "training goes on" not in told


def test_our_own_training_pushes_each_epoch_and_what_it_kept_under_the_bases_name(tiny_model, hub, tmp_path, capsys):
    from fintune.pipeline.stages.train import train as stage

    (tmp_path / "train").mkdir()
    config = Config.model_validate(
        {
            "model": {"name": str(tiny_model)},
            "adapter": {"r": 2, "init_lora_weights": "pissa"},
            "train": {"dtype": "float32", "per_device_train_batch_size": 4, "num_train_epochs": 2, "save_steps": 100},
            "publish": {
                "repo_id": "ann/model",
                "each_epoch": True,
                "base_model": "acme/tiny",
                "artifacts": ("adapter", "merged"),
            },
        }
    )
    stage(config, {"prepare": prepared(tmp_path / "prepare", tiny_model, 8)}, tmp_path / "train")
    assert hub.repositories["ann/model"].commits["main"] == ["initial commit", "epoch 1, step 2", "end of training"]
    files = hub.files("ann/model")
    assert set(files) == {f"adapter/{name}" for name in ADAPTER}
    assert json.loads(files["adapter/adapter_config.json"])["base_model_name_or_path"] == "acme/tiny"
    weights = tmp_path / "train" / "adapter" / "adapter_model.safetensors"
    assert files["adapter/adapter_model.safetensors"] == weights.read_bytes()
