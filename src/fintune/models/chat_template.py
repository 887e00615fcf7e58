"""Chat templates: conversations to text, and text to token ids with a mask of the trained tokens.

Training, prediction, export and replay all use this module, so a model is prompted exactly as it was trained.
Special tokens come from the template alone (``add_special_tokens=False``), so there are never two BOS tokens.

The functions of the second part render the template of a model *folder*, without transformers: the GGUF writer and the
Modelfile need the template before any tokenizer is loaded.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol
from weakref import WeakKeyDictionary

from fintune.errors import DataError, ModelError
from fintune.records import Message
from fintune.util.files import read_json

if TYPE_CHECKING:
    from jinja2 import Template
    from transformers import PreTrainedTokenizerBase

TEMPLATE_DATE = date(2024, 7, 26)
"""The date that templates print (Llama-3.2, Mistral). A prompt must not depend on today; this is Llama 3's default."""

_STRFTIME_CALL = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
_PROBE = "fintuneprobe"
_end_of_turn: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[str, tuple[int, ...]]] = WeakKeyDictionary()


class EndOfTurnError(DataError):
    """A text contains the token that ends a turn.

    Args:
        token: The token as text.
    """

    def __init__(self, token: str) -> None:
        super().__init__(f"the text contains {token}, the token that ends a turn", hint="remove it from the data")
        self.token = token


@dataclass(frozen=True)
class EncodedExample:
    """A conversation as token ids.

    Attributes:
        input_ids: Prompt, completion and end-of-turn token; shape [num_tokens].
        completion_mask: 1 for trained tokens (completion and end of turn), 0 for the prompt; shape [num_tokens].
        follows_template: Whether the ids are the template's own rendering of the whole conversation. False if that
            rendering does not begin with the prompt's; the completion was then appended to the prompt.
    """

    input_ids: list[int]
    completion_mask: list[int]
    follows_template: bool

    @property
    def num_prompt_tokens(self) -> int:
        """Number of tokens before the first trained one."""
        return self.completion_mask.index(1)


class ChatTokenizer(Protocol):
    """Conversations to text, and text to ids.

    :class:`fintune.models.chat_cache.CachedChatTokenizer` is one for conversations that share their first turns. It
    returns what :func:`render` and :func:`encode_text` return.
    """

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """Render a conversation as :func:`render` does."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of a rendered text."""


@dataclass(frozen=True)
class _PlainChatTokenizer:
    tokenizer: PreTrainedTokenizerBase

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        return render(self.tokenizer, messages, add_generation_prompt)

    def encode(self, text: str) -> list[int]:
        return encode_text(self.tokenizer, text)


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
    """Render a conversation with the tokenizer's chat template.

    Thinking is switched off if the template knows ``enable_thinking``, and the date is fixed.

    Raises:
        ModelError: The tokenizer has no chat template.
        DataError: There are no messages, or the template refuses them (order of roles, system turn ...).
    """
    from jinja2 import TemplateError

    if not messages:
        raise DataError(
            "the assistant speaks first, so its turn has no prompt",
            hint="put a user's turn before it, or set data.system",
        )
    try:
        text = tokenizer.apply_chat_template(
            [message.model_dump() for message in messages],
            chat_template=dated_template(tokenizer),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            enable_thinking=False,
        )
    except TemplateError as error:
        roles = ", ".join(message.role for message in messages)
        raise DataError(f"the chat template of {tokenizer.name_or_path} refuses the turns {roles}: {error}") from error
    return str(text)


