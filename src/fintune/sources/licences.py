"""The licence of each data source: as the user says it, as is known, or as a card or licence file beside it says."""

from __future__ import annotations

import re
from pathlib import Path

from fintune.records import Record

NOT_STATED = "not stated"
KNOWN = {"finlang/investopedia-instruction-tuning-dataset": "CC-BY-NC-4.0"}
"""Licences of hub datasets, by name in lower case."""
_NON_COMMERCIAL = re.compile(r"(?<![a-z])nc(?![a-z])|non[\s-]?commercial|research[\s-]only", re.IGNORECASE)
_CARD_LICENCE = re.compile(r"^licen[sc]e:\s*(.+?)\s*$", re.MULTILINE)
_FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---", re.DOTALL)
_CARD_BYTES = 20_000


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


def licence_of(stated: str, *, hub_name: str = "", card: str = "", path: Path | None = None) -> Licence:
    """The first that is known.

    Args:
        stated: By the user in the configuration.
        hub_name: ``OWNER/NAME`` of a hub dataset.
        card: What its card says.
        path: File or folder of a local source; a README.md or licence file is looked for beside or in it.
    """
    known = KNOWN.get(hub_name.lower(), "")
    beside = _beside(path) if path is not None else ("", "")
    for name, origin in ((stated, "data.sources"), (known, "known"), (card, "its card"), beside):
        if name:
            return Licence(name=name, origin=origin, non_commercial=is_non_commercial(name))
    return Licence(name=NOT_STATED, origin="", non_commercial=False)


def is_non_commercial(name: str) -> bool:
    """Whether a licence's name says that commercial use is forbidden."""
    return bool(_NON_COMMERCIAL.search(name))


def _beside(path: Path) -> tuple[str, str]:
    folder = path if path.is_dir() else path.parent
    try:
        card = (folder / "README.md").read_text(encoding="utf-8", errors="replace")[:_CARD_BYTES]
        front = _FRONT_MATTER.match(card.replace("\r\n", "\n"))
        if front and (said := _CARD_LICENCE.search(front[1])):
            return said[1].strip("\"'"), "README.md"
    except OSError:
        pass
    for file in sorted(folder.glob("LICEN[CS]E*")) if path.is_dir() else []:
        if file.is_file():
            head = file.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            return (head[0].strip()[:80] if head else ""), file.name
    return "", ""
