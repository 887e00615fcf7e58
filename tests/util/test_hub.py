"""Pushes through the real client to a stand-in of the hub that works, fails, refuses, breaks off and is interrupted."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from fintune.errors import ResourceError
from fintune.util import hub as hub_push
from fintune.util.hub import Target, Upload, send
from support.model_hub import LIBRARY_WARNS, TOKEN, ModelHub, Repository, connected

pytest.importorskip("huggingface_hub")

pytestmark = LIBRARY_WARNS

QUICK = (0.0, 0.0)
TARGET = Target("ann/model")


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
    return hub_push.files_of(folder)


def test_a_push_makes_a_private_repository_with_every_file_in_one_commit(hub, files):
    done = send(TARGET, files, message="first")
    assert hub.repositories["ann/model"].private
    assert hub.files("ann/model") == {each.name: each.path.read_bytes() for each in files}
    assert hub.repositories["ann/model"].commits["main"] == ["initial commit", "first"]
    assert done.commit == hub.repositories["ann/model"].sha("main")
    assert done.address == f"{hub.url}/ann/model/commit/{done.commit}"
    assert (set(done.sent), done.kept) == ({each.name for each in files}, ())
    assert done.num_sent_bytes == 70_002


def test_what_is_there_with_the_same_hash_is_not_sent_again(hub, files):
    first = send(TARGET, files, message="first")
    again = send(TARGET, files, message="again")
    assert (again.sent, len(again.kept), again.num_sent_bytes) == ((), 3, 0)
    assert again.commit == first.commit
    files[0].path.write_bytes(os.urandom(30_000))
    third = send(TARGET, files, message="third")
    assert third.sent == (files[0].name,)
    assert sorted(hub.stored) == [30_000, 30_000, 40_000]
    assert hub.files("ann/model")[files[0].name] == files[0].path.read_bytes()


def test_a_push_that_was_interrupted_before_its_commit_goes_on_without_sending_the_large_files_again(
    hub, files, monkeypatch
):
    from huggingface_hub import HfApi

    monkeypatch.setattr(hub_push, "LARGE_BYTES", 10_000)
    with monkeypatch.context() as stopped, pytest.raises(KeyboardInterrupt):
        stopped.setattr(HfApi, "create_commit", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        send(TARGET, files, message="first")
    assert hub.files("ann/model") == {}
    assert sorted(hub.stored) == [30_000, 40_000]
    send(TARGET, files, message="first")
    assert sorted(hub.stored) == [30_000, 40_000]
    assert len(hub.files("ann/model")) == 3


@pytest.mark.parametrize(
    "piece", ["repos/create", "paths-info", "preupload", "objects/batch", "PUT /store", "POST /verify", "commit/"]
)
@pytest.mark.parametrize("trouble", ["dropped", "status"])
def test_every_request_that_fails_once_is_tried_again(hub, files, piece, trouble, capsys):
    hub.drop = {piece: 1} if trouble == "dropped" else {}
    hub.fail = {piece: [503]} if trouble == "status" else {}
    send(TARGET, files, message="first", pauses=QUICK)
    assert hub.files("ann/model") == {each.name: each.path.read_bytes() for each in files}
    assert len(hub.repositories["ann/model"].commits["main"]) == 2
    assert "hf_" not in capsys.readouterr().err


def test_a_commit_whose_answer_was_lost_is_not_made_twice(hub, files, monkeypatch):
    from huggingface_hub import HfApi

    real, calls = HfApi.create_commit, []

    def lost(*args, **kwargs):
        calls.append(real(*args, **kwargs))
        raise ConnectionError("gone")

    monkeypatch.setattr(HfApi, "create_commit", lost)
    done = send(TARGET, files, message="first", pauses=QUICK)
    assert len(calls) == 1
    assert done.commit == calls[0].oid
    assert len(done.kept) == 3


def test_a_network_that_stays_away_gives_one_line_and_keeps_what_came(hub, files, capsys):
    hub.drop = {"commit/": 99}
    with pytest.raises(ResourceError) as raised:
        send(TARGET, files, message="first", pauses=QUICK)
    told = str(raised.value)
    assert told.startswith("ann/model was not pushed: the hub cannot be reached 3 times (")
    assert told.endswith("look at the network and try again")
    assert "\n" not in told
    assert capsys.readouterr().err.count("attempt") == 2
    hub.drop = {}
    send(TARGET, files, message="first")
    assert sorted(hub.stored) == [30_000, 40_000]


@pytest.mark.parametrize(
    ("piece", "status", "told"),
    [
        ("repos/create", 401, "the hub refuses the token (status 401)"),
        ("commit/", 403, "the hub refuses the token (status 403): no more room here"),
        ("PUT /store", 403, "the hub refuses the token (status 403)"),
        ("paths-info", 404, "knows no such repository or branch"),
        ("commit/", 413, "the hub answers with status 413: no more room here: try again later"),
    ],
)
def test_a_refusal_is_told_at_once_and_not_asked_again(hub, files, piece, status, told, capsys):
    hub.fail = {piece: [status] * 99}
    with pytest.raises(ResourceError) as raised:
        send(TARGET, files, message="first", pauses=QUICK)
    assert told in str(raised.value)
    assert "\n" not in str(raised.value)
    assert TOKEN not in str(raised.value)
    assert capsys.readouterr().err == ""


def test_a_wrong_token_and_another_owner_are_refused(hub, files, monkeypatch):
    with pytest.raises(ResourceError, match=r"refuses the token \(status 403\): You don't have the rights"):
        send(Target("bob/model"), files, message="first")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(ResourceError, match=r"refuses the token \(status 401\).*hf auth login"):
        send(TARGET, files, message="first")


def test_a_public_repository_is_refused_where_the_files_must_be_private(hub, files):
    hub.repositories["ann/model"] = Repository(private=False)
    with pytest.raises(ResourceError, match="ann/model can be read by everybody"):
        send(Target("ann/model", must_be_private=True), files, message="first")
    assert hub.files("ann/model") == {}
    send(TARGET, files, message="first")
    assert len(hub.files("ann/model")) == 3


def test_a_branch_is_made_and_the_main_one_stays(hub, files):
    send(Target("ann/model", branch="try"), files, message="first")
    send(Target("ann/model", branch="try"), files[:1], message="again", remove=["config.json", "never-there"])
    assert hub.files("ann/model") == {}
    assert set(hub.files("ann/model", "try")) == {"adapter.safetensors", "b.gguf"}


def test_names_without_an_owner_are_the_users(hub, tmp_path):
    assert hub_push.check("model", tmp_path) == "ann/model"
    assert hub_push.check(None, tmp_path) == f"ann/{tmp_path.name}"
    assert hub_push.check("bob/model", tmp_path) == "bob/model"


def test_named_files_are_pushed_and_nothing_else_of_their_folder(hub, tmp_path):
    make(tmp_path, {"a.json": b"a", ".env": b"secret", "b.json": b"b"})
    assert hub_push.push("ann/model", [tmp_path / "a.json"]).startswith(f"{hub.url}/ann/model/commit/")
    assert set(hub.files("ann/model")) == {"a.json"}
