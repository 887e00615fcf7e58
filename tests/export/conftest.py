from __future__ import annotations

from pathlib import Path

import pytest

from support.synthetic import write_folder


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory) -> Path:
    """A random llama of width 256 with its own output matrix; copy it before changing it."""
    return write_folder(tmp_path_factory.mktemp("synthetic") / "llama")