def dated_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the chat template with :data:`TEMPLATE_DATE` in place of today's date.

    Raises:
        ModelError: The tokenizer has no chat template.
    """
    return _STRFTIME_CALL.sub(lambda call: repr(TEMPLATE_DATE.strftime(call[2])), chat_template(tokenizer))


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], chat_tokenizer: ChatTokenizer | None = None
) -> list[int]:
    """Return the ids of a conversation up to the start of the assistant's turn, as training saw them.

    Raises:
        ModelError: There is no chat template, it does not end turns, or the prompt begins with two BOS tokens.
        DataError: The template refuses these messages, or one contains the token that ends a turn.
    """
    chat_tokenizer = chat_tokenizer or _PlainChatTokenizer(tokenizer)
    return _encode_prompt(tokenizer, messages, chat_tokenizer.render(messages), chat_tokenizer)


def _encode_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], prompt: str, chat_tokenizer: ChatTokenizer
) -> list[int]:
    _refuse_end_of_turn(tokenizer, *(message.content for message in messages))
    ids = chat_tokenizer.encode(prompt)
    if tokenizer.bos_token_id is not None and ids[:2] == [tokenizer.bos_token_id] * 2:
        raise ModelError(
            f"a prompt of {tokenizer.name_or_path} begins with two {tokenizer.bos_token} tokens",
            hint="the chat template and the tokenizer both add one; remove it from one of them",
        )
    return ids


def encode_example(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    completion: str,
    chat_tokenizer: ChatTokenizer | None = None,
) -> EncodedExample:
    """Encode a conversation with the assistant's answer. The answer and the token that ends it are trained.

    If the template's rendering of the whole conversation begins with the prompt's ids, the ids are that rendering up to
    the end-of-turn token. Otherwise prompt and completion are encoded separately, as generation joins them.

    Raises:
        ModelError: As for :func:`encode_prompt`, or the template rewrites the completion.
        DataError: As for :func:`encode_prompt`, or the completion is empty.
    """
    chat_tokenizer = chat_tokenizer or _PlainChatTokenizer(tokenizer)
    prompt = chat_tokenizer.render(messages)
    prompt_ids = _encode_prompt(tokenizer, messages, prompt, chat_tokenizer)
    if not completion.strip():
        raise DataError("the completion is empty, so there is nothing to train on")
    end_id, end_text = _refuse_end_of_turn(tokenizer, completion)

    turns = [*messages, Message(role="assistant", content=completion)]
    whole = chat_tokenizer.render(turns, add_generation_prompt=False)
    turn = whole.removeprefix(prompt) if whole.startswith(prompt) else completion + end_text
    turn = turn[: turn.find(end_text) + len(end_text)]
    if turn.removesuffix(end_text).strip() != completion.strip():
        raise ModelError(
            f"the chat template of {tokenizer.name_or_path} writes the completion {completion[:60]!r} as {turn[:80]!r}"
        )
    ids = chat_tokenizer.encode(prompt + turn)
    follows = whole.startswith(prompt + turn) and ids[: len(prompt_ids)] == prompt_ids
    if not follows:
        ids = prompt_ids + chat_tokenizer.encode(turn)
    trained = ids[len(prompt_ids) :]
    if trained[-1:] != [end_id] or trained.count(end_id) != 1:
        raise ModelError(f"{end_text} does not end the encoded completion {completion[:60]!r}")
    return EncodedExample(ids, [0] * len(prompt_ids) + [1] * len(trained), follows)


def end_of_turn_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the ids at which generation stops.

    The first is the token that the template writes after an assistant's turn (it is trained). The tokenizer's EOS
    follows if it is another token.

    Raises:
        ModelError: There is no chat template, or it writes no special token after an assistant's turn.
    """
    template = chat_template(tokenizer)
    cached = _end_of_turn.get(tokenizer)
    if cached is not None and cached[0] == template:
        return cached[1]
    turns = [Message(role="user", content="question"), Message(role="assistant", content=_PROBE)]
    ending = render(tokenizer, turns, add_generation_prompt=False).rpartition(_PROBE)[2]
    special = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    end = next((token_id for token_id in encode_text(tokenizer, ending) if token_id in special), None)
    if end is None:
        raise ModelError(
            f"the chat template of {tokenizer.name_or_path} writes no special token after an assistant's turn",
            hint="use a template that ends each turn, as ChatML does with <|im_end|>; otherwise generation never stops",
        )
    eos = tokenizer.eos_token_id
    ids = (end,) if eos is None or eos == end else (end, eos)
    _end_of_turn[tokenizer] = template, ids
    return ids


