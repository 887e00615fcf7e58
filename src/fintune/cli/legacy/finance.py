"""Finance chat by the older flags: ``train_financial_model.py`` and ``train.py`` turn them into a configuration.

The run with its manifests and checkpoints lies in ``run/`` of the adapter's folder, where every command with that
folder goes on after an interruption. Adapter, merged folder and GGUF files lie where the flags say; large ones as links
to the run's files where the disk allows it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click

from fintune.cli.legacy import output_checks as places
from fintune.cli.legacy import outputs as files
from fintune.cli.legacy.finance_flags import MODEL, SKIPS, pipeline_flags, train_flags
from fintune.cli.legacy.messages import told_in_flags
from fintune.cli.legacy.output_checks import Place
from fintune.cli.legacy.pasted import PastedCommand
from fintune.config import Config
from fintune.config import aliases as cli_extra_args
from fintune.errors import ConfigError
from fintune.pipeline import disk_estimate
from fintune.util.console import say
from fintune.util.signals import RESUME_MESSAGE, interrupt_message

GUIDE_MODEL = "DSR1/DSR1-Distill-Qwen-14B"
_RUN = "run"
_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_NEWEST = ("checkpoint-latest", "latest", "last", "true")
"""Words for the newest checkpoint."""
_DEVICES = re.compile(r"cpu|auto|cuda(:\d+)?|balanced|sequential")


def pipeline_command() -> click.Command:
    """The command of ``train_financial_model.py``."""
    return PastedCommand(
        "train_financial_model",
        params=pipeline_flags(),
        callback=run_pipeline,
        help="Finance data to a fine-tuned, merged and quantised model; `fintune run` does the same and more.",
    )


def train_command() -> click.Command:
    """The command of ``train.py``."""
    return PastedCommand(
        "train",
        params=train_flags(),
        callback=run_training,
        help="Fine-tune an adapter on a folder of conversations; `fintune train` does the same and more.",
    )


def run_pipeline(**flags: Any) -> None:
    """Every stage, then the files to where the flags say.

    Raises:
        FintuneError: A mistake of the user's, or a tool that is missing; before any training where that can be known.
    """
    with interrupt_message(RESUME_MESSAGE), told_in_flags("--lora_output_dir"):
        _pipeline(flags)


def _pipeline(flags: Mapping[str, Any]) -> None:
    kind, checkout = flags["quantization_target"].upper(), flags["llama_cpp_path"]
    more = ["merge.dtype=float16", f"export.types=[F16, {kind}]"]
    more += [] if checkout is None else [f"export.llama_cpp_path={json.dumps(str(checkout))}"]
    config = _config(flags, flags["lora_output_dir"], _investopedia(flags), more)
    if missing := {"F16", kind} - set(config.export.types):
        raise ConfigError(
            f"--extra_train_args leaves out {' and '.join(sorted(missing))}: the GGUF files are F16 and {kind}",
            hint="--quantization_target names the second",
        )
    if not flags["skip_merge"]:
        _check_device(flags["merge_device_map"])
    if not flags["skip_quantization"]:
        _tell_type(flags["gguf_q4_path"], kind)
    outputs = _outputs(config, kind, flags)
    skip = [stage for flag, stage in SKIPS.items() if flags[flag]]
    if not _run(config, flags, skip=skip, outputs=outputs):
        return
    for output in outputs:
        if output.kind == "adapter":
            files.lay_out_adapter(config, output.path)
        elif output.is_folder:
            files.lay_out(output.source, output.path, kind=output.kind, link=True)
        else:
            files.place(output.source, output.path, kind=output.kind)
    if not flags["skip_quantization"]:
        files.modelfile(
            config.folder / "export" / "Modelfile",
            f"{config.run.name}-{config.export.types[-1]}.gguf",
            flags["gguf_q4_path"],
        )


def _tell_type(file: Path, kind: str) -> None:
    """The name that the guide gives the quantised file stays as it is, whatever type is asked for."""
    if "q4_k_m" in file.name.lower() and kind != "Q4_K_M":
        say(f"{file} will hold {kind}: --gguf_q4_path gives it another name")


def _outputs(config: Config, kind: str, flags: Mapping[str, Any]) -> list[Place]:
    """What the flags say about the places of what is not skipped."""
    merged, exported = config.folder / "merge", config.folder / "export"
    found = [_adapter(config, "--lora_output_dir", flags["lora_output_dir"])]
    if not flags["skip_merge"]:
        predicted = partial(disk_estimate.merge_bytes, config)
        found.append(Place("--merged_model_dir", flags["merged_model_dir"], "merged", "merge", merged, predicted))
    if not flags["skip_quantization"]:
        for type_, flag in (("F16", "gguf_fp16_path"), (kind, "gguf_q4_path")):
            alone = config.model_copy(update={"export": config.export.model_copy(update={"types": (type_,)})})
            file = exported / f"{config.run.name}-{type_}.gguf"
            found.append(
                Place(f"--{flag}", flags[flag], "gguf", "export", file, partial(disk_estimate.export_bytes, alone))
            )
    return found


def _adapter(config: Config, flag: str, path: Path) -> Place:
    return Place(flag, path, "adapter", "train", config.folder / "train" / "adapter")


def _check_device(device: str) -> None:
    """The guide passes Accelerate's word for where the merge happens.

    Raises:
        ConfigError: It is none.
    """
    if not _DEVICES.fullmatch(device):
        raise ConfigError(
            f"--merge_device_map {device}: not known",
            hint="known are cpu, auto, cuda, cuda:N, balanced, sequential; all of them merge on the CPU",
        )
    if device != "cpu":
        say(
            f"--merge_device_map {device}: merging is done on the CPU all the same, in memory bounded by the largest "
            "tensor"
        )


def run_training(**flags: Any) -> None:
    """Prepare and train, then the adapter to where the flag says.

    Raises:
        FintuneError: A mistake of the user's.
    """
    with interrupt_message(RESUME_MESSAGE), told_in_flags("--output_dir"):
        _train(flags)


def _train(flags: Mapping[str, Any]) -> None:
    config = _config(flags, flags["output_dir"], [], [])
    # What is unfinished goes on with the data that it began with.
    began = (config.folder / "prepare").is_dir() and bool(flags["resume_from_checkpoint"])
    skip = ["merge", "export", "report", *(["prepare"] if began else [])]
    if _run(config, flags, skip=skip, outputs=[_adapter(config, "--output_dir", flags["output_dir"])]):
        files.lay_out_adapter(config, flags["output_dir"])


def _run(config: Config, flags: Mapping[str, Any], *, skip: Sequence[str], outputs: Sequence[Place]) -> bool:
    """Whether anything was run: not where ``--dry_run`` only asks."""
    from fintune.pipeline.runner import Pipeline
    from fintune.pipeline.step import Selection
    from fintune.pipeline.steps import build_steps

    places.check(outputs, _read(flags), config.folder)
    steps = build_steps(config)
    if flags["resume_from_checkpoint"]:
        train = next(step for step in steps if step.name == "train")
        _tell_resuming(config.folder, flags["resume_from_checkpoint"], train.resume_word)
    pipeline = Pipeline(config, steps, Selection(skip=skip, redo=flags["redo"]))
    if flags["dry_run"]:
        for step, what in pipeline.preview():
            click.echo(f"{step.name}: {what}")
        return False
    places.try_out(outputs)
    places.check_space(outputs, lambda: {step.name: what for step, what in pipeline.preview()}, config.folder)
    places.adopt(outputs)
    list(pipeline.run())
    return True


def _read(flags: Mapping[str, Any]) -> dict[str, Path]:
    """What is read, where it lies on this disk."""
    names = ("model_name", "dataset_folder", "investopedia", "llama_cpp_path")
    found = {f"--{name}": Path(flags[name]).expanduser() for name in names if flags.get(name) is not None}
    return {flag: path for flag, path in found.items() if path.exists()}


def _tell_resuming(run: Path, checkpoint: str, resume_word: Callable[[Path], str]) -> None:
    """What becomes of the flag, where it is not what happens anyway.

    Args:
        run: The run's folder.
        checkpoint: As it was given.
        resume_word: What becomes of unfinished training in a folder.

    Raises:
        ConfigError: A checkpoint that another program wrote.
    """
    given = Path(checkpoint)
    if given.is_dir() and run.resolve() not in given.resolve().parents:
        raise ConfigError(
            f"--resume_from_checkpoint {checkpoint}: this checkpoint is none of the run in {run}",
            hint="training goes on from the run's own; leave the flag out to begin anew, or merge that adapter first",
        )
    unfinished = run / ".work" / "train"
    newest = resume_word(unfinished).removeprefix("resume from step ")
    if not unfinished.is_dir():
        done = (run / "train").is_dir()
        state = (
            "training is finished there" if done else "there is no unfinished training, so it starts at the beginning"
        )
    elif newest == "run":
        state = "there is no whole checkpoint yet, so training starts at the beginning"
    elif newest.isdecimal() and given.name.lower() not in (*_NEWEST, f"checkpoint-{newest}"):
        state = f"training goes on from the newest, step {newest}"
    else:
        return
    say(f"--resume_from_checkpoint {checkpoint}: {state} ({run})")


def _investopedia(flags: Mapping[str, Any]) -> list[dict[str, Any]]:
    path = flags["investopedia"]
    rows = flags["investopedia_rows"]
    return [] if path.lower() == "none" else [{"path": path, "format": "question_answer", "max_rows": rows}]


def _config(
    flags: Mapping[str, Any], output: Path, more_sources: Sequence[Mapping[str, Any]], more: Sequence[str]
) -> Config:
    from fintune.config.load import load

    name = flags["model_name"]
    if name == GUIDE_MODEL and not Path(name).is_dir():
        say(f"{GUIDE_MODEL} is {MODEL} on the hub")
        name = MODEL
    sources = [{"path": str(flags["dataset_folder"])}, *more_sources]
    cuda, bits = _cuda(), flags["training_quantization"]
    if bits == "auto":
        bits = "4bit" if cuda else "16bit"
        if not cuda:
            say("no CUDA GPU: trains on 16-bit weights, not on 4-bit ones (--training_quantization 4bit insists)")
    values: dict[str, Any] = {
        "run.name": _RUN,
        "run.dir": str(output),
        "run.seed": 3407,
        "model.name": name,
        "model.quantization": "nf4" if bits == "4bit" else "none",
        "data.source": "chat",
        "data.sources": sources,
        "data.strict": flags["strict"],
        "prompt.max_length": flags["max_seq_length"],
        "adapter.r": flags["lora_r"],
        "adapter.lora_alpha": flags["lora_alpha"],
        "adapter.target_modules": list(_TARGETS),
        "train.learning_rate": flags["learning_rate"],
        "train.num_train_epochs": flags["num_train_epochs"],
        "train.per_device_train_batch_size": flags["per_device_train_batch_size"],
        "train.gradient_accumulation_steps": flags["gradient_accumulation_steps"],
        "train.warmup_steps": 5,
        "train.optim": "adamw_8bit",
        "train.save_steps": 500,
        "train.save_total_limit": 3,
    }
    overrides = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    return load(None, [*overrides, *more, *cli_extra_args.overrides(flags["extra_train_args"])]).config


def _cuda() -> bool:
    import torch

    return bool(torch.cuda.is_available())
