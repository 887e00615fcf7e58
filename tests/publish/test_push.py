"""Pushes with the real client to a local hub that works, fails, refuses, disconnects or is interrupted."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from fintune.errors import ResourceError
from fintune.publish import push as module
from fintune.publish.push import PushTarget, Upload, push, push_files, uploads_of
from fintune.util.hub import full_repo_name
from support.model_hub import LIBRARY_WARNS, TOKEN, ModelHub, Repository, connected

pytest.importorskip("huggingface_hub")

pytestmark = LIBRARY_WARNS

QUICK = (0.0, 0.0)
TARGET = PushTarget("ann/model")


@pytest.fixture
def hub(monkeypatch) -> Iterator[ModelHub]:
    with connected(monkeypatch) as running:
        yield running


@pytest.fixture
def files(tmp_path) -> list[Upload]:
    """One that travels in the commit and two that go to the store."""
    return make(tmp_path, {"config.json": b"{}", "adapter.safetensors": os.urandom(30_000), "b.gguf": b"g" * 40_000})


def make(folder: Path, contents: dict[str, bytes]) -> list[Upload]:
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return uploads_of(folder)


def test_push_creates_private_repo_with_one_commit(hub, files):
    done = push(TARGET, files, message="first")
    assert hub.repositories["ann/model"].private
    assert hub.files("ann/model") == {upload.name: upload.path.read_bytes() for upload in files}
    assert hub.repositories["ann/model"].commits["main"] == ["initial commit", "first"]
    assert done.commit == hub.repositories["ann/model"].sha("main")
    assert done.address == f"{hub.url}/ann/model/commit/{done.commit}"
    assert (set(done.sent), done.kept) == ({upload.name for upload in files}, ())
    assert done.num_sent_bytes == 70_002


def test_push_sends_no_unchanged_file(hub, files):
    first = push(TARGET, files, message="first")
    again = push(TARGET, files, message="again")
    assert (again.sent, len(again.kept), again.num_sent_bytes) == ((), 3, 0)
    assert again.commit == first.commit
    files[0].path.write_bytes(os.urandom(30_000))
    third = push(TARGET, files, message="third")
    assert third.sent == (files[0].name,)
    assert sorted(hub.stored) == [30_000, 30_000, 40_000]
    assert hub.files("ann/model")[files[0].name] == files[0].path.read_bytes()


def test_push_resumes_without_sending_large_files_again(hub, files, monkeypatch):
    from huggingface_hub import HfApi

    monkeypatch.setattr(module, "LARGE_BYTES", 10_000)
    with monkeypatch.context() as stopped, pytest.raises(KeyboardInterrupt):
        stopped.setattr(HfApi, "create_commit", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        push(TARGET, files, message="first")
    assert hub.files("ann/model") == {}
    assert sorted(hub.stored) == [30_000, 40_000]
    push(TARGET, files, message="first")
    assert sorted(hub.stored) == [30_000, 40_000]
    assert len(hub.files("ann/model")) == 3


@pytest.mark.parametrize(
    "piece", ["repos/create", "paths-info", "preupload", "objects/batch", "PUT /store", "POST /verify", "commit/"]
)
@pytest.mark.parametrize("trouble", ["dropped", "status"])
def test_push_repeats_every_failed_request(hub, files, piece, trouble, capsys):
    hub.drop = {piece: 1} if trouble == "dropped" else {}
    hub.fail = {piece: [503]} if trouble == "status" else {}
    push(TARGET, files, message="first", pauses=QUICK)
    assert hub.files("ann/model") == {upload.name: upload.path.read_bytes() for upload in files}
    assert len(hub.repositories["ann/model"].commits["main"]) == 2
    assert "hf_" not in capsys.readouterr().err


def test_push_makes_no_commit_twice_if_the_answer_is_lost(hub, files, monkeypatch):
    from huggingface_hub import HfApi

    real, calls = HfApi.create_commit, []

    def lost(*args, **kwargs):
        calls.append(real(*args, **kwargs))
        if len(calls) == 1:
            raise ConnectionError("gone")
        return calls[-1]

    monkeypatch.setattr(HfApi, "create_commit", lost)
    done = push(TARGET, files, message="first", pauses=QUICK)
    assert hub.repositories["ann/model"].commits["main"] == ["initial commit", "first"]
    assert done.commit == calls[0].oid == calls[1].oid
    assert len(done.kept) == 3


def test_push_without_network_is_one_line_and_keeps_stored_files(hub, files, capsys):
    hub.drop = {"commit/": 99}
    with pytest.raises(ResourceError) as raised:
        push(TARGET, files, message="first", pauses=QUICK)
    message = str(raised.value)
    assert message.startswith("ann/model was not pushed: the hub cannot be reached 3 times (")
    assert message.endswith("check the network and try again")
    assert "\n" not in message
    assert capsys.readouterr().err.count("attempt") == 2
    hub.drop = {}
    push(TARGET, files, message="first")
    assert sorted(hub.stored) == [30_000, 40_000]


@pytest.mark.parametrize(
    ("piece", "status", "message"),
    [
        ("repos/create", 401, "the hub refuses the token (status 401)"),
        ("commit/", 403, "the hub refuses the token (status 403): no more room here"),
        ("PUT /store", 403, "the hub refuses the token (status 403)"),
        ("paths-info", 404, "has no such repository or branch"),
        ("commit/", 413, "the hub answers with status 413: no more room here: try again later"),
    ],
)
def test_push_does_not_repeat_a_refused_request(hub, files, piece, status, message, capsys):
    hub.fail = {piece: [status] * 99}
    with pytest.raises(ResourceError) as raised:
        push(TARGET, files, message="first", pauses=QUICK)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert TOKEN not in str(raised.value)
    assert capsys.readouterr().err == ""


def test_push_refused_for_wrong_token_and_other_owner(hub, files, monkeypatch):
    with pytest.raises(ResourceError, match=r"refuses the token \(status 403\): You don't have the rights"):
        push(PushTarget("bob/model"), files, message="first")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(ResourceError, match=r"refuses the token \(status 401\).*hf auth login"):
        push(TARGET, files, message="first")


def test_push_of_private_files_refuses_public_repo(hub, files):
    hub.repositories["ann/model"] = Repository(private=False)
    with pytest.raises(ResourceError, match="ann/model can be read by everybody"):
        push(PushTarget("ann/model", must_be_private=True), files, message="first")
    assert hub.files("ann/model") == {}
    push(TARGET, files, message="first")
    assert len(hub.files("ann/model")) == 3


def test_push_to_new_branch_keeps_main(hub, files):
    push(PushTarget("ann/model", branch="try"), files, message="first")
    push(PushTarget("ann/model", branch="try"), files[:1], message="again", remove=["config.json", "never-there"])
    assert hub.files("ann/model") == {}
    assert set(hub.files("ann/model", "try")) == {"adapter.safetensors", "b.gguf"}


def test_full_repo_name_adds_the_user(hub):
    assert full_repo_name("model") == "ann/model"
    assert full_repo_name("bob/model") == "bob/model"


def test_push_files_pushes_only_named_files(hub, tmp_path):
    make(tmp_path, {"a.json": b"a", ".env": b"secret", "b.json": b"b"})
    assert push_files("ann/model", [tmp_path / "a.json"]).startswith(f"{hub.url}/ann/model/commit/")
    assert set(hub.files("ann/model")) == {"a.json"}