def _refuse_end_of_turn(tokenizer: PreTrainedTokenizerBase, *texts: str) -> tuple[int, str]:
    # Inside a page or an answer, the token would end the turn, and the rest would become the next speaker's text.
    end_id = end_of_turn_ids(tokenizer)[0]
    end_text = str(tokenizer.convert_ids_to_tokens(end_id))
    if any(end_text in text for text in texts):
        raise EndOfTurnError(end_text)
    return end_id, end_text


def chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the Jinja text of the tokenizer's (default) chat template.

    Raises:
        ModelError: The tokenizer has none.
    """
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        raise ModelError(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template",
            hint="use an instruction-tuned model, or put a chat_template.jinja into its folder",
        )
    return str(template)


def template_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the SHA-256 of the chat template's text. Every manifest holds it, to reveal a mixed-up template."""
    return hashlib.sha256(chat_template(tokenizer).encode()).hexdigest()


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the ids of a rendered text; nothing is added."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return ids


# --- the template of a folder, without a tokenizer


def compile_template(template: str) -> Template:
    """Compile a chat template in the Jinja environment that transformers documents for it, with a fixed date.

    Raises:
        jinja2.TemplateError: The template is wrong.
    """
    from jinja2 import TemplateError
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationBlock(Extension):
        """``{% generation %}`` marks the assistant's words in transformers; the content is rendered as it is."""

        tags = {"generation"}  # noqa: RUF012 - as jinja declares it

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, "jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = TEMPLATE_DATE.strftime
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    return environment.from_string(template)


def render_template(
    template: str,
    messages: Sequence[Mapping[str, str]],
    *,
    special_tokens: Mapping[str, str],
    add_generation_prompt: bool = False,
) -> str:
    """Render a conversation with a template's text.

    Args:
        template: Jinja text.
        messages: Turns, each with "role" and "content".
        special_tokens: "bos_token" and so on, as the template names them.
        add_generation_prompt: Whether to append the opening of the assistant's turn.

    Raises:
        ModelError: The template is wrong or refuses these messages.
    """
    from jinja2 import TemplateError

    try:
        return compile_template(template).render(
            messages=list(messages),
            add_generation_prompt=add_generation_prompt,
            enable_thinking=False,
            **special_tokens,
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise ModelError(f"the chat template cannot be rendered: {error}") from error


def read_chat_template(folder: Path) -> str | None:
    """Return a folder's default chat template; None if it has none.

    ``chat_template.jinja`` has precedence over ``tokenizer_config.json``, as in transformers.

    Raises:
        ModelError: ``tokenizer_config.json`` cannot be read.
    """
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    path = folder / "tokenizer_config.json"
    template = read_json(path, ModelError).get("chat_template") if path.is_file() else None
    if isinstance(template, list):
        by_name = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = by_name.get("default")
    return template if isinstance(template, str) else None


def special_token_texts(folder: Path) -> dict[str, str]:
    """Return ``bos_token``, ``eos_token`` and so on from ``tokenizer_config.json``; "" for those that are not set."""
    path = folder / "tokenizer_config.json"
    config = read_json(path, ModelError) if path.is_file() else {}
    texts = {}
    for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"):
        entry = config.get(f"{kind}_token")
        content = entry.get("content") if isinstance(entry, dict) else entry
        texts[f"{kind}_token"] = content if isinstance(content, str) else ""
    return texts


def turn_ending(template: str, special_tokens: Mapping[str, str]) -> str:
    """Return what the template writes after the assistant's text: the end-of-turn token and what follows it.

    Raises:
        ModelError: The template is wrong, or drops the assistant's text.
    """
    text = render_template(
        template,
        [{"role": "user", "content": "question"}, {"role": "assistant", "content": _PROBE}],
        special_tokens=special_tokens,
    )
    _, probe, ending = text.partition(_PROBE)
    if not probe:
        raise ModelError("the chat template drops the assistant's turn")
    return ending
