"""Silence for libraries that talk while they work."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """No chatter of transformers, PEFT, TRL and accelerate: what matters goes through the bar and metrics.jsonl."""
    import logging

    from transformers.utils import logging as hf_logging

    names = ("transformers", "peft", "trl", "accelerate", "datasets")
    before = {name: logging.getLogger(name).level for name in names}
    shown = hf_logging.is_progress_bar_enabled()
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    hf_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"(transformers|peft|trl|accelerate|torch)\b")
            yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
        if shown:
            hf_logging.enable_progress_bar()
