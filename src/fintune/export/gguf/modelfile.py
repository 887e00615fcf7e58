"""An Ollama Modelfile whose template renders conversations as the model's own chat template does.

Ollama knows Go templates only. What a chat template puts around each role's words is read off its renderings of probe
conversations, and the pieces are accepted only if they reproduce the renderings of others.
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
# Conversations by role; the first is the probe, all are compared.
_CONVERSATIONS = ("suau", "u", "su", "uau", "suauau")
_THOUGHT = "<think>\nfintune-probe-thought\n</think>\n\n"


@dataclass(frozen=True)
class TurnPieces:
    """What stands around the words of each role.

    Attributes:
        opening: Before everything.
        default_system: In place of a system turn where there is none.
        around: Role -> (before, after).
        generation: Opens the assistant's turn.
    """

    opening: str
    default_system: str
    around: dict[str, tuple[str, str]]
    generation: str

    def render(self, roles: str, words: Sequence[str]) -> str:
        """Render a conversation, roles given by their first letters, with the generation prompt."""
        turns = [
            before + word + after
            for role, word in zip(roles, words, strict=True)
            for before, after in (self.around[_ROLES[role]],)
        ]
        return self.opening + ("" if "s" in roles else self.default_system) + "".join(turns) + self.generation


def modelfile(folder: Path, gguf_name: str, *, context_tokens: int) -> tuple[str, list[str]]:
    """The text of a Modelfile, and what its template renders otherwise than the chat template does, a line each.

    Ollama's language cannot cut a text, so thoughts that a chat template takes out of earlier answers stay in, and so
    does white space around a message's words. The text begins with the same lines, as comments.

    Args:
        folder: The Hugging Face folder that was exported.
        gguf_name: File name of the GGUF, which lies beside the Modelfile.
        context_tokens: Context length that Ollama shall allocate.

    Raises:
        ModelError: No chat template, or one that Go's templates cannot express role by role.
    """
    import gguf

    template, special = _template(folder)
    pieces = _read_pieces(folder, template, special)
    # Where a vocabulary says that it prepends BOS, Ollama does it: the template must not do it again.
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

    found = []
    if differs("uau", [_THOUGHT * (role == "a") + word for role, word in zip("uau", _words("uau"), strict=True)]):
        found.append(
            "the chat template takes <think>...</think> out of earlier answers or writes it otherwise, Ollama's "
            "template leaves it: send earlier answers without their thoughts"
        )
    # Some templates take off line ends alone, some everything.
    if any(differs("suau", [f"{white}{word}{white[::-1]}" for word in _words("suau")]) for white in (" \n", "\n ")):
        found.append(
            "the chat template takes white space off the ends of messages, Ollama's template leaves it: send messages "
            "without white space around their words"
        )
    return found


def _template(folder: Path) -> tuple[str, dict[str, str]]:
    template = read_chat_template(folder)
    if template is None:
        raise ModelError(f"{folder}: no chat template, so no Modelfile", hint="add chat_template.jinja to the folder")
    return template, special_token_texts(folder)


def _render(template: str, special: dict[str, str], roles: str, words: Sequence[str], *, generate: bool) -> str:
    messages = [{"role": _ROLES[role], "content": word} for role, word in zip(roles, words, strict=True)]
    return render_template(template, messages, special_tokens=special, add_generation_prompt=generate)


def _read_pieces(folder: Path, template: str, special: dict[str, str]) -> TurnPieces:
    def rendered(roles: str, generate: bool) -> str:
        return _render(template, special, roles, _words(roles), generate=generate)

    def parts(roles: str, generate: bool) -> list[str]:
        text, found = rendered(roles, generate), []
        for word in _words(roles):
            before, _, text = text.partition(word)
            found.append(before)
        return [*found, text]

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
                f"{folder}: the chat template cannot be written as an Ollama template: it is not made of turns",
                hint="write the Modelfile by hand, or serve the GGUF with llama.cpp, which runs the template itself",
            )
    texts = [pieces.opening, pieces.default_system, pieces.generation, *itertools.chain(*pieces.around.values())]
    if any("{{" in text or '"""' in text for text in texts):
        raise ModelError(f"{folder}: the chat template's text cannot be quoted in a Modelfile")
    return pieces


def _is_opening(first: str, before_user: str, special: dict[str, str]) -> bool:
    # SmolLM2 declares as BOS the token that opens every turn: that is not an opening of the whole text.
    bos = special["bos_token"]
    return first.startswith(bos) and not before_user.startswith(bos)


def _words(roles: str) -> list[str]:
    return [f"fintune-probe-{index}-{role}" for index, role in enumerate(roles)]
