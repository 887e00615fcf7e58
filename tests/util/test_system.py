from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from fintune.util import system as machine
from fintune.util.memory import peak_memory_bytes, release_memory, reset_peak_memory
from fintune.util.system import checkout_commit, configure_environment, installed_versions, machine_facts
from fintune.util.text import format_bytes, format_duration


def test_versions_name_python_and_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "PACKAGES", ("pydantic", "no-such-package-here"))
    found = installed_versions()
    assert found.keys() == {"python", "pydantic"}
    assert found["python"] == platform.python_version()


def test_the_facts_of_a_machine_name_no_host_user_or_path() -> None:
    told = json.dumps(machine_facts())
    assert int(machine_facts()["cores"]) > 0
    assert socket.gethostname() not in told
    assert str(Path.home()) not in told


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A repository with one commit, from which the module believes to run."""
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    module = tmp_path / "src" / "machine.py"
    module.parent.mkdir()
    module.write_text("x")
    who = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    for words in (["init", "-q"], ["add", "."], [*who, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    monkeypatch.setattr(machine, "__file__", str(module))
    return module


ALLOC_CONF = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_is_marked_where_files_differ_from_it(checkout: Path) -> None:
    clean = checkout_commit()
    assert clean is not None
    assert len(clean) == 12
    (checkout.parent / "new.txt").write_text("untracked files are the user's own")
    assert checkout_commit() == clean
    checkout.write_text("y")
    assert checkout_commit() == f"{clean}+"


def test_there_is_no_commit_outside_a_checkout_or_without_git(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "which", lambda _: None)
        assert checkout_commit() is None
    shutil.rmtree(tmp_path / ".git")
    assert checkout_commit() is None


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs a kernel that forgets the peak")
def test_peak_memory_covers_what_was_held_and_can_start_anew() -> None:
    reset_peak_memory()
    before = peak_memory_bytes()
    held = bytearray(64 << 20)
    held[::4096] = b"x" * len(held[::4096])
    peak = peak_memory_bytes()
    assert peak > before + (48 << 20)
    del held
    reset_peak_memory()
    assert peak_memory_bytes() <= peak


@pytest.mark.parametrize(
    ("num_bytes", "told"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (999_400, "999 kB"),
        (1_340_000, "1.3 MB"),
        (99_960_000, "100 MB"),
        (134_000_000, "134 MB"),
        (999_600_000, "1.0 GB"),
        (1_340_000_000, "1.3 GB"),
        (5e15, "5000 TB"),
    ],
)
def test_sizes_are_for_people(num_bytes: float, told: str) -> None:
    assert format_bytes(num_bytes) == told


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (245, "4 min 5 s"), (3600, "1 h 0 min"), (7384, "2 h 3 min")],
)
def test_durations_are_for_people(seconds: float, told: str) -> None:
    assert format_duration(seconds) == told


def test_spinning_is_short_unless_the_user_sets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # so that both are put back afterwards
        monkeypatch.delenv(name)
    configure_environment()
    assert os.environ["GOMP_SPINCOUNT"] == "1000"
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    configure_environment()
    assert os.environ["GOMP_SPINCOUNT"] == "7"
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    configure_environment()
    assert "GOMP_SPINCOUNT" not in os.environ


@pytest.mark.parametrize(
    ("system", "kernel", "own", "set_to"),
    [
        ("linux", "6.12.1-generic", {}, dict.fromkeys(ALLOC_CONF, "expandable_segments:True")),
        ("linux", "6.12.1-generic", {ALLOC_CONF[0]: "max_split_size_mb:64"}, {ALLOC_CONF[0]: "max_split_size_mb:64"}),
        ("linux", "6.12.1-generic", {ALLOC_CONF[1]: "backend:native"}, {ALLOC_CONF[1]: "backend:native"}),
        ("linux", "6.6.87.2-microsoft-standard-WSL2", {}, {}),
        ("win32", "11", {}, {}),
    ],
)
def test_expandable_segments_are_set_where_they_work(
    monkeypatch: pytest.MonkeyPatch, system: str, kernel: str, own: dict[str, str], set_to: dict[str, str]
) -> None:
    for name in (*ALLOC_CONF, "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(machine.sys, "platform", system)
    monkeypatch.setattr(machine.platform, "release", lambda: kernel)
    configure_environment()
    assert {name: os.environ[name] for name in ALLOC_CONF if name in os.environ} == set_to


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps freed blocks")
def test_freed_blocks_go_back_to_the_system() -> None:
    blocks = [b"x" * 100_000 for _ in range(2000)]
    reset_peak_memory()
    full = peak_memory_bytes()
    kept = blocks[-1]
    del blocks
    release_memory()
    reset_peak_memory()
    assert full - peak_memory_bytes() > 150_000_000
    assert len(kept) == 100_000
