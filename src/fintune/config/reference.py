"""``docs/options.md``: every option with its type, default and meaning, from the fields themselves."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic.fields import FieldInfo

from fintune.config import Config, Options, is_neutral
from fintune.config.load import fields

_HEAD = """# Options

One YAML file holds a run's options in sections; a dotted `key=value` on the command line overrides one of them:

```
fintune run configs/demo.yaml train.learning_rate=1e-4 run.name=lower-rate
```

`fintune config show CONFIG` prints every value and where it came from. An unknown key is an error. Options marked °
cannot change a result; all others belong to the fingerprint that decides whether a stage is up to date.

This page is written by `fintune config reference` from `src/fintune/config/`.
"""


def options_page() -> str:
    """The page as Markdown."""
    lines = [_HEAD]
    section = ""
    for key, field in fields():
        parent, _, leaf = key.rpartition(".")
        if parent != section:
            section = parent
            lines += [
                f"\n## {section}\n",
                f"{_section_meaning(section)}\n",
                "| option | type | default | meaning |",
                "|---|---|---|---|",
            ]
        mark = "°" if is_neutral(field) else ""
        default = field.get_default(call_default_factory=True)
        lines.append(f"| `{leaf}`{mark} | {_shown_type(field)} | {_default(default)} | {field.description} |")
    for key, field in fields():
        for entry in get_args(field.annotation):
            if isinstance(entry, type) and issubclass(entry, Options):
                lines += _entries(key, entry)
    return "\n".join(lines) + "\n"


def _entries(key: str, model: type[Options]) -> list[str]:
    """The table of what an entry of a list holds."""
    rows = [
        f"| `{name}` | {_type(str(field.annotation))} | {_entry_default(field)} | {field.description} |"
        for name, field in model.model_fields.items()
    ]
    return [
        f"\n## {key}[]\n",
        f"{str(model.__doc__).strip().splitlines()[0]}\n",
        "| key | type | default | meaning |",
        "|---|---|---|---|",
        *rows,
    ]


def _entry_default(field: FieldInfo) -> str:
    return "required" if field.is_required() else _default(field.get_default(call_default_factory=True))


def _section_meaning(section: str) -> str:
    model: Any = Config
    for part in section.split("."):
        model = model.model_fields[part].annotation
    return str(model.__doc__).strip().splitlines()[0]


def _shown_type(field: FieldInfo) -> str:
    extra = field.json_schema_extra
    said = extra.get("shown_type") if isinstance(extra, dict) else None  # where the annotation is no reading
    return said if isinstance(said, str) else _type(str(field.annotation))


def _type(annotation: str) -> str:
    plain = re.sub(r"typing\.|pathlib\.(?:_local\.)?|<class '|'>", "", annotation)
    plain = re.sub(r"Optional\[(.*)\]", r"\1 | None", plain).replace("Path", "path")
    plain = re.sub(r"Literal\[([^\]]*)\]", lambda found: found[1].replace("', '", " or ").replace("'", ""), plain)
    plain = re.sub(r"tuple\[(.*), \.\.\.\]", r"list of \1", plain)
    plain = re.sub(r"(\w+\.)+SourceOptions", "entries", plain).replace("dict[str, str]", "names by name")
    return plain.replace("| None", "or empty").replace("|", "or")


def _default(value: object) -> str:
    if value is None or value in ("", {}, ()):
        return ""
    if isinstance(value, Path):
        return f"`{value}`"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"
