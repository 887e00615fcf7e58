"""A table of flags makes a command, its overrides, and the flag that an error is about."""

from __future__ import annotations

from pathlib import Path

import click
import pytest

from fintune.cli.legacy import finance, finqa
from fintune.cli.legacy.flags import PATH, REDO, TRUE_OR_FALSE, Flag, as_overrides, make_command
from fintune.config.load import fields
from fintune.errors import ConfigError
from support.command import fintune

TABLE = (
    Flag("lora_r", 16, "Rank.", "adapter.r"),
    Flag("folder", Path("data"), "Folder."),
    Flag("file", PATH, "File.", "data.train", is_required=True),
    Flag("use_4bit", TRUE_OR_FALSE, "4 bits."),
    Flag("dry_run", False, "Plan."),
    REDO,
)


def run(*words, fails=None):
    """What the command got, and how it ended."""
    got = []

    def record(flags, overrides):
        got.append((flags, overrides))
        if fails is not None:
            raise fails

    return got, fintune(*words, command=make_command(record, TABLE, "A command."))


def test_command_passes_values_and_overrides():
    got, done = run("--file", "a", "--use_4bit", "--dry_run", "--redo", "train", "--redo", "merge", "train.max_steps=1")
    assert done.status == 0
    values = {"lora_r": 16, "folder": Path("data"), "file": Path("a"), "use_4bit": True, "dry_run": True}
    assert got == [({**values, "redo": ("train", "merge")}, ["train.max_steps=1"])]
    got, _ = run("--file", "a", "--use_4bit", "false")
    assert (got[0][0]["use_4bit"], got[0][0]["dry_run"], got[0][0]["redo"]) == (False, False, ())
    assert run()[1].status == 2


def test_as_overrides_skips_none():
    assert as_overrides(TABLE, {"lora_r": 4, "file": Path("x")}) == ["adapter.r=4", 'data.train="x"']
    assert as_overrides(TABLE, {"lora_r": 4, "file": None}) == ["adapter.r=4"]


@pytest.mark.parametrize(("option", "name"), [("adapter.r", "--lora_r"), ("run.seed", "run.seed"), (None, "adapter.r")])
def test_error_names_the_flag_of_its_option(option, name):
    _, done = run("--file", "a", fails=ConfigError(f"{option or 'adapter.r'}: got 0", option=option))
    assert (done.status, done.err) == (2, f"fintune: {name}: got 0\n")


@pytest.mark.parametrize("rest", [["  "], [" ", "#", "QLoRA-style"]])
def test_pasted_comment_stops_the_command(rest):
    got, done = run("--file", "a", "--use_4bit", "true", *rest)
    assert (got, done.status) == ([], 2)
    assert "remove the comment" in done.err


@pytest.mark.parametrize("command", [finance.PIPELINE, finance.TRAIN, finqa.TRAIN_DORA])
def test_help_lists_every_flag(command):
    done = fintune("--help", command=command)
    assert done.status == 0
    assert all(param.opts[0] in done.out for param in command.params if isinstance(param, click.Option))


@pytest.mark.parametrize("table", [finance._PIPELINE, finance._TRAIN, finqa.FLAGS])
def test_tables_name_existing_options(table):
    assert {flag.option for flag in table if flag.option} <= {key for key, _ in fields()}
