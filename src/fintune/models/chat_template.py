"""Chat templates: conversations to text, and text to token ids with a mask of the trained tokens.

Training, prediction, export and replay all use this module, so a model is prompted exactly as it was trained.
Special tokens come from the template alone (``add_special_tokens=False``), so there are never two BOS tokens.

The functions of the second part render the template of a model *folder*, without transformers: the GGUF writer and the
Modelfile need the template before any tokenizer is loaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn, Protocol
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
_THOUGHT_FIELDS: Final = ("reasoning_content", "thinking", "reasoning")
"""Names under which chat templates know the thought of a turn."""
_THOUGHT: Final = re.compile(r"\s*(?:<think>)?(.*?)</think>\s*", re.DOTALL)


_facts: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[str, dict[str, Any]]] = WeakKeyDictionary()
"""What is known about a tokenizer's chat template, which is found out by rendering probes."""


@dataclass(frozen=True)
class EncodedExample:
    """A conversation as token ids.

    Attributes:
        input_ids: Prompt, completion and end-of-turn token; shape [num_tokens].
        completion_mask: 1 for trained tokens (completion and end of turn), 0 for the prompt; shape [num_tokens].
        follows_template: Whether the ids are the template's own rendering of the whole conversation. False if that
            rendering does not begin with the prompt's; the completion was then appended to the prompt.
        completion: The trained text, without the end of turn.
        prompt: The text before it.
    """

    input_ids: list[int]
    completion_mask: list[int]
    follows_template: bool
    completion: str = ""
    prompt: str = ""

    @property
    def num_prompt_tokens(self) -> int:
        """Number of tokens before the first trained one."""
        return self.completion_mask.index(1)


class ChatTokenizer(Protocol):
    """Conversations to text, and text to ids.

    :class:`fintune.models.chat_cache.CachedChatTokenizer` is one for conversations that share their first turns. It
    returns what :func:`render` and :func:`encode_text` return.
    """

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True, *, thinking: bool = False) -> str:
        """Render a conversation as :func:`render` does."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of a rendered text."""


@dataclass(frozen=True)
class _PlainChatTokenizer:
    tokenizer: PreTrainedTokenizerBase

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True, *, thinking: bool = False) -> str:
        return render(self.tokenizer, messages, add_generation_prompt, thinking=thinking)

    def encode(self, text: str) -> list[int]:
        return encode_text(self.tokenizer, text)


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    add_generation_prompt: bool = True,
    *,
    thinking: bool = False,
) -> str:
    """Render a conversation with the tokenizer's chat template, with the tools of its first turn. The date is fixed.

    Args:
        tokenizer: The tokenizer.
        messages: All turns.
        add_generation_prompt: Whether to append the opening of the assistant's turn.
        thinking: The value of ``enable_thinking``, for templates that know it.

    Raises:
        ModelError: The tokenizer has no chat template.
        DataError: There are no messages, or the template refuses them (order of roles, system turn ...).
    """
    return _render(tokenizer, messages, add_generation_prompt, thinking, thought_field(tokenizer, messages))


def _render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    add_generation_prompt: bool,
    thinking: bool,
    thought_field: str | None,
) -> str:
    from jinja2 import TemplateError

    if not messages:
        raise DataError(
            "the assistant speaks first, so its turn has no prompt",
            hint="put a user's turn before it, or set data.system",
        )
    try:
        text = tokenizer.apply_chat_template(
            template_turns(messages, thought_field),
            tools=list(messages[0].tools or ()) or None,
            chat_template=dated_template(tokenizer),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            enable_thinking=thinking,
        )
    except (TemplateError, TypeError) as error:
        roles = ", ".join(message.role for message in messages)
        raise DataError(f"the chat template of {tokenizer.name_or_path} refuses the turns {roles}: {error}") from error
    return str(text)


def template_turns(messages: Sequence[Message], thought_field: str | None) -> list[dict[str, Any]]:
    """Return the turns as a template takes them: thoughts in the field that it knows, else before the text."""
    turns = []
    for message in messages:
        turn = message.as_dict()
        turn.pop("tools", None)
        if message.role == "assistant":
            turn.pop("reasoning_content", None)
            thought, text = split_thought(message)
            if thought and thought_field:
                turn |= {thought_field: thought, "content": text}
            elif message.reasoning_content:
                turn["content"] = f"<think>\n{thought}\n</think>\n\n{text}"
        turns.append(turn)
    return turns


def split_thought(message: Message) -> tuple[str, str]:
    """Return the thought of an assistant's turn, and its text. A thought is in its field, or in the text before it."""
    if message.reasoning_content:
        return message.reasoning_content.strip("\n"), message.content
    match = _THOUGHT.match(message.content) if "</think>" in message.content else None
    return (match[1].strip("\n"), message.content[match.end() :]) if match else ("", message.content)


