"""``--extra_train_args``: options of this package, or the names that transformers, TRL, PEFT and Unsloth give them."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Callable, Mapping

from fintune.errors import ConfigError

_FLAG = "--extra_train_args"

RENAMED: Mapping[str, str] = {
    "adam_beta2": "train.adam_beta2",
    "eval_steps": "train.eval_steps",
    "gradient_accumulation_steps": "train.gradient_accumulation_steps",
    "gradient_checkpointing": "train.gradient_checkpointing",
    "use_gradient_checkpointing": "train.gradient_checkpointing",
    "learning_rate": "train.learning_rate",
    "logging_steps": "train.logging_steps",
    "lora_alpha": "adapter.lora_alpha",
    "lora_dropout": "adapter.lora_dropout",
    "lora_r": "adapter.r",
    "max_grad_norm": "train.max_grad_norm",
    "max_length": "prompt.max_length",
    "max_seq_length": "prompt.max_length",
    "max_steps": "train.max_steps",
    "num_train_epochs": "train.num_train_epochs",
    "per_device_train_batch_size": "train.per_device_train_batch_size",
    "random_state": "run.seed",
    "save_steps": "train.save_steps",
    "save_total_limit": "train.save_total_limit",
    "seed": "run.seed",
    "use_rslora": "adapter.use_rslora",
    "warmup_ratio": "train.warmup_ratio",
    "warmup_steps": "train.warmup_steps",
    "weight_decay": "train.weight_decay",
}
"""Names that mean what the option means."""

CALLED: Mapping[str, str] = {
    "base_model": "model.name",
    "bf16": "train.dtype=bfloat16",
    "dataset": "data.sources",
    "eval_strategy": "train.eval_steps",
    "evaluation_strategy": "train.eval_steps",
    "fp16": "train.dtype=float16",
    "load_best_model_at_end": "train.select_checkpoint=best_loss",
    "load_in_4bit": "model.quantization=nf4",
    "lora_rank": "adapter.r",
    "lr": "train.learning_rate",
    "lr_scheduler_type": "train.lr_scheduler_type",
    "model_name": "model.name",
    "model_name_or_path": "model.name",
    "optim": "train.optim",
    "output_dir": "run.dir",
    "rank": "adapter.r",
    "report_to": "train.report_to",
    "target_modules": "adapter.target_modules",
    "use_dora": "adapter.kind=dora",
}
"""Further names by which other programs call an option, for messages; ``option=value`` where the value is settled."""

OPTIMIZERS: Mapping[str, str] = {
    "adamw": "adamw_torch",
    "adamw_torch": "adamw_torch",
    "adamw_torch_fused": "adamw_torch",
    "adamw_hf": "adamw_torch",
    "adamw_8bit": "adamw_8bit",
    "adamw_bnb_8bit": "adamw_8bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
    "paged_adamw_32bit": "paged_adamw_32bit",
    "lion_8bit": "lion_8bit",
    "adafactor": "adafactor",
    "sgd": "sgd",
}
"""Values of ``optim``."""

FIXED: Mapping[str, tuple[str, str]] = {
    "adam_beta1": ("0.9", "AdamW's first moment is averaged with 0.9"),
    "adam_epsilon": ("1e-08", "AdamW divides with 1e-8"),
    "assistant_only_loss": ("true", "only the assistant's turns are trained, see data.train_on"),
    "bias": ("none", "biases are never trained"),
    "completion_only_loss": ("true", "only the assistant's turns are trained, see data.train_on"),
    "dataloader_num_workers": ("0", "the tokens are made before training"),
    "group_by_length": ("true", "batches are of like length within a window of 32"),
    "label_smoothing_factor": ("0.0", "labels are never smoothed"),
    "logging_first_step": ("true", "the first step is always logged"),
    "packing": ("false", "rows are never packed into one; the fused layers need no padding"),
    "remove_unused_columns": ("true", "the collator keeps only what the model reads"),
    "save_strategy": ("steps", "checkpoints are written every --save_steps"),
}
"""What is always so here; another value is refused with the reason."""

ELSEWHERE: Mapping[str, str] = {
    "deepspeed": "see docs/training.md for several GPUs",
    "fsdp": "see docs/training.md for several GPUs",
    "hub_model_id": "`fintune publish` uploads a finished run",
    "output_dir": "it is --lora_output_dir, or --output_dir of train.py",
    "push_to_hub": "`fintune publish` uploads a finished run",
    "resume_from_checkpoint": "it is a flag of its own",
}
"""Names whose work is done in another place."""


def meant(name: str) -> str | None:
    """The option that another program calls so, as ``train.learning_rate`` or ``model.quantization=nf4``."""
    return RENAMED.get(name) or CALLED.get(name)


def overrides(text: str) -> list[str]:
    """``key=value`` overrides from one string.

    Args:
        text: ``'train.weight_decay=0.01'``, ``'--weight_decay 0.01'``, ``'--weight_decay=0.01 --bf16'`` and so on.

    Raises:
        ConfigError: A name or value that has no counterpart here, with what is near or why.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"{_FLAG} {text!r}: {error}") from None
    plain: list[str] = []
    named: dict[str, str] = {}
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            if "=" not in word:
                raise ConfigError(f"{_FLAG}: {word!r} stands alone", hint="write key=value or --name value")
            plain.append(word)
            continue
        name, equals, value = word.removeprefix("--").partition("=")
        if not equals:
            value = words.pop(0) if words and not words[0].startswith("--") else "true"
        named[name.replace("-", "_")] = value
    order = sorted(named, key=lambda name: name in _CONVERTED)  # `--eval_strategy no` goes before `--eval_steps 5`
    found = [each for name in order for each in _translate(name, named[name], named)]
    return [*found, *plain]  # what is called by its own name has the last word


