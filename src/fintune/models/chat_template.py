"""The one tokenisation path: messages through the model's chat template to token ids, with what is trained marked.

Training, prediction, export and replay all call this module, so that a model is asked exactly as it was trained.
Special tokens come from the template alone (``add_special_tokens=False``), hence never two BOS tokens.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING, Protocol
from weakref import WeakKeyDictionary

from fintune.errors import DataError, ModelError
from fintune.records import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Some templates print today's date (Llama-3.2, Mistral); a prompt must not depend on the day that it is rendered on, so
# this one stands there: Llama-3's own default.
_TEMPLATE_DAY = date(2024, 7, 26)
_STRFTIME_CALL = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
_PROBE = "fintuneprobe"
_end_of_turn: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[str, tuple[int, ...]]] = WeakKeyDictionary()


class EndOfTurnError(DataError):
    """A text that holds the token that ends a turn.

    Args:
        token: It, as text.
    """

    def __init__(self, token: str) -> None:
        super().__init__(f"the text holds {token}, the token that ends a turn", hint="remove it from the data")
        self.token = token


@dataclass(frozen=True)
class EncodedExample:
    """A conversation as token ids.

    Attributes:
        input_ids: Prompt, completion, end-of-turn token; shape [num_tokens].
        completion_mask: 1 where the token is trained (completion and end of turn), 0 on the prompt; same length.
        follows_template: True where the ids are those of the template's own rendering of the whole conversation; False
            where its rendering does not begin with the prompt's, so that the completion was put behind the prompt.
    """

    input_ids: list[int]
    completion_mask: list[int]
    follows_template: bool

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens before the first trained one."""
        return self.completion_mask.index(1)


