"""``docs/options.md``: every option with its type, default and meaning, generated from the fields."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic.fields import FieldInfo

from fintune.config import Config, Options, is_advanced, is_neutral
from fintune.config.load import fields

_HEAD = """# Options

A YAML file sets the options of a run, in sections. A dotted `key=value` on the command line overrides one option:

```
fintune run configs/demo.yaml train.learning_rate=1e-4 run.name=lower-rate
```

`fintune init` writes a file to start from. `fintune config show CONFIG` prints every option with its value and origin;
with `--changed`, only those that differ from the defaults. An unknown key is an error.

Options marked ° cannot change a result. All others are part of the fingerprint that decides whether a stage is up to
date. Options that few users set are in [a table of their own](#advanced).

This page is generated: `fintune config reference > docs/options.md`.
"""
_ADVANCED = "Options that few users set. They go into the same sections: `train.machines` is `machines` in `train:`."
_COLUMNS = ("| option | type | default | meaning |", "|---|---|---|---|")


def options_page() -> str:
    """Return the page as Markdown."""
    lines = [_HEAD]
    section = ""
    for key, field in fields():
        parent, _, name = key.rpartition(".")
        if is_advanced(field):
            continue
        if parent != section:
            section = parent
            model: Any = Config
            for part in section.split("."):
                model = model.model_fields[part].annotation
            lines += [f"\n## {section}\n", f"{model.__doc__.splitlines()[0]}\n", *_COLUMNS]
        lines.append(_row(name, field))
    lines += ["\n## advanced\n", f"{_ADVANCED}\n", *_COLUMNS]
    lines += [_row(key, field) for key, field in fields() if is_advanced(field)]
    for key, field in fields():
        for entry in get_args(field.annotation):
            if isinstance(entry, type) and issubclass(entry, Options):
                first = str(entry.__doc__).splitlines()[0]
                lines += [f"\n## {key}[]\n", f"{first}\n", _COLUMNS[0].replace("option", "key"), _COLUMNS[1]]
                lines += [_row(name, option) for name, option in entry.model_fields.items()]
    return "\n".join(lines) + "\n"


def _row(name: str, field: FieldInfo) -> str:
    mark = "°" if is_neutral(field) else ""
    extra = field.json_schema_extra
    shown = extra.get("shown_type") if isinstance(extra, dict) else None  # for annotations that are hard to read
    default = "required" if field.is_required() else _default(field.get_default(call_default_factory=True))
    meaning = " ".join(str(field.description).split())
    return f"| `{name}`{mark} | {shown or _type(str(field.annotation))} | {default} | {meaning} |"


def _type(annotation: str) -> str:
    plain = re.sub(r"typing\.|pathlib\.(?:_local\.)?|<class '|'>", "", annotation)
    plain = re.sub(r"Optional\[(.*)\]", r"\1 | None", plain).replace("Path", "path")
    plain = re.sub(r"Literal\[([^\]]*)\]", lambda match: match[1].replace("', '", " or ").replace("'", ""), plain)
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
