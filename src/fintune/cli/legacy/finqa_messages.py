"""What messages of the older training scripts call options by, and what they advise there."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from fintune.cli.legacy.messages import told_in

FLAGS: Mapping[str, str] = {
    "adapter.lora_alpha": "--lora_alpha",
    "adapter.lora_dropout": "--lora_dropout",
    "adapter.kind": "--use_dora",
    "adapter.r": "--lora_r",
    "data.eval": "--eval_dataset_dir",
    "data.train": "--dataset_dir",
    "model.quantization=nf4": "--use_4bit true",
    "model.quantization: none": "--use_4bit false",
    "model.quantization": "--use_4bit",
    "model.name": "--base_model",
    "prompt.max_length": "--max_length",
    "run.dir": "--output_dir",
    "run.name": "--output_dir",
    "run.seed": "--seed",
    "train.gradient_accumulation_steps": "--gradient_accumulation_steps",
    "train.per_device_train_batch_size": "--per_device_train_batch_size",
    "train.save_steps": "--save_steps",
    "train.num_train_epochs": "--epochs",
    "train.eval_steps": "--eval_steps",
    "train.gradient_checkpointing": "--gradient_checkpointing",
    "train.learning_rate": "--lr",
    "train.logging_steps": "--logging_steps",
    "train.dtype": "--use_bf16",
    "train.report_to": "--report_to",
    "train.weight_decay": "--weight_decay",
}
"""What messages call the options by; the longer of two that begin alike stands first."""

OVERWRITE = "overwrite_output_dir"
_ANEW = f"give --{OVERWRITE} true to begin anew"
_ADVICE: tuple[tuple[str, str], ...] = (
    (r"--redo \S+ makes it anew, run\.name=OTHER keeps it", f"{_ANEW}, or another --output_dir"),
    (r"--redo \S+ makes it anew", _ANEW),
    (r"--redo [\w/]+", f"--{OVERWRITE} true"),
    (r"\b(?:run )?(?:`fintune prepare`|(?:fintune )?prepare) again", _ANEW),
    (r"set run\.dir to another folder, or run\.name to another name", "give another --output_dir"),
    (r"set run\.name to another name", "give another --output_dir"),
    (r"set run\.dir to a folder on another disk", "give an --output_dir on another disk"),
    (r"leave the option out", "leave the flag out"),
)
"""What the verbs of ``fintune`` advise, and the same for the scripts, which have no --redo and no name of a run."""


@contextmanager
def told_in_script(given: Mapping[str, object]) -> Iterator[None]:
    """Errors of the package in the flags of the scripts.

    Args:
        given: Value by flag: it says which other arithmetic there is, and which folder is evaluated on.

    Raises:
        FintuneError: The same, in other words.
    """
    use_bf16 = given.get("use_bf16")

    def wider(_: re.Match[str]) -> str:
        import torch  # takes seconds, and an error that speaks of arithmetic has loaded it

        # --use_bf16 false is float16 on a GPU, where nothing is wider than bfloat16, and float32 elsewhere.
        other = use_bf16 is False if torch.cuda.is_available() else use_bf16 is not False
        return f", or give --use_bf16 {str(use_bf16 is False).lower()}" if other else ""

    phrases: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [*_ADVICE]
    evaluated = {} if given.get("eval_dataset_dir") is not None else {"data.eval": "--dataset_dir"}
    with told_in({**FLAGS, **evaluated}, [*phrases, (r", or set train\.dtype to float32", wider)]):
        yield