def _translate(name: str, value: str, named: Mapping[str, str]) -> list[str]:
    if name in RENAMED:
        if name == "use_gradient_checkpointing" and value == "unsloth":
            value = "true"
        return [f"{RENAMED[name]}={value}"]
    if name in _CONVERTED:
        return _CONVERTED[name](name, value, named)
    if name in FIXED:
        has, why = FIXED[name]
        if not _same(value, has):
            raise ConfigError(f"{_FLAG}: --{name} {value} cannot be set", hint=f"{why}; leave it out")
        return []
    if name in ELSEWHERE:
        raise ConfigError(f"{_FLAG}: --{name} is not set here", hint=ELSEWHERE[name])
    if called := meant(name):
        given = "VALUE" if value == "true" else value  # none of these is a switch
        raise ConfigError(f"{_FLAG}: unknown --{name}", hint=f"did you mean {shlex.quote(f'{called}={given}')}?")
    known = sorted([*RENAMED, *_CONVERTED, *FIXED])
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean --{near[0]}?" if near else f"known are {', '.join(known)}, and any option as key=value"
    raise ConfigError(f"{_FLAG}: unknown --{name}", hint=hint)


def _same(value: str, has: str) -> bool:
    try:
        return float(value) == float(has)
    except ValueError:
        return value.lower() == has


def _optim(name: str, value: str, _: Mapping[str, str]) -> list[str]:
    return [f"train.optim={_choice(name, value, OPTIMIZERS)}"]


def _schedule(name: str, value: str, _: Mapping[str, str]) -> list[str]:
    known = {
        "cosine": "cosine",
        "linear": "linear",
        "constant": "constant_with_warmup",
        "constant_with_warmup": "constant_with_warmup",
    }
    return [f"train.lr_scheduler_type={_choice(name, value, known)}"]


def _sixteen_bits(name: str, value: str, named: Mapping[str, str]) -> list[str]:
    if _truth(name, value):
        return [f"train.dtype={'bfloat16' if name == 'bf16' else 'float16'}"]
    others = {"bf16", "fp16"} - {name}
    return [] if any(_truth(other, named[other]) for other in others & set(named)) else ["train.dtype=float32"]


def _dora(name: str, value: str, _: Mapping[str, str]) -> list[str]:
    return [f"adapter.kind={'dora' if _truth(name, value) else 'lora'}"]


def _targets(_: str, value: str, __: Mapping[str, str]) -> list[str]:
    names = [each.strip(" '\"") for each in value.strip("[]").split(",")]
    return [f"adapter.target_modules=[{', '.join(names)}]"]


def _four_bit(name: str, value: str, _: Mapping[str, str]) -> list[str]:
    return [f"model.quantization={'nf4' if _truth(name, value) else 'none'}"]


def _report_to(name: str, value: str, _: Mapping[str, str]) -> list[str]:
    known = {"none": "", "all": "tensorboard, wandb", "tensorboard": "tensorboard", "wandb": "wandb"}
    chosen = [_choice(name, each.strip(), known) for each in value.strip("[]").split(",")]
    return [f"train.report_to=[{', '.join(each for each in chosen if each)}]"]


def _keep(name: str, value: str, _: Mapping[str, str]) -> list[str]:
    return [f"train.select_checkpoint={'best_loss' if _truth(name, value) else 'last'}"]


def _eval_strategy(name: str, value: str, named: Mapping[str, str]) -> list[str]:
    strategy = _choice(name, value, {"no": "no", "steps": "steps"})
    if strategy == "no":
        return ["train.eval_steps="]
    if "eval_steps" not in named:
        raise ConfigError(f"{_FLAG}: --{name} steps needs --eval_steps", hint="add for example --eval_steps 100")
    return []


def _choice(name: str, value: str, known: Mapping[str, str]) -> str:
    if value not in known:
        raise ConfigError(f"{_FLAG}: --{name} {value} is not known here", hint=f"known are {', '.join(known)}")
    return known[value]


def _truth(name: str, value: str) -> bool:
    known = {"true": "yes", "1": "yes", "yes": "yes", "false": "no", "0": "no", "no": "no"}
    return _choice(name, value.lower(), known) == "yes"


_CONVERTED: Mapping[str, Callable[[str, str, Mapping[str, str]], list[str]]] = {
    "bf16": _sixteen_bits,
    "eval_strategy": _eval_strategy,
    "evaluation_strategy": _eval_strategy,
    "fp16": _sixteen_bits,
    "load_best_model_at_end": _keep,
    "load_in_4bit": _four_bit,
    "lr_scheduler_type": _schedule,
    "optim": _optim,
    "report_to": _report_to,
    "target_modules": _targets,
    "use_dora": _dora,
}
