"""Finance chat with the older flags: ``train_financial_model.py`` and ``train.py``.

The run is in ``run/`` of the adapter's folder, where the same command resumes. Adapter, merged folder and GGUF files
appear at the paths that the flags name.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from fintune.cli.common import echo, print_tables
from fintune.cli.legacy.flags import PATH, REDO, Flag, as_overrides, make_command
from fintune.cli.legacy.outputs import Output, check, replaces
from fintune.config import Config
from fintune.config.load import load
from fintune.errors import ConfigError, DataError, ResourceError
from fintune.manifest import Slot
from fintune.models.load import fetch_base, load_tokenizer
from fintune.pipeline.runner import Pipeline
from fintune.pipeline.step import Selection, Step
from fintune.pipeline.steps import build_steps
from fintune.report.tables import plan_table
from fintune.util.console import say

GUIDE_MODEL = "DSR1/DSR1-Distill-Qwen-14B"
MODEL = "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B"  # the guide's model on the hub
INVESTOPEDIA = "hub:FinLang/investopedia-instruction-tuning-dataset"
_FIXED = (
    *("run.name=run", "run.seed=3407", "data.source=chat", "merge.dtype=float16"),
    *("train.warmup_steps=5", "train.optim=adamw_8bit", "train.save_steps=500", "train.save_total_limit=3"),
    "adapter.target_modules=q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj",
)
"""Options that the guide sets without a flag."""
_NEWEST = ("checkpoint-latest", "latest", "last", "true")  # values of --resume_from_checkpoint
_SKIPS = {
    "prepare": "skip_dataset_prep",
    "train": "skip_training",
    "merge": "skip_merge",
    "export": "skip_quantization",
}
"""Flag that skips a stage, in the order of the stages."""
_BITS = click.Choice(["4bit", "16bit", "auto"])
_OUTPUT = Path("financial_lora")

_TRAINING = (
    Flag("model_name", MODEL, "Hub id, local folder or builtin:smollm2-135m.", "model.name"),
    Flag("dataset_folder", Path("datasets"), "Folder of JSON, JSONL, CSV or Parquet conversations.", "data.sources"),
    Flag("resume_from_checkpoint", str, "Resume unfinished training from its newest checkpoint."),
    Flag("learning_rate", 1e-5, "Peak of the cosine schedule.", "train.learning_rate"),
    Flag("num_train_epochs", 3.0, "Passes over the data.", "train.num_train_epochs"),
    Flag("max_seq_length", 4096, "Tokens of a conversation. Turns that do not fit are dropped.", "prompt.max_length"),
    Flag("gradient_accumulation_steps", 8, "Forward passes per optimizer step.", "train.gradient_accumulation_steps"),
    Flag("per_device_train_batch_size", 1, "Conversations per forward pass.", "train.per_device_train_batch_size"),
    Flag("lora_r", 32, "Rank of the adapter.", "adapter.r"),
    Flag("lora_alpha", 64, "Scale of the adapter.", "adapter.lora_alpha"),
    Flag("training_quantization", _BITS, "Base weights. Default: 4bit on a CUDA GPU.", "model.quantization"),
    Flag("extra_train_args", "", "More options in one string: 'train.weight_decay=0.01 train.max_steps=50'."),
    Flag("strict", False, "Stop at the first row that cannot be used.", "data.strict"),
    Flag("dry_run", False, "Print the plan without running it."),
    REDO,
)
_PIPELINE = (
    *_TRAINING,
    Flag("llama_cpp_path", PATH, "Convert and quantize with this llama.cpp checkout.", "export.llama_cpp_path"),
    Flag("lora_output_dir", _OUTPUT, "Folder for adapter, tokenizer and the run.", "run.dir"),
    Flag("merged_model_dir", Path("merged_financial_fp16"), "Folder for the merged 16-bit model."),
    Flag("gguf_fp16_path", Path("financial_model_fp16.gguf"), "16-bit GGUF file."),
    Flag("gguf_q4_path", Path("financial_model_q4_k_m.gguf"), "Quantized GGUF file."),
    Flag("quantization_target", "Q4_K_M", "Type of the quantized GGUF file.", "export.types"),
    Flag("merge_device_map", "cpu", "Accepted and ignored: merging always runs on the CPU."),
    Flag("investopedia", INVESTOPEDIA, "Source of the Investopedia rows: hub:OWNER/NAME, a file, or none."),
    Flag("investopedia_rows", 22_500, "Number of Investopedia rows."),
    *(Flag(flag, False, f"Skip {stage} and keep its existing result.") for stage, flag in _SKIPS.items()),
)
_TRAIN = (*_TRAINING, Flag("output_dir", _OUTPUT, "Folder for adapter, tokenizer and the run.", "run.dir"))


def train_financial_model(flags: dict[str, Any], overrides: Sequence[str]) -> None:
    """Run every stage that is not skipped, and put the results where the flags say."""
    kind, file = flags["quantization_target"].upper(), flags["gguf_q4_path"]
    source = {"path": flags["investopedia"], "format": "question_answer", "max_rows": flags["investopedia_rows"]}
    sources = [] if flags["investopedia"].lower() == "none" else [source]
    config = _config(_PIPELINE, flags | {"quantization_target": ["F16", kind]}, overrides, sources)
    if not {"F16", kind} <= set(config.export.types):
        raise ConfigError(f"export.types must hold F16 and {kind}", option="export.types")
    if flags["merge_device_map"] != "cpu":
        say(f"--merge_device_map {flags['merge_device_map']} is ignored: merging runs on the CPU")
    if "q4_k_m" in file.name.lower() and kind != "Q4_K_M" and not flags["skip_quantization"]:
        say(f"{file} will hold {kind}; --gguf_q4_path sets another name")
    skipped = [stage for stage, flag in _SKIPS.items() if flags[flag]]
    last = max((index for index, stage in enumerate(_SKIPS) if stage not in skipped), default=0)
    for stage in [*_SKIPS][:last]:
        if stage in skipped and Slot(config.folder, stage).manifest() is None:
            raise ConfigError(f"--{_SKIPS[stage]}: {config.folder} has no result of {stage}", hint="leave the flag out")
    outputs = _adapter(config, "--lora_output_dir", flags["lora_output_dir"])
    if not flags["skip_merge"]:
        outputs.append(Output("--merged_model_dir", flags["merged_model_dir"], "merge", config.folder / "merge"))
    if not flags["skip_quantization"]:
        for flag, type_ in (("gguf_fp16_path", "F16"), ("gguf_q4_path", kind)):
            exported = config.folder / "export" / f"{config.run.name}-{type_}.gguf"
            outputs.append(Output(f"--{flag}", flags[flag], "export", exported, is_folder=False))
    try:
        is_done = _run(config, flags, skipped, outputs)
    except (DataError, ResourceError) as error:
        if sources and flags["investopedia"].removeprefix("hub:") in str(error):
            error.hint = f"{error.hint or 'check --investopedia'}; --investopedia none trains without this dataset"
        raise
    if is_done and not flags["skip_quantization"]:
        modelfile = config.folder / "export" / "Modelfile"
        echo(f"To serve it: fintune serve {shlex.quote(str(file))}")
        if modelfile.is_file():
            echo(f"To use it in Ollama: ollama create {file.stem} -f {shlex.quote(str(modelfile))}")


def run_training(flags: dict[str, Any], overrides: Sequence[str]) -> None:
    """Prepare the data and train, and put the adapter where the flag says."""
    config = _config(_TRAIN, flags, overrides, [])
    # Unfinished training resumes with the data that it started with, also if train_financial_model.py started it.
    is_resumed = bool(flags["resume_from_checkpoint"]) and Slot(config.folder, "prepare").manifest() is not None
    skipped = ["merge", "export", "report", *(["prepare"] if is_resumed else [])]
    _run(config, flags, skipped, _adapter(config, "--output_dir", flags["output_dir"]))


PIPELINE = make_command(train_financial_model, _PIPELINE, "Fine-tune, merge and quantize a model on finance data.")
TRAIN = make_command(run_training, _TRAIN, "Fine-tune an adapter on a folder of conversations.")


def _config(table: Sequence[Flag], flags: dict[str, Any], overrides: Sequence[str], sources: list[Any]) -> Config:
    flags = {**flags}
    if flags["model_name"] == GUIDE_MODEL and not Path(GUIDE_MODEL).is_dir():
        say(f"{GUIDE_MODEL} is {MODEL} on the hub")
        flags["model_name"] = MODEL
    bits = flags["training_quantization"]
    if bits in (None, "auto"):
        import torch

        bits = "4bit" if torch.cuda.is_available() else "16bit"
        if bits == "16bit":
            say("no CUDA GPU: training uses 16-bit weights (--training_quantization 4bit forces 4-bit weights)")
    flags["training_quantization"] = "nf4" if bits == "4bit" else "none"
    flags["dataset_folder"] = [{"path": str(flags["dataset_folder"])}, *sources]
    extra = shlex.split(flags["extra_train_args"])
    return load(None, [*_FIXED, *as_overrides(table, flags), *extra, *overrides]).config


def _adapter(config: Config, flag: str, path: Path) -> list[Output]:
    folders = (config.folder / "train" / "adapter", config.folder / "train" / "tokenizer")
    return [Output(flag, path, "train", folder, is_copy=True) for folder in folders]


def _with_tokenizer(step: Step) -> Step:
    """Return training so that it also saves the base model's tokenizer, which the guide wants beside the adapter."""

    def run(config: Config, inputs: Mapping[str, Path], folder: Path) -> dict[str, Any]:
        facts = step.run(config, inputs, folder)
        tokenizer = load_tokenizer(fetch_base(config), trust_remote_code=config.model.trust_remote_code)
        tokenizer.save_pretrained(folder / "tokenizer")
        return facts

    return dataclasses.replace(step, run=run) if step.name == "train" else step


