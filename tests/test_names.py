"""Names of the package: every public class, type and function is defined once, and test names stay short."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from support.paths import ROOT

PACKAGE = ROOT / "src" / "fintune"

KERNELS = {"training/fused/kernels_torch.py", "training/fused/launch_triton.py"}
"""Two implementations of one protocol, the kernels of the fused layers."""

ENTRY_POINTS = {"main"}
"""Functions that a process calls by name."""

MAX_TEST_NAME = 60


def public_definitions(path: Path) -> Iterator[str]:
    """Yield the module-level public classes, functions and type aliases."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            name = node.name
        elif isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            if not name[:1].isupper() or name.isupper():
                continue  # a constant or a variable, no type
        else:
            continue
        if not name.startswith("_"):
            yield name


def test_no_public_name_is_defined_twice() -> None:
    homes: dict[str, list[str]] = defaultdict(list)
    for path in sorted(PACKAGE.rglob("*.py")):
        for name in public_definitions(path):
            homes[name].append(str(path.relative_to(PACKAGE)))
    twice = {
        name: files
        for name, files in homes.items()
        if len(files) > 1 and set(files) != KERNELS and name not in ENTRY_POINTS
    }
    assert twice == {}


def test_test_names_are_short() -> None:
    long = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            is_test = isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
            if is_test and len(node.name) > MAX_TEST_NAME:
                long.append(f"{path.relative_to(ROOT)}: {node.name}")
    assert long == []
