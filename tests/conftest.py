from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from support.tiny import make_tiny_model

# Beside other workers one thread each: two that wait for each other on two cores are slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as the command line does, see machine.settle_environment
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# The GPU's kernels are tested on the CPU; Triton asks for this when it is first imported.
os.environ.setdefault("TRITON_INTERPRET", "1")

# nohup and "&" in a script ignore Ctrl-C, and every process that a test starts would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """Folder of a random two-layer Llama with a ChatML tokenizer; copy it before changing it."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def builtin_model() -> Path:
    """Folder of the built-in model in the user's own cache folder; for tests marked slow."""
    from fintune.models.builtin import ensure

    return ensure("builtin:smollm2-135m")


@pytest.fixture(scope="session")
def _session_cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _own_cache(request, monkeypatch, _session_cache) -> None:
    # Only slow tests, which need the built-in model, may touch the user's cache folder.
    if request.node.get_closest_marker("slow") is None:
        monkeypatch.setenv("FINTUNE_CACHE", str(_session_cache))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: the longest must not begin when all other processes are done."""
    slow = {item.path for item in items if item.get_closest_marker("slow") is not None}
    items.sort(key=lambda item: item.path not in slow)  # stable, so that a file's tests keep their order
