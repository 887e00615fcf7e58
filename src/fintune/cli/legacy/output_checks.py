"""Where the finance commands' flags put results, looked at before any work: hours of it must not end in a refusal.

Nothing that is read is written to, nothing of the user's is replaced, and each disk has room for what goes there.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fintune.cli.legacy import outputs as files
from fintune.cli.legacy.owned_files import Record
from fintune.errors import ConfigError
from fintune.models.folder import MODEL_FILES, TOKENIZER_FILES
from fintune.util.disk import nearest_existing, require_space

_ADAPTER_FILES = ("adapter_config.json", "adapter_model*.safetensors")


@dataclass(frozen=True)
class Place:
    """What a flag names.

    Attributes:
        flag: ``--merged_model_dir``.
        path: As the user wrote it.
        kind: adapter or merged, which are folders, or gguf.
        step: Whose result it is.
        source: That result in the run: a folder's, or the file.
        predicted_bytes: How large it will be; may look at the base model.
    """

    flag: str
    path: Path
    kind: str
    step: str
    source: Path
    predicted_bytes: Callable[[], int] = lambda: 0

    @property
    def is_folder(self) -> bool:
        """Whether files are put into it."""
        return self.kind != "gguf"

    @property
    def words(self) -> str:
        """The flag with its value."""
        return f"{self.flag} {self.path}"

    def pairs(self) -> Iterator[tuple[Path, Path]]:
        """Files of the finished result, each with its place."""
        if not self.is_folder:
            yield from [(self.source, self.path)] * self.source.is_file()
        elif self.source.is_dir():
            for path in sorted(self.source.iterdir()):
                if path.is_file() and path.name != "manifest.json":
                    yield path, self.path / path.name


def check(places: Sequence[Place], read: Mapping[str, Path], run: Path) -> None:
    """Refuse places that cannot be meant; touches nothing.

    Args:
        places: What will be written.
        read: Files and folders that are read, by the flag that names them.
        run: Folder of the run.

    Raises:
        ConfigError: Two that are the same, one that is read or that the run uses, one that cannot be written, a file
            there that these commands did not lay out.
    """
    for number, place in enumerate(places):
        _refuse_read(place, read, run.resolve())
        _refuse_unwritable(place)
        for other in places[:number]:
            _refuse_both(other, place)
        _refuse_foreign(place, run)


def _refuse_read(place: Place, read: Mapping[str, Path], run: Path) -> None:
    path = place.path.resolve()
    for flag, other in read.items():
        if path == other.resolve():
            raise ConfigError(f"{place.words}: is what {flag} names, and would be overwritten", hint=_another(place))
    data = read.get("--dataset_folder")
    if place.is_folder and data is not None and path.is_relative_to(data.resolve()):
        raise ConfigError(
            f"{place.words}: lies in --dataset_folder {data}, whose files are all read as data", hint=_another(place)
        )
    if path.is_relative_to(run):
        raise ConfigError(f"{place.words}: lies in the folder of the run, {run}", hint=_another(place))


def _refuse_both(one: Place, other: Place) -> None:
    a, b = one.path.resolve(), other.path.resolve()
    if a == b:
        raise ConfigError(f"{one.flag} and {other.flag} both name {other.path}", hint=_another(other))
    for file, inner in ((one, b), (other, a)):
        if not file.is_folder and inner.is_relative_to(file.path.resolve()):
            raise ConfigError(f"{file.words}: is to be a file, and another output lies below it", hint=_another(file))


def _refuse_unwritable(place: Place) -> None:
    if not place.is_folder and place.path.is_dir():
        raise ConfigError(f"{place.words}: is a folder, not a file", hint=f"name a file in it: {place.path}/NAME.gguf")
    folder = nearest_existing(place.path if place.is_folder else place.path.parent)
    if not folder.is_dir():
        raise ConfigError(f"{place.words}: {folder} is a file, not a folder", hint=_another(place))
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"{place.words}: {folder} may not be written to", hint=_another(place))


def _refuse_foreign(place: Place, run: Path) -> None:
    foreign = [path for path in _in_the_way(place, run) if not _is_ours(path, dict(_turned(place)).get(path))]
    if not foreign:
        return
    if not place.is_folder:
        raise ConfigError(
            f"{place.words}: there is a file already, which these commands did not lay out",
            hint="move it elsewhere, or name another file",
        )
    more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
    raise ConfigError(
        f"{place.words}: holds {foreign[0].name}{more}, which these commands did not lay out",
        hint="move it elsewhere, or name another folder",
    )


def _in_the_way(place: Place, run: Path) -> list[Path]:
    if not place.is_folder:
        return [place.path] if os.path.lexists(place.path) else []
    patterns: tuple[str, ...] = MODEL_FILES
    if place.kind == "adapter":
        # Before there was a record, a tokenizer was laid out whose content is known when it has been loaded.
        recorded = Record(place.path).path.exists() or not (run / "train").is_dir()
        patterns = (*_ADAPTER_FILES, *(TOKENIZER_FILES if recorded else ()))
    found = {path for pattern in patterns for path in place.path.glob(pattern)}
    return sorted(found | {target for _, target in place.pairs() if os.path.lexists(target)})


def _turned(place: Place) -> Iterator[tuple[Path, Path]]:
    return ((target, source) for source, target in place.pairs())


def _is_ours(path: Path, source: Path | None) -> bool:
    if Record(path.parent).owns(path):
        return True
    return source is not None and files.is_there(source, path, link=True)


def try_out(places: Sequence[Place]) -> None:
    """Write and delete an empty file on each place's file system: not all say beforehand that they refuse.

    Raises:
        ConfigError: One that refuses.
    """
    for place in places:
        folder = nearest_existing(place.path if place.is_folder else place.path.parent)
        try:
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise ConfigError(
                f"{place.words}: {folder} cannot be written to ({error.strerror or error})", hint=_another(place)
            ) from None


def adopt(places: Sequence[Place]) -> None:
    """Record what is the run's own file although no record says so, before the run may make another."""
    for place in places:
        for source, target in place.pairs():
            record = Record(target.parent)
            if not record.owns(target) and _is_ours(target, source):
                record.add(target, as_in=target, kind=place.kind)


