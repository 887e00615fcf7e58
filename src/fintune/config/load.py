"""Load a YAML file and ``key=value`` overrides into a checked :class:`~fintune.config.Config`.

Overrides win over the file, and the file over the defaults. The origin of every value is kept. Files are YAML 1.2, in
which ``1e-5`` is a number and ``no`` a string.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from ruamel.yaml.error import YAMLError

from fintune.config import Config, Options, is_neutral
from fintune.config.other_names import suggest_key, suggest_option
from fintune.config.yaml_file import parse_yaml, read_yaml
from fintune.errors import ConfigError

_MAX_NAME_BYTES = 200
DEFAULT = "default"
OVERRIDE = "command line"
_OPTION = re.compile(r"[a-z_]+(?:\.[a-z0-9_]+)+")
_METHODS = {
    "adapter.kind=qlora": "; QLoRA is adapter.kind=lora model.quantization=nf4",
    "adapter.kind=qdora": "; QDoRA is adapter.kind=dora model.quantization=nf4",
}
"""Names of methods that are two options here."""


@dataclass(frozen=True)
class Loaded:
    """A configuration and the origin of its values.

    Attributes:
        origin: Location by dotted key, ``"configs/demo.yaml:12"`` or ``"command line"``. A key that is not in it has
            its default value.
    """

    config: Config
    origin: Mapping[str, str]
    path: Path | None

    def changed(self) -> set[str]:
        """Return the dotted keys of all options whose value is not the default."""
        defaults = flat(Config())
        return {key for key, value in flat(self.config).items() if value != defaults[key]}


def load(path: Path | None, overrides: Sequence[str] = ()) -> Loaded:
    """Load a YAML file (None: the defaults) and apply overrides, ``dotted.key=value`` with values in YAML.

    Raises:
        ConfigError: Missing or malformed file, unknown option (with a suggestion), wrong type, or options that do not
            work together.
    """
    tree, lines = read_yaml(path) if path is not None else ({}, {})
    if path is not None and not tree and not overrides:
        raise ConfigError(
            f"{path} is empty",
            hint="write at least model and data (`fintune init` writes an example); `fintune demo` needs no file",
        )
    values, origin = dict(_options(tree, lines.get)), dict(lines)
    for override in overrides:
        key, tree = _parse_override(override)
        for option, value in _options(tree, lambda _: OVERRIDE):
            before = values.get(option) or {}
            # data.columns.question=... adds to data.columns
            is_entry = key != option and isinstance(value, dict) and isinstance(before, dict)
            values[option] = {**before, **value} if is_entry else value
            origin[option] = OVERRIDE
    try:
        # JSON mode is strict about scalars ("3" is not a number) but accepts a list for a tuple.
        config = Config.model_validate_json(json.dumps(_nested(values)), strict=True)
    except ValidationError as error:
        raise _explain(error, origin) from None
    if not config.run.name:
        name = path.stem if path is not None else "run"
        config = config.model_copy(update={"run": config.run.model_copy(update={"name": name})})
        if path is not None:
            origin["run.name"] = f"{path}, its name"
    is_folder_name = Path(config.run.name).name == config.run.name and config.run.name.isprintable()
    if not is_folder_name or config.run.name.startswith(".") or len(config.run.name.encode()) > _MAX_NAME_BYTES:
        raise ConfigError(
            f"run.name: {config.run.name!r} is not a folder name",
            hint="set run.dir for the path before it",
            option="run.name",
            location=origin.get("run.name"),
        )
    return Loaded(config, origin, path)


def load_config(path: Path | str | None = None, *overrides: str) -> Config:
    """Load a configuration; the arguments and errors are those of :func:`load`."""
    return load(None if path is None else Path(path), overrides).config


def fields(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield all options as (dotted key, field), in the order in which they are declared."""
    for name, field in model.model_fields.items():
        section = _section(field)
        if section is not None:
            yield from fields(section, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def flat(config: Config) -> dict[str, Any]:
    """Return all values by dotted key, as JSON values."""
    tree = config.model_dump(mode="json")
    values = {}
    for key, _ in fields():
        node: Any = tree
        for part in key.split("."):
            node = node[part]
        values[key] = node
    return values


def display_values(config: Config) -> dict[str, Any]:
    """Return the values of :func:`flat` for display: entries of ``data.sources`` without their defaults."""
    entries = [source.model_dump(mode="json", exclude_defaults=True) for source in config.data.sources]
    return flat(config) | {"data.sources": [entry["path"] if len(entry) == 1 else entry for entry in entries]}


def effective(config: Config, prefixes: Sequence[str]) -> dict[str, Any]:
    """Return the values below any of the prefixes (``"train"``, ``"data.eval"``) that can change a result."""
    values = flat(config)
    return {
        key: values[key]
        for key, field in fields()
        if not is_neutral(field) and any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)
    }


