"""A file of the hub where a disk is full: which folder is named, and what is left there."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from fintune.data import hub
from fintune.errors import ResourceError

CONTENT = b"Question,Answer\n" * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()
ADDRESS = "hf://datasets/FinLang/small@c0ffee/train.csv"


@pytest.fixture
def fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Fetches a file into a cache of the package and one of the hub, both below the test's folder."""
    from huggingface_hub import constants

    about = SimpleNamespace(etag=SHA256, size=len(CONTENT), location="https://hub/train.csv")
    answer = io.BytesIO(CONTENT)
    answer.status = 200  # type: ignore[attr-defined]
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: None)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda _: about)
    monkeypatch.setattr(hub, "_open_url", lambda *_: answer)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.setenv("FINTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    return lambda: hub.fetch_file(ADDRESS)


def test_a_file_becomes_the_blob_of_the_hubs_own_cache(fetch, tmp_path):
    fetch()
    assert (tmp_path / "hf" / "hub" / "datasets--FinLang--small" / "blobs" / SHA256).read_bytes() == CONTENT


def test_a_file_of_no_bytes_is_fetched_too(fetch, tmp_path, monkeypatch):
    about = SimpleNamespace(etag=hashlib.sha1(b"").hexdigest(), size=0, location="https://hub/train.csv")
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda _: about)
    fetch()
    assert (tmp_path / "hf" / "hub" / "datasets--FinLang--small" / "blobs" / about.etag).read_bytes() == b""


def test_file_too_large_for_disk_is_refused_first(fetch, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000))
    with pytest.raises(ResourceError, match="no space for train") as caught:
        fetch()
    assert f"in {tmp_path}/cache/downloads, 1 kB is free: free some, or set FINTUNE_CACHE to" in str(caught.value)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a file system that is full, as Linux has it")
def test_the_packages_cache_is_named_where_that_is_full(fetch, tmp_path):
    part = tmp_path / "cache" / "downloads" / f"{SHA256}.part"
    part.parent.mkdir(parents=True)
    part.symlink_to("/dev/full")
    with pytest.raises(ResourceError) as caught:
        fetch()
    assert str(caught.value) == (
        f"no space for train.csv of FinLang/small in {tmp_path}/cache/downloads: the disk is full: "
        "free some, or set FINTUNE_CACHE to a folder on another disk"
    )


@pytest.mark.parametrize("variable", ["HF_HOME", "HF_HUB_CACHE"])
def test_full_hub_cache_is_named_and_keeps_no_part(fetch, tmp_path, monkeypatch, variable):
    monkeypatch.setenv(variable, "/somewhere")

    def move(source: Path, target: Path) -> None:
        target.write_bytes(source.read_bytes()[:99])
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patched, pytest.raises(ResourceError) as caught:
        patched.setattr(shutil, "move", move)
        fetch()
    assert str(caught.value) == (
        f"no space for train.csv of FinLang/small in {tmp_path}/hf/hub: the disk is full: "
        f"free some, or set {variable} to a folder on another disk"
    )
    assert not [path for path in (tmp_path / "hf").rglob("*") if path.is_file()]
    fetch()
    assert list((tmp_path / "hf").rglob(SHA256)), "what came is kept"
