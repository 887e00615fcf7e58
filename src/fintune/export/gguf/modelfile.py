"""Ollama Modelfiles whose template renders conversations like the model's own chat template.

Ollama supports only Go templates. The text around the words of every role is read from renderings of probe
conversations. The result is accepted only if it reproduces the renderings of other conversations.
Source: Ollama's documentation, "Modelfile" and "Template" (``.Messages``, ``.Role``, ``.Content``, ``.System``).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fintune.errors import ModelError
from fintune.models.chat_template import read_chat_template, render_template, special_token_texts, turn_ending

_ROLES = {"s": "system", "u": "user", "a": "assistant"}
# Conversations as first letters of roles. The first is the probe; all are compared.
_CONVERSATIONS = ("suau", "u", "su", "uau", "suauau")
_THOUGHT = "<think>\nfintune-probe-thought\n</think>\n\n"


@dataclass(frozen=True)
class TurnPieces:
    """The parts of a chat template.

    Attributes:
        opening: Text at the start of a conversation.
        default_system: Text at the place of a system turn if the conversation has none.
        around: Role -> (text before the words, text after the words).
        generation: Text that opens the assistant's turn.
    """

    opening: str
    default_system: str
    around: dict[str, tuple[str, str]]
    generation: str

    def render(self, roles: str, words: Sequence[str]) -> str:
        """Render a conversation with the generation prompt. ``roles`` are the first letters of the roles."""
        turns = [
            before + word + after
            for role, word in zip(roles, words, strict=True)
            for before, after in (self.around[_ROLES[role]],)
        ]
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

    template, special = _template(folder)
    pieces = _read_pieces(folder, template, special)
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
    notes = _differences(pieces, template, special)
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


def _differences(pieces: TurnPieces, template: str, special: dict[str, str]) -> list[str]:
    def differs(roles: str, words: Sequence[str]) -> bool:
        return pieces.render(roles, words) != _render(template, special, roles, words, generate=True)

    notes = []
    if differs("uau", [_THOUGHT * (role == "a") + word for role, word in zip("uau", _words("uau"), strict=True)]):
        notes.append(
            "the chat template removes or changes <think>...</think> in earlier answers, Ollama's template keeps it: "
            "send earlier answers without their thoughts"
        )
    # Some templates strip line ends only, others all white space.
    if any(differs("suau", [f"{white}{word}{white[::-1]}" for word in _words("suau")]) for white in (" \n", "\n ")):
        notes.append(
            "the chat template strips white space from the ends of messages, Ollama's template keeps it: send messages "
            "without white space at their ends"
        )
    return notes


def _template(folder: Path) -> tuple[str, dict[str, str]]:
    template = read_chat_template(folder)
    if template is None:
        raise ModelError(
            f"{folder} has no chat template, so no Modelfile is written", hint="add chat_template.jinja to the folder"
        )
    return template, special_token_texts(folder)


def _render(template: str, special: dict[str, str], roles: str, words: Sequence[str], *, generate: bool) -> str:
    messages = [{"role": _ROLES[role], "content": word} for role, word in zip(roles, words, strict=True)]
    return render_template(template, messages, special_tokens=special, add_generation_prompt=generate)


def _read_pieces(folder: Path, template: str, special: dict[str, str]) -> TurnPieces:
    def rendered(roles: str, generate: bool) -> str:
        return _render(template, special, roles, _words(roles), generate=generate)

    def parts(roles: str, generate: bool) -> list[str]:
        text, pieces = rendered(roles, generate), []
        for word in _words(roles):
            before, _, text = text.partition(word)
            pieces.append(before)
        return [*pieces, text]

    first, system_user, user_assistant, assistant_user, end = parts("suau", True)
    after_user, after_assistant = parts("su", False)[-1], parts("sua", False)[-1]
    before_user = assistant_user.removeprefix(after_assistant)
    opening = special["bos_token"] if special["bos_token"] and _is_opening(first, before_user, special) else ""
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
    for roles in _CONVERSATIONS:
        if pieces.render(roles, _words(roles)) != rendered(roles, True):
            raise ModelError(
                f"{folder}: the chat template cannot be written as an Ollama template, because it is not made of turns",
                hint="write the Modelfile by hand, or serve the GGUF with llama.cpp, which runs the chat template",
            )
    texts = [pieces.opening, pieces.default_system, pieces.generation, *itertools.chain(*pieces.around.values())]
    if any("{{" in text or '"""' in text for text in texts):
        raise ModelError(f"{folder}: the chat template's text cannot be quoted in a Modelfile")
    return pieces


def _is_opening(first: str, before_user: str, special: dict[str, str]) -> bool:
    # SmolLM2 declares the token that opens every turn as BOS. That is no opening of the whole text.
    bos = special["bos_token"]
    return first.startswith(bos) and not before_user.startswith(bos)


def _words(roles: str) -> list[str]:
    return [f"fintune-probe-{index}-{role}" for index, role in enumerate(roles)]