def check_space(places: Sequence[Place], words: Callable[[], Mapping[str, str]], run: Path) -> None:
    """Refuse to start where another disk than the run's, to which files are copied, has no room for them.

    Args:
        places: What will be written.
        words: Gives what will be done about each step, as ``Pipeline.preview`` has it; asked where it matters.
        run: Folder of the run, whose disk the pipeline looks at.

    Raises:
        ResourceError: With the flags, the bytes and the place.
    """
    elsewhere: dict[int, list[Place]] = {}
    for place in places:
        if (disk := device(place.path)) != device(run):
            elsewhere.setdefault(disk, []).append(place)
    for there in elsewhere.values():
        done = words()
        needed = sum(_needed_bytes(place, done.get(place.step, "run")) for place in there)
        flags = " and ".join(place.words for place in there)
        require_space(
            there[0].path if there[0].is_folder else there[0].path.parent,
            needed,
            f"a copy as {flags}",
            way_out="name a place on the run's disk, where links take no room",
        )


def _needed_bytes(place: Place, word: str) -> int:
    if not word.startswith(("skipped", "up to date")):
        return place.predicted_bytes()
    missing = (source for source, target in place.pairs() if not files.is_there(source, target, link=True))
    return sum(path.stat().st_size for path in missing)


def device(path: Path) -> int:
    """Number of the file system that a path is or will be on."""
    return nearest_existing(path).stat().st_dev


def _another(place: Place) -> str:
    return f"name another {'folder' if place.is_folder else 'file'}"
