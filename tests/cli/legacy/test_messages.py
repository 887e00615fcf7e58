"""Messages of the finance commands name their flags, not the options behind them."""

from __future__ import annotations

import re

import pytest

from fintune.cli.legacy import finqa as cli_train
from fintune.cli.legacy import finqa_messages as cli_train_words
from fintune.cli.legacy.messages import FLAGS, in_flags, told_in, told_in_flags
from fintune.config.load import fields
from fintune.errors import ArtifactError, ConfigError, ResourceError


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "set train.per_device_train_batch_size=4 train.gradient_accumulation_steps=2, or model.quantization=nf4, "
            "or prompt.max_length below 4096",
            "set --per_device_train_batch_size 4 --gradient_accumulation_steps 2, or --training_quantization 4bit, "
            "or --max_seq_length below 4096",
        ),
        ("set train.gradient_checkpointing=true", "set --extra_train_args 'train.gradient_checkpointing=true'"),
        ("--redo train makes it anew, run.name=OTHER keeps it", "--redo train makes it anew, another --out keeps it"),
        ("fintune prepare CONFIG first, or fintune run CONFIG for everything", "leave out --skip_dataset_prep"),
        (
            "fintune guard CONFIG first, or fintune run CONFIG for everything",
            "fintune guard CONFIG first, or fintune run CONFIG for everything",
        ),
        ("wait for it, or set run.name to another name", "wait for it, or give another --out"),
        ("train.learning_rate was 1e-05 and is now 2e-05", "--learning_rate was 1e-05 and is now 2e-05"),
        ('train.optim was "sgd"', 'train.optim was "sgd"'),
        (
            "export.llama_cpp_path tools: no such folder: leave the option out",
            "--llama_cpp_path tools: no such folder: leave the flag out",
        ),
        ("command line: adapter.r: got 0", "--lora_r: got 0"),
        ("data/train.batch_size/x", "data/train.batch_size/x"),
        ("command line: data.sources[1].max_rows: got 0", "--investopedia_rows: got 0"),
        ('data.sources[0].path was "a" and is now "b"', '--dataset_folder was "a" and is now "b"'),
        ("data.sources[1].format: got 0", "--investopedia.format: got 0"),
        (
            "data.sources had 1 entry and now has 2",
            "--dataset_folder and --investopedia had 1 entry and now has 2",
        ),
        ("or leave out --strict (data.strict: false) to drop such rows", "or leave out --strict to drop such rows"),
        ("make one first: fintune run CONFIG", "make one first: the same command without its --skip flags"),
        ("put it back, or make it anew first: fintune prepare CONFIG", "put it back, or leave out --skip_dataset_prep"),
        ("free some, or set run.dir to a folder on another disk", "free some, or give a --out on another disk"),
    ],
)
def test_options_are_told_as_flags(text, told):
    assert in_flags(text, "--out") == told


def test_every_flag_stands_for_an_option():
    assert set(FLAGS) <= {key for key, _ in fields()}


def test_an_error_keeps_its_kind():
    with pytest.raises(ArtifactError, match=r"^--lora_r was 8: leave out --skip_merge$"), told_in_flags("--out"):
        raise ArtifactError("adapter.r was 8", hint="fintune merge CONFIG first, or fintune run CONFIG for everything")
    with pytest.raises(ResourceError, match=r"^no GPU$"), told_in_flags("--out"):
        raise ResourceError("no GPU")


@pytest.mark.parametrize(
    ("output_flag", "steps", "told"),
    [
        ("--out", "merge", r"merge, which --skip_merge leaves out: drop one of the two"),
        ("--out", "export, replay", r"export, replay, which --skip_quantization leaves out: drop one of the two"),
        ("--out", "guard, merge", r"guard, merge, which --skip_training and --skip_merge leave out: drop one"),
        ("--output_dir", "prepare", r"prepare, which --resume_from_checkpoint leaves out: drop one of the two"),
        ("--output_dir", "merge, prepare", r"merge, which this command does not make: it makes prepare, train and"),
    ],
)
def test_what_redo_and_a_flag_disagree_about_is_told_with_that_flag(output_flag, steps, told):
    with pytest.raises(ArtifactError, match=rf"^--redo asks for {told}"), told_in_flags(output_flag):
        raise ArtifactError(
            f"--redo asks for {steps}, which --skip, --from or --only leaves out", hint="drop one of the two"
        )


def test_the_command_that_only_trains_sends_to_the_one_that_does_the_rest():
    assert in_flags("make it first: fintune run CONFIG", "--output_dir") == (
        "make it first: train_financial_model.py on the same folder"
    )


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("command line: adapter.r: got 0", "--lora_r: got 0"),
        (
            "add train.per_device_train_batch_size=4 train.seed=1, or adapter.r=8.",
            "add --batch 4 train.seed=1, or --lora_r 8.",
        ),
        (
            "lower adapter.r, or model.quantization=nf4, or model.quantization",
            "lower --lora_r, or --use_4bit true, or model.quantization",
        ),
        (
            "data/adapter.r/x and adapter.use_rslora and adapter.r.txt",
            "data/adapter.r/x and adapter.use_rslora and adapter.r.txt",
        ),
    ],
)
def test_a_script_is_told_in_its_own_flags(text, told):
    with (
        pytest.raises(ConfigError) as raised,
        told_in(
            {
                "adapter.r": "--lora_r",
                "train.per_device_train_batch_size": "--batch",
                "model.quantization=nf4": "--use_4bit true",
            }
        ),
    ):
        raise ConfigError(text, hint=text)
    assert (raised.value.message, raised.value.hint) == (told, told)


def test_the_flags_of_the_older_training_commands_stand_for_options():
    assert {re.split("[=:]", option)[0] for option in cli_train_words.FLAGS} <= {key for key, _ in fields()}
    known = {f"--{name}" for name, *_ in cli_train._OPTIONS}
    assert {flag.split()[0] for flag in cli_train_words.FLAGS.values()} <= known
