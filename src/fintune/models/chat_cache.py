"""Cached tokenisation of conversations, and of many prefixes of one, without tokenising all of it each time.

The token that ends a turn splits a text before anything else is done to it, so the text between two of them has the
same ids wherever it occurs. A conversation is therefore tokenised once, and every prefix of it is assembled from its
turns. A turn can be split once more, before a heading such as ``Question:``, so that questions about one page share
the page's ids. Every prefix is still rendered, because a template may write an earlier turn differently once there is a
later one. Rendering skips ``apply_chat_template``, which copies all messages first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from fintune.errors import DataError, FintuneError
from fintune.models import chat_template as chat
from fintune.records import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MAX_CACHED_IDS = 1_500_000
"""Maximum number of cached token ids (about 60 MB). The cache is cleared when it is full."""


_LOCAL_PRE_TOKENIZERS = {"ByteLevel", "Digits", "Punctuation", "Split", "Whitespace", "WhitespaceSplit"}
"""Pre-tokenizers that cut a text into words, scanning it from left to right."""
_CHARACTER_CLASS = re.compile(r"\[(?:\\.|[^\]\\])*\]")
_LOOKS_FAR = re.compile(r"\(\?<|\\[bBAGKzZ\d]|[.^$]")
"""Parts of a pattern, outside of character classes, that may look behind a word or far ahead of it."""
_BEFORE_HEADING = ("a\n\n", ".\n\n", "1\n\n", " \n\n", "|\n", ")\n\n", "\n\n")
"""Ends of a text before a heading, with which it is checked that the heading begins a word."""


class _EdgePiece(NamedTuple):
    """The first or last piece of a text. A piece between two ends of turns is a plain str."""

    text: str
    is_first: bool
    is_last: bool


class _HeadPiece(NamedTuple):
    """The part of a piece before its heading."""

    text: str
    is_first: bool


_Piece: TypeAlias = "str | _EdgePiece | _HeadPiece"


class CachedChatTokenizer:
    """Return what :func:`chat.render` and :func:`chat.encode_text` return, and cache the ids of turns.

    Args:
        tokenizer: A tokenizer with a chat template. Neither may change while this object is used.
        heading: The beginning of a line at which turns are split; it begins with an ASCII letter. Empty for no split.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, heading: str = "") -> None:
        self._tokenizer = tokenizer
        self._render_fast = _compile(tokenizer)
        self._checked_forms: set[tuple[tuple[str, ...], ...]] = set()
        self._texts: dict[tuple[int, ...], tuple[Sequence[Message], str]] = {}
        self._end: tuple[int, str] | None = None
        self._is_splittable = True
        self._heading = heading
        self._heading_ids: list[int] = []
        self._ids: dict[_Piece, list[int]] = {}
        self._num_ids = 0

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True, *, thinking: bool = False) -> str:
        """Render a conversation with the chat template.

        Raises:
            DataError: The template refuses these messages.
        """
        if not (add_generation_prompt or thinking) and (known := self._texts.get(tuple(map(id, messages)))):
            return known[1]
        text = self._try_fast(messages, add_generation_prompt, thinking)
        return (
            chat.render(self._tokenizer, messages, add_generation_prompt, thinking=thinking) if text is None else text
        )

    def learn(self, conversations: Iterable[Sequence[Message]], *, num_letters: int) -> None:
        """Render and tokenise whole conversations at once, so that their parts are found again. This only saves time.

        Args:
            conversations: All turns of each conversation.
            num_letters: See :meth:`cache_texts`.
        """
        self._texts.clear()
        for messages in conversations:
            with suppress(FintuneError):  # encoding raises it
                # The turns are kept, so that no other turn gets the id of one of them.
                self._texts[tuple(map(id, messages))] = messages, self.render(messages, False)
        with suppress(FintuneError):
            self.cache_texts([text for _, text in self._texts.values()], num_letters=num_letters)

    def check(self, messages: Sequence[Message]) -> None:
        """Compare the fast rendering of a conversation with ``apply_chat_template``. If it differs, stop using it.

        Conversations whose turns have the same roles and fields are compared once.
        """
        form = tuple((message.role, *message.as_dict()) for message in messages)
        if form in self._checked_forms:
            return
        self._checked_forms.add(form)
        for thinking in (False, True):
            try:
                expected = chat.render(self._tokenizer, messages, False, thinking=thinking)
            except DataError:
                expected = None
            if self._try_fast(messages, False, thinking) != expected:
                self._render_fast = None
                self._texts.clear()

    def _try_fast(self, messages: Sequence[Message], add_generation_prompt: bool, thinking: bool) -> str | None:
        """Return None if the template refuses the messages, or the fast rendering is not used."""
        from jinja2 import TemplateError

        if self._render_fast is None or not messages:
            return None
        turns = chat.template_turns(messages, chat.thought_field(self._tokenizer, messages))
        try:
            return self._render_fast(turns, list(messages[0].tools or ()) or None, add_generation_prompt, thinking)
        except (TemplateError, TypeError):
            return None

    def cache_texts(self, texts: Sequence[str], *, num_letters: int) -> None:
        """Tokenise rendered texts in one call and cache the ids of their pieces.

        Args:
            texts: Texts as :meth:`render` returns them.
            num_letters: A longer text is cached up to the end of the turn that contains this position.
        """
        end_id, end_text = self._end_of_turn()
        if not self._is_splittable or not texts:
            return
        self._limit_cache()
        texts = [_prefix(text, end_text, num_letters) for text in texts]
        for text, ids in zip(texts, self._tokenise(texts), strict=True):
            ends = [index + 1 for index, token_id in enumerate(ids) if token_id == end_id]
            pieces = _pieces(text, end_text)
            if len(ends) != len(pieces) - 1:
                self._is_splittable = False
                return
            for piece, start, stop in zip(pieces, [0, *ends], [*ends, len(ids)], strict=True):
                self._cache(piece, ids[start:stop])

    def encode(self, text: str) -> list[int]:
        """Return the ids of a rendered text."""
        self._limit_cache()
        end_text = self._end_of_turn()[1]
        pieces: list[_Piece] = []
        if self._is_splittable:
            pieces = self._split_headings(_pieces(text, end_text))
            missing = [piece for piece in dict.fromkeys(pieces) if piece not in self._ids]
            if missing and not self._cache_pieces(missing):
                return self.encode(text)
        if not self._is_splittable:
            return chat.encode_text(self._tokenizer, text)
        ids: list[int] = []
        for piece in pieces:
            ids += self._ids[piece]
        return ids

    def _end_of_turn(self) -> tuple[int, str]:
        if self._end is None:
            end_id = chat.end_of_turn_ids(self._tokenizer)[0]
            self._end = end_id, str(self._tokenizer.convert_ids_to_tokens(end_id))
            self._is_splittable = _always_splits(self._tokenizer, *self._end)
            if not (self._is_splittable and self._heading and _begins_word(self._tokenizer, self._heading)):
                self._heading = ""
            if self._heading:
                self._heading_ids = self._tokenise([self._heading])[0]
        return self._end

    def _split_headings(self, turns: Sequence[str | _EdgePiece]) -> list[_Piece]:
        if not self._heading:
            return list(turns)
        pieces: list[_Piece] = []
        for turn in turns:
            edge = turn if isinstance(turn, _EdgePiece) else _EdgePiece(turn, False, False)
            start = edge.text.rfind(f"\n{self._heading}") + 1
            if start and turn not in self._ids:
                head, rest = edge.text[:start], edge.text[start:]
                pieces += (_HeadPiece(head, edge.is_first), _EdgePiece(rest, True, edge.is_last))
            else:
                pieces.append(turn)
        return pieces

    def _cache_pieces(self, pieces: Sequence[_Piece]) -> bool:
        """Tokenise pieces, each between the end-of-turn tokens, or before the heading, beside it.

        Returns:
            Whether all are cached. If not, texts are no longer split at headings.
        """
        end_id, end_text = self._end_of_turn()
        edges = [_EdgePiece(piece, False, False) if isinstance(piece, str) else piece for piece in pieces]
        texts = []
        for edge in edges:
            after = self._heading if isinstance(edge, _HeadPiece) else "" if edge.is_last else end_text
            texts.append(f"{'' if edge.is_first else end_text}{edge.text}{after}")
        for piece, edge, ids in zip(pieces, edges, self._tokenise(texts), strict=True):
            num_ends, stop = int(not edge.is_first), len(ids)
            if isinstance(edge, _EdgePiece):
                num_ends += not edge.is_last
            else:
                stop -= len(self._heading_ids)
                if ids[stop:] != self._heading_ids:
                    self._heading = ""
                    return False
            if ids.count(end_id) != num_ends:
                self._is_splittable = False
            self._cache(piece, ids[1 - edge.is_first : stop])
        return True

    def _cache(self, piece: _Piece, ids: list[int]) -> None:
        before = self._ids.setdefault(piece, ids)
        if before is ids:
            self._num_ids += len(ids) + 20
        elif before != ids:
            self._is_splittable = False

    def _limit_cache(self) -> None:
        if self._num_ids > _MAX_CACHED_IDS:
            self._ids.clear()
            self._num_ids = 0

    def _tokenise(self, texts: Sequence[str]) -> list[list[int]]:
        # The tokenizers library itself: for a short text, its wrapper in transformers costs more than the work.
        backend = self._tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]