def dated_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the chat template with :data:`TEMPLATE_DATE` in place of today's date.

    Raises:
        ModelError: The tokenizer has no chat template.
    """
    return _STRFTIME_CALL.sub(lambda call: repr(TEMPLATE_DATE.strftime(call[2])), chat_template(tokenizer))


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    chat_tokenizer: ChatTokenizer | None = None,
    *,
    thinking: bool = False,
) -> list[int]:
    """Return the ids of a conversation up to the start of the assistant's turn, as training saw them.

    Raises:
        ModelError: There is no chat template, it does not end turns, or the prompt begins with two BOS tokens.
        DataError: The template refuses these messages, or one contains a special token.
    """
    chat_tokenizer = chat_tokenizer or _PlainChatTokenizer(tokenizer)
    return _encode_prompt(tokenizer, messages, chat_tokenizer.render(messages, thinking=thinking), chat_tokenizer)


def _encode_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], prompt: str, chat_tokenizer: ChatTokenizer
) -> list[int]:
    # Inside a page or an answer, such a token would end the turn, and the rest would become the next speaker's text.
    pattern = special_tokens(tokenizer)
    for message in messages:
        if found := pattern.search(message.content):
            raise DataError(f"the text contains {found[0]}, a special token", hint="remove it from the data")
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
    completion: str | Message,
    chat_tokenizer: ChatTokenizer | None = None,
    *,
    thinking: bool | None = None,
) -> EncodedExample:
    """Encode a conversation with the assistant's answer. The answer and the token that ends it are trained.

    The ids are the template's rendering of the whole conversation up to the end-of-turn token, after the prompt with
    which it begins: of a template with a switch for thoughts, the thinking prompt if the answer has a thought, else the
    other one. If the rendering begins with no such prompt, prompt and completion are encoded separately, as generation
    joins them.

    Args:
        tokenizer: A tokenizer with a chat template.
        messages: The turns before the answer.
        completion: The answer. A text is the completion as it is; a turn may have a thought and tool calls.
        chat_tokenizer: A cache for conversations that share their first turns.
        thinking: Prefer this prompt of a template with a switch, whether or not the answer has a thought.

    Raises:
        ModelError: As for :func:`encode_prompt`, or the template rewrites the completion.
        DataError: As for :func:`encode_prompt`, or the completion is empty, or the template leaves out a part of it.
    """
    chat_tokenizer = chat_tokenizer or _PlainChatTokenizer(tokenizer)
    answer = Message(role="assistant", content=completion) if isinstance(completion, str) else completion
    if not (answer.content.strip() or answer.tool_calls):
        raise DataError("the completion is empty, so there is nothing to train on")
    end_id = end_of_turn_ids(tokenizer)[0]
    end_text = str(tokenizer.convert_ids_to_tokens(end_id))
    if end_text in answer.content or end_text in (answer.reasoning_content or ""):
        raise DataError(f"the text contains {end_text}, the token that ends a turn", hint="remove it from the data")
    first = bool(split_thought(answer)[0]) if thinking is None else thinking
    prompts = []
    for mode in (first, not first) if "enable_thinking" in chat_template(tokenizer) else (False,):
        prompt = chat_tokenizer.render(messages, thinking=mode)
        whole = chat_tokenizer.render([*messages, answer], add_generation_prompt=False, thinking=mode)
        prompts.append(prompt)
        if whole.startswith(prompt):
            turn = whole.removeprefix(prompt)
            break
    else:
        prompt = prompts[0]
        turn = (completion if isinstance(completion, str) else _completion_after(prompt, answer)) + end_text
        whole = ""
    prompt_ids = _encode_prompt(tokenizer, messages, prompt, chat_tokenizer)
    text, end, _ = turn.partition(end_text)
    _check_completion(text, end, answer, tokenizer)
    ids = chat_tokenizer.encode(prompt + text + end)
    follows = bool(whole) and ids[: len(prompt_ids)] == prompt_ids
    if not follows:
        ids = prompt_ids + chat_tokenizer.encode(text + end)
    trained = ids[len(prompt_ids) :]
    if trained[-1:] != [end_id] or trained.count(end_id) != 1:
        raise ModelError(f"{end_text} does not end the encoded completion {answer.content[:60]!r}")
    return EncodedExample(ids, [0] * len(prompt_ids) + [1] * len(trained), follows, text, prompt)


def _completion_after(prompt: str, answer: Message) -> str:
    """Return what the model writes after a prompt that the template's rendering of the answer does not begin with."""
    if answer.tool_calls:
        hint = "remove the row, or use a template that writes an answer as it asks for one"
        raise DataError("the chat template renders a tool call otherwise than its prompt announces it", hint=hint)
    thought, text = split_thought(answer)
    if not prompt.rstrip().endswith("<think>"):
        return f"<think>\n{thought}\n</think>\n\n{text}" if answer.reasoning_content else answer.content
    if not thought:  # an answer without a thought closes it at once
        return f"\n</think>\n\n{text}"
    if answer.reasoning_content:
        return f"{thought}\n</think>\n\n{text}"
    return answer.content.lstrip().removeprefix("<think>").lstrip("\n")


