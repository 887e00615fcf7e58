"""Plain English: no word of the list in docs, README, CONTRIBUTING and `--help`."""

from __future__ import annotations

import re

import click
import pytest

from fintune.cli.main import app
from support.paths import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

BANNED = (
    r"anew",
    r"begun",
    r"likewise",
    r"told|tells?",
    r"so many",
    r"goes on|go on|went on",
    r"as it lies|lies (?:in|there|beside|under)",
    r"stands? (?:in|on|there|beside|behind|before)",
    r"behind (?:the|a|each|every|it)",
    r"which is said|is said",
    r"made good",
    r"a word of",
)
"""Words that a native engineer does not write; CONTRIBUTING has the plain ones."""


def offences(text: str) -> list[str]:
    """Every banned word of a text, with its line."""
    pattern = re.compile(rf"\b(?:{'|'.join(BANNED)})\b", re.IGNORECASE)
    return [line.strip() for line in text.splitlines() if pattern.search(line)]


def test_offences_finds_a_word_in_its_line() -> None:
    assert offences("fine\nthe stage is made ANEW here\n") == ["the stage is made ANEW here"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page_has_no_banned_word(page) -> None:
    assert offences(page.read_text(encoding="utf-8")) == []


def commands(command: click.Command, name: str) -> list[tuple[str, click.Command]]:
    """A command and everything below it, by the words that call it."""
    if not isinstance(command, click.Group):
        return [(name, command)]
    context = click.Context(command, info_name=name)
    below = [(word, command.get_command(context, word)) for word in command.list_commands(context)]
    return [(name, command), *(pair for word, sub in below if sub for pair in commands(sub, f"{name} {word}"))]


@pytest.mark.parametrize(("name", "command"), commands(app, "fintune"), ids=str)
def test_help_has_no_banned_word(name: str, command: click.Command) -> None:
    text = command.get_help(click.Context(command, info_name=name))
    assert offences(text) == []
