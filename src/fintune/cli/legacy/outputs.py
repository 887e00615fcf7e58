"""Results of a run at the paths that the older commands' flags name.

A file there is the run's if its content is that of the run's own file. Only such a file is deleted, when the run's new
result is complete. Any other file stops the command before its work starts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import filecmp
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fintune.errors import ArtifactError, ConfigError, ResourceError
from fintune.manifest import MANIFEST
from fintune.models.folder import MODEL_FILES
from fintune.pipeline.step import Step
from fintune.util.disk import nearest_existing


@dataclasses.dataclass(frozen=True)
class Output:
    """The result of a stage (``source``, in the run's folder) that a flag puts at another path.

    Where the disk allows it, these are hard links to the run's files, unless ``is_copy``. Writing into links changes
    the run.
    """

    flag: str
    path: Path
    stage: str
    source: Path
    is_folder: bool = True
    is_copy: bool = False

    def pairs(self) -> list[tuple[Path, Path]]:
        """Return the run's files with their paths at the output. No library loads a folder before its last file."""
        if not self.is_folder:
            return [(self.source, self.path)] if self.source.is_file() else []
        files = sorted(file for file in self.source.glob("*") if file.is_file() and file.name != MANIFEST)
        return [(file, self.path / file.name) for file in sorted(files, key=lambda file: file.name == "config.json")]

    def write(self, *, overwrite: bool = False) -> None:
        """Put the run's files at the output. A file appears there when it is complete."""
        for source, target in self.pairs():
            if _is_same(source, target):
                continue
            if os.path.lexists(target) and not (overwrite and target.is_file() and not target.is_symlink()):
                hint = f"move it elsewhere and run the same command again; the run's file is {source}"
                raise ArtifactError(f"{target} exists and is not a file of the run", hint=hint)
            part = target.with_name(f".{target.name}.part")
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                part.unlink(missing_ok=True)
                _copy_or_link(source, part, is_copy=self.is_copy)
                part.replace(target)
            except OSError as error:
                part.unlink(missing_ok=True)
                hint = f"{source} is complete: free some space or name another path, and run the same command again"
                raise ResourceError(f"{target} cannot be written ({error.strerror or error})", hint=hint) from None


def replaces(step: Step, outputs: Sequence[Output]) -> Step:
    """Return the step so that it deletes its former files at the outputs when its new result is complete."""

    def run(*arguments: Any) -> dict[str, Any]:
        facts = step.run(*arguments)
        pairs = [pair for output in outputs if output.stage == step.name for pair in reversed(output.pairs())]
        for source, target in pairs:
            if _is_same(source, target):
                target.unlink()
        return facts

    return dataclasses.replace(step, run=run)


def check(outputs: Sequence[Output], run: Path, data: Path, *, overwrite: bool = False) -> None:
    """Refuse outputs that would overwrite something, be read as data, or cannot be written. Nothing is touched."""
    for output in outputs:
        for reason in _reasons(output, outputs, run, data, overwrite):
            raise ConfigError(f"{output.flag} {output.path}: {reason}", hint="name another path, or move what is there")


def _reasons(output: Output, outputs: Sequence[Output], run: Path, data: Path, overwrite: bool) -> Iterator[str]:
    path, folder = output.path.resolve(), nearest_existing(output.path if output.is_folder else output.path.parent)
    for other in (other for other in outputs if other.flag != output.flag):
        if path == other.path.resolve() or (not output.is_folder and other.path.resolve().is_relative_to(path)):
            yield f"{other.flag} {other.path} needs the same path"
    if path.is_relative_to(run.resolve()):
        yield f"it is inside {run}, the folder of the run"
    if output.is_folder and path.is_relative_to(data.resolve()):
        yield f"it is inside {data}, whose files are all read as data"
    if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        yield f"{folder} is not a folder that can be written to"
    sources = {target: source for one in outputs if one.flag == output.flag for source, target in one.pairs()}
    found = {file for name in MODEL_FILES for file in output.path.glob(name)} if output.is_folder else {output.path}
    for file in [] if overwrite else sorted(found | {*sources}):
        if os.path.lexists(file) and not _is_same(sources.get(file), file):
            yield f"{file} exists and is not a file of the run in {run}"


def _is_same(source: Path | None, target: Path) -> bool:
    if source is None or not source.is_file() or not target.is_file():
        return False
    return target.samefile(source) or filecmp.cmp(source, target, shallow=False)


def _copy_or_link(source: Path, part: Path, *, is_copy: bool) -> None:
    if not is_copy:
        with contextlib.suppress(OSError):  # another disk, or a file system without links
            os.link(source, part)
            return
    shutil.copyfile(source, part)
