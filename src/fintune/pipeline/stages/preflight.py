"""``fintune preflight``: check before training that llama.cpp tokenizes like the model."""

from __future__ import annotations

import json
import tempfile
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fintune.config import Config
from fintune.errors import ModelError
from fintune.export.gguf import llama_cpp_checkout
from fintune.export.gguf.architectures import ModelConfig
from fintune.export.gguf.vocabulary import (
    GgufVocabulary,
    read_converted_vocabulary,
    read_vocabulary,
    write_vocabulary_file,
)
from fintune.manifest import Facts
from fintune.models import chat_template as chat
from fintune.models import load as models
from fintune.models.tokenizer_check import check_tokenizer_against_llama_cpp, probe_strings
from fintune.records import Message
from fintune.util.console import say
from fintune.util.files import write_atomically

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MAX_ADDED = 500
"""Number of added tokens that are compared inside a word and between spaces."""
_SENTENCEPIECE = "llama"
"""``tokenizer.ggml.model`` of a SentencePiece vocabulary."""
_LEGACY = (
    'llama.cpp puts a space after every special token: set "legacy": true in tokenizer_config.json, so that the '
    "tokenizer does, too; or train without GGUF files: --skip export"
)
_DECOMPOSED = "Ne\u0301stle\u0301 Zu\u0308rich"


def preflight(config: Config, inputs: Mapping[str, Path], folder: Path) -> Facts:
    """Compare the base model's tokenizer with llama.cpp, on a GGUF file with the vocabulary and a tiny model.

    The facts, also written to ``preflight.json``, state whether the tokenizer composes accents, which llama.cpp does
    not, and whether it drops a leading space, which llama.cpp keeps.

    Raises:
        ModelError: The GGUF cannot keep the architecture, pre-tokenizer, chat template or a special token, or llama.cpp
            splits strings into other tokens. The message names the first ones.
        ResourceError: xllamacpp is not installed.
    """
    ref = models.fetch_base(config)
    tokenizer = models.load_tokenizer(ref, trust_remote_code=config.model.trust_remote_code)
    with tempfile.TemporaryDirectory(prefix=".converted-", dir=folder) as temporary:
        return _check(ref.path, tokenizer, _vocabulary(config, ref.path, Path(temporary)), folder)


def _vocabulary(config: Config, model: Path, temporary: Path) -> GgufVocabulary:
    """Return the vocabulary that the export will write, with or without a llama.cpp checkout."""
    if config.export.llama_cpp_path is None:
        return read_vocabulary(model, ModelConfig.read(model).vocab_size)
    checkout = llama_cpp_checkout.check_checkout(config.export.llama_cpp_path)
    llama_cpp_checkout.convert_model(checkout, model, temporary / "converted.gguf", vocabulary_only=True)
    return read_converted_vocabulary(temporary / "converted.gguf")


def _check(model: Path, tokenizer: PreTrainedTokenizerBase, vocabulary: GgufVocabulary, folder: Path) -> Facts:
    if vocabulary.chat_template is None or vocabulary.chat_template != tokenizer.chat_template:
        raise ModelError(
            f"{model}: the chat template of the GGUF would differ from the one for training",
            hint="put one default template into the folder, as chat_template.jinja",
        )
    ends = chat.end_of_turn_ids(tokenizer)
    if vocabulary.eos_id not in ends:
        raise ModelError(
            f"{model}: the GGUF would end answers at token {vocabulary.eos_id}, but a turn ends with {list(ends)}",
            hint="mark the end of a turn as a special token in tokenizer.json",
        )

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    turns = [
        chat.render(tokenizer, messages, add_generation_prompt=generate)
        for messages in _conversations()
        for generate in (False, True)
    ]
    takes_space = vocabulary.model == _SENTENCEPIECE and encode(" x") == encode("x")
    probes = [*probe_strings(), *_beside_added_tokens(tokenizer, space="" if takes_space else " ")]
    strings = [*turns, *(text.lstrip(" ") if takes_space else text for text in probes)]
    with tempfile.TemporaryDirectory(prefix=".vocabulary-", dir=folder) as temporary:
        path = write_vocabulary_file(vocabulary, Path(temporary) / "vocabulary.gguf")
        try:
            num_strings = check_tokenizer_against_llama_cpp(encode, path, strings)
        except ModelError as error:
            if vocabulary.model != _SENTENCEPIECE or error.hint is None:
                raise
            raise ModelError(error.message, hint=_LEGACY) from None
    composes = encode(_DECOMPOSED) == encode(unicodedata.normalize("NFC", _DECOMPOSED))
    if composes:
        say(
            "the tokenizer composes accents, llama.cpp does not: send text in Unicode's composed form (NFC) to the GGUF"
        )
    if takes_space:
        say(
            "the tokenizer drops a space at the start of a text or after a special token, llama.cpp does not: send no "
            "such text to the GGUF"
        )
    facts: Facts = {
        "pre_tokenizer": vocabulary.pre,
        "num_tokens": len(vocabulary.tokens),
        "eos_token": vocabulary.tokens[ends[0]],
        "template_hash": chat.template_hash(tokenizer),
        "num_strings": num_strings,
        "composes_accents": composes,
        "drops_leading_space": takes_space,
        "summary": f"{num_strings} strings give the same tokens in llama.cpp, pre-tokenizer {vocabulary.pre}",
    }
    write_atomically(folder / "preflight.json", json.dumps(facts, indent=1) + "\n")
    return facts


def _beside_added_tokens(tokenizer: PreTrainedTokenizerBase, *, space: str) -> Iterator[str]:
    """Yield added tokens between spaces and inside a word.

    A token may swallow the spaces beside it, or count only between words. llama.cpp supports neither.
    """
    for added in list(tokenizer.added_tokens_decoder.values())[:_MAX_ADDED]:
        yield f"revenue {added.content}{space}x"
        yield f"a{added.content}b"


def _conversations() -> Iterator[list[Message]]:
    question, answer = "What was revenue in 2019,\n$ 1,234.5  million?", "subtract(5829, 5735)"
    user, assistant = Message(role="user", content=question), Message(role="assistant", content=answer)
    yield [user]
    yield [user, assistant, user]
    yield [Message(role="system", content=" Be brief. "), user]
