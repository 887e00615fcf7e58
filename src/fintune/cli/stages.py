"""The verbs that run stages: ``run``, ``demo``, and one verb per stage."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fintune.cli.common import (
    FILE,
    STRICT,
    config_arguments,
    dry_run_option,
    optional_config_arguments,
    redo_flag,
    redo_option,
    run_stage,
    run_stages,
    strict_option,
)
from fintune.config.yaml_file import packaged_config
from fintune.pipeline.step import Selection
from fintune.util.signals import interrupt_message

if TYPE_CHECKING:
    from fintune.config import Config


@click.command("run")
@config_arguments
@click.option("--skip", multiple=True, metavar="STAGE", help="Skip this stage (keep its existing result).")
@click.option("--from", "start", metavar="STAGE", help="Skip every stage before this one.")
@click.option("--only", multiple=True, metavar="STAGE", help="Run only this stage.")
@redo_option
@strict_option
@dry_run_option
def run_command(
    config: Path,
    overrides: tuple[str, ...],
    skip: tuple[str, ...],
    start: str | None,
    only: tuple[str, ...],
    redo: tuple[str, ...],
    strict: bool,
    dry_run: bool,
) -> None:
    """Run every stage, from data to measured GGUF files and one HTML page.

    Stages that are up to date are skipped, and an interrupted run resumes. STAGE is a verb (predict) or one step of it
    (predict/merged). Give --skip, --only and --redo once for each stage.
    """
    overrides = (*overrides, *(STRICT if strict else ()))
    run_stages(config, overrides, Selection(skip=skip, start=start, only=only, redo=redo), dry_run=dry_run)


@click.command("demo")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@redo_option
@dry_run_option
def demo_command(overrides: tuple[str, ...], redo: tuple[str, ...], dry_run: bool) -> None:
    """Run every stage on the built-in model and generated pages, on a CPU."""
    run_stages(packaged_config("demo.yaml"), overrides, Selection(redo=redo), dry_run=dry_run)


def _stage_command(name: str, help_text: str) -> click.Command:
    @click.command(name, help=help_text)
    @config_arguments
    @redo_flag
    @dry_run_option
    def command(config: Path, overrides: tuple[str, ...], redo: bool, dry_run: bool) -> None:
        run_stage(name, config, overrides, redo=redo, dry_run=dry_run)

    return command


@click.command("prepare")
@config_arguments
@redo_flag
@strict_option
@dry_run_option
def prepare_command(config: Path, overrides: tuple[str, ...], redo: bool, strict: bool, dry_run: bool) -> None:
    """Read the data, drop what cannot be used, split it, and tokenize it."""
    run_stage("prepare", config, (*overrides, *(STRICT if strict else ())), redo=redo, dry_run=dry_run)


train_command = _stage_command("train", "Fine-tune the adapter. An interrupted run resumes from its last checkpoint.")
guard_command = _stage_command(
    "guard",
    "Check what training made worse (a forgetting check): a fixed set of finance questions and FinQA pages is answered "
    "before and after training.",
)
preflight_command = _stage_command(
    "preflight",
    "Check that llama.cpp tokenizes like the model, before any training. Otherwise a GGUF file would read other tokens "
    "than the ones that were trained.",
)
replay_command = _stage_command(
    "replay",
    "Verify that every export matches the trained model: merged model and GGUF files must predict held-out "
    "completions, token by token, as the trained model does.",
)
report_command = _stage_command("report", "Write one HTML page about the run: scores, losses, data and checks.")


def _conversion_arguments(
    *, model: str, adapter: str, out: str
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add the arguments of a stage, and --model, --adapter and --out with these help texts."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        command = click.option("--out", type=FILE, metavar="DIR", help=out)(command)
        command = click.option("--adapter", type=FILE, metavar="DIR", help=adapter)(command)
        command = click.option("--model", metavar="MODEL", help=model)(command)
        return optional_config_arguments(redo_flag(dry_run_option(command)))

    return decorate


@click.command("merge")
@_conversion_arguments(
    model="Base model (folder or hub id), instead of a run's.",
    adapter="PEFT adapter of --model.",
    out="Folder for the merged model; it must not exist or be empty.",
)
def merge_command(
    config: Path | None,
    overrides: tuple[str, ...],
    redo: bool,
    dry_run: bool,
    model: str | None,
    adapter: Path | None,
    out: Path | None,
) -> None:
    """Merge the adapter into the base model and write a 16-bit Hugging Face folder.

    Give a CONFIG to merge a run, or --model, --adapter and --out to merge any adapter.
    """
    if config is not None and model is None and adapter is None and out is None:
        run_stage("merge", config, overrides, redo=redo, dry_run=dry_run)
        return
    if model is None or adapter is None or out is None or redo or dry_run:
        raise click.UsageError("give a CONFIG, or --model, --adapter and --out together")
    from fintune.pipeline.stages.merge import merge_adapter

    given = adapter
    _convert(config, overrides, model, given, out, lambda options, folder: merge_adapter(options, given, folder))


@click.command("export")
@_conversion_arguments(
    model="Any Hugging Face folder or hub id, instead of a run's model.",
    adapter="PEFT adapter of --model; it is merged while the weights are read.",
    out="Folder for the files; it must not exist or be empty.",
)
def export_command(
    config: Path | None,
    overrides: tuple[str, ...],
    redo: bool,
    dry_run: bool,
    model: str | None,
    adapter: Path | None,
    out: Path | None,
) -> None:
    """Export the model to GGUF files for llama.cpp.

    Give a CONFIG to export a run, or --model and --out to export any model, with or without --adapter.
    export.types=[Q4_K_M,F16] chooses the types.
    """
    if config is not None and model is None and adapter is None and out is None:
        run_stage("export", config, overrides, redo=redo, dry_run=dry_run)
        return
    if model is None or out is None or redo or dry_run:
        raise click.UsageError("give a CONFIG, or --model and --out together")
    from fintune.pipeline.stages.export import export_model

    def convert(options: Config, folder: Path) -> dict[str, Any]:
        return export_model(options, folder, adapter=adapter)

    _convert(config, overrides, model, adapter, out, convert)


def _convert(
    config: Path | None,
    overrides: tuple[str, ...],
    model: str,
    adapter: Path | None,
    out: Path,
    convert: Callable[[Config, Path], dict[str, Any]],
) -> None:
    """Write a folder without a run: all of it or nothing, with a manifest of its inputs and versions."""
    from fintune.config.load import load
    from fintune.util.files import atomic_folder
    from fintune.util.system import checkout_commit, installed_versions

    has_name = any(override.startswith("run.name=") for override in overrides)
    name = () if has_name else (f"run.name={json.dumps(out.name)}",)
    options = load(config, [f"model.name={json.dumps(model)}", "predict.models=[base]", *name, *overrides]).config
    message = f"interrupted; {out} is empty, and the same command starts from the beginning"
    with interrupt_message(message), atomic_folder(out) as folder:
        facts = convert(options, folder)
        manifest = {
            "model": model,
            "adapter": None if adapter is None else str(adapter),
            "facts": facts,
            "versions": installed_versions(),
            "commit": checkout_commit(),
        }
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    click.echo(f"{out}: {facts['summary']}")
