"""Turns remembered: rows, errors and ids as if every beginning of a conversation were rendered and tokenised anew."""

from __future__ import annotations

import functools
import random
from operator import methodcaller

import pytest

from fintune.data.tokenize import TokenizedExample
from fintune.data.tokenize_chat import ConversationEncoder
from fintune.errors import DataError, FintuneError
from fintune.models import chat_cache as chat_writer
from fintune.models import chat_template as chat
from fintune.models.chat_cache import CachedChatTokenizer
from fintune.records import Message
from support.tiny import CHATML, EOS, make_tokenizer

TRIM = CHATML.replace("message['content']", "message['content'] | trim")
ALTERNATING = (
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('user and assistant take turns, the user first') }}{% endif %}{% endfor %}"
) + CHATML
# Qwen3's manner: the last turn has an empty thought, earlier ones have none.
LAST = CHATML.replace(
    "+ message['content']",
    "+ ('<think>\n\n</think>\n\n' if message['role'] == 'assistant' and loop.last else '') + message['content']",
).replace("assistant\n' }}{% endif %}", "assistant\n<think>\n\n</think>\n\n' }}{% endif %}")
# DeepSeek-R1's: an answer begins inside a thought, which goes once it is answered.
OPENED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% set content = message['content'] %}"
    "{% if message['role'] == 'assistant' and '</think>' in content %}{% set content = content.split('</think>')[-1] %}"
    "{% endif %}{{ content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
COUNTING = "{{ messages | length % 3 }}" + CHATML
"""Its first letter changes with every turn."""
SHY = CHATML.replace("{% for", "{% if messages | length > 7 %}{{ raise_exception('too many') }}{% endif %}{% for")
TEMPLATES = {
    name: value
    for name, value in globals().items()
    if name in ("CHATML", "TRIM", "ALTERNATING", "LAST", "OPENED", "COUNTING", "SHY")
}
WORDS = (
    "cash",
    " 12.5",
    "\n",
    "  ",
    "é",
    "的",
    "<think>\nso\n</think>\n\n",
    "<|im_start|>",
    "of  5829",
    "?",
    "\t.\r\n",
)


def metaspace(tokenizer):
    """As SentencePiece's: a space is put before a text, and not before what follows a special token."""
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    return tokenizer


def with_end(**how):
    """Whose end of turn swallows spaces, is searched for in normalised text or shares letters with another token."""

    def change(tokenizer):
        from tokenizers import normalizers
        from transformers import AddedToken

        other = how.pop("other", None)
        tokenizer.add_special_tokens({"eos_token": AddedToken(EOS, special=True, **how)})
        if how.get("normalized"):
            tokenizer.backend_tokenizer.normalizer = normalizers.Replace(" 12", EOS)
        if other:
            tokenizer.add_tokens([AddedToken(other, normalized=False)])
        return tokenizer

    return change


TOKENIZERS = {
    "bytes": lambda tokenizer: tokenizer,
    "metaspace": metaspace,
    "swallows what follows": with_end(rstrip=True, normalized=False),
    "swallows what is before": with_end(lstrip=True, normalized=False),
    "a word by itself": with_end(single_word=True, normalized=False),
    "normalised": with_end(normalized=True),
    "part of another": with_end(normalized=False, other=EOS + "\n<|im_start|>"),
    "joined to another": with_end(normalized=False, other=">\n<|im"),
}


def conversation(draw: random.Random) -> list[Message]:
    turns = [Message(role="system", content="Be brief.")] if draw.random() < 0.3 else []
    roles = ["user", "assistant"] * draw.randint(1, 6)
    if draw.random() < 0.2:
        roles.insert(draw.randrange(1, len(roles)), draw.choice(("user", "assistant")))
    for role in roles:
        content = "".join(draw.choices([word for word in WORDS if "|" not in word], k=draw.randint(1, 9)))
        turns.append(Message(role=role, content=content + (EOS if draw.random() < 0.01 else "")))
    return turns


class Straightforward(ConversationEncoder):
    """Every beginning rendered and tokenised by itself."""

    def __init__(self, tokenizer, **how):
        super().__init__(tokenizer, **how)
        self._writer = PlainWriter(tokenizer)


class PlainWriter:
    def __init__(self, tokenizer):
        self.render = functools.partial(chat.render, tokenizer)
        self.encode = functools.partial(chat.encode_text, tokenizer)
        self.check = lambda turns: None
        self.learn = lambda turns, num_letters: None