def _prefix(text: str, end_text: str, num_letters: int) -> str:
    before, end, _ = text[num_letters:].partition(end_text)
    return text[:num_letters] + before + end


def _pieces(text: str, end_text: str) -> list[str | _EdgePiece]:
    """Split a text at the ends of turns. The end-of-turn token is the last of the ids of the piece before it."""
    pieces: list[str | _EdgePiece] = list(text.split(end_text))
    pieces[-1] = _EdgePiece(str(pieces[-1]), len(pieces) == 1, True)
    if len(pieces) > 1:
        pieces[0] = _EdgePiece(str(pieces[0]), True, False)
    return pieces


def _always_splits(tokenizer: PreTrainedTokenizerBase, end_id: int, end_text: str) -> bool:
    """Whether the end-of-turn token splits any text before other steps, whatever stands beside it.

    The added tokens of the tokenizers library do, with three exceptions: tokens that look at the letters beside them,
    tokens that are searched for in normalised text, and tokens that share letters with another added token that could
    match in their place.
    """
    if not tokenizer.is_fast or getattr(tokenizer, "split_special_tokens", False):
        return False
    added = dict(tokenizer.added_tokens_decoder)
    end = added.pop(end_id, None)
    if end is None or end.content != end_text or end.single_word:
        return False
    if end.normalized and tokenizer.backend_tokenizer.normalizer is not None:
        return False
    return not any(_overlap(end_text, other.content) for other in added.values())


