"""Finance chat by the older flags: ``train_financial_model.py`` and ``train.py`` turn them into a configuration.

The run with its manifests and checkpoints lies in ``run/`` of the adapter's folder, where every command with that
folder goes on after an interruption. Adapter, merged folder and GGUF files lie where the flags say; large ones as links
to the run's files where the disk allows it.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from fintune import llama_cpp_checkout
from fintune.artifact import write_atomically
from fintune.errors import ConfigError
from fintune.options import Config
from fintune.progress import say

GUIDE_MODEL = "DSR1/DSR1-Distill-Qwen-14B"
MODEL = "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B"
"""What the hub calls the guide's model."""
INVESTOPEDIA = "hub:FinLang/investopedia-instruction-tuning-dataset"
INVESTOPEDIA_ROWS = 22_500
_RUN = "run"
_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_PATH = click.Path(path_type=Path)
_BITS = click.Choice(["auto", "4bit", "16bit"])

_TRAINING: tuple[tuple[str, Any, Any, str], ...] = (
    ("model_name", str, MODEL, "Hub id, local folder or builtin:smollm2-135m."),
    ("dataset_folder", _PATH, Path("datasets"), "Folder of JSON, JSONL, CSV or Parquet conversations of any shape."),
    ("resume_from_checkpoint", str, None, "Go on with the unfinished training in the adapter's folder."),
    ("learning_rate", float, 1e-5, "Peak learning rate, on a cosine schedule."),
    ("num_train_epochs", float, 3.0, "Passes over the data."),
    ("max_seq_length", int, 4096, "Tokens of a conversation; later turns that do not fit are left out."),
    ("gradient_accumulation_steps", int, 8, "Forward passes an optimiser step."),
    ("per_device_train_batch_size", int, 1, "Conversations a forward pass."),
    ("lora_r", int, 32, "Rank of the adapter."),
    ("lora_alpha", int, 64, "Scale of the adapter."),
    ("training_quantization", _BITS, "auto", "Base weights while training; auto is 4bit on a CUDA GPU, else 16bit."),
    ("extra_train_args", str, "", "More options in one string: 'train.weight_decay=0.01' or '--weight_decay 0.01'."),
)
_PIPELINE: tuple[tuple[str, Any, Any, str], ...] = (
    (
        "llama_cpp_path",
        _PATH,
        None,
        "Convert and quantise with this llama.cpp checkout instead of the built-in export.",
    ),
    ("lora_output_dir", _PATH, Path("financial_lora"), "Gets the adapter and tokenizer; the run lies in its run/."),
    ("merged_model_dir", _PATH, Path("merged_financial_fp16"), "Gets the merged 16-bit Hugging Face folder."),
    ("gguf_fp16_path", _PATH, Path("financial_model_fp16.gguf"), "Gets the 16-bit GGUF file."),
    ("gguf_q4_path", _PATH, Path("financial_model_q4_k_m.gguf"), "Gets the quantised GGUF file."),
    ("quantization_target", str, "Q4_K_M", "Type of the quantised file."),
    ("merge_device_map", str, "cpu", "Taken for compatibility: merging always computes on the CPU, in float32."),
    ("investopedia", str, INVESTOPEDIA, "Where Investopedia's rows come from: hub:OWNER/NAME, a file, or none."),
    ("investopedia_rows", int, INVESTOPEDIA_ROWS, "So many of them, drawn by a hash."),
)
_SKIPS = {
    "skip_dataset_prep": "prepare",
    "skip_training": "train",
    "skip_merge": "merge",
    "skip_quantization": "export",
}
_EXTRA = {
    "adam_beta2": "train.adam_beta2",
    "gradient_checkpointing": "train.gradient_checkpointing",
    "logging_steps": "train.log_steps",
    "lora_dropout": "adapter.dropout",
    "lr_scheduler_type": "train.schedule",
    "max_grad_norm": "train.max_grad_norm",
    "max_steps": "train.max_steps",
    "eval_steps": "train.eval_steps",
    "save_steps": "train.checkpoint_steps",
    "seed": "run.seed",
    "warmup_ratio": "train.warmup_ratio",
    "weight_decay": "train.weight_decay",
}
"""Names of transformers' TrainingArguments, and the options that they are here."""


def _option(name: str, kind: Any, default: Any, meaning: str) -> click.Option:
    return click.Option([f"--{name}"], type=kind, default=default, show_default=default not in (None, ""), help=meaning)


