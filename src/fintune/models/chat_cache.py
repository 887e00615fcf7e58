"""Many conversations, or many beginnings of one, as text and ids, without rendering and tokenising all of it anew.

A token that ends a turn splits a text before anything else is done to it, so that what stands between two of them has
the same ids wherever it stands. A conversation is therefore tokenised once, and every beginning of it is put together
from its turns. Every beginning is still rendered, because a template may write an earlier turn in another way once
there is a later one; what is spared there is that `apply_chat_template` copies all messages first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from fintune.errors import DataError
from fintune.models import chat_template as chat
from fintune.records import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_KEPT_IDS = 1_500_000
"""So many, and all are forgotten; some 60 MB."""


class _Edge(NamedTuple):
    """The first or last piece of a text, or both; what stands between two ends of turns is a str."""

    text: str
    is_first: bool
    is_last: bool


class TurnWriter:
    """Gives what `chat.render` and `chat.encode_text` give, and remembers the ids of turns.

    Args:
        tokenizer: With a chat template; neither changes while this is used.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._write = _compiled(tokenizer)
        self._end: tuple[int, str] | None = None
        self._splits = True
        self._known: dict[str | _Edge, list[int]] = {}
        self._num_ids = 0

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The conversation as the template writes it.

        Raises:
            DataError: The template refuses these messages.
        """
        text = self._written(messages, add_generation_prompt)
        return chat.render(self._tokenizer, messages, add_generation_prompt) if text is None else text

    def check(self, messages: Sequence[Message]) -> None:
        """Compare with what ``apply_chat_template`` makes of a conversation; where it differs, that does all then."""
        try:
            expected = chat.render(self._tokenizer, messages, add_generation_prompt=False)
        except DataError:
            expected = None
        if self._written(messages, False) != expected:
            self._write = None

    def _written(self, messages: Sequence[Message], add_generation_prompt: bool) -> str | None:
        """None where the template refuses the messages."""
        from jinja2 import TemplateError

        if self._write is None or not messages:
            return None
        try:
            return self._write([dict(vars(message)) for message in messages], add_generation_prompt)
        except TemplateError:
            return None

    def learn(self, texts: Sequence[str], *, num_letters: int) -> None:
        """Tokenise texts at once and keep the ids of their pieces.

        Args:
            texts: As `render` gives them.
            num_letters: A longer text goes in up to the end of the turn in which this many are reached.
        """
        end_id, end_text = self._ready()
        if not self._splits or not texts:
            return
        self._forget()
        texts = [_beginning(text, end_text, num_letters) for text in texts]
        for text, ids in zip(texts, self._tokenised(texts), strict=True):
            behind = [place + 1 for place, id_ in enumerate(ids) if id_ == end_id]
            pieces = _pieces(text, end_text)
            if len(behind) != len(pieces) - 1:
                self._splits = False
                return
            for piece, start, stop in zip(pieces, [0, *behind], [*behind, len(ids)], strict=True):
                self._keep(piece, ids[start:stop])

    def encode(self, text: str) -> list[int]:
        """Ids of a rendered text."""
        self._forget()
        pieces = _pieces(text, self._ready()[1])
        if self._splits:
            missing = [piece for piece in dict.fromkeys(pieces) if piece not in self._known]
            if missing:
                self._learn_pieces(missing)
        if not self._splits:
            return chat.encode_text(self._tokenizer, text)
        ids: list[int] = []
        for piece in pieces:
            ids += self._known[piece]
        return ids

    def _ready(self) -> tuple[int, str]:
        if self._end is None:
            end_id = chat.end_of_turn_ids(self._tokenizer)[0]
            self._end = end_id, str(self._tokenizer.convert_ids_to_tokens(end_id))
            self._splits = _always_splits(self._tokenizer, *self._end)
        return self._end

    def _learn_pieces(self, pieces: Sequence[str | _Edge]) -> None:
        """Tokenise pieces, each between the ends that it has beside it."""
        end_id, end_text = self._ready()
        edges = [piece if isinstance(piece, _Edge) else _Edge(piece, False, False) for piece in pieces]
        texts = [("" if each.is_first else end_text) + each.text + ("" if each.is_last else end_text) for each in edges]
        for piece, edge, ids in zip(pieces, edges, self._tokenised(texts), strict=True):
            if ids.count(end_id) != 2 - edge.is_first - edge.is_last:
                self._splits = False
            self._keep(piece, ids[1 - edge.is_first :])

    def _keep(self, piece: str | _Edge, ids: list[int]) -> None:
        before = self._known.setdefault(piece, ids)
        if before is ids:
            self._num_ids += len(ids) + 20
        elif before != ids:
            self._splits = False

    def _forget(self) -> None:
        if self._num_ids > _KEPT_IDS:
            self._known.clear()
            self._num_ids = 0

    def _tokenised(self, texts: Sequence[str]) -> list[list[int]]:
        found = self._tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
        ids: list[list[int]] = found["input_ids"]
        return ids


def _beginning(text: str, end_text: str, num_letters: int) -> str:
    before, end, _ = text[num_letters:].partition(end_text)
    return text[:num_letters] + before + end


def _pieces(text: str, end_text: str) -> list[str | _Edge]:
    """The text between the ends of turns; of each piece's ids the end behind it is the last."""
    pieces: list[str | _Edge] = list(text.split(end_text))
    pieces[-1] = _Edge(str(pieces[-1]), len(pieces) == 1, True)
    if len(pieces) > 1:
        pieces[0] = _Edge(str(pieces[0]), True, False)
    return pieces


def _always_splits(tokenizer: PreTrainedTokenizerBase, end_id: int, end_text: str) -> bool:
    """Whether the end of a turn is found in a text whatever stands beside it, before all else.

    So it is with the added tokens of the tokenizers library, but for those that look at the letters beside them, are
    searched for in normalised text, or share letters with another added token that could be found in their place.
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
    """Whether another token holds the end, or one begins with the last letters of the other."""
    sizes = range(1, min(len(end), len(other)))
    return end in other or any(end[-size:] == other[:size] or other[-size:] == end[:size] for size in sizes)


def _compiled(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[dict[str, str]], bool], str] | None:
    """The template as ``apply_chat_template`` compiles it; None where it does not or does it elsewhere."""
    from jinja2 import TemplateError

    try:
        from transformers.utils.chat_template_utils import _compile_jinja_template
    except ImportError:
        return None
    try:
        template = _compile_jinja_template(chat.dated_template(tokenizer))
    except TemplateError:
        return None  # told where it is used
    names = dict(tokenizer.special_tokens_map)

    def write(messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        told = {"add_generation_prompt": add_generation_prompt, "tools": None, "documents": None}
        return str(template.render(**{**names, "enable_thinking": False, **told, "messages": messages}))

    return write
