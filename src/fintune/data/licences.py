"""The licence of a data source: from the configuration, a table, the dataset's card, or files next to the data."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from fintune.records import Record

NOT_STATED = "not stated"
KNOWN = {"finlang/investopedia-instruction-tuning-dataset": "CC-BY-NC-4.0"}
"""Licences of hub datasets, by name in lower case."""
_NON_COMMERCIAL = re.compile(r"(?<![a-z])nc(?![a-z])|non[\s-]?commercial|research[\s-]only", re.IGNORECASE)
_CARD_LICENCE = re.compile(r"^licen[sc]e:[ \t]*(.*(?:\n[ \t]*- .+)*)", re.MULTILINE)
_CARD_NAME = re.compile(r"^licen[sc]e_name:[ \t]*(.+)", re.MULTILINE)
_FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---", re.DOTALL)
_CARD_BYTES = 20_000
_AND = " and "
_FREE = re.compile(r"(apache|mit|bsd|isc|unlicense|zlib|cc0|pddl|cc-by-\d|odc-by)(?![a-z])|public-domain")
"""Licences that require no more than a notice."""
_ON_HUB = re.compile(
    r"apache-2\.0|mit|bsd(-[23]-clause)?|isc|unlicense|cc0-1\.0|cc-by(-sa)?-[34]\.0|cc-by-nc(-[sn][ad])?-[34]\.0|cc-by-nd-4\.0"
    r"|[al]?gpl-[23]\.[01]|mpl-2\.0|openrail|gemma|llama[23]|llama3\.[123]|llama4|odc-by|odbl|pddl|unknown|other"
)
"""Names of licences on the hub that models and texts usually have."""


class Licence(Record):
    """The licence of a source.

    Attributes:
        name: The licence, as ``CC-BY-NC-4.0``, or ``not stated``.
        origin: Where it is stated.
        non_commercial: Whether it forbids commercial use.
    """

    name: str
    origin: str
    non_commercial: bool


def licence_of(
    stated: str, *, hub_name: str = "", card: str = "", path: Path | None = None, files: Sequence[Path] = ()
) -> Licence:
    """Return the first licence that is stated, in the order of the arguments.

    Args:
        stated: The licence in the configuration.
        hub_name: ``OWNER/NAME`` of a hub dataset.
        card: The licence on the dataset's card.
        path: File, folder or pattern of a local source. A README.md next to it or in it is read, and a licence file in
            it.
        files: The files of the source. Files in subfolders may have licences of their own, and then all are joined.
    """
    known = KNOWN.get(hub_name.lower(), "")
    local = _licence_in_folders(path, files) if path is not None else ("", "")
    for name, origin in ((stated, "data.sources"), (known, "known"), (card, "its card"), local):
        if name:
            return Licence(name=name, origin=origin, non_commercial=is_non_commercial(name))
    return Licence(name=NOT_STATED, origin="", non_commercial=False)


def is_non_commercial(name: str) -> bool:
    """Whether the name of a licence says that it forbids commercial use."""
    return bool(_NON_COMMERCIAL.search(name))


def join_licences(names: Iterable[str]) -> str:
    """Join licences that hold together, each once. :func:`combine_licences` splits them again."""
    return _AND.join(dict.fromkeys(name for name in names if name))


def _licence_in_folders(path: Path, files: Sequence[Path]) -> tuple[str, str]:
    """Return the licences in the folders of the files and in those above, up to the source's own, and their origins."""
    root = _source_folder(path)
    stated: dict[Path, tuple[str, str]] = {}
    licences: dict[tuple[str, str], None] = {}
    for parent in dict.fromkeys([file.parent for file in files] or [root]):
        folders = [folder for folder in (parent, *parent.parents) if folder == root or root in folder.parents] or [root]
        for folder in folders:
            if folder not in stated:
                # A licence file next to a single file may be about something else.
                stated[folder] = _licence_in_folder(folder, root, licence_files=folder != root or path.is_dir())
        here = [stated[folder] for folder in reversed(folders) if stated[folder][0]]
        licences.update(dict.fromkeys(here or [(NOT_STATED, "")]))
    if not any(origin for _, origin in licences):
        return "", ""
    origins = dict.fromkeys(origin for _, origin in licences if origin)
    return join_licences(name for name, _ in licences), ", ".join(origins)


def _source_folder(path: Path) -> Path:
    """Return the folder of a source: itself, that of its file, or the one above the first wildcard of a pattern."""
    if path.is_dir():
        return path
    if path.exists():
        return path.parent
    wildcards = [part for part in (path, *path.parents) if any(letter in part.name for letter in "*?[")]
    return (wildcards[-1] if wildcards else path).parent


def _licence_in_folder(folder: Path, root: Path, *, licence_files: bool) -> tuple[str, str]:
    prefix = folder.relative_to(root)
    try:
        card = (folder / "README.md").read_text(encoding="utf-8", errors="replace")[:_CARD_BYTES]
        front = _FRONT_MATTER.match(card.replace("\r\n", "\n"))
        if front and (name := _licence_on_card(front[1])):
            return name, (prefix / "README.md").as_posix()
    except OSError:
        pass
    for file in sorted(folder.glob("LICEN[CS]E*")) if licence_files else []:
        if file.is_file():
            head = file.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            return (head[0].strip()[:80] if head else ""), (prefix / file.name).as_posix()
    return "", ""


def _licence_on_card(front: str) -> str:
    match = _CARD_LICENCE.search(front)
    text = match[1].strip() if match else ""
    items = text.strip("[]").split(",") if text.startswith("[") else text.splitlines()
    name = join_licences(item.strip().removeprefix("- ").strip("\"' ") for item in items)
    full_name = _CARD_NAME.search(front) if name == "other" else None
    return full_name[1].strip("\"' ") if full_name else name


def combine_licences(base: str, data: Iterable[str]) -> str:
    """Return the licence of a model: that of its base, and those of the data that require more than a notice.

    Args:
        base: Licence of the base model, or ``not stated``.
        data: Licence of each source of the training data, or ``not stated``. :func:`join_licences` joins several.

    Returns:
        Names as on the hub: ``apache-2.0``, joined as in ``llama3.2-and-cc-by-nc-4.0``, and ``unknown`` if not stated.
    """
    names = [hub_name(part) for name in (base, *data) for part in name.split(_AND)]
    binding = list(dict.fromkeys(name for name in names if not _FREE.match(name)))
    return "-and-".join(binding) or names[0]


def hub_name(licence: str) -> str:
    """Return the name of a licence as the hub writes it: in lower case, without spaces."""
    return "unknown" if licence == NOT_STATED else re.sub(r"[^a-z0-9.]+", "-", licence.lower()).strip("-")


def is_on_hub(name: str) -> bool:
    """Whether the hub knows a licence by this name. A card calls any other licence ``other``."""
    return bool(_ON_HUB.fullmatch(name))
