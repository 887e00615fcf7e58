"""YAML file and ``key=value`` overrides to a checked :class:`~fintune.config.Config`, with the origin of every value.

Defaults < file < overrides. YAML 1.2 is read, in which ``1e-5`` is a number and ``no`` a string.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from fintune.config import Config, Options, is_neutral
from fintune.config.aliases import FIXED, meant
from fintune.config.other_names import RENAMED_IN_SOURCES, renamed
from fintune.config.yaml_file import read
from fintune.errors import ConfigError

DEFAULT = "default"
OVERRIDE = "command line"
_OPTION = re.compile(r"[a-z_]+(?:\.[a-z0-9_]+)+")
_KINDS = {
    "adapter.kind=qlora": "; QLoRA is adapter.kind=lora model.quantization=nf4",
    "adapter.kind=qdora": "; QDoRA is adapter.kind=dora model.quantization=nf4",
}
"""What is called a method elsewhere and is two options here."""


@dataclass(frozen=True)
class Loaded:
    """A configuration and where each of its values came from.

    Attributes:
        config: The checked options.
        origin: Dotted key to ``"configs/demo.yaml:12"`` or ``"command line"``; keys not in it have their default.
        path: The file.
    """

    config: Config
    origin: Mapping[str, str]
    path: Path | None


def load_config(path: Path | str | None = None, *overrides: str) -> Config:
    """Load a configuration.

    Args:
        path: A YAML file; None for the defaults alone.
        overrides: ``dotted.key=value``, with values in YAML.

    Raises:
        ConfigError: As :func:`load`.
    """
    return load(None if path is None else Path(path), overrides).config


def load(path: Path | None, overrides: Sequence[str] = ()) -> Loaded:
    """Read a file and apply overrides.

    Args:
        path: YAML file, or None for defaults alone.
        overrides: ``dotted.key=value``, values in YAML.

    Raises:
        ConfigError: Missing or malformed file, unknown key (with a suggestion), wrong type, impossible combination.
    """
    values, origin = read(path) if path is not None else ({}, {})
    if path is not None and not values and not overrides:
        raise ConfigError(
            f"{path} is empty",
            hint="write at least model and data, see docs/options.md; `fintune demo` runs the built-in example",
        )
    _drop_empty_sections(values, Config)
    for override in overrides:
        for key, value in _leaves(*_split(override)):
            _put(values, key, value, override)
            origin[key] = OVERRIDE
    _refuse_unknown(values, Config, (), origin)
    _names_alone(values, Config)
    try:
        # JSON mode is strict about scalars ("3" is no number) and still takes a list for a tuple.
        config = Config.model_validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        raise _explain(error, origin) from None
    if not config.run.name:
        name = path.stem if path is not None else "run"
        config = config.model_copy(update={"run": config.run.model_copy(update={"name": name})})
        if path is not None:
            origin["run.name"] = f"{path}, its name"
    if Path(config.run.name).name != config.run.name or config.run.name.startswith("."):
        raise ConfigError(
            f"run.name: {config.run.name!r} is not a folder name",
            hint="set run.dir for the path before it",
            option="run.name",
            location=origin.get("run.name"),
        )
    return Loaded(config, origin, path)


def fields(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """All options as (dotted key, field), in the order in which they are declared."""
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Options):
            yield from fields(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def flat(config: Config) -> dict[str, Any]:
    """All values by dotted key, as JSON has them."""
    tree = config.model_dump(mode="json")
    return {key: _get(tree, key) for key, _ in fields()}


def told(config: Config) -> dict[str, Any]:
    """The values of :func:`flat` to look at: of an entry of ``data.sources`` only what is set."""
    entries = [each.model_dump(mode="json", exclude_defaults=True) for each in config.data.sources]
    return flat(config) | {"data.sources": [each["path"] if len(each) == 1 else each for each in entries]}


def effective(config: Config, prefixes: Sequence[str]) -> dict[str, Any]:
    """The values below any of the prefixes (``"train"``, ``"data.max_eval_samples"``) that can change a result."""
    values = flat(config)
    return {
        key: values[key]
        for key, field in fields()
        if not is_neutral(field) and any(key == p or key.startswith(p + ".") for p in prefixes)
    }


def _drop_empty_sections(values: dict[str, Any], model: type[BaseModel]) -> None:
    """A section whose options are all commented out reads as null; its options have their defaults."""
    for name, field in model.model_fields.items():
        kind = field.annotation
        if name in values and isinstance(kind, type) and issubclass(kind, Options):
            if values[name] is None:
                del values[name]
            elif isinstance(values[name], dict):
                _drop_empty_sections(values[name], kind)


def _names_alone(values: dict[str, Any], model: type[BaseModel]) -> None:
    """``F16`` or ``F16, Q4_K_M`` for a list of names becomes that list."""
    for name, field in model.model_fields.items():
        kind, value = field.annotation, values.get(name)
        if isinstance(value, dict) and isinstance(kind, type) and issubclass(kind, Options):
            _names_alone(value, kind)
        elif isinstance(value, str) and get_origin(kind) is tuple and not hasattr(get_args(kind)[0], "model_fields"):
            values[name] = [each.strip() for each in value.split(",") if each.strip()]


def _split(override: str) -> tuple[str, Any]:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        raise ConfigError(
            f"{override!r}: not an override",
            hint="write dotted.key=value, for example train.learning_rate=1e-4",
        )
    try:
        value = YAML(typ="safe").load(text) if text.strip() else None
    except YAMLError:
        raise ConfigError(
            f"{override!r}: the value is not valid YAML", hint="quote it, for example 'run.name=\"a: b\"'"
        ) from None
    return key, json.loads(json.dumps(value, default=str))


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    # `train={epochs: 1}` sets what it names and leaves the rest of the section.
    if isinstance(value, dict) and value and key.partition(".")[0] in Config.model_fields:
        for name, below in value.items():
            yield from _leaves(f"{key}.{name}", below)
    else:
        yield key, value


def _put(values: dict[str, Any], key: str, value: Any, override: str) -> None:
    *parents, last = key.split(".")
    node = values
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"{override!r}: {parent} is a value, not a section", option=key)
        node = child
    node[last] = value


def _get(tree: Mapping[str, Any], key: str) -> Any:
    node: Any = tree
    for part in key.split("."):
        node = node[part]
    return node


def _refuse_unknown(
    values: Mapping[str, Any], model: type[BaseModel], path: tuple[str, ...], origin: Mapping[str, str]
) -> None:
    for name, value in values.items():
        dotted = ".".join((*path, name))
        location = origin.get(dotted)
        field = model.model_fields.get(name)
        if field is None:
            known = [key for key, _ in fields()] + ([] if path else list(Config.model_fields))
            here = {other: ".".join((*path, other)) for other in model.model_fields}
            called = renamed(dotted) or meant(name)
            if name in FIXED and called is None:
                raise ConfigError(
                    f"unknown option {dotted}",
                    hint=f"{FIXED[name][1]}; leave it out",
                    option=dotted,
                    location=location,
                )
            near = (
                [called]
                if called
                else _initials(name, here)
                or [here[leaf] for leaf in difflib.get_close_matches(name, list(here), n=1)]
                or [here[leaf] for leaf in here if name in leaf]
            )
            # A section alone is no likeness: train.zzz is not train.select_checkpoint.
            near = near or difflib.get_close_matches(dotted, known, n=1, cutoff=0.8) or _same_leaf(name, known)
            hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(model.model_fields)}"
            raise ConfigError(f"unknown option {dotted}", hint=hint, option=dotted, location=location)
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Options):
            if not isinstance(value, Mapping):
                example = next(iter(kind.model_fields))
                raise ConfigError(
                    f"{dotted} is a section, not a value",
                    hint=f"set for example {dotted}.{example}",
                    option=dotted,
                    location=location,
                )
            _refuse_unknown(value, kind, (*path, name), origin)


def _initials(name: str, here: Mapping[str, str]) -> list[str]:
    """``learning_rate`` for ``lr``, as other programs abbreviate it."""
    return [dotted for other, dotted in here.items() if "".join(word[0] for word in other.split("_")) == name]


def _same_leaf(name: str, known: Sequence[str]) -> list[str]:
    leaves = {key.rsplit(".", 1)[-1]: key for key in known}
    return [leaves[leaf] for leaf in difflib.get_close_matches(name, list(leaves), n=1)]


def _explain(error: ValidationError, origin: Mapping[str, str]) -> ConfigError:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"] if isinstance(part, str))
    known = {name for name, _ in fields()}
    while key and key not in known and key not in origin and "." in key:
        key = key.rsplit(".", 1)[0]
    location = origin.get(key)
    if first["type"] == "value_error":
        text = str(first["ctx"]["error"])
        # A check of several options belongs to a section; which of them it is about, it says itself.
        named = [name for name in _OPTION.findall(text) if name in known]
        chosen = next((name for name in named if name in origin), None)
        if key not in known and chosen is not None:
            location = origin[chosen]
        option = key if key in known else chosen or next(iter(named), None)
        return ConfigError(text, option=option, location=location)
    got = json.dumps(first["input"], default=str)
    entry = _entry(first["loc"])
    if first["type"] == "extra_forbidden":
        near = _near_in_entry(first["loc"])
        return ConfigError(f"unknown option {entry or key}", hint=near, option=entry or key, location=location)
    if first["type"] == "missing" and entry:
        return ConfigError(f"{entry} is missing", option=entry, location=location)
    key = entry or key
    hint = first["msg"][0].lower() + first["msg"][1:]
    if key == "data.source" and isinstance(first["input"], str) and any(mark in first["input"] for mark in "./*"):
        hint = f"data.source is finqa, chat or builtin:statements; for a file write data.sources={first['input']}"
    hint += _KINDS.get(f"{key}={first['input']}".lower(), "")
    return ConfigError(f"{key}: got {got}", hint=hint, option=key, location=location)


def _entry(loc: Sequence[int | str]) -> str:
    """``data.sources[0].weight``, for a place inside an entry of a list; nothing for any other."""
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc]
    within = any(isinstance(part, int) for part in loc[:-1])
    return "".join(parts).removeprefix(".") if within else ""


def _near_in_entry(loc: Sequence[int | str]) -> str | None:
    field = dict(fields()).get(".".join(str(part) for part in loc[:-2]))
    models = [each for each in get_args(field.annotation) if hasattr(each, "model_fields")] if field else []
    if not models:
        return None
    names = list(models[0].model_fields)
    last = str(loc[-1])
    near = [RENAMED_IN_SOURCES[last]] if last in RENAMED_IN_SOURCES else difflib.get_close_matches(last, names, n=1)
    return f"did you mean {near[0]}?" if near else f"known here: {', '.join(names)}"
