"""Every error that this package raises on purpose.

::

    FintuneError            a user's mistake or the outside world; the command line prints one line, exit status 2
    ├── ConfigError         a configuration: unknown option, wrong type, impossible combination
    ├── DataError           a data file: missing, truncated, a bad row; carries the file, row and id
    ├── ModelError          a model: no such folder or id, no weights, no tokenizer, unsupported architecture
    │   └── PromptError     a prompt that a model cannot take; carries its number
    ├── ArtifactError       a stage's folder: stale, unfinished, or held by another process
    └── ResourceError       the machine: disk too small, network unreachable, no GPU, package missing

A message says what happened and where, without a final full stop. ``hint`` says how to fix it, in one sentence.
``option`` is the dotted key of the option at fault, so that a command with its own flags can print its flag instead
(:meth:`FintuneError.renamed`). Any other exception that escapes is a bug of this package and keeps its traceback.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import TypeVar

Error = TypeVar("Error", bound="FintuneError")


class FintuneError(Exception):
    """Base class of all errors of this package."""

    def __init__(self, message: str, *, hint: str | None = None, option: str | None = None) -> None:
        super().__init__(message)
        self.message, self.hint, self.option = message, hint, option

    def __str__(self) -> str:
        return f"{self.message}: {self.hint}" if self.hint else self.message

    def renamed(self: Error, name: str) -> Error:
        """Return a copy that calls the option by another name, such as ``--lr``."""
        error = copy.copy(self)
        if self.option is not None:
            # Whole keys only: train.eval is not part of train.eval_steps.
            key = re.compile(rf"(?<![\w.]){re.escape(self.option)}(?![\w]|\.\w)")
            error.message = key.sub(name, self.message)
            error.hint = None if self.hint is None else key.sub(name, self.hint)
        error.option = name
        return error


class ConfigError(FintuneError):
    """A configuration that cannot be used; ``location`` is where it was set, such as ``configs/chat.yaml:12``."""

    def __init__(
        self, message: str, *, hint: str | None = None, option: str | None = None, location: str | None = None
    ) -> None:
        super().__init__(f"{location}: {message}" if location else message, hint=hint, option=option)
        self.location = location

    def renamed(self, name: str) -> ConfigError:
        """Return a copy that calls the option by another name and leaves its location out."""
        error = super().renamed(name)
        if self.location:
            error.message = error.message.removeprefix(f"{self.location}: ")
            error.location = None
        return error


class DataError(FintuneError):
    """A data file that cannot be read, or a row of it: a line of a JSONL file or element of a JSON list, from 1."""

    def __init__(
        self,
        message: str,
        *,
        path: Path | str | None = None,
        row: int | None = None,
        record_id: str | None = None,
        hint: str | None = None,
        option: str | None = None,
    ) -> None:
        parts = ((path, ""), (row, "row "), (record_id, "id "))
        location = ", ".join(f"{word}{part}" for part, word in parts if part is not None)
        super().__init__(f"{location}: {message}" if location else message, hint=hint, option=option)
        self.path, self.row, self.record_id = path, row, record_id


class ModelError(FintuneError):
    """A model or tokenizer that cannot be used."""


class PromptError(ModelError):
    """One of several prompts that a model cannot take: its number, from 1, and the text that follows "prompt 3"."""

    def __init__(self, number: int, problem: str, *, hint: str | None = None) -> None:
        super().__init__(f"prompt {number}{problem}", hint=hint)
        self.number, self.problem = number, problem

    def of(self, name: str) -> ModelError:
        """Return the same error with the prompt's name instead of its number."""
        return ModelError(f"the prompt of {name}{self.problem}", hint=self.hint)


class ArtifactError(FintuneError):
    """A stage's folder that is stale, unfinished or in use."""


class ResourceError(FintuneError):
    """Something that the machine lacks."""