def _check_completion(text: str, end: str, answer: Message, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a turn in which the template left something out of the answer."""
    name = tokenizer.name_or_path
    thought, content = split_thought(answer)
    if not (thought or answer.tool_calls) and not text.strip().endswith(answer.content.strip()):
        shown = f"{answer.content[:60]!r} as {text[:80]!r}"
        raise ModelError(f"the chat template of {name} writes the completion {shown}")
    if not end:
        hint = "remove the row, or use a model whose template ends every turn with the same token"
        raise DataError(f"the chat template of {name} ends this turn with another token", hint=hint)
    calls = [call["function"]["name"] for call in answer.tool_calls or ()]
    for what, part in (("thought", thought), ("text", content), *(("tool call", call) for call in calls)):
        if part.strip() not in text:
            hint = "remove the row, or use a model whose template knows it"
            raise DataError(f"the chat template of {name} leaves out the {what} of the answer", hint=hint)


def end_of_turn_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the ids at which generation stops.

    The first is the token that the template writes after an assistant's turn (it is trained). The tokenizer's EOS
    follows if it is another token.

    Raises:
        ModelError: There is no chat template, or it writes no special token after an assistant's turn.
    """
    return tuple(_known(tokenizer, "stop ids", lambda: _find_stop_ids(tokenizer)))


def _known(tokenizer: PreTrainedTokenizerBase, fact: str, find: Callable[[], Any]) -> Any:
    """Return a fact about the chat template, found out once."""
    template = chat_template(tokenizer)
    if tokenizer not in _facts or _facts[tokenizer][0] != template:
        _facts[tokenizer] = template, {}
    facts = _facts[tokenizer][1]
    if fact not in facts:
        facts[fact] = find()
    return facts[fact]


def _find_stop_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
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
    return (end,) if eos is None or eos == end else (end, eos)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Return a pattern that finds the tokenizer's special tokens in a text."""

    def find() -> re.Pattern[str]:
        texts = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        return re.compile("|".join(re.escape(text) for text in sorted(texts, reverse=True) if text.strip()) or "(?!)")

    pattern: re.Pattern[str] = _known(tokenizer, "special tokens", find)
    return pattern


def thought_field(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str | None:
    """Return the field in which the template takes thoughts; None if it knows none, or if the turns have no thought."""
    if not any(message.reasoning_content or "</think>" in message.content for message in messages):
        return None
    name: str | None = _known(tokenizer, "thought field", lambda: _find_thought_field(tokenizer))
    return name


def _find_thought_field(tokenizer: PreTrainedTokenizerBase) -> str | None:
    answer = Message(role="assistant", content="answer", reasoning_content=_PROBE)
    for name in _THOUGHT_FIELDS:
        with contextlib.suppress(DataError):
            text = _render(tokenizer, [Message(role="user", content="question"), answer], False, True, name)
            if _PROBE in text:
                return name
    return None


def find_left_out(text: str, message: Message) -> str:
    """Return what a rendered conversation lacks of a turn: its text, a tool or a tool call; empty if nothing.

    Templates may write a tool's result as JSON.
    """
    content = split_thought(message)[1].strip() if message.role == "assistant" else message.content.strip()
    forms = [content]
    if message.role == "tool":
        forms += [json.dumps(content, ensure_ascii=is_ascii)[1:-1] for is_ascii in (False, True)]
    if not any(form in text for form in forms):
        return "text"
    named = {"tool": message.tools or (), "tool call": message.tool_calls or ()}
    return next(
        (what for what, tools in named.items() for tool in tools if tool["function"]["name"] not in text),
        "",
    )


def fold_system(messages: Sequence[Message]) -> list[Message]:
    """Put a system message at the beginning of the first user's turn, for templates that leave it out."""
    system, *turns = messages
    first = next(index for index, message in enumerate(turns) if message.role == "user")
    content = f"{system.content}\n\n{turns[first].content}"
    turns[first] = turns[first].model_copy(update={"content": content})
    return with_tools(turns, system.tools)


def with_tools(messages: Sequence[Message], tools: tuple[dict[str, Any], ...] | None) -> list[Message]:
    """Let the first of some turns offer tools."""
    first, *rest = messages
    return [first if first.tools == tools else first.model_copy(update={"tools": tools}), *rest]


def own_system_message(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what the chat template writes before a conversation without a system message, without special tokens.

    Empty if it writes no sentence.
    """
    begin = render(tokenizer, [Message(role="user", content=_PROBE)]).partition(_PROBE)[0]
    lines = (line.strip() for line in special_tokens(tokenizer).sub("\n", begin).splitlines())
    return " ".join(line for line in lines if " " in line)


def drops_system(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template leaves out a system message, instead of writing or refusing it."""
    turns = [Message(role="system", content=_PROBE), Message(role="user", content="question")]
    try:
        return _PROBE not in render(tokenizer, turns)
    except DataError:
        return False


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