def _common() -> list[click.Parameter]:
    return [
        click.Option(
            ["--redo"], multiple=True, metavar="STAGE", help="Make a stage anew: prepare, train, merge, export."
        ),
        click.Option(["--strict"], is_flag=True, help="Stop at the first row that cannot be used."),
        click.Option(["--dry_run"], is_flag=True, help="Say what would be done, do nothing."),
    ]


def pipeline_command() -> click.Command:
    """The command of ``train_financial_model.py``."""
    skips: list[click.Parameter] = [
        click.Option([f"--{flag}"], is_flag=True, help=f"Leave {stage} as it lies.") for flag, stage in _SKIPS.items()
    ]
    return click.Command(
        "train_financial_model",
        params=[*(_option(*each) for each in (*_TRAINING, *_PIPELINE)), *skips, *_common()],
        callback=run_pipeline,
        help="Finance data to a fine-tuned, merged and quantised model; `fintune run` does the same and more.",
    )


def train_command() -> click.Command:
    """The command of ``train.py``."""
    output = _option("output_dir", _PATH, Path("financial_lora"), "Gets the adapter; the run lies in its run/.")
    return click.Command(
        "train",
        params=[*(_option(*each) for each in _TRAINING), output, *_common()],
        callback=run_training,
        help="Fine-tune an adapter on a folder of conversations; `fintune train` does the same and more.",
    )


def run_pipeline(**flags: Any) -> None:
    """Every stage, then the files to where the flags say.

    Raises:
        FintuneError: A mistake of the user's, or a tool that is missing; before any training where that can be known.
    """
    checkout = None
    if flags["llama_cpp_path"] is not None and not flags["skip_quantization"]:
        checkout = llama_cpp_checkout.check(flags["llama_cpp_path"])
    kind = flags["quantization_target"].upper()
    config = _config(
        flags, flags["lora_output_dir"], _investopedia(flags), ["merge.dtype=float16", f"export.types=[F16, {kind}]"]
    )
    skip = [stage for flag, stage in _SKIPS.items() if flags[flag]]
    if checkout is not None and "export" not in skip:
        skip.append("export")
    if not _run(config, flags, skip=skip):
        return
    _lay_out_adapter(config, flags["lora_output_dir"])
    if not flags["skip_merge"]:
        _lay_out(config.folder / "merge", flags["merged_model_dir"], link=True)
    if checkout is not None:
        _external(checkout, config, flags, kind)
    elif not flags["skip_quantization"]:
        exported = config.folder / "export"
        for type_, flag in (("F16", "gguf_fp16_path"), (kind, "gguf_q4_path")):
            _place(exported / f"{_RUN}-{type_}.gguf", flags[flag])
        _modelfile(exported / "Modelfile", f"{_RUN}-{kind}.gguf", flags["gguf_q4_path"])


def run_training(**flags: Any) -> None:
    """Prepare and train, then the adapter to where the flag says.

    Raises:
        FintuneError: A mistake of the user's.
    """
    config = _config(flags, flags["output_dir"], [], [])
    # What is unfinished goes on with the data that it began with.
    began = (config.folder / "prepare").is_dir() and flags["resume_from_checkpoint"] is not None
    skip = ["merge", "export", "report", *(["prepare"] if began else [])]
    if _run(config, flags, skip=skip):
        _lay_out_adapter(config, flags["output_dir"])


def _run(config: Config, flags: Mapping[str, Any], *, skip: Sequence[str]) -> bool:
    """Whether anything was run: not where ``--dry_run`` only asks."""
    from fintune.pipeline import Pipeline
    from fintune.selection import Selection
    from fintune.steps import build

    if flags["resume_from_checkpoint"] is not None and not (config.folder / ".work" / "train").is_dir():
        done = (config.folder / "train").is_dir()
        state = (
            "training is finished there" if done else "there is no unfinished training, so it starts at the beginning"
        )
        say(f"--resume_from_checkpoint {flags['resume_from_checkpoint']}: {state} ({config.folder})")
    pipeline = Pipeline(config, build(config), Selection(skip=skip, redo=flags["redo"]))
    if flags["dry_run"]:
        for step, what in pipeline.preview():
            click.echo(f"{step.name}: {what}")
        return False
    list(pipeline.run())
    return True


def _investopedia(flags: Mapping[str, Any]) -> list[dict[str, Any]]:
    path = flags["investopedia"]
    rows = flags["investopedia_rows"]
    return [] if path.lower() == "none" else [{"path": path, "shape": "question_answer", "max_rows": rows}]


