"""Messages about options, told in the flags that the finance commands call them by."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from fintune.errors import FintuneError

FLAGS: Mapping[str, str] = {
    "adapter.lora_alpha": "--lora_alpha",
    "adapter.r": "--lora_r",
    "data.sources": "--dataset_folder and --investopedia",
    "data.strict": "--strict",
    "export.llama_cpp_path": "--llama_cpp_path",
    "export.types": "--quantization_target",
    "model.quantization": "--training_quantization",
    "model.name": "--model_name",
    "prompt.max_length": "--max_seq_length",
    "train.gradient_accumulation_steps": "--gradient_accumulation_steps",
    "train.per_device_train_batch_size": "--per_device_train_batch_size",
    "train.num_train_epochs": "--num_train_epochs",
    "train.learning_rate": "--learning_rate",
}
"""Options that have a flag."""
_OF_SOURCES: Mapping[str, str] = {
    "data.sources[0].path": "--dataset_folder",
    "data.sources[0]": "--dataset_folder",
    "data.sources[1].max_rows": "--investopedia_rows",
    "data.sources[1].path": "--investopedia",
    "data.sources[1]": "--investopedia",
}
"""What the flags say about the sources, longer names first."""
_SKIPS = {
    "prepare": "--skip_dataset_prep",
    "train": "--skip_training",
    "merge": "--skip_merge",
    "export": "--skip_quantization",
}
_SKIPPED_WITH = {"preflight": "export", "replay": "export", "guard": "train"}
_LEFT_OUT = re.compile(r"--redo asks for (.+), which --skip, --from or --only leaves out")
_TRAINS_ALONE = "--output_dir"
"""Output flag of the command that has no --skip flag and makes no more than an adapter."""
_SECTIONS = "run|model|data|prompt|adapter|train|merge|export|predict"


@contextmanager
def told_in_flags(output_flag: str) -> Iterator[None]:
    """Errors of the package in the words of these commands.

    Args:
        output_flag: What names the folder that the run lies in.

    Raises:
        FintuneError: The same, in other words.
    """
    try:
        yield
    except FintuneError as error:
        if left_out := _LEFT_OUT.fullmatch(error.message):
            error.message, error.hint = _not_redone(left_out[1].split(", "), output_flag)
        error.message = in_flags(error.message, output_flag)
        error.hint = in_flags(error.hint, output_flag) if error.hint is not None else None
        raise


def in_flags(text: str, output_flag: str) -> str:
    """``train.learning_rate=1e-4`` as ``--learning_rate 1e-4``; an option without a flag as --extra_train_args."""
    text = text.removeprefix("command line: ")  # where a YAML file would be named
    text = re.sub(r"\bfintune (\w+) CONFIG first, or fintune run CONFIG for everything", _without_skip, text)
    text = re.sub(r"\bmake it anew first: fintune prepare CONFIG$", f"leave out {_SKIPS['prepare']}", text)
    alone = output_flag == _TRAINS_ALONE
    whole = "train_financial_model.py on the same folder" if alone else "the same command without its --skip flags"
    text = re.sub(r"\bfintune run CONFIG$", whole, text)
    text = text.replace("leave the option out", "leave the flag out")
    text = text.replace("run.name=OTHER keeps it", f"another {output_flag} keeps it")
    text = text.replace("set run.dir to another folder, or run.name to another name", f"give another {output_flag}")
    text = text.replace("set run.name to another name", f"give another {output_flag}")
    text = text.replace("set run.dir to a folder on another disk", f"give a {output_flag} on another disk")
    text = text.replace(" (data.strict: false)", "")
    for option, flag in _OF_SOURCES.items():
        text = text.replace(option, flag)
    text = re.sub(rf"\b(?:{_SECTIONS})\.[a-z0-9_]+=[^\s,;:]+", _setting, text)
    return re.sub(rf"(?<!['\w./])(?:{_SECTIONS})\.[a-z0-9_]+\b(?!=)", lambda found: FLAGS.get(found[0], found[0]), text)


def _without_skip(found: re.Match[str]) -> str:
    return f"leave out {_SKIPS[found[1]]}" if found[1] in _SKIPS else found[0]


def _not_redone(steps: Sequence[str], output_flag: str) -> tuple[str, str]:
    """What to say where --redo names steps that are left out, and what to do."""
    if output_flag == _TRAINS_ALONE:
        if other := [step for step in steps if step != "prepare"]:
            made = "it makes prepare, train and guard"
            return f"--redo asks for {', '.join(other)}, which this command does not make", made
        flags = ["--resume_from_checkpoint"]
    else:
        flags = list(dict.fromkeys(_SKIPS[_SKIPPED_WITH.get(step, step)] for step in steps))
    leave = "leaves" if len(flags) == 1 else "leave"
    return f"--redo asks for {', '.join(steps)}, which {' and '.join(flags)} {leave} out", "drop one of the two"


def _setting(found: re.Match[str]) -> str:
    option, _, value = found[0].partition("=")
    value = {"model.quantization=nf4": "4bit", "model.quantization=none": "16bit"}.get(found[0], value)
    return f"{FLAGS[option]} {value}" if option in FLAGS else f"--extra_train_args '{found[0]}'"


@contextmanager
def told_in(
    flags: Mapping[str, str], phrases: Sequence[tuple[str, str | Callable[[re.Match[str]], str]]] = ()
) -> Iterator[None]:
    """Errors of the package in the flags of one script.

    Args:
        flags: Flag by option, or flag and value by ``option=value``; options that are not among them keep their name.
        phrases: Regular expressions and what stands in their place, the first before the others and before the flags.

    Raises:
        FintuneError: The same, in other words.
    """
    named = re.compile(rf"(?<!['\w./])({'|'.join(map(re.escape, flags))})(?:(=)|(?!\w|\.\w))")

    def told(text: str) -> str:
        text = text.removeprefix("command line: ")
        for phrase, instead in phrases:
            text = re.sub(phrase, instead, text)
        return named.sub(lambda found: flags[found[1]] + (" " if found[2] else ""), text)

    try:
        yield
    except FintuneError as error:
        error.message = told(error.message)
        error.hint = told(error.hint) if error.hint is not None else None
        raise
