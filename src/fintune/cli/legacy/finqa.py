"""FinQA training with the older flags: ``scripts/train_dora.py`` and ``scripts/train_peft.py``.

The adapter appears in ``--output_dir``. The run is in ``--output_dir/run``, where the same command resumes.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from typing import Any

import click

from fintune.cli.common import echo
from fintune.cli.legacy.finqa_data import finqa_file, split_folders
from fintune.cli.legacy.flags import PATH, REDO, TRUE_OR_FALSE, Flag, as_overrides, make_command
from fintune.cli.legacy.outputs import Output, check, replaces
from fintune.config import Config
from fintune.config.load import load
from fintune.errors import ConfigError
from fintune.models.adapter import BASE_FILE
from fintune.pipeline.runner import Pipeline
from fintune.pipeline.step import Selection
from fintune.pipeline.steps import build_steps
from fintune.publish.push import push_files
from fintune.training.callbacks import check_reporters
from fintune.util.hub import full_repo_name

_NEVER = 10**9  # steps between checkpoints with --save_strategy no
_REPORTERS = {"none": [], "tensorboard": ["tensorboard"], "wandb": ["wandb"], "all": ["tensorboard", "wandb"]}
_STRATEGY = click.Choice(("no", "steps", "epoch"))


FLAGS = (
    Flag("base_model", str, "Hub id, local folder or builtin:smollm2-135m.", "model.name", is_required=True),
    Flag("dataset_dir", PATH, "What preprocess.py or save_to_disk wrote.", "data.train", is_required=True),
    Flag("output_dir", PATH, "Folder for the adapter and the run.", "run.dir", is_required=True),
    Flag("overwrite_output_dir", TRUE_OR_FALSE, "Prepare and train again, and replace what is in --output_dir."),
    Flag("epochs", 3.0, "Passes over the data.", "train.num_train_epochs"),
    Flag("per_device_train_batch_size", 4, "Examples per forward pass.", "train.per_device_train_batch_size"),
    Flag("lr", 1e-4, "Peak learning rate.", "train.learning_rate"),
    Flag("weight_decay", 0.0, "Weight decay of AdamW.", "train.weight_decay"),
    Flag("gradient_accumulation_steps", 1, "Passes per optimizer step.", "train.gradient_accumulation_steps"),
    Flag("use_bf16", TRUE_OR_FALSE, "bfloat16, or float16 on a GPU and float32 on a CPU.", "train.dtype"),
    Flag("use_4bit", TRUE_OR_FALSE, "4-bit base weights (QLoRA, QDoRA).", "model.quantization"),
    Flag("gradient_checkpointing", TRUE_OR_FALSE, "Recompute all layers or none.", "train.gradient_checkpointing"),
    Flag("lora_r", 16, "Rank of the adapter.", "adapter.r"),
    Flag("lora_alpha", 32, "Scale of the adapter.", "adapter.lora_alpha"),
    Flag("lora_dropout", 0.0, "Dropout before the adapter.", "adapter.lora_dropout"),
    Flag("use_dora", TRUE_OR_FALSE, "DoRA instead of LoRA.", "adapter.kind"),
    Flag("logging_steps", 20, "Steps between lines of run/train/metrics.jsonl.", "train.logging_steps"),
    Flag("save_strategy", _STRATEGY, "When checkpoints are saved. Default: steps."),
    Flag("save_steps", 100, "Steps between checkpoints with --save_strategy steps.", "train.save_steps"),
    Flag("eval_strategy", _STRATEGY, "When the evaluation loss is measured. Default: no."),
    Flag("eval_steps", 100, "Steps between evaluations with --eval_strategy steps.", "train.eval_steps"),
    Flag("eval_dataset_dir", PATH, "Evaluation split, if --dataset_dir has none.", "data.eval"),
    Flag("push_to_hub", TRUE_OR_FALSE, "Upload the adapter. Needs a token (hf auth login)."),
    Flag("hub_model_id", str, "Repository. Default: the name of --output_dir in your account."),
    Flag("hub_strategy", click.Choice(["end", "epoch"]), "Upload at the end (default) or after every epoch."),
    Flag("report_to", click.Choice([*_REPORTERS]), "Tracker of the losses. Default: none.", "train.report_to"),
    Flag("max_length", 2048, "Tokens of prompt and completion. The page is cut to fit.", "prompt.max_length"),
    Flag("seed", 17, "Seed of order, sampling and initialization.", "run.seed"),
    REDO,
)
_DORA_FLAGS = [Flag("use_dora", True, flag.help, flag.option) if flag.name == "use_dora" else flag for flag in FLAGS]


def train_finqa(flags: dict[str, Any], overrides: Sequence[str]) -> None:
    """Prepare the data, train, put the adapter into its folder, and push it."""
    folder, overwrite = flags["output_dir"], bool(flags["overwrite_output_dir"])
    check_reporters(_REPORTERS[flags["report_to"] or "none"])
    repo = full_repo_name(flags["hub_model_id"] or folder.resolve().name) if flags["push_to_hub"] else None
    if repo is not None and flags["hub_strategy"] == "epoch":
        overrides = [f"publish.repo_id={repo}", "publish.each_epoch=true", *overrides]
    values, data = _data(flags)
    config = _config(values, [*data, *overrides])
    adapter = Output("--output_dir", folder, "train", config.folder / "train" / "adapter", is_copy=True)
    check([adapter], config.folder, flags["dataset_dir"], overwrite=overwrite)
    redo = {"prepare", "train", *flags["redo"]} if overwrite else {*flags["redo"]}
    # Only this step: a result of train that cannot be read must not stop the command that replaces it.
    steps = [step for step in build_steps(config) if step.name == "prepare"]
    Pipeline(config, steps, Selection(redo=redo & {"prepare"})).run()
    steps = [replaces(step, [adapter]) for step in build_steps(config)]
    Pipeline(config, steps, Selection(only=("train",), redo=redo - {"prepare"})).run()
    adapter.write(overwrite=overwrite)
    echo(f"{folder}: the adapter; its losses are in {config.folder / 'train' / 'metrics.jsonl'}")
    if repo is not None:
        echo(push_files(repo, [path for source, path in adapter.pairs() if source.name != BASE_FILE]))
    if config.data.source == "finqa":
        predict = f"inference_fixed.py --model_path {shlex.quote(str(folder))} --test_json data/FinQA_test.json"
        echo(f"To answer questions: python scripts/{predict} --out_json predictions.json")
        score = "score_finqa.py --pred_json predictions.json --gold_json data/FinQA_test.json"
        echo(f"To score the answers: python scripts/{score}")


TRAIN_LORA = make_command(train_finqa, FLAGS, "Fine-tune a LoRA adapter on FinQA.")
TRAIN_DORA = make_command(train_finqa, _DORA_FLAGS, "Fine-tune a DoRA adapter on FinQA.")


def _data(flags: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the flags with the files of the data instead of their folders, and more overrides of the data."""
    train_folder, eval_folder = split_folders(flags["dataset_dir"])
    if flags["eval_dataset_dir"] is not None:
        eval_folder = split_folders(flags["eval_dataset_dir"])[0]
    train_file = finqa_file(train_folder, flags["output_dir"] / "data" / "train.jsonl")
    if train_file is None:
        sources = [{"path": str(train_folder), "hold_out": "none" if eval_folder else "split"}]
        sources += [{"path": str(eval_folder), "hold_out": "all"}] if eval_folder else []
        return flags | {"dataset_dir": None, "eval_dataset_dir": None}, [
            "data.source=chat",
            f"data.sources={json.dumps(sources)}",
        ]
    eval_file = finqa_file(eval_folder, flags["output_dir"] / "data" / "eval.jsonl") if eval_folder else None
    if eval_file is None and flags["eval_strategy"] in ("steps", "epoch"):
        what = f"--eval_strategy {flags['eval_strategy']}: {flags['dataset_dir']} has no evaluation split"
        raise ConfigError(what, hint="set --eval_dataset_dir, or name a folder with train and validation")
    # Without an evaluation split, the first training record stands in. Nothing is measured on it.
    values = flags | {"dataset_dir": train_file, "eval_dataset_dir": eval_file or train_file}
    return values, ["data.source=finqa", *([] if eval_file else ["data.max_eval_samples=1"])]


def _config(flags: dict[str, Any], overrides: Sequence[str]) -> Config:
    dtype = None if flags["use_bf16"] is None else "bfloat16"
    if flags["use_bf16"] is False:
        import torch

        dtype = "float16" if torch.cuda.is_available() else "float32"
    values = flags | {
        "use_bf16": dtype,
        "use_4bit": "nf4" if flags["use_4bit"] else "none",
        "use_dora": "dora" if flags["use_dora"] else "lora",
        "report_to": _REPORTERS[flags["report_to"] or "none"],
        "save_steps": _NEVER if flags["save_strategy"] == "no" else flags["save_steps"],
        "eval_steps": flags["eval_steps"] if flags["eval_strategy"] == "steps" else None,
    }
    strategies = [f"train.{name}=epoch" for name in ("save_strategy", "eval_strategy") if flags[name] == "epoch"]
    return load(None, ["run.name=run", *strategies, *as_overrides(FLAGS, values), *overrides]).config
