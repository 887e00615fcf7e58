"""What huggingface_hub and transformers do by themselves: the reasons for `fintune.publish.push`."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.model_hub import LIBRARY_WARNS, ModelHub, Repository, connected

pytest.importorskip("huggingface_hub")
pytestmark = LIBRARY_WARNS


@pytest.fixture
def hub(monkeypatch) -> Iterator[ModelHub]:
    with connected(monkeypatch) as running:
        yield running


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "config.json").write_bytes(b"{}")
    (tmp_path / "files" / "model.safetensors").write_bytes(os.urandom(30_000))
    return tmp_path / "files"


def test_create_commit_skips_unchanged_files(hub, folder):
    """So `push` leaves that to the library."""
    from huggingface_hub import CommitOperationAdd, HfApi

    HfApi().create_repo("ann/model", private=True)
    for _ in range(2):
        files = [CommitOperationAdd(path.name, str(path)) for path in folder.iterdir()]
        HfApi().create_commit("ann/model", files, commit_message="files")
    assert hub.repositories["ann/model"].commits["main"] == ["initial commit", "files"]
    assert hub.stored == [30_000]


def test_upload_folder_fills_a_public_repo(hub, folder):
    from huggingface_hub import HfApi

    hub.repositories["ann/model"] = Repository(private=False)
    HfApi().create_repo("ann/model", private=True, exist_ok=True)
    HfApi().upload_folder(repo_id="ann/model", folder_path=folder)
    assert len(hub.files("ann/model")) == 2


@pytest.mark.parametrize("piece", ["repos/create", "commit/"])
def test_upload_folder_does_not_repeat_a_request(hub, folder, piece):
    from huggingface_hub import HfApi

    hub.fail = {piece: [503]}
    with pytest.raises(OSError, match="503"):
        HfApi().create_repo("ann/model", private=True)
        HfApi().upload_folder(repo_id="ann/model", folder_path=folder)


def test_run_as_future_sends_every_waiting_snapshot(hub):
    from huggingface_hub import HfApi

    opened, sent = threading.Event(), []

    def send(snapshot: int) -> None:
        opened.wait()
        sent.append(snapshot)

    api = HfApi()
    futures = [api.run_as_future(send, snapshot) for snapshot in (1, 2, 3)]
    opened.set()
    assert [future.result() for future in futures] == [None, None, None]
    assert sent == [1, 2, 3]


def test_commit_scheduler_ends_training_without_a_hub(hub, folder):
    from huggingface_hub import CommitScheduler

    hub.fail = {"repos/create": [500]}
    with pytest.raises(OSError, match="500"):
        CommitScheduler(repo_id="ann/model", folder_path=folder, private=True)


def test_trainer_with_push_to_hub_ends_without_a_hub(hub, tiny_model, tmp_path):
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    hub.fail = {"repos/create": [500]}
    options = {"output_dir": str(tmp_path), "push_to_hub": True, "hub_model_id": "ann/model", "report_to": "none"}
    with pytest.raises(OSError, match="500"):
        Trainer(AutoModelForCausalLM.from_pretrained(tiny_model), TrainingArguments(**options, use_cpu=True))
