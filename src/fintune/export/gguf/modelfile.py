"""Ollama Modelfiles whose template renders conversations like the model's own chat template.

Ollama supports only Go templates. The text around the words of every role is read from renderings of probe
conversations. The result is accepted only if it reproduces the renderings of other conversations.
Source: Ollama's documentation, "Modelfile" and "Template" (``.Messages``, ``.Role``, ``.Content``, ``.System``).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fintune.errors import ModelError
from fintune.models.chat_template import read_chat_template, render_template, special_token_texts, turn_ending

_ROLES = {"s": "system", "u": "user", "a": "assistant"}
# Conversations as first letters of roles. The first is the probe; all are compared.
_CONVERSATIONS = ("suau", "u", "su", "uau", "suauau")
_THOUGHT = "<think>\nfintune-probe-thought\n</think>\n\n"
_KEEPS_THOUGHTS = (
    "the chat template removes or changes <think>...</think> in earlier answers, Ollama's template keeps it: "
    "send earlier answers without their thoughts"
)
_KEEPS_WHITE_SPACE = (
    "the chat template strips white space from the ends of messages, Ollama's template keeps it: send messages "
    "without white space at their ends"
)

Renderer = Callable[[str, Sequence[str], bool], str]
"""(first letters of the roles, words of the turns, whether the assistant's turn is opened) -> text."""


@dataclass(frozen=True)
class TurnPieces:
    """The parts of a chat template."""

    opening: str
    default_system: str
    """Text at the place of a system turn if the conversation has none."""
    around: dict[str, tuple[str, str]]
    """Role -> (text before the words, text after the words)."""
    generation: str
    """Text that opens the assistant's turn."""

    def render(self, roles: str, words: Sequence[str]) -> str:
        """Render a conversation with the generation prompt. ``roles`` are the first letters of the roles."""
        around = [self.around[_ROLES[role]] for role in roles]
        turns = [before + word + after for word, (before, after) in zip(words, around, strict=True)]
        return self.opening + ("" if "s" in roles else self.default_system) + "".join(turns) + self.generation


def render_modelfile(folder: Path, gguf_name: str, *, context_tokens: int) -> tuple[str, list[str]]:
    """Render a Modelfile.

    Ollama's template language cannot cut a text. So thoughts that a chat template removes from earlier answers stay,
    and so does white space around the words of a message.

    Args:
        folder: The Hugging Face folder that was exported.
        gguf_name: Name of the GGUF file, which is in the same folder as the Modelfile.
        context_tokens: Context length for Ollama.

    Returns:
        The text, and the differences between its template and the chat template. The text begins with the differences
        as comments.

    Raises:
        ModelError: There is no chat template, or Go's templates cannot express it role by role.
    """
    import gguf

    template, special = read_chat_template(folder), special_token_texts(folder)
    if template is None:
        raise ModelError(
            f"{folder} has no chat template, so no Modelfile is written", hint="add chat_template.jinja to the folder"
        )

    def render(roles: str, words: Sequence[str], generate: bool) -> str:
        messages = [{"role": _ROLES[role], "content": word} for role, word in zip(roles, words, strict=True)]
        return render_template(template, messages, special_tokens=special, add_generation_prompt=generate)

    pieces = _read_pieces(folder, render, special["bos_token"])
    # If the vocabulary says that BOS is prepended, Ollama prepends it, so the template must not.
    adds_bos = gguf.SpecialVocab(folder).add_special_token.get("bos", False)
    opening = pieces.opening.removeprefix(special["bos_token"]) if adds_bos else pieces.opening
    branches = "".join(
        f'{{{{ {word} eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}'
        for word, (role, (before, after)) in zip(("if", "else if", "else if"), pieces.around.items(), strict=True)
    )
    default = f"{{{{ if not .System }}}}{pieces.default_system}{{{{ end }}}}" if pieces.default_system else ""
    body = f"{opening}{default}{{{{ range .Messages }}}}{branches}{{{{ end }}}}{{{{ end }}}}{pieces.generation}"
    stop = turn_ending(template, special).strip() or special["eos_token"]
    notes = _differences(pieces, render)
    lines = [
        *(f"# {note}" for note in notes),
        f"FROM ./{gguf_name}",
        f'TEMPLATE """{body}"""',
        f'PARAMETER stop "{stop}"',
        f"PARAMETER num_ctx {context_tokens}",
        "PARAMETER temperature 0",
        "PARAMETER repeat_penalty 1.0",
    ]
    return "\n".join(lines) + "\n", notes


def _differences(pieces: TurnPieces, render: Renderer) -> list[str]:
    def differs(roles: str, words: Sequence[str]) -> bool:
        return pieces.render(roles, words) != render(roles, words, True)

    user, answer, again = _words("uau")
    # Some templates strip line ends only, others all white space.
    padded = [[f"{white}{word}{white[::-1]}" for word in _words("suau")] for white in (" \n", "\n ")]
    keeps_thoughts = differs("uau", [user, _THOUGHT + answer, again])
    keeps_white_space = any(differs("suau", words) for words in padded)
    return [_KEEPS_THOUGHTS] * keeps_thoughts + [_KEEPS_WHITE_SPACE] * keeps_white_space


def _read_pieces(folder: Path, render: Renderer, bos: str) -> TurnPieces:
    def parts(roles: str, generate: bool) -> list[str]:
        """Return the texts before, between and after the words."""
        text, pieces = render(roles, _words(roles), generate), []
        for word in _words(roles):
            before, _, text = text.partition(word)
            pieces.append(before)
        return [*pieces, text]

    first, system_user, user_assistant, assistant_user, end = parts("suau", True)
    after_user, after_assistant = parts("su", False)[-1], parts("sua", False)[-1]
    before_user = assistant_user.removeprefix(after_assistant)
    # SmolLM2 declares the token that opens every turn as BOS. That is no opening of the whole text.
    opening = bos if bos and first.startswith(bos) and not before_user.startswith(bos) else ""
    pieces = TurnPieces(
        opening,
        parts("u", True)[0].removeprefix(opening).removesuffix(before_user),
        {
            "system": (first.removeprefix(opening), system_user.removesuffix(before_user)),
            "user": (before_user, after_user),
            "assistant": (user_assistant.removeprefix(after_user), after_assistant),
        },
        end.removeprefix(after_user),
    )
    if any(pieces.render(roles, _words(roles)) != render(roles, _words(roles), True) for roles in _CONVERSATIONS):
        raise ModelError(
            f"{folder}: the chat template cannot be written as an Ollama template, because it is not made of turns",
            hint="write the Modelfile by hand, or serve the GGUF with llama.cpp, which runs the chat template",
        )
    texts = [pieces.opening, pieces.default_system, pieces.generation, *itertools.chain(*pieces.around.values())]
    if any("{{" in text or '"""' in text for text in texts):
        raise ModelError(f"{folder}: the chat template's text cannot be quoted in a Modelfile")
    return pieces


def _words(roles: str) -> list[str]:
    return [f"fintune-probe-{index}-{role}" for index, role in enumerate(roles)]
