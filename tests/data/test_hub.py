"""Datasets from a hub that works, breaks off, is down, refuses, or is not there; each in a process of its own."""

from __future__ import annotations

import csv
import errno
import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fintune.data import hub
from fintune.errors import DataError, ResourceError
from support.hub_server import HubServer

NAME = "FinLang/investopedia-instruction-tuning-dataset"
NUM_ROWS = 5000

READ = """
import json, sys
from fintune.errors import FintuneError
from fintune.data import hub
hub.PAUSES = (0.01, 0.01)
wanted = hub.HubSplit(*sys.argv[1:])
try:
    rows = [row.value for row in hub.read_split(wanted)]
    print(json.dumps({"num": len(rows), "last": rows[-1], "licence": hub.read_licence(wanted)}))
except FintuneError as error:
    print(json.dumps({"kind": type(error).__name__, "told": str(error)}))
"""


def table(num_rows: int) -> bytes:
    text = io.StringIO()
    rows = csv.writer(text)
    rows.writerow(["Topic", "Title", "Context", "Question", "Answer"])
    rows.writerows(
        ["Bonds", f"T{n}", f"Context {n}, in\nlines", f"What is {n}?", f"It is {n}."] for n in range(num_rows)
    )
    return text.getvalue().encode()


@pytest.fixture
def server() -> Iterator[HubServer]:
    card = b"---\nlicense: cc-by-nc-4.0\n---\n# Investopedia\n"
    running = HubServer(NAME, {"train.csv": table(NUM_ROWS), "test.csv": table(3), "README.md": card})
    yield running
    running.close()


@pytest.fixture
def read(server, tmp_path):
    def read(*wanted: str, **environment: str) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, "-c", READ, *(wanted or (NAME,))],
            capture_output=True,
            check=False,
            text=True,
            env={
                **os.environ,
                "HF_ENDPOINT": server.url,
                "HF_HOME": str(tmp_path / "hf"),
                "FINTUNE_CACHE": str(tmp_path / "cache"),
                "HF_TOKEN": "hf_secret",
                **environment,
            },
        )
        assert done.returncode == 0, done.stderr
        assert "hf_secret" not in done.stdout + done.stderr
        return {**json.loads(done.stdout), "stderr": done.stderr}

    return read


def test_split_is_read_from_cache_without_network(read, server, tmp_path):
    first = read()
    assert first["num"] == NUM_ROWS
    assert first["last"]["Context"] == f"Context {NUM_ROWS - 1}, in\nlines"
    assert first["licence"] == "cc-by-nc-4.0"
    downloads = len(server.ranges)
    assert read(NAME, "test")["num"] == 3
    assert len(server.ranges) == downloads
    server.asked.clear()
    assert read(HF_HUB_OFFLINE="1")["num"] == NUM_ROWS
    assert not server.asked
    assert not list((tmp_path / "cache" / "downloads").glob("*.part"))
    assert list((tmp_path / "hf" / "hub").glob("datasets--*/snapshots/*/train.csv")), "in the hub's own cache"


def test_a_download_that_breaks_off_goes_on_where_it_stopped(read, server):
    server.break_after = [100_000]
    found = read()
    assert found["num"] == NUM_ROWS
    assert "bytes=100000-" in server.ranges
    assert "attempt 2 of 3" in found["stderr"]


def test_failed_download_is_resumed_by_next_run(read, server):
    server.break_after = [30_000] * 3
    found = read()
    assert found["kind"] == "ResourceError"
    assert f"hub:{NAME}, split train: the download failed 3 times" in found["told"]
    assert "nothing was trained on a part of it" in found["told"]
    assert "run the same command again" in found["told"]
    server.ranges.clear()
    assert read()["num"] == NUM_ROWS
    assert "bytes=90000-" in server.ranges


def test_a_server_that_recovers_is_asked_again(read, server):
    server.fail = {"train.csv": [500]}
    assert read()["num"] == NUM_ROWS