def _section(field: FieldInfo) -> type[Options] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Options) else None


def _parse_override(override: str) -> tuple[str, dict[str, Any]]:
    """Parse ``a.b=value`` into its key and the tree ``{"a": {"b": value}}``."""
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        raise ConfigError(
            f"{override!r}: not an override", hint="write dotted.key=value, for example train.learning_rate=1e-4"
        )
    try:
        value = parse_yaml(text, "safe") if text.strip() else None
    except YAMLError:
        hint = "quote it, for example 'run.name=\"a: b\"'"
        raise ConfigError(
            f"{override!r}: the value is not valid YAML", hint=hint, option=key, location=OVERRIDE
        ) from None
    return key, _nested({key: json.loads(json.dumps(value, default=str))})


def _options(
    tree: Mapping[str, Any],
    locate: Callable[[str], str | None],
    model: type[BaseModel] = Config,
    prefix: str = "",
) -> Iterator[tuple[str, Any]]:
    """Yield the options of a tree of sections as (dotted key, value).

    A section that is null (all its lines are comments) has no options. A list of names may be one name or names with
    commas between them.
    """
    for name, value in tree.items():
        key = f"{prefix}{name}"
        field, where = model.model_fields.get(name), locate(key)
        if field is None:
            hint = suggest_option(
                prefix, name, [*model.model_fields], [option for option, _ in fields()], [*Config.model_fields]
            )
            raise ConfigError(f"unknown option {key}", hint=hint, option=key, location=where)
        section, kind = _section(field), field.annotation
        if section is None:
            is_list = get_origin(kind) is tuple and not hasattr(get_args(kind)[0], "model_fields")
            is_text = is_list and isinstance(value, str)
            yield key, [name.strip() for name in value.split(",") if name.strip()] if is_text else value
        elif isinstance(value, Mapping):
            yield from _options(value, locate, section, f"{key}.")
        elif value is not None or where == OVERRIDE:
            example = f"{key}.{next(iter(section.model_fields))}"
            raise ConfigError(
                f"{key} is a section, not a value", hint=f"set for example {example}", option=key, location=where
            )


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *sections, name = key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = value
    return tree


def _explain(error: ValidationError, origin: Mapping[str, str]) -> ConfigError:
    """Turn the first problem that pydantic found into an error about an option."""
    first, known = error.errors()[0], dict(fields())
    loc, value = first["loc"], first["input"]
    key = ".".join(part for part in loc if isinstance(part, str))
    while key not in known and key not in origin and "." in key:
        key = key.rsplit(".", 1)[0]
    location = origin.get(key)
    if first["type"] == "value_error":
        text = str(first["ctx"]["error"])
        # A rule about several options belongs to none of them. Its message names the options.
        named = [name for name in _OPTION.findall(text) if name in known]
        chosen = next((name for name in named if name in origin), None)
        if key not in known:
            key, location = chosen or next(iter(named), ""), origin.get(chosen or "", location)
        return ConfigError(text, option=key or None, location=location)
    is_entry = any(isinstance(part, int) for part in loc[:-1])
    if is_entry:
        key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc)[1:]
    if first["type"] == "extra_forbidden":
        field = known.get(".".join(map(str, loc[:-2])))
        models = [kind for kind in get_args(field.annotation) if hasattr(kind, "model_fields")] if field else []
        hint = suggest_key(str(loc[-1]), [*models[0].model_fields]) if models else None
        return ConfigError(f"unknown option {key}", hint=hint, option=key, location=location)
    if first["type"] == "missing" and is_entry:
        return ConfigError(f"{key} is missing", option=key, location=location)
    hint = first["msg"][0].lower() + first["msg"][1:] + _METHODS.get(f"{key}={value}".lower(), "")
    if key == "data.source" and isinstance(value, str) and any(mark in value for mark in "./*"):
        hint = (
            f"data.source is finqa, chat or builtin:statements; for a file write data.source=chat data.sources={value}"
        )
    return ConfigError(f"{key}: got {json.dumps(value, default=str)}", hint=hint, option=key, location=location)
