"""``fintune merge`` and ``fintune export``: a stage of a run, or any model and adapter without one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fintune.cli.common import FILE, dry_run_option, optional_config_arguments, redo_flag, run_stage
from fintune.util.signals import interrupt_message

if TYPE_CHECKING:
    from fintune.config import Config

    Make = Callable[[Config, Path], dict[str, Any]]
    """Of the options and the folder to write into, what there is to tell."""


def _arguments(*, model: str, adapter: str, out: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Those of a stage, and instead of a run's the three with these words."""

    def decorated(command: Callable[..., None]) -> Callable[..., None]:
        command = click.option("--out", type=FILE, metavar="DIR", help=out)(command)
        command = click.option("--adapter", type=FILE, metavar="DIR", help=adapter)(command)
        command = click.option("--model", metavar="MODEL", help=model)(command)
        return optional_config_arguments(redo_flag(dry_run_option(command)))

    return decorated


@click.command()
@_arguments(
    model="Instead of a run's: base model, folder or hub id.",
    adapter="PEFT adapter of --model.",
    out="Folder for the merged model; nothing may be there yet.",
)
def merge(
    config: Path | None,
    overrides: tuple[str, ...],
    redo: bool,
    dry_run: bool,
    model: str | None,
    adapter: Path | None,
    out: Path | None,
) -> None:
    """Fold the adapter into the base model: a 16-bit Hugging Face folder.

    Of a run, or of --model and --adapter.
    """
    if config is not None and model is None and adapter is None and out is None:
        run_stage("merge", config, overrides, redo=redo, dry_run=dry_run)
        return
    if model is None or adapter is None or out is None or redo or dry_run:
        raise click.UsageError("give a CONFIG, or --model, --adapter and --out together")
    from fintune.pipeline.stages.merge import merge_adapter

    given = adapter
    _without_a_run(config, overrides, model, given, out, lambda options, folder: merge_adapter(options, given, folder))


@click.command()
@_arguments(
    model="Instead of a run's: any Hugging Face folder or hub id.",
    adapter="PEFT adapter of --model, folded in while it is read.",
    out="Folder for the files; nothing may be there yet.",
)
def export(
    config: Path | None,
    overrides: tuple[str, ...],
    redo: bool,
    dry_run: bool,
    model: str | None,
    adapter: Path | None,
    out: Path | None,
) -> None:
    """The model to GGUF files for llama.cpp.

    Of a run, or of --model, with --adapter or without; export.types=[Q4_K_M,F16] chooses the types.
    """
    if config is not None and model is None and adapter is None and out is None:
        run_stage("export", config, overrides, redo=redo, dry_run=dry_run)
        return
    if model is None or out is None or redo or dry_run:
        raise click.UsageError("give a CONFIG, or --model and --out together")
    from fintune.pipeline.stages.export import export_model

    _without_a_run(
        config,
        overrides,
        model,
        adapter,
        out,
        lambda options, folder: export_model(options, folder, adapter=adapter),
    )


def _without_a_run(
    config: Path | None, overrides: tuple[str, ...], model: str, adapter: Path | None, out: Path, make: Make
) -> None:
    """Make the folder whole, with a manifest of what it was made from and with."""
    from fintune.config.load import load
    from fintune.util.files import atomic_folder
    from fintune.util.system import checkout_commit, installed_versions

    named = () if any(each.startswith("run.name=") for each in overrides) else (f"run.name={json.dumps(out.name)}",)
    options = load(config, [f"model.name={json.dumps(model)}", "predict.models=[base]", *named, *overrides]).config
    anew = f"interrupted; nothing is left in {out}, and the same command begins anew"
    with interrupt_message(anew), atomic_folder(out) as folder:
        facts = make(options, folder)
        made = {
            "model": model,
            "adapter": None if adapter is None else str(adapter),
            "facts": facts,
            "versions": installed_versions(),
            "commit": checkout_commit(),
        }
        (folder / "manifest.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    click.echo(f"{out}: {facts['summary']}")
