"""The chat template of a folder: where it stands, what it renders, which token ends a turn."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from fintune.errors import ModelError


def read_chat_template(folder: Path) -> str | None:
    """The folder's default chat template, None where it has none.

    ``chat_template.jinja`` wins over ``tokenizer_config.json``, as in transformers.
    """
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return None
    try:
        template = json.loads(path.read_text(encoding="utf-8")).get("chat_template")
    except (ValueError, AttributeError) as error:
        raise ModelError(f"{path}: unreadable: {error}") from error
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, str]],
    *,
    special_tokens: Mapping[str, str],
    add_generation_prompt: bool = False,
) -> str:
    """Render a conversation in the environment that transformers documents for chat templates.

    Args:
        template: Jinja text.
        messages: Turns, each with "role" and "content".
        special_tokens: "bos_token" and the like, as the template names them.
        add_generation_prompt: Whether the opening of the assistant's turn is appended.

    Raises:
        ModelError: The template is wrong or refuses these messages.
    """
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = raise_exception
    try:
        return environment.from_string(template).render(
            messages=list(messages), add_generation_prompt=add_generation_prompt, **special_tokens
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise ModelError(f"the chat template cannot be rendered: {error}") from error


def turn_ending(template: str, special_tokens: Mapping[str, str]) -> str:
    """What the template puts after the assistant's words: the end-of-turn token and what follows it.

    Raises:
        ModelError: The template is wrong, or drops the assistant's words.
    """
    mark = "fintune-assistant-words"
    text = render_chat(
        template,
        [{"role": "user", "content": "question"}, {"role": "assistant", "content": mark}],
        special_tokens=special_tokens,
    )
    _, found, ending = text.partition(mark)
    if not found:
        raise ModelError("the chat template drops the assistant's turn")
    return ending
