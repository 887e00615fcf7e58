"""Flags of the older commands: as click options, as overrides of a configuration, and in messages."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from fintune.errors import FintuneError
from fintune.util.signals import RESUME_MESSAGE, interrupt_message

PATH = click.Path(path_type=Path)
TRUE_OR_FALSE = click.BOOL


@dataclass(frozen=True)
class Flag:
    """A row of a script's table of flags.

    A default of a type means None. False marks a flag without a value, and () a repeatable flag. ``option`` is
    the key that the flag sets, such as ``adapter.r``; empty if the script reads the flag itself.
    """

    name: str
    default: Any
    help: str
    option: str = ""
    is_required: bool = False

    def parameter(self) -> click.Option:
        """Return the flag as a click option."""
        settings: dict[str, Any] = {"required": self.is_required, "help": self.help}
        if self.default is TRUE_OR_FALSE or self.default is True:  # --use_4bit, --use_4bit true or --use_4bit false
            settings |= {"type": click.BOOL, "is_flag": False, "flag_value": "true", "metavar": "true|false"}
            settings["default"] = self.default is True or None
        elif isinstance(self.default, (type, click.ParamType)):
            settings["type"] = self.default
        elif self.default is False or self.default == ():
            settings["multiple" if self.default == () else "is_flag"] = True
        else:
            kind = PATH if isinstance(self.default, Path) else type(self.default)
            settings |= {"type": kind, "default": self.default, "show_default": True}
        return click.Option([f"--{self.name}"], **settings)


REDO = Flag("redo", (), "Rerun this stage, and later stages whose inputs change. May be repeated.")


def as_overrides(table: Sequence[Flag], flags: Mapping[str, Any]) -> list[str]:
    """Return the ``key=value`` overrides that flags stand for; a flag whose value is None sets nothing."""
    values = [(flag.option, flags[flag.name]) for flag in table if flag.option]
    return [f"{option}={json.dumps(value, default=str)}" for option, value in values if value is not None]


def make_command(
    run: Callable[[dict[str, Any], list[str]], None], table: Sequence[Flag], summary: str
) -> click.Command:
    """Make the click command of a script, whose errors name flags; ``run`` gets their values and the overrides."""

    def callback(overrides: tuple[str, ...], **flags: Any) -> None:
        try:
            with interrupt_message(RESUME_MESSAGE):
                run(flags, list(overrides))
        except FintuneError as error:
            names = [flag.name for flag in table if flag.option and flag.option == error.option]
            raise error.renamed(f"--{names[0]}") if names else error from None

    overrides = click.Argument(["overrides"], nargs=-1, metavar="[KEY=VALUE]...")
    text = f"{summary}\n\nKEY=VALUE sets any option of docs/options.md; it overrides the flags."
    params = [*(flag.parameter() for flag in table), overrides]
    return PastedCommand(run.__name__, params=params, callback=callback, help=text)


class PastedCommand(click.Command):
    r"""A command that refuses to run with a part of its flags.

    In ``--use_4bit true \   # comment`` the backslash passes a blank, and the shell drops the flags of the next lines.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments; a blank or a comment among them is a usage error."""
        if any(arg.startswith("#") or (arg and not arg.strip()) for arg in args):
            what = "a backslash is not the last character of its line, so the shell dropped the flags of the next lines"
            raise click.UsageError(f"{what}: remove the comment or the blanks after the backslash", ctx)
        return super().parse_args(ctx, args)