@pytest.mark.parametrize(
    ("trouble", "wanted", "kind", "told"),
    [
        ("gated", (NAME,), "ResourceError", "only to those who accepted its terms"),
        ("refused", (NAME,), "ResourceError", "log in with `hf auth login`"),
        ("", ("FinLang/nothing",), "DataError", "there is no dataset FinLang/nothing on the hub"),
        ("", (NAME, "dev"), "DataError", "there is no split 'dev': set split to train or test"),
    ],
)
def test_a_refusal_is_told_at_once_and_not_asked_again(read, server, trouble, wanted, kind, told):
    server.gated = trouble == "gated"
    server.fail = {"/": [401] * 99} if trouble == "refused" else {}
    found = read(*wanted)
    assert found["kind"] == kind
    assert told in found["told"]
    assert "attempt" not in found["stderr"]
    assert "\n" not in found["told"]


def parser_trouble() -> None:
    raise ValueError("Error tokenizing data. Expected 2 fields in line 3, saw 5, of aggregated figures")


def full_disk() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def too_small_disk() -> None:
    raise OSError("Not enough disk space. Needed: 9 GB (download: 4 GB, generated: 5 GB)")


NO_ROOM = f"no space for hub:{NAME}, split train in /tables: the disk is full: free some, or set HF_HOME to a folder"


@pytest.mark.parametrize(
    ("trouble", "kind", "told"),
    [
        (
            parser_trouble,
            DataError,
            f"hub:{NAME}, split train: cannot be read as a dataset (Error tokenizing data. Expected 2 fields in line 3",
        ),
        (full_disk, ResourceError, NO_ROOM),
        (too_small_disk, ResourceError, NO_ROOM),
    ],
)
def test_dataset_error_names_its_cause(monkeypatch, caplog, trouble, kind, told):
    import datasets

    def prepare() -> None:
        datasets.logging.get_logger("datasets.builder").error("Failed to read file 'train.csv'")
        try:
            trouble()
        except Exception as error:
            raise datasets.exceptions.DatasetGenerationError(
                "An error occurred while generating the dataset"
            ) from error

    monkeypatch.setattr("fintune.util.hub._resolves", lambda _: True)
    builder = SimpleNamespace(config=SimpleNamespace(data_files={}), download_and_prepare=prepare)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: builder)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", "/tables")
    monkeypatch.delenv("HF_DATASETS_CACHE", raising=False)
    monkeypatch.setattr(logging.getLogger("datasets"), "propagate", True)
    verbosity = datasets.logging.get_verbosity()
    with pytest.raises(kind) as caught:
        list(hub.read_split(hub.HubSplit(NAME)))
    assert str(caught.value).startswith(told)
    assert not caplog.records
    assert datasets.logging.get_verbosity() == verbosity


def test_what_came_damaged_is_thrown_away_and_told(tmp_path):
    from fintune.data.hub import _move_to_cache

    part = tmp_path / "x.part"
    part.write_bytes(b"wrong")
    with pytest.raises(ResourceError, match=r"train\.csv came damaged"):
        _move_to_cache(part, tmp_path / "blobs" / "x", "0" * 64, "train.csv")
    assert not list(Path(tmp_path).rglob("*x*"))


def test_unresolved_hub_is_tried_once(monkeypatch, capfd):
    import datasets
    from huggingface_hub import constants

    monkeypatch.setattr("fintune.util.hub._resolves", lambda _: False)
    monkeypatch.setattr("fintune.util.hub.urllib.request.getproxies", dict)
    monkeypatch.setattr("time.sleep", lambda _: pytest.fail("the hub is tried again"))
    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    with pytest.raises(ResourceError, match="does not resolve"):
        hub.check_split(hub.HubSplit("ann/none-such"))
    assert "Retry" not in capfd.readouterr().err
    assert before == (constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE)


PLAIN_DOWNLOAD = f"""
import huggingface_hub
huggingface_hub.hf_hub_download({NAME!r}, "train.csv", repo_type="dataset")
"""


def test_hub_library_starts_a_broken_download_again(server, tmp_path):
    """Why `fetch_file` exists: the library's next process does not ask for the rest of a file."""
    environment = {**os.environ, "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "hf")}

    def download() -> int:
        command = [sys.executable, "-c", PLAIN_DOWNLOAD]
        return subprocess.run(command, env=environment, capture_output=True, check=False, timeout=60).returncode

    server.break_after = [1000] * 6  # the library tries five times more
    assert download() != 0
    server.break_after.clear()
    server.ranges.clear()
    assert download() == 0
    assert server.ranges == [None]
