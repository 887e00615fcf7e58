"""The licence of each data source: as the user says it, as is known, or as a card or licence file beside it says."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from fintune.records import Record

NOT_STATED = "not stated"
KNOWN = {"finlang/investopedia-instruction-tuning-dataset": "CC-BY-NC-4.0"}
"""Licences of hub datasets, by name in lower case."""
_NON_COMMERCIAL = re.compile(r"(?<![a-z])nc(?![a-z])|non[\s-]?commercial|research[\s-]only", re.IGNORECASE)
_CARD_LICENCE = re.compile(r"^licen[sc]e:\s*(.+?)\s*$", re.MULTILINE)
_FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---", re.DOTALL)
_CARD_BYTES = 20_000
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


def combined(base: str, data: Iterable[str]) -> str:
    """The licence of a model: its base's where the data ask for nothing more, else all that ask for something.

    Args:
        base: Licence of the base model, or ``not stated``.
        data: Licence of each source of the training data, likewise.

    Returns:
        In the hub's form: ``apache-2.0``; joined as in ``llama3.2-and-cc-by-nc-4.0``; what is not stated is
        ``unknown``.
    """
    names = [hub_name(name) for name in (base, *data)]
    binding = list(dict.fromkeys(name for name in names if not _FREE.match(name)))
    return "-and-".join(binding) or names[0]


def hub_name(licence: str) -> str:
    """A licence's name as the hub writes them: lower case, no spaces."""
    return "unknown" if licence == NOT_STATED else re.sub(r"[^a-z0-9.]+", "-", licence.lower()).strip("-")


def is_on_hub(name: str) -> bool:
    """Whether the hub's cards know a licence by this name; any other is called ``other`` there, with a name beside."""
    return bool(_ON_HUB.fullmatch(name))