class Writer(Protocol):
    """How a conversation becomes text, and the text ids.

    `fintune.models.chat_cache` has one for conversations that begin alike; it gives what `render` and `encode_text`
    give.
    """

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The conversation as the template writes it."""

    def encode(self, text: str) -> list[int]:
        """Its ids."""


@dataclass(frozen=True)
class _Anew:
    tokenizer: PreTrainedTokenizerBase

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        return render(self.tokenizer, messages, add_generation_prompt)

    def encode(self, text: str) -> list[int]:
        return encode_text(self.tokenizer, text)


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
    """The conversation as the template writes it.

    Thinking is switched off where a template knows ``enable_thinking``, and the date is fixed.

    Raises:
        ModelError: The tokenizer has no chat template.
        DataError: There is none, or the template refuses these messages (order of roles, no system turn ...).
    """
    from jinja2 import TemplateError

    if not messages:
        raise DataError(
            "the assistant speaks first, so there is no prompt for its turn",
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
    """The chat template with a fixed day in place of today.

    Raises:
        ModelError: The tokenizer has no chat template.
    """
    return _STRFTIME_CALL.sub(lambda call: repr(_TEMPLATE_DAY.strftime(call[2])), chat_template(tokenizer))


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], writer: Writer | None = None
) -> list[int]:
    """Ids of the conversation up to where the assistant's turn begins; the same ids that training saw.

    Raises:
        ModelError: No chat template, none that ends a turn, or the prompt begins with two BOS tokens.
        DataError: The template refuses these messages, or one holds the token that ends a turn.
    """
    writer = writer or _Anew(tokenizer)
    return _encode_prompt(tokenizer, messages, writer.render(messages), writer)


def _encode_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], prompt: str, writer: Writer
) -> list[int]:
    _refuse_end_of_turn(tokenizer, *(message.content for message in messages))
    ids = writer.encode(prompt)
    if tokenizer.bos_token_id is not None and ids[:2] == [tokenizer.bos_token_id] * 2:
        raise ModelError(
            f"a prompt of {tokenizer.name_or_path} begins with two {tokenizer.bos_token} tokens",
            hint="the chat template and the tokenizer both add it; remove it from one",
        )
    return ids


def encode_example(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], completion: str, writer: Writer | None = None
) -> EncodedExample:
    """Ids of the conversation with the assistant's turn, trained on that turn and the token that ends it.

    Equal to the template's rendering of the whole conversation, cut behind the end-of-turn token, wherever that
    rendering begins with the prompt's ids; else prompt and completion are encoded apart, as generation joins them.

    Raises:
        ModelError: No chat template, none that ends a turn, or one that changes the completion's text.
        DataError: The completion is empty or holds the end-of-turn token, or the template refuses the messages.
    """
    writer = writer or _Anew(tokenizer)
    prompt = writer.render(messages)
    prompt_ids = _encode_prompt(tokenizer, messages, prompt, writer)
    if not completion.strip():
        raise DataError("the completion is empty, so there is nothing to train on")
    end_id, end_text = _refuse_end_of_turn(tokenizer, completion)

    whole = writer.render([*messages, Message(role="assistant", content=completion)], add_generation_prompt=False)
    turn = whole.removeprefix(prompt) if whole.startswith(prompt) else completion + end_text
    turn = turn[: turn.find(end_text) + len(end_text)]
    if turn.removesuffix(end_text).strip() != completion.strip():
        raise ModelError(
            f"the chat template of {tokenizer.name_or_path} writes the completion {completion[:60]!r} as {turn[:80]!r}"
        )
    ids = writer.encode(prompt + turn)
    follows = whole.startswith(prompt + turn) and ids[: len(prompt_ids)] == prompt_ids
    if not follows:
        ids = prompt_ids + writer.encode(turn)
    trained = ids[len(prompt_ids) :]
    if trained[-1:] != [end_id] or trained.count(end_id) != 1:
        raise ModelError(f"{end_text} does not end the encoded completion {completion[:60]!r}")
    return EncodedExample(ids, [0] * len(prompt_ids) + [1] * len(trained), follows)


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], writer: Writer | None = None
) -> EncodedExample:
    """Ids of a conversation that ends with the assistant, trained on every assistant's turn and what ends it.

    Raises:
        ModelError: As ``encode_example``, or the template rewrites earlier turns once there is a later one.
        DataError: As ``encode_example``, or the last turn is not the assistant's.
    """
    if not messages or messages[-1].role != "assistant":
        raise DataError("a conversation to train on ends with the assistant's turn")
    ids: list[int] = []
    mask: list[int] = []
    follows = True
    for place, message in enumerate(messages):
        if message.role != "assistant":
            continue
        turn = encode_example(tokenizer, messages[:place], message.content, writer)
        if turn.input_ids[: len(ids)] != ids:
            raise ModelError(
                f"the chat template of {tokenizer.name_or_path} rewrites earlier turns",
                hint="it cannot train several turns at once; set data.group_questions to 1",
            )
        mask += turn.completion_mask[len(ids) :]
        ids, follows = turn.input_ids, follows and turn.follows_template
    return EncodedExample(ids, mask, follows)


def end_of_turn_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids at which generation stops.

    First the token that the template writes behind an assistant's turn (it is trained), then the tokenizer's EOS where
    that is another.

    Raises:
        ModelError: No chat template, or it puts no special token behind an assistant's turn.
    """
    template = chat_template(tokenizer)
    known = _end_of_turn.get(tokenizer)
    if known is not None and known[0] == template:
        return known[1]
    turns = [Message(role="user", content="question"), Message(role="assistant", content=_PROBE)]
    behind = render(tokenizer, turns, add_generation_prompt=False).rpartition(_PROBE)[2]
    special = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    end = next((id_ for id_ in encode_text(tokenizer, behind) if id_ in special), None)
    if end is None:
        raise ModelError(
            f"the chat template of {tokenizer.name_or_path} puts no special token behind an assistant's turn",
            hint="use one that ends each turn, as ChatML does with <|im_end|>; else generation never stops",
        )
    eos = tokenizer.eos_token_id
    ids = (end,) if eos is None or eos == end else (end, eos)
    _end_of_turn[tokenizer] = template, ids
    return ids


def _refuse_end_of_turn(tokenizer: PreTrainedTokenizerBase, *texts: str) -> tuple[int, str]:
    # Inside a page or an answer it would be read as the end of a turn, and what follows as the next speaker's.
    end_id = end_of_turn_ids(tokenizer)[0]
    end_text = str(tokenizer.convert_ids_to_tokens(end_id))
    if any(end_text in text for text in texts):
        raise EndOfTurnError(end_text)
    return end_id, end_text


def chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The Jinja text of the tokenizer's (default) chat template.

    Raises:
        ModelError: It has none.
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
    """sha256 of the chat template's text; in every manifest, so that a mixed-up template shows."""
    return hashlib.sha256(chat_template(tokenizer).encode()).hexdigest()


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a rendered text, as it stands."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return ids
