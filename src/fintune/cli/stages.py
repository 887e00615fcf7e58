"""The verbs that run stages: ``run``, ``demo``, and one verb per stage."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from fintune.cli.common import (
    FILE,
    STRICT,
    config_arguments,
    dry_run_option,
    echo,
    optional_config_arguments,
    redo_flag,
    redo_option,
    run_stage,
    run_stages,
    strict_option,
)
from fintune.config.load import load
from fintune.config.yaml_file import packaged_config
from fintune.pipeline.stages.export import export_model
from fintune.pipeline.stages.merge import merge_adapter
from fintune.pipeline.step import Selection
from fintune.util.files import atomic_folder
from fintune.util.signals import interrupt_message
from fintune.util.system import checkout_commit, installed_versions


@click.command("run")
@config_arguments
@click.option("--skip", multiple=True, metavar="STAGE", help="Skip this stage (keep its existing result).")
@click.option("--from", "start", metavar="STAGE", help="Skip every stage before this one.")
@click.option("--only", multiple=True, metavar="STAGE", help="Run only this stage.")
@redo_option
@strict_option
@dry_run_option
def run_command(config: Path, overrides: tuple[str, ...], strict: bool, dry_run: bool, **selection: Any) -> None:
    """Run every stage, from data to measured GGUF files and one HTML page.

    Stages that are up to date are skipped, and an interrupted run resumes. STAGE is a verb (predict) or one step of it
    (predict/merged). Give --skip, --only and --redo once for each stage.
    """
    run_stages(config, (*overrides, *(STRICT if strict else ())), Selection(**selection), dry_run=dry_run)


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
    def command(**arguments: Any) -> None:
        run_stage(name, **arguments)

    return command


@click.command("prepare")
@config_arguments
@redo_flag
@strict_option
@dry_run_option
def prepare_command(config: Path, overrides: tuple[str, ...], strict: bool, redo: bool, dry_run: bool) -> None:
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

_Convert = Callable[..., dict[str, Any]]


def _conversion_command(
    name: str, help_text: str, convert: _Convert, required: tuple[str, ...], **flags: str
) -> click.Command:
    """Make a verb that runs a stage, or converts any model if all of ``required`` are given."""

    @click.command(name, help=help_text)
    @optional_config_arguments
    @click.option("--model", metavar="MODEL", help=flags["model"])
    @click.option("--adapter", type=FILE, metavar="DIR", help=flags["adapter"])
    @click.option("--out", type=FILE, metavar="DIR", help="Folder for the result; it must not exist or be empty.")
    @redo_flag
    @dry_run_option
    def command(config: Path | None, overrides: tuple[str, ...], redo: bool, dry_run: bool, **paths: Any) -> None:
        if config is not None and not any(paths.values()):
            run_stage(name, config, overrides, redo=redo, dry_run=dry_run)
            return
        if not all(paths[flag] for flag in required) or redo or dry_run:
            *others, last = (f"--{flag}" for flag in required)
            raise click.UsageError(f"give a CONFIG, or {', '.join(others)} and {last} together")
        _convert(convert, config, overrides, **paths)

    return command


merge_command = _conversion_command(
    "merge",
    "Merge the adapter into the base model and write a 16-bit Hugging Face folder.\n\n"
    "Give a CONFIG to merge a run, or --model, --adapter and --out to merge any adapter.",
    merge_adapter,
    ("model", "adapter", "out"),
    model="Base model (folder or hub id), instead of a run's.",
    adapter="PEFT adapter of --model.",
)
export_command = _conversion_command(
    "export",
    "Export the model to GGUF files for llama.cpp.\n\n"
    "Give a CONFIG to export a run, or --model and --out to export any model, with or without --adapter. "
    "export.types=[Q4_K_M,F16] chooses the types.",
    export_model,
    ("model", "out"),
    model="Any Hugging Face folder or hub id, instead of a run's model.",
    adapter="PEFT adapter of --model; it is merged while the weights are read.",
)


def _convert(
    convert: _Convert,
    config: Path | None,
    overrides: tuple[str, ...],
    *,
    model: str,
    adapter: Path | None,
    out: Path,
) -> None:
    """Write a folder without a run: all of it or nothing, with a manifest of its inputs and versions."""
    has_name = any(override.startswith("run.name=") for override in overrides)
    name = () if has_name else (f"run.name={json.dumps(out.name)}",)
    options = load(config, [f"model.name={json.dumps(model)}", "predict.models=[base]", *name, *overrides]).config
    message = f"interrupted; {out} is empty, and the same command starts from the beginning"
    with interrupt_message(message), atomic_folder(out) as folder:
        facts = convert(options, folder, adapter=adapter)
        manifest = {
            "model": model,
            "adapter": None if adapter is None else str(adapter),
            "facts": facts,
            "versions": installed_versions(),
            "commit": checkout_commit(),
        }
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    echo(f"{out}: {facts['summary']}")