def _overlap(end: str, other: str) -> bool:
    """Whether another token contains the end, or one of the two begins with the last letters of the other."""
    sizes = range(1, min(len(end), len(other)))
    return end in other or any(end[-size:] == other[:size] or other[-size:] == end[:size] for size in sizes)


def _begins_word(tokenizer: PreTrainedTokenizerBase, heading: str) -> bool:
    """Whether a text can be tokenised in two parts, before and from a line that begins with the heading.

    This needs a model that merges letters within words alone, as BPE does. It also needs words before the heading that
    do not depend on what comes after it, and words after it that do not depend on what comes before. Both hold if words
    are found from left to right by patterns without a lookbehind or a far lookahead, and if the heading begins a word.
    """
    backend = tokenizer.backend_tokenizer
    normalizer, pre_tokenizer = backend.normalizer, backend.pre_tokenizer
    if type(backend.model).__name__ != "BPE" or backend.model.dropout or pre_tokenizer is None:
        return False
    if normalizer is not None and json.loads(normalizer.__getstate__())["type"] != "NFC":
        return False
    settings = json.loads(pre_tokenizer.__getstate__())
    parts = settings.get("pretokenizers", [settings])
    if any(part["type"] not in _LOCAL_PRE_TOKENIZERS or part.get("add_prefix_space") for part in parts):
        return False
    patterns = [next(iter(part["pattern"].values())) for part in parts if part["type"] == "Split"]
    if any(_LOOKS_FAR.search(_CHARACTER_CLASS.sub("", pattern)) for pattern in patterns):
        return False
    if any(f"\n{heading[0]}" in token.content for token in tokenizer.added_tokens_decoder.values()):
        return False
    return heading[0].isascii() and all(
        any(start == len(text) for _, (start, _) in pre_tokenizer.pre_tokenize_str(text + heading))
        for text in _BEFORE_HEADING
    )


def _compile(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[dict[str, Any]], object, bool, bool], str] | None:
    """Compile the chat template for direct rendering; None if it does not compile."""
    from jinja2 import TemplateError

    try:
        template = chat.compile_template(chat.dated_template(tokenizer))
    except TemplateError:
        return None  # `chat.render` reports it
    special_tokens = dict(tokenizer.special_tokens_map)

    def render(turns: list[dict[str, Any]], tools: object, add_generation_prompt: bool, thinking: bool) -> str:
        options = {"add_generation_prompt": add_generation_prompt, "tools": tools, "documents": None}
        return str(template.render(**{**special_tokens, "enable_thinking": thinking, **options, "messages": turns}))

    return render
