"""A configuration file as plain values, with the line of each; what is wrong with one in a user's words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from fintune.errors import ConfigError
from fintune.manifest import MANIFEST, WORK

_DATA = {".jsonl", ".ndjson", ".csv", ".tsv", ".parquet"}


def read(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The values of a file as JSON has them, and the place of each by dotted key, as ``configs/demo.yaml:12``.

    Raises:
        ConfigError: Missing, no YAML, or no tree of sections.
    """
    if Path(path.name.removesuffix(".gz")).suffix in _DATA and path.is_file():
        raise _is_data(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"{path}: no such configuration file", hint=_where_to_look(path)) from None
    except IsADirectoryError:
        raise _is_folder(path) from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: not UTF-8 text (byte {error.start})", hint="a configuration is a YAML file, see docs/options.md"
        ) from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from None
    try:
        tree = YAML(typ="rt").load(text)
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        why, hint = _yaml_problem(str(error.problem))
        raise ConfigError(f"{path}:{line}: not valid YAML ({why})", hint=hint) from None
    except YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML ({str(error).splitlines()[0]})") from None
    if tree is None:
        return {}, {}
    if isinstance(tree, CommentedSeq) and path.suffix == ".json":
        raise _is_data(path)
    if not isinstance(tree, CommentedMap):
        raise ConfigError(
            f"{path}: holds no sections such as 'model:'",
            hint="see docs/options.md",
        )
    origin: dict[str, str] = {}
    return _plain(tree, path, "", origin), origin


def _plain(tree: CommentedMap, path: Path, prefix: str, origin: dict[str, str]) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    for key, value in tree.items():
        dotted = f"{prefix}{key}"
        # A key that came from elsewhere by a merge (`<<: *anchor`) has no line of its own.
        origin[dotted] = f"{path}:{(tree.lc.key(key)[0] if key in tree.lc.data else tree.lc.line) + 1}"
        if isinstance(value, CommentedMap):
            plain[str(key)] = _plain(value, path, f"{dotted}.", origin)
        else:
            plain[str(key)] = json.loads(json.dumps(value, default=str))
    return plain


def _is_data(path: Path) -> ConfigError:
    return ConfigError(
        f"{path}: this is data, not a configuration",
        hint=f"behind a configuration it is named so: data.source=chat data.sources={path}",
    )


def _is_folder(path: Path) -> ConfigError:
    if (path / WORK).is_dir() or any((path / step / MANIFEST).is_file() for step in ("prepare", "train")):
        return ConfigError(
            f"{path} is a run's folder, not a configuration file",
            hint="a run is made from its configuration file and the same overrides; where run.name was not set, that "
            f"file is called {path.resolve().name}.yaml",
        )
    return ConfigError(f"{path} is a folder, not a configuration file", hint=_where_to_look(path / "_"))


def _yaml_problem(problem: str) -> tuple[str, str]:
    """What the parser says, in a user's words, and what to do."""
    if "'\\t'" in problem:
        return "a tab stands before it", "use spaces, not a tab"
    if problem.startswith("expected <block end>") or problem == "mapping values are not allowed here":
        return "the indentation does not match a line above", "begin options of one section in the same column"
    return problem, "look at that line and the one before it"


def _where_to_look(path: Path) -> str:
    near = sorted(str(p) for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
    return f"{path.parent} holds {', '.join(near)}" if near else "check the path"
