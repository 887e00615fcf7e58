"""The licence of each data source: as the user says it, as is known, or as a card or licence file beside it says."""

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
"""Licences that ask for no more than a notice."""
_ON_HUB = re.compile(
    r"apache-2\.0|mit|bsd(-[23]-clause)?|isc|unlicense|cc0-1\.0|cc-by(-sa)?-[34]\.0|cc-by-nc(-[sn][ad])?-[34]\.0|cc-by-nd-4\.0"
    r"|[al]?gpl-[23]\.[01]|mpl-2\.0|openrail|gemma|llama[23]|llama3\.[123]|llama4|odc-by|odbl|pddl|unknown|other"
)
"""Names that the hub knows, of those that models and texts usually have."""


class Licence(Record):
    """What a source may be used for.

    Attributes:
        name: ``CC-BY-NC-4.0``, or ``not stated``.
        origin: Who says so.
        non_commercial: Whether it forbids commercial use.
    """

    name: str
    origin: str
    non_commercial: bool


def licence_of(
    stated: str, *, hub_name: str = "", card: str = "", path: Path | None = None, files: Sequence[Path] = ()
) -> Licence:
    """The first that is known.

    Args:
        stated: By the user in the configuration.
        hub_name: ``OWNER/NAME`` of a hub dataset.
        card: What its card says.
        path: File, folder or pattern of a local source; a README.md beside or in it is read, a licence file in it.
        files: What is read there. Those of other folders below it may have a licence of their own; then all are named.
    """
    known = KNOWN.get(hub_name.lower(), "")
    beside = _beside(path, files) if path is not None else ("", "")
    for name, origin in ((stated, "data.sources"), (known, "known"), (card, "its card"), beside):
        if name:
            return Licence(name=name, origin=origin, non_commercial=is_non_commercial(name))
    return Licence(name=NOT_STATED, origin="", non_commercial=False)


def is_non_commercial(name: str) -> bool:
    """Whether a licence's name says that commercial use is forbidden."""
    return bool(_NON_COMMERCIAL.search(name))


def join_licences(names: Iterable[str]) -> str:
    """Licences that hold together, as :func:`combine_licences` takes them apart again; each is named once."""
    return _AND.join(dict.fromkeys(name for name in names if name))


def _beside(path: Path, files: Sequence[Path]) -> tuple[str, str]:
    """What the files' folders and those above them say, up to the source's own; and which of their files say so."""
    root = _root(path)
    said: dict[Path, tuple[str, str]] = {}
    found: dict[tuple[str, str], None] = {}
    for folder in dict.fromkeys([each.parent for each in files] or [root]):
        below = [each for each in (folder, *folder.parents) if each == root or root in each.parents] or [root]
        for each in below:
            if each not in said:
                # A licence file beside a single file may be about something else.
                said[each] = _said_in(each, root, licence_files=each != root or path.is_dir())
        stated = [said[each] for each in reversed(below) if said[each][0]]
        found.update(dict.fromkeys(stated or [(NOT_STATED, "")]))
    if not any(origin for _, origin in found):
        return "", ""
    return join_licences(name for name, _ in found), ", ".join(dict.fromkeys(origin for _, origin in found if origin))


def _root(path: Path) -> Path:
    """The folder that a source means, or that its file or the first variable part of its pattern is in."""
    if path.is_dir():
        return path
    if path.exists():
        return path.parent
    variable = [each for each in (path, *path.parents) if any(letter in each.name for letter in "*?[")]
    return (variable[-1] if variable else path).parent


def _said_in(folder: Path, root: Path, *, licence_files: bool) -> tuple[str, str]:
    before = folder.relative_to(root)
    try:
        card = (folder / "README.md").read_text(encoding="utf-8", errors="replace")[:_CARD_BYTES]
        front = _FRONT_MATTER.match(card.replace("\r\n", "\n"))
        if front and (said := _in_card(front[1])):
            return said, (before / "README.md").as_posix()
    except OSError:
        pass
    for file in sorted(folder.glob("LICEN[CS]E*")) if licence_files else []:
        if file.is_file():
            head = file.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            return (head[0].strip()[:80] if head else ""), (before / file.name).as_posix()
    return "", ""


def _in_card(front: str) -> str:
    said = _CARD_LICENCE.search(front)
    text = said[1].strip() if said else ""
    listed = text.strip("[]").split(",") if text.startswith("[") else text.splitlines()
    name = join_licences(each.strip().removeprefix("- ").strip("\"' ") for each in listed)
    named = _CARD_NAME.search(front) if name == "other" else None
    return named[1].strip("\"' ") if named else name


def combine_licences(base: str, data: Iterable[str]) -> str:
    """The licence of a model: its base's where the data ask for nothing more, else all that ask for something.

    Args:
        base: Licence of the base model, or ``not stated``.
        data: Licence of each source of the training data, likewise; of several, as :func:`join_licences` writes them.

    Returns:
        In the hub's form: ``apache-2.0``; join_licences as in ``llama3.2-and-cc-by-nc-4.0``; what is not stated is
        ``unknown``.
    """
    names = [hub_name(part) for name in (base, *data) for part in name.split(_AND)]
    binding = list(dict.fromkeys(name for name in names if not _FREE.match(name)))
    return "-and-".join(binding) or names[0]


def hub_name(licence: str) -> str:
    """A licence's name as the hub writes them: lower case, no spaces."""
    return "unknown" if licence == NOT_STATED else re.sub(r"[^a-z0-9.]+", "-", licence.lower()).strip("-")


def is_on_hub(name: str) -> bool:
    """Whether the hub's cards know a licence by this name; any other is called ``other`` there, with a name beside."""
    return bool(_ON_HUB.fullmatch(name))