def _run(config: Config, flags: Mapping[str, Any], skipped: Sequence[str], outputs: Sequence[Output]) -> bool:
    """Run the stages and write the outputs; False if ``--dry_run`` only asks for the plan."""
    check(outputs, config.folder, flags["dataset_folder"])
    steps = [replaces(_with_tokenizer(step), outputs) for step in build_steps(config)]
    pipeline = Pipeline(config, steps, Selection(skip=skipped, redo=flags["redo"]), called=str(config.folder))
    plan = pipeline.preview()
    if flags["resume_from_checkpoint"]:
        _check_checkpoint(config.folder, Path(flags["resume_from_checkpoint"]), {s.name: w for s, w in plan}["train"])
    if flags["dry_run"]:
        print_tables(plan_table([(step.name, word, step.inputs) for step, word in plan]))
        return False
    outcomes = {outcome.step: outcome.what for outcome in pipeline.run()}
    for output in outputs:
        output.write()
    for path in dict.fromkeys(output.path for output in outputs if output.path.exists()):
        echo(f"{path}" if path.is_dir() else f"{path}: {path.stat().st_size / 1e6:.0f} MB")
    if outcomes.get("report", "skipped") != "skipped":
        echo(f"The run's page: {config.folder / 'report' / 'index.html'}")
    return True


def _check_checkpoint(run: Path, checkpoint: Path, word: str) -> None:
    """Refuse a checkpoint of another run. Say what the plan's word for training means if another one is named."""
    if checkpoint.is_dir() and run.resolve() not in checkpoint.resolve().parents:
        hint = "leave the flag out, or merge that adapter into the base model first"
        raise ConfigError(f"--resume_from_checkpoint {checkpoint}: it is not from the run in {run}", hint=hint)
    newest = word.removeprefix("resume from step ")
    if not newest.isdecimal():
        say(f"--resume_from_checkpoint {checkpoint}: {run} has no checkpoint to resume from; train: {word}")
    elif checkpoint.name.lower() not in (*_NEWEST, f"checkpoint-{newest}"):
        say(f"--resume_from_checkpoint {checkpoint}: training resumes from the newest checkpoint, step {newest}")