def outcome(work, encoder) -> object:
    try:
        return work(encoder)
    except FintuneError as error:
        return type(error), str(error)


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_cached_rows_and_errors_equal_uncached(template, kind):
    tokenizer = TOKENIZERS[kind](make_tokenizer())
    tokenizer.chat_template = TEMPLATES[template]
    draw = random.Random(f"{template} {kind}")
    seen = set()
    for max_length in (120, 700):
        system = "" if template == "ALTERNATING" else draw.choice(("", "Answer."))
        how = {"system": system, "train_on": draw.choice(("all", "last")), "max_length": max_length}
        quick, plain = ConversationEncoder(tokenizer, **how), Straightforward(tokenizer, **how)
        talks = [conversation(draw) for _ in range(8)]
        quick.learn(talks[::2])
        for number, talk in enumerate(talks):
            untrained = {place for place in range(len(talk)) if draw.random() < 0.1}
            worse = talk[-3].content if len(talk) > 2 else "no"
            for work in (
                methodcaller("encode", id_="x", messages=talk, untrained=untrained),
                methodcaller("encode_pair", id_="x", messages=talk, rejected=Message(role="assistant", content=worse)),
                methodcaller("encode_labelled", id_="x", messages=talk, label=False),
            ):
                found = outcome(work, quick)
                assert found == outcome(work, plain), (number, talk)
                seen.add(found[0] if isinstance(found, tuple) else type(found))
    assert TokenizedExample in seen


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_any_text_has_the_ids_of_the_tokenizer(kind):
    tokenizer = TOKENIZERS[kind](make_tokenizer())
    writer, draw = CachedChatTokenizer(tokenizer), random.Random(kind)
    for _ in range(30):
        text = "".join(draw.choices((*WORDS, EOS, EOS), k=draw.randint(0, 30)))
        if draw.random() < 0.5:
            writer.cache_texts([text, text + EOS], num_letters=draw.choice((5, 1000)))
        assert writer.encode(text) == chat.encode_text(tokenizer, text), text


def long_talk(num_turns: int) -> list[Message]:
    return [Message(role=("user", "assistant")[n % 2], content=f"cash of {n} ?") for n in range(num_turns)]


@pytest.mark.parametrize("kind", ["bytes", "metaspace", "swallows what follows", "swallows what is before"])
def test_a_long_conversation_is_tokenised_once(kind, monkeypatch):
    tokenizer = TOKENIZERS[kind](make_tokenizer())
    encoder, letters = ConversationEncoder(tokenizer, system="", train_on="all", max_length=4000), []
    tokenised = type(tokenizer).__call__
    talk = long_talk(60)
    encoder.encode("before", talk[:2])

    def counted(self, text, **options):
        letters.append(sum(map(len, [text] if isinstance(text, str) else text)))
        return tokenised(self, text, **options)

    monkeypatch.setattr(type(tokenizer), "__call__", counted)
    encoder.learn([talk])
    whole = len(chat.render(tokenizer, talk, add_generation_prompt=False))
    assert encoder.encode("x", talk).example.num_cut == 0
    assert sum(letters) < 2 * whole
    assert len(letters) < 10


def test_a_template_that_is_compiled_in_another_way_is_noticed(monkeypatch):
    tokenizer = make_tokenizer()
    monkeypatch.setattr(chat_writer, "_compile", lambda tokenizer: lambda *_: "something else" + EOS)
    how = {"system": "", "train_on": "all", "max_length": 4000}
    talk = long_talk(6)
    encoder = ConversationEncoder(tokenizer, **how)
    expected = Straightforward(tokenizer, **how).encode("x", talk)
    with pytest.raises(FintuneError):  # what such a template would do
        chat.encode_example(tokenizer, talk[:1], "a", CachedChatTokenizer(tokenizer))
    encoder.learn([talk])
    assert encoder.encode("x", talk) == expected


def test_cached_render_of_broken_template():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for %}"
    writer = CachedChatTokenizer(tokenizer)
    with pytest.raises(DataError, match="refuses the turns user"):
        writer.render(long_talk(1))


def test_cached_error_is_raised_for_its_conversation():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = SHY.replace("> 7", "== 2")  # as its end of turn is looked for
    encoder = ConversationEncoder(tokenizer, system="", train_on="all", max_length=4000)
    talk = long_talk(4)
    encoder.learn([talk])
    with pytest.raises(DataError, match="too many"):
        encoder.encode("x", talk)


def test_what_is_remembered_is_bounded(monkeypatch):
    tokenizer = make_tokenizer()
    monkeypatch.setattr(chat_writer, "_MAX_CACHED_IDS", 200)
    how = {"system": "", "train_on": "all", "max_length": 4000}
    encoder, plain = ConversationEncoder(tokenizer, **how), Straightforward(tokenizer, **how)
    for number in range(5):
        talk = long_talk(10 + 2 * number)[2 * number :]
        assert encoder.encode("x", talk) == plain.encode("x", talk)
