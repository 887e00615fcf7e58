"""Commands that are pasted from the guides, with what a shell makes of their line breaks."""

from __future__ import annotations

import click

from fintune.util.console import say


class PastedCommand(click.Command):
    r"""Leaves out arguments of white space alone, and says what they mean.

    In ``--use_4bit true \   # a comment`` the shell reads a blank instead of a line break: the command ends there.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click does, on the arguments that say something."""
        kept = [arg for arg in args if arg.strip() or arg == ""]
        if len(kept) < len(args):
            say(
                "a backslash with something behind it does not continue a line, so the shell did not pass the flags of "
                "the lines below; remove the comment there to pass them"
            )
        return super().parse_args(ctx, kept)
