"""The order of the rooms: an import goes down, never up and never to a room beside.

The imports are read from the source, those inside functions and those for types alone included.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from support.paths import ROOT

SOURCE = ROOT / "src"

ROOMS = (
    "cli",
    "pipeline",
    "training",
    "publish",
    "report",
    "export",
    "evaluation",
    "inference",
    "data",
    "models",
    "finqa",
    "config",
    "manifest",
    "util",
    "records",
    "errors",
)
"""From top to bottom. A module imports from its own room and from the rooms below it."""

HEAVY = {
    "accelerate",
    "bitsandbytes",
    "datasets",
    "gguf",
    "huggingface_hub",
    "libggml",
    "matplotlib",
    "numpy",
    "peft",
    "pyarrow",
    "safetensors",
    "sympy",
    "tokenizers",
    "torch",
    "transformers",
    "trl",
    "vllm",
    "xllamacpp",
}
"""Libraries that a module may import inside functions only, so that `--help` and `score` start at once."""

NEEDS_TORCH = "fintune.training.fused."
"""Modules that define torch functions and GPU kernels. They load torch, so they are imported inside functions."""


class Import(NamedTuple):
    """A name that a module imports; `at_load` if that happens while the module itself is imported."""

    module: str
    line: int
    at_load: bool


@cache
def modules() -> dict[str, Path]:
    paths = {}
    for path in sorted((SOURCE / "fintune").rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return paths


@cache
def imports(name: str) -> tuple[Import, ...]:
    return tuple(_imports(ast.parse(modules()[name].read_text(encoding="utf-8")), at_load=True))


def _imports(node: ast.AST, *, at_load: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, child.lineno, at_load) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"line {child.lineno}: a relative import"
            for alias in child.names:
                below = f"{child.module}.{alias.name}"
                yield Import(below if below in modules() else str(child.module), child.lineno, at_load)
        else:
            for_types = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            later = for_types or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from _imports(child, at_load=at_load and not later)


def floor(module: str) -> int:
    """Position of a module's room in ROOMS; the package itself (`__version__`) is below all of them."""
    parts = module.split(".")
    return ROOMS.index(parts[1]) if len(parts) > 1 else len(ROOMS)


def ours(name: str) -> list[Import]:
    return [found for found in imports(name) if found.module.split(".")[0] == "fintune"]


def test_imports_are_read_inside_functions_and_branches() -> None:
    code = "import a\nif TYPE_CHECKING:\n import b\ndef f():\n from c import d\nclass E:\n import g\ntry: import h\n"
    code += "finally: 0"
    found = list(_imports(ast.parse(code), at_load=True))
    assert [one.module for one in found] == ["a", "b", "c", "g", "h"]
    assert [one.module for one in found if not one.at_load] == ["b", "c"]


def test_every_import_names_a_module_of_the_package() -> None:
    missing = [f"{name}:{found.line} {found.module}" for name in modules() for found in ours(name)]
    assert [line for line in missing if line.split()[1] not in modules()] == []


def test_imports_only_go_down() -> None:
    upward = [
        f"{name}:{found.line} imports {found.module}"
        for name in modules()
        if name not in {"fintune", "fintune.__main__"}  # the front door opens on every room
        for found in ours(name)
        if floor(found.module) < floor(name)
    ]
    assert upward == []


def test_no_modules_import_each_other_while_they_load() -> None:
    graph = {name: {found.module for found in ours(name) if found.at_load} for name in modules()}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"circle: {' -> '.join((*path[path.index(name) :], name))}"
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_finqa_needs_the_standard_library_and_sympy() -> None:
    foreign = [
        f"{name}:{found.line} imports {found.module}"
        for name in modules()
        if name.startswith("fintune.finqa")
        for found in imports(name)
        if found.module.split(".")[0] not in {"fintune", "sympy", *sys.stdlib_module_names}
    ]
    assert foreign == []


def test_heavy_libraries_are_imported_inside_functions() -> None:
    heavy = []
    for name in modules():
        allowed = {"torch", "trl"} if name.startswith(NEEDS_TORCH) else set()
        for found in imports(name):
            is_heavy = found.module.split(".")[0] in HEAVY - allowed
            is_layer = found.module.startswith(NEEDS_TORCH) and not name.startswith(NEEDS_TORCH)
            if found.at_load and (is_heavy or is_layer):
                heavy.append(f"{name}:{found.line} imports {found.module}")
    assert heavy == []


def test_judging_a_program_loads_no_pydantic_and_no_sympy() -> None:
    names = "fintune.finqa.program, fintune.finqa.execute, fintune.finqa.parse, fintune.finqa.equal"
    assert loaded(f"import {names}", {"pydantic", "sympy", "numpy", "torch"}) == ""


def test_package_loads_without_a_deep_learning_library() -> None:
    light = [name for name in modules() if not name.startswith(NEEDS_TORCH) and not name.endswith("__main__")]
    every = f"from importlib import import_module\nfor name in {light!r}: import_module(name)"
    assert loaded(every, HEAVY) == ""


def loaded(code: str, names: set[str]) -> str:
    """Which of the libraries a fresh Python holds after the code."""
    code = f"import sys\n{code}\nprint(*sorted({names!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()
