"""Where the package keeps what it can fetch or compute again: downloads, the built-in model, hashes of large files."""

from __future__ import annotations

import os
from pathlib import Path

CACHE_VARIABLE = "FINTUNE_CACHE"
ANOTHER_CACHE = f"set {CACHE_VARIABLE} to a folder on another disk"
"""What to do where it has no room."""


def cache_folder() -> Path:
    """The folder named by ``FINTUNE_CACHE``, else the user's cache folder of the operating system; not created."""
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named).expanduser()
    from platformdirs import user_cache_path

    return user_cache_path("fintune", appauthor=False)
