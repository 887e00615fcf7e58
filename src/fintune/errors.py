"""Every error that this package raises on purpose.

::

    FintuneError            a user's mistake or the outside world; the command line prints one line, status 2
    ├── ConfigError         the YAML file or an override: unknown key, wrong type, impossible combination
    ├── DataError           a data file: missing, truncated, a bad row (carries file, row and id)
    ├── ModelError          a model reference: no such folder or id, no weights, no tokenizer, wrong family
    │   └── PromptError     a prompt that a model cannot take (carries its number)
    ├── ArtifactError       a run folder: stale, unfinished, or held by another process
    └── ResourceError       the machine: disk too small, network unreachable, no GPU, package missing

A message says what is wrong and where; ``hint`` says what to do. Anything else that escapes is a bug of ours and
keeps its traceback.
"""

from __future__ import annotations

from pathlib import Path


class FintuneError(Exception):
    """Base of the tree.

    Args:
        message: What is wrong and where, without a final full stop.
        hint: What the reader can do about it, or None where the message already says so.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}: {self.hint}" if self.hint else self.message


class ConfigError(FintuneError):
    """A configuration that cannot be used."""


class DataError(FintuneError):
    """A data file that cannot be read, or a row of it.

    Args:
        message: What is wrong, without the place.
        path: The file.
        row: 1-based row (line of a JSONL, element of a JSON list), or None where the whole file is meant.
        record_id: The record's id, where it has one.
        hint: What to do.
    """

    def __init__(
        self,
        message: str,
        *,
        path: Path | str | None = None,
        row: int | None = None,
        record_id: str | None = None,
        hint: str | None = None,
    ) -> None:
        place = ", ".join(
            part
            for part in (
                str(path) if path is not None else "",
                f"row {row}" if row is not None else "",
                f"id {record_id}" if record_id is not None else "",
            )
            if part
        )
        super().__init__(f"{place}: {message}" if place else message, hint=hint)
        self.path, self.row, self.record_id = path, row, record_id


class ModelError(FintuneError):
    """A model or tokenizer that cannot be used."""


class PromptError(ModelError):
    """One of several prompts that a model cannot take.

    Args:
        number: Which, from 1.
        problem: What is wrong with it, as it follows "prompt 3".
        hint: What to do.
    """

    def __init__(self, number: int, problem: str, *, hint: str | None = None) -> None:
        super().__init__(f"prompt {number}{problem}", hint=hint)
        self.number, self.problem = number, problem

    def of(self, name: str) -> ModelError:
        """The same about a prompt whose name the caller knows."""
        return ModelError(f"the prompt of {name}{self.problem}", hint=self.hint)


class ArtifactError(FintuneError):
    """A stage's folder that is stale, unfinished or in use."""


class ResourceError(FintuneError):
    """Something that the machine lacks."""
