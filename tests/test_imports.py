"""The import directions of the package, read from its source, with imports inside functions and for types alone.

``cli`` and ``steps`` know the stages; a stage knows the rooms; a room knows the root modules listed here and ``finqa``;
``finqa`` knows the standard library, sympy, errors and, where it reads a page, the records.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

SOURCE = Path(__file__).resolve().parents[1] / "src"

ROOMS = {"sources", "finqa", "tuning", "engines", "gguf", "report"}

ROOTS_FOR_ROOMS = {
    "fintune",  # __version__
    "fintune.adapter_origin",  # which base an adapter belongs to
    "fintune.artifact",  # manifests and outcomes, which tables show
    "fintune.cache",
    "fintune.chat",
    "fintune.config",
    "fintune.errors",
    "fintune.hub_background",  # what training pushes behind an epoch
    "fintune.hub_errors",
    "fintune.hub_push",
    "fintune.loss_ends",  # what a training and its page say of the loss
    "fintune.options",
    "fintune.progress",
    "fintune.records",
    "fintune.space",
    "fintune.stopping",  # SIGTERM while training
}

ROOTS_OVER_ROOMS = {
    "fintune.accuracy": {"finqa"},
    "fintune.card_facts": {"finqa", "report", "sources"},  # manifests to what the model card says
    "fintune.answerer": {"engines", "tuning"},  # a model by its name, in the engine that goes with it
    "fintune.cli_audit": {"stages"},
    "fintune.cli_common": {"report"},
    "fintune.cli_config": {"report"},
    "fintune.cli_convert": {"stages"},
    "fintune.cli_inspect": {"stages"},
    "fintune.cli_score": {"report", "stages"},
    "fintune.cli_serve": {"stages"},
    "fintune.cli_ask": {"report", "sources", "stages"},
    "fintune.cli_models": {"stages"},  # the file of a run that is served is also the one that is asked
    "fintune.cli_plan": {"stages"},
    "fintune.cli_predict": {"stages"},
    "fintune.cli_train": {"tuning"},  # whether a reporter is installed, before any work
    "fintune.conversation_encoder": {"finqa"},  # which conversations are too long
    "fintune.conversations": {"finqa"},  # examples of one page as one training row
    "fintune.disk": {"gguf", "sources"},  # the size of a GGUF before it is written, and of the data
    "fintune.examples": {"finqa"},
    "fintune.guard_set": {"finqa"},  # fixed pages as prompts
    "fintune.cli_publish": {"stages"},
    "fintune.publication": {"report", "sources"},  # what is pushed, and where it comes from
    "fintune.preparation": {"finqa", "sources"},
    "fintune.preparation_chat": {"finqa", "sources"},
    "fintune.prepare_report": {"sources"},
    "fintune.prepared": {"sources"},
    "fintune.step_inputs": {"sources"},  # the files that a run reads
    "fintune.steps": {"tuning"},  # the step from which training goes on
    "fintune.train_rank": {"stages", "tuning"},  # one process of a training on several GPUs
    "fintune.train_unsloth": {"tuning"},  # the process in which Unsloth trains
    "fintune.shots": {"finqa", "sources"},  # solved questions before the question
}
"""Root modules that may import rooms or stages, and which. All others are below the rooms; ``steps`` loads
stages by name when they run."""

FINQA_WITH_RECORDS = {"fintune.finqa.page", "fintune.finqa.prompt"}
"""The modules of finqa that read a page of records; those that judge a program stay without pydantic."""

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


NEEDS_TORCH = "fintune.tuning.fused."
"""Modules that define torch functions and GPU kernels. They load torch, and are imported inside functions only."""


class Import(NamedTuple):
    """A name that a module imports; `at_load` where that happens while the module itself is imported."""

    module: str
    line: int
    at_load: bool


@cache
def modules() -> dict[str, Path]:
    found = {}
    for path in sorted((SOURCE / "fintune").rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


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


def room(module: str) -> str:
    """The first folder below the package; "" for a root module, of which the options are one in several files."""
    parts = module.split(".")
    is_folder = len(parts) > 1 and parts[1] != "options" and (SOURCE / "fintune" / parts[1]).is_dir()
    return parts[1] if is_folder else ""


def offenders(*rooms: str, rule: Callable[[str, Import], bool]) -> list[str]:
    """Imports of modules in these rooms that break a rule, as "module:line imports other"."""
    return [
        f"{name}:{found.line} imports {found.module}"
        for name in modules()
        if room(name) in rooms
        for found in imports(name)
        if not rule(name, found)
    ]


def is_ours(found: Import) -> bool:
    return found.module.split(".")[0] == "fintune"


def test_the_reader_sees_imports_wherever_they_stand() -> None:
    code = "import a\nif TYPE_CHECKING:\n import b\ndef f():\n from c import d\nclass E:\n import g\ntry: import h\n"
    code += "finally: 0"
    found = list(_imports(ast.parse(code), at_load=True))
    assert [one.module for one in found] == ["a", "b", "c", "g", "h"]
    assert [one.module for one in found if not one.at_load] == ["b", "c"]


def test_every_folder_is_a_room_with_rules() -> None:
    assert {room(name) for name in modules()} - {""} == ROOMS | {"stages"}


def test_every_import_of_the_package_names_a_module_that_is_there() -> None:
    def rule(_: str, found: Import) -> bool:
        return not is_ours(found) or found.module in modules()

    assert offenders("", "stages", *ROOMS, rule=rule) == []


def test_a_stage_imports_no_other_stage() -> None:
    assert offenders("stages", rule=lambda _, found: room(found.module) != "stages") == []


def test_a_room_imports_itself_finqa_and_listed_root_modules() -> None:
    def rule(name: str, found: Import) -> bool:
        below = room(found.module) in {room(name), "finqa"} or found.module in ROOTS_FOR_ROOMS
        return below or not is_ours(found)

    assert offenders(*ROOMS, rule=rule) == []


def test_a_root_module_imports_only_the_rooms_that_are_its_business() -> None:
    roots = [name for name in modules() if room(name) == ""]
    used = {name: {room(found.module) for found in imports(name) if is_ours(found)} - {""} for name in roots}
    assert {name: rooms for name, rooms in used.items() if rooms} == ROOTS_OVER_ROOMS


def test_only_the_steps_load_modules_by_name() -> None:
    sources = {name: path.read_text(encoding="utf-8") for name, path in modules().items()}
    found = {name for name, text in sources.items() if "import_module" in text or "__import__" in text}
    assert found == {"fintune.steps", "fintune.step_inputs"}


def test_what_rooms_may_import_is_itself_below_all_rooms() -> None:
    seen, queue = set[str](), list(ROOTS_FOR_ROOMS)
    while queue:
        name = queue.pop()
        if name not in seen:
            seen.add(name)
            queue += [found.module for found in imports(name) if is_ours(found)]
    assert not seen & {*ROOTS_OVER_ROOMS, "fintune.steps"}
    assert {room(name) for name in seen} == {""}


def test_finqa_imports_the_standard_library_and_little_else() -> None:
    def rule(name: str, found: Import) -> bool:
        top = found.module.split(".")[0]
        with_records = found.module == "fintune.records" and name in FINQA_WITH_RECORDS
        within = room(found.module) == "finqa" or found.module == "fintune.errors" or with_records
        return within or top == "sympy" or top in sys.stdlib_module_names

    assert offenders("finqa", rule=rule) == []


def test_heavy_libraries_are_imported_inside_the_function_that_needs_them() -> None:
    def rule(name: str, found: Import) -> bool:
        if name.startswith(NEEDS_TORCH):
            return found.module.split(".")[0] not in HEAVY - {"torch", "trl"} or not found.at_load
        heavy = found.module.split(".")[0] in HEAVY or found.module.startswith(NEEDS_TORCH)
        return not (heavy and found.at_load)

    assert offenders("", "stages", *ROOMS, rule=rule) == []


def test_no_modules_import_each_other_while_they_load() -> None:
    graph = {name: {found.module for found in imports(name) if found.at_load and is_ours(found)} for name in modules()}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"circle: {' -> '.join((*path[path.index(name) :], name))}"
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_judging_a_program_loads_no_pydantic_and_no_sympy() -> None:
    names = "fintune.finqa.program, fintune.finqa.execute, fintune.finqa.parse, fintune.finqa.equal"
    assert loaded(f"import {names}", {"pydantic", "sympy", "numpy", "torch"}) == ""


def test_all_of_the_package_loads_without_a_deep_learning_library() -> None:
    light = [name for name in modules() if not name.startswith(NEEDS_TORCH)]
    every = f"from importlib import import_module\nfor name in {light!r}: import_module(name)"
    assert loaded(every, HEAVY) == ""


def loaded(code: str, names: set[str]) -> str:
    """Which of the libraries a fresh Python holds after the code."""
    code = f"import sys\n{code}\nprint(*sorted({names!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()
