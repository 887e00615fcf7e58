"""Configuration files: read one as plain values with the line of each, and write one from a packaged template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import CollectionEndEvent, CollectionStartEvent

from fintune.errors import ConfigError
from fintune.manifest import MANIFEST, WORK

TEMPLATES = ("chat", "finqa", "preference")
"""Names that ``fintune init`` accepts."""
_MAX_LETTERS, _MAX_DEPTH, _MAX_VALUES = 200_000, 50, 100_000
_DATA_ENDINGS = {".jsonl", ".ndjson", ".csv", ".tsv", ".parquet"}


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Read a configuration file.

    Returns:
        The values as JSON values, and the location of each by dotted key, such as ``configs/demo.yaml:12``.

    Raises:
        ConfigError: The file is missing, is not YAML, or holds no sections.
    """
    if Path(path.name.removesuffix(".gz")).suffix in _DATA_ENDINGS and path.is_file():
        raise _is_data(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"{path}: no such configuration file or run", hint=_where_to_look(path)) from None
    except IsADirectoryError:
        raise _is_folder(path) from None
    except UnicodeDecodeError as error:
        hint = "a configuration is a YAML file, see docs/options.md"
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start})", hint=hint) from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from None
    try:
        tree = parse_yaml(text, "rt")
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else None
        reason, hint = str(error.problem), "check that line and the one before it"
        if "'\\t'" in reason:
            reason, hint = "a tab stands before it", "use spaces, not a tab"
        elif reason.startswith("expected <block end>") or reason == "mapping values are not allowed here":
            reason = "the indentation does not match a line above"
            hint = "begin options of one section in the same column"
        raise ConfigError(f"{path}:{line or '?'}: not valid YAML ({reason})", hint=hint) from None
    except YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML ({str(error).splitlines()[0]})") from None
    if tree is None:
        return {}, {}
    if isinstance(tree, CommentedSeq) and path.suffix == ".json":
        raise _is_data(path)
    if not isinstance(tree, CommentedMap):
        raise ConfigError(f"{path}: it has no sections such as 'model:'", hint="see docs/options.md")
    locations: dict[str, str] = {}
    return _plain(tree, path, "", locations), locations


def parse_yaml(text: str, kind: Literal["rt", "safe"]) -> Any:
    """Parse YAML of bounded size: an alias repeats what it names, so a short text can hold any number of values.

    Raises:
        YAMLError: The text is no YAML, is too long, is nested deeper than 50 levels, or has too many values.
    """
    if len(text) > _MAX_LETTERS:
        raise YAMLError(f"more than {_MAX_LETTERS:,} letters")
    depth = 0
    for event in YAML(typ=kind, pure=True).parse(text):
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        if depth > _MAX_DEPTH:
            raise YAMLError(f"nested more than {_MAX_DEPTH} levels deep")
    try:
        tree = YAML(typ=kind, pure=True).load(text)
        if _num_values(tree, {}) > _MAX_VALUES:
            raise YAMLError(f"its aliases repeat more than {_MAX_VALUES:,} values")
        json.dumps(tree, default=str)
    except (TypeError, ValueError) as error:
        raise YAMLError(str(error).partition(";")[0]) from None
    return tree


def _num_values(value: object, counted: dict[int, int]) -> int:
    if not isinstance(value, dict | list | set):
        return 1
    if id(value) not in counted:
        counted[id(value)] = _MAX_VALUES + 1  # for an alias inside of what it names
        counted[id(value)] = 1 + sum(
            _num_values(part, counted) for part in (value.values() if isinstance(value, dict) else value)
        )
    return counted[id(value)]


def _plain(tree: CommentedMap, path: Path, prefix: str, locations: dict[str, str]) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    for key, value in tree.items():
        dotted = f"{prefix}{key}"
        # A key that a merge (`<<: *anchor`) brings in has no line of its own.
        locations[dotted] = f"{path}:{(tree.lc.key(key)[0] if key in tree.lc.data else tree.lc.line) + 1}"
        if isinstance(value, CommentedMap):
            plain[str(key)] = _plain(value, path, f"{dotted}.", locations)
        else:
            plain[str(key)] = json.loads(json.dumps(value, default=str))
    return plain


def _is_data(path: Path) -> ConfigError:
    return ConfigError(
        f"{path}: this is data, not a configuration",
        hint=f"write a configuration with fintune init chat, then fintune inspect chat.yaml data.sources={path}",
    )


def _is_folder(path: Path) -> ConfigError:
    if (path / WORK).is_dir() or any((path / step / MANIFEST).is_file() for step in ("prepare", "train")):
        return ConfigError(
            f"{path} is a run's folder, not a configuration file",
            hint="give the configuration file and overrides that made the run; unless run.name was set, that file is "
            f"called {path.resolve().name}.yaml",
        )
    return ConfigError(f"{path} is a folder, not a configuration file", hint=_where_to_look(path / "_"))


def _where_to_look(path: Path) -> str:
    near = sorted(str(found) for found in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
    listed = f"{path.parent} contains {', '.join(near)}; " if near else ""
    if path.stem in TEMPLATES:
        return f"{listed}`fintune init {path.stem} --out {path}` writes it"
    return f"{listed}`fintune init {'|'.join(TEMPLATES)}` writes a new one"


def packaged_config(name: str) -> Path:
    """Return the path of a packaged configuration: inside the package if installed, beside ``src`` in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "configs" / name
    return installed if installed.is_file() else package.parents[1] / "configs" / name


def write_template(name: str, path: Path) -> None:
    """Write a new configuration file from one of :data:`TEMPLATES`, with its own path in the commands of its comments.

    Raises:
        ConfigError: The file exists, or its folder does not.
    """
    text = packaged_config(f"{name}.yaml").read_text(encoding="utf-8").replace(f"configs/{name}.yaml", str(path))
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError(f"{path} already exists", hint="choose another file with --out") from None
    except FileNotFoundError:
        raise ConfigError(f"{path}: its folder does not exist", hint=f"create {path.parent} first") from None
