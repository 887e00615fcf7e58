"""``fintune merge`` and ``fintune export``: a stage of a run, or any model and adapter without one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fintune.cli_common import FILE, dry_run_option, run_stages

if TYPE_CHECKING:
    from fintune.options import Config

_redo = click.option("--redo", is_flag=True, help="Even if it is up to date.")
_config = click.argument("config", type=FILE, required=False, metavar="[CONFIG]")
_overrides = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")


@click.command()
@_config
@_overrides
@_redo
@dry_run_option
@click.option("--model", metavar="MODEL", help="Instead of a run's: base model, folder or hub id.")
@click.option("--adapter", type=FILE, metavar="DIR", help="PEFT adapter of --model.")
@click.option("--out", type=FILE, metavar="DIR", help="Folder for the merged model; nothing may be there yet.")
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
    if _is_of_a_run("merge", config, overrides, [model, adapter, out], redo=redo, dry_run=dry_run):
        return
    if model is None or adapter is None or out is None or redo or dry_run:
        raise click.UsageError("give a CONFIG, or --model, --adapter and --out together")
    from fintune import outputs
    from fintune.stages.merge import merge_adapter

    options = _options(config, overrides, model, out)
    with outputs.whole_folder(out) as folder:
        facts = merge_adapter(options, adapter, folder)
        _note(folder, model, adapter, facts)
    click.echo(f"{out}: {facts['summary']}")


@click.command()
@_config
@_overrides
@_redo
@dry_run_option
@click.option("--model", metavar="MODEL", help="Instead of a run's: any Hugging Face folder or hub id.")
@click.option("--adapter", type=FILE, metavar="DIR", help="PEFT adapter of --model, folded in while it is read.")
@click.option("--out", type=FILE, metavar="DIR", help="Folder for the files; nothing may be there yet.")
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
    if _is_of_a_run("export", config, overrides, [model, adapter, out], redo=redo, dry_run=dry_run):
        return
    if model is None or out is None or redo or dry_run:
        raise click.UsageError("give a CONFIG, or --model and --out together")
    from fintune import outputs
    from fintune.stages.export import export_model

    options = _options(config, overrides, model, out)
    with outputs.whole_folder(out) as folder:
        facts = export_model(options, folder, adapter=adapter)
        _note(folder, model, adapter, facts)
    click.echo(f"{out}: {facts['summary']}")


def _is_of_a_run(
    verb: str, config: Path | None, overrides: tuple[str, ...], others: list[object], *, redo: bool, dry_run: bool
) -> bool:
    """Run the stage where only a configuration is given."""
    if config is None or any(other is not None for other in others):
        return False
    from fintune.selection import Selection

    run_stages(config, overrides, Selection(only=(verb,), redo=(verb,) if redo else ()), dry_run=dry_run)
    return True


def _options(config: Path | None, overrides: tuple[str, ...], model: str, out: Path) -> Config:
    from fintune.config import load

    if config is not None and "=" in config.name:
        config, overrides = None, (str(config), *overrides)
    named = () if any(each.startswith("run.name=") for each in overrides) else (f"run.name={json.dumps(out.name)}",)
    return load(config, [f"model.name={json.dumps(model)}", "predict.models=[base]", *named, *overrides]).config


def _note(folder: Path, model: str, adapter: Path | None, facts: dict[str, object]) -> None:
    """Beside the result, what it was made from and with."""
    from fintune import machine

    made = {
        "model": model,
        "adapter": None if adapter is None else str(adapter),
        "facts": facts,
        "versions": machine.versions(),
        "commit": machine.commit(),
    }
    (folder / "manifest.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
