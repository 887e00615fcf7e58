"""The chat template of a folder: where it stands, what it renders, which token ends a turn."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import NoReturn

from fintune.errors import ModelError

# A template that prints the day must render alike every day.
_TEMPLATE_DAY = date(2024, 7, 26)


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

    def strftime_now(form: str) -> str:
        return _TEMPLATE_DAY.strftime(form)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    try:
        return environment.from_string(template).render(
            messages=list(messages),
            add_generation_prompt=add_generation_prompt,
            enable_thinking=False,
            **special_tokens,
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise ModelError(f"the chat template cannot be rendered: {error}") from error


def special_token_texts(folder: Path) -> dict[str, str]:
    """``bos_token``, ``eos_token`` and the like of ``tokenizer_config.json``; "" where one is not set."""
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    texts = {}
    for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"):
        entry = config.get(f"{kind}_token")
        content = entry.get("content") if isinstance(entry, dict) else entry
        texts[f"{kind}_token"] = content if isinstance(content, str) else ""
    return texts


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