def _config(
    flags: Mapping[str, Any], output: Path, more_sources: Sequence[Mapping[str, Any]], more: Sequence[str]
) -> Config:
    from fintune.config import load

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
        "model.load": bits,
        "data.source": "chat",
        "data.sources": sources,
        "data.strict": flags["strict"],
        "prompt.max_length": flags["max_seq_length"],
        "adapter.r": flags["lora_r"],
        "adapter.alpha": flags["lora_alpha"],
        "adapter.targets": list(_TARGETS),
        "train.learning_rate": flags["learning_rate"],
        "train.epochs": flags["num_train_epochs"],
        "train.batch_size": flags["per_device_train_batch_size"],
        "train.accumulation": flags["gradient_accumulation_steps"],
        "train.gradient_checkpointing": cuda,
        "train.checkpoint_steps": 500,
    }
    overrides = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    return load(None, [*overrides, *more, *_extra(flags["extra_train_args"])]).config


def _cuda() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def _extra(text: str) -> list[str]:
    """``key=value`` as they are; ``--name value`` by the table of names."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"--extra_train_args {text!r}: {error}") from None
    found: list[str] = []
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            if "=" not in word:
                raise ConfigError(f"--extra_train_args: {word!r} stands alone", hint="write key=value or --name value")
            found.append(word)
            continue
        name, equals, value = word.removeprefix("--").partition("=")
        if name not in _EXTRA:
            raise ConfigError(f"--extra_train_args: unknown --{name}", hint=f"known are {', '.join(_EXTRA)}")
        if not equals:
            value = words.pop(0) if words and not words[0].startswith("--") else "true"
        found.append(f"{_EXTRA[name]}={value}")
    return found


def _external(checkout: llama_cpp_checkout.Checkout, config: Config, flags: Mapping[str, Any], kind: str) -> None:
    """Both GGUF files by the checkout's tools, unless they are from this merged model already."""
    from fintune.artifact import Slot

    merged = Slot(config.folder, "merge")
    manifest = merged.manifest()
    if manifest is None:
        raise ConfigError("there is no merged model to convert", hint="leave out --skip_merge")
    half, small = flags["gguf_fp16_path"], flags["gguf_q4_path"]
    record = config.folder / "llama_cpp.json"
    key = {"merged": manifest.digest, "converter": str(checkout.converter.resolve()), "type": kind}
    places = {str(path.resolve()): path.stat().st_size for path in (half, small) if path.is_file()}
    if len(places) == 2 and _read(record) == {**key, "files": places}:
        say(f"{half}, {small}: up to date")
        return
    llama_cpp_checkout.convert(checkout, merged.folder, half)
    llama_cpp_checkout.quantize(checkout, half, small, kind)
    places = {str(path.resolve()): path.stat().st_size for path in (half, small)}
    write_atomically(record, json.dumps({**key, "files": places}, indent=1))
    click.echo(f"{small}: {small.stat().st_size / 1e6:.0f} MB")


def _read(path: Path) -> object:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def _lay_out_adapter(config: Config, target: Path) -> None:
    """Adapter and tokenizer, as copies: who trains on from there must not write into the run."""
    from fintune import models

    _lay_out(config.folder / "train" / "adapter", target, link=False)
    if (target / "adapter_config.json").is_file() and not (target / "tokenizer.json").is_file():
        reference = models.resolve(config.model.name, revision=config.model.revision)
        models.load_tokenizer(reference, trust_remote_code=config.model.trust_remote_code).save_pretrained(target)


def _lay_out(source: Path, target: Path, *, link: bool) -> None:
    """Every file of a finished folder but its manifest, each appearing whole."""
    if not source.is_dir():
        return
    for path in sorted(source.iterdir()):
        if path.is_file() and path.name != "manifest.json":
            _place(path, target / path.name, link=link, quiet=True)
    click.echo(f"{target}")


def _place(source: Path, target: Path, *, link: bool = True, quiet: bool = False) -> None:
    """The same file under another name: a hard link, or a copy where asked or on another disk."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if not (target.exists() and target.samefile(source)):
        part = target.with_name(f".{target.name}.part")
        part.unlink(missing_ok=True)
        try:
            (os.link if link else shutil.copyfile)(source, part)
        except OSError:  # another disk, or one without links
            shutil.copyfile(source, part)
        part.replace(target)
    if not quiet:
        click.echo(f"{target}: {target.stat().st_size / 1e6:.0f} MB")


def _modelfile(source: Path, name: str, target: Path) -> None:
    """Ollama's file beside the quantised model, naming it."""
    if source.is_file():
        text = source.read_text(encoding="utf-8").replace(name, target.name)
        write_atomically(target.with_name(f"{target.name}.Modelfile"), text)
