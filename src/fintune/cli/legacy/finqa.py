"""Training by the older flags: ``scripts/train_dora.py`` and ``scripts/train_peft.py`` turn them into a configuration.

What comes out lies where their users look for it: the adapter in ``--output_dir`` itself, the run with its manifests,
metrics and checkpoints in ``--output_dir/run``, where the same command goes on after an interruption.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from pydantic import ValidationError

from fintune.cli.legacy import dataset_folder
from fintune.cli.legacy.finqa_messages import OVERWRITE, told_in_script
from fintune.cli.legacy.pasted import PastedCommand
from fintune.config import Config
from fintune.errors import ConfigError
from fintune.models import adapter as adapters
from fintune.publish.push import push_files
from fintune.util.hub import full_repo_name
from fintune.util.signals import RESUME_MESSAGE, interrupt_message

_RUN = "run"
_NEVER = 10**9
"""Steps between checkpoints where none is wanted."""

_DIR = click.Path(path_type=Path)
_STRATEGY = click.Choice(["no", "steps", "epoch"])

_OPTIONS: tuple[tuple[str, Any, Any, str], ...] = (
    ("base_model", str, None, "Hub id, local folder or builtin:smollm2-135m."),
    (
        "dataset_dir",
        _DIR,
        None,
        "What scripts/preprocess.py or datasets.save_to_disk wrote; may hold train and validation.",
    ),
    ("output_dir", _DIR, None, "Gets the adapter; the same command goes on where it was interrupted."),
    (OVERWRITE, bool, False, "Begin anew where --output_dir holds a run, also one with other settings."),
    ("epochs", float, 3.0, "Passes over the data."),
    ("per_device_train_batch_size", int, 4, "Examples a forward pass."),
    ("lr", float, 1e-4, "Peak learning rate."),
    ("weight_decay", float, 0.0, "Of AdamW."),
    ("gradient_accumulation_steps", int, 1, "Forward passes an optimiser step."),
    (
        "use_bf16",
        bool,
        None,
        "bfloat16 (true), or float16 on a GPU and float32 elsewhere; what fits the machine if left out.",
    ),
    ("use_4bit", bool, False, "Base weights in 4 bits: QLoRA, QDoRA."),
    ("gradient_checkpointing", bool, None, "Recompute activations: less memory, slower; what fits if left out."),
    ("lora_r", int, 16, "Rank."),
    ("lora_alpha", int, 32, "Scale."),
    ("lora_dropout", float, 0.0, "Dropout before the adapter."),
    ("use_dora", bool, None, "DoRA instead of LoRA."),
    ("logging_steps", int, 20, "Steps between lines of run/train/metrics.jsonl."),
    ("save_strategy", _STRATEGY, "steps", "When checkpoints are written."),
    ("save_steps", int, 100, "With --save_strategy steps."),
    ("eval_strategy", _STRATEGY, "no", "When the loss on the evaluation split is taken."),
    ("eval_steps", int, 100, "With --eval_strategy steps."),
    ("eval_dataset_dir", _DIR, None, "Evaluation split, where --dataset_dir has none."),
    ("push_to_hub", bool, False, "Upload the adapter; needs a token (hf auth login)."),
    ("hub_model_id", str, None, "Where to; the name of --output_dir under your account if left out."),
    ("hub_strategy", click.Choice(["end", "epoch"]), "end", "With --push_to_hub: behind every epoch, too, or not."),
    ("report_to", click.Choice(["none", "tensorboard", "wandb", "all"]), "none", "Where losses go."),
    ("max_length", int, 2048, "Tokens of prompt and completion; the page is cut to fit."),
    ("seed", int, 17, "Of order, sampling and initialisation."),
)
_REQUIRED = ("base_model", "dataset_dir", "output_dir")


def command(*, use_dora: bool) -> click.Command:
    """The click command of a script.

    Args:
        use_dora: What it does where ``--use_dora`` is left out.
    """

    def run(**flags: Any) -> None:
        with interrupt_message(RESUME_MESSAGE), told_in_script(flags):
            train({**flags, "use_dora": use_dora if flags["use_dora"] is None else flags["use_dora"]})

    alone: dict[str, Any] = {"is_flag": False, "flag_value": "true"}
    params: list[click.Parameter] = [
        click.Option(
            [f"--{name}"],
            type=click.BOOL if kind is bool else kind,
            default=use_dora if name == "use_dora" else default,
            required=name in _REQUIRED,
            show_default=default is not None or name == "use_dora",
            metavar="true|false" if kind is bool else None,
            help=meaning,
            **(alone if kind is bool else {}),
        )
        for name, kind, default, meaning in _OPTIONS
    ]
    doc = "Fine-tune an adapter (LoRA, QLoRA, DoRA, QDoRA) on a dataset folder; `fintune train` does the same and more."
    return PastedCommand("train", params=params, callback=run, help=doc)


def train(flags: Mapping[str, Any]) -> None:
    """Prepare, train, lay the adapter out, push.

    Args:
        flags: All of the options above.

    Raises:
        FintuneError: A mistake of the user's, told by the flag where it is one.
    """
    from fintune.pipeline.runner import Pipeline
    from fintune.pipeline.step import Selection
    from fintune.pipeline.steps import build_steps
    from fintune.training.callbacks import check_reporters

    output: Path = flags["output_dir"]
    check_reporters(_report_to(flags))
    repo = full_repo_name(flags["hub_model_id"] or output.resolve().name) if flags["push_to_hub"] else None
    data, has_eval = _data(flags)
    if flags["eval_strategy"] != "no" and not has_eval:
        raise ConfigError(
            f"--eval_strategy {flags['eval_strategy']}: {flags['dataset_dir']} has no evaluation split",
            hint="give --eval_dataset_dir, or a folder with train and validation",
        )
    first = _config(flags, data, repo, save_steps=1, eval_steps=None)
    anew = bool(flags[OVERWRITE])
    # Alone, so that a train folder that cannot be read does not stop what is to replace it.
    steps = [step for step in build_steps(first) if step.name == "prepare"]
    prepare = Pipeline(first, steps, Selection(redo=("prepare",) if anew else ()))
    list(prepare.run())
    manifest = prepare.manifest("prepare")
    assert manifest is not None, "prepare is done"
    batch = flags["per_device_train_batch_size"] * flags["gradient_accumulation_steps"]
    epoch = max(1, math.ceil(manifest.facts["num_train_rows"] / batch))
    config = _config(
        flags,
        data,
        repo,
        save_steps={"no": _NEVER, "steps": flags["save_steps"], "epoch": epoch}[flags["save_strategy"]],
        eval_steps={"no": None, "steps": flags["eval_steps"], "epoch": epoch}[flags["eval_strategy"]],
    )
    list(Pipeline(config, build_steps(config), Selection(only=("train",), redo=("train",) if anew else ())).run())
    files = _lay_out(config.folder / "train" / "adapter", output)
    click.echo(f"{output}: the adapter; its losses are in {config.folder / 'train' / 'metrics.jsonl'}")
    if repo is not None:
        click.echo(push_files(repo, [path for path in files if path.name != adapters.BASE_FILE]))


def _data(flags: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """The section ``data`` of the configuration, and whether there is something to evaluate on."""
    folder, output = flags["dataset_dir"], flags["output_dir"]
    train_folder, eval_folder = dataset_folder.split_folders(folder)
    if flags["eval_dataset_dir"] is not None:
        eval_folder = dataset_folder.split_folders(flags["eval_dataset_dir"])[0]
    train_file = dataset_folder.finqa_file(train_folder, output / "data" / "train.jsonl")
    if train_file is None:
        sources = [{"path": str(train_folder), "hold_out": "none" if eval_folder else "split"}]
        sources += [{"path": str(eval_folder), "hold_out": "all"}] if eval_folder else []
        return {"source": "chat", "sources": sources}, True
    eval_file = dataset_folder.finqa_file(eval_folder, output / "data" / "eval.jsonl") if eval_folder else None
    if eval_file is None:
        # The chain wants a question to show; nothing is measured on it.
        return {"source": "finqa", "train": train_file, "eval": train_file, "max_eval_samples": 1}, False
    return {"source": "finqa", "train": train_file, "eval": eval_file}, True


def _config(flags: Mapping[str, Any], data: Mapping[str, Any], repo: str | None, **steps: int | None) -> Config:
    sections = {
        "run": {"name": _RUN, "dir": flags["output_dir"], "seed": flags["seed"]},
        "model": {"name": flags["base_model"], "quantization": "nf4" if flags["use_4bit"] else "none"},
        "data": dict(data),
        "prompt": {"max_length": flags["max_length"]},
        "adapter": {
            "kind": "dora" if flags["use_dora"] else "lora",
            "r": flags["lora_r"],
            "lora_alpha": flags["lora_alpha"],
            "lora_dropout": flags["lora_dropout"],
        },
        "train": {
            "num_train_epochs": flags["epochs"],
            "per_device_train_batch_size": flags["per_device_train_batch_size"],
            "gradient_accumulation_steps": flags["gradient_accumulation_steps"],
            "learning_rate": flags["lr"],
            "weight_decay": flags["weight_decay"],
            "gradient_checkpointing": flags["gradient_checkpointing"],
            "logging_steps": flags["logging_steps"],
            "dtype": _precision(flags["use_bf16"]),
            "report_to": _report_to(flags),
            **steps,
        },
    }
    if repo is not None and flags["hub_strategy"] == "epoch":
        sections["publish"] = {"repo_id": repo, "each_epoch": True}
    try:
        return Config.model_validate(sections)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        reason = first["msg"].removeprefix("Value error, ")
        if not where:
            raise ConfigError(reason) from None
        raise ConfigError(f"{where}: got {first['input']}", hint=reason[0].lower() + reason[1:]) from None


def _report_to(flags: Mapping[str, Any]) -> tuple[str, ...]:
    return {"none": (), "all": ("tensorboard", "wandb")}.get(flags["report_to"], (flags["report_to"],))


def _precision(use_bf16: bool | None) -> str:
    if use_bf16 is None:
        return "auto"
    if use_bf16:
        return "bfloat16"
    import torch

    return "float16" if torch.cuda.is_available() else "float32"


def _lay_out(adapter: Path, output: Path) -> list[Path]:
    """Copy the adapter's files to where older commands look for them, each of which appears whole; gives the copies."""
    copies = []
    for path in sorted(adapter.iterdir()):
        part = output / f".{path.name}.tmp"
        shutil.copyfile(path, part)
        copies.append(part.replace(output / path.name))
    return copies
