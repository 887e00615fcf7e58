"""Find duplicate conversations: exact ones by a digest, near ones by their words.

Near duplicates have the same system message, the same words in what the user says, and the same numbers in the same
order. Of questions and of answers, at least a share of the 8-byte pieces is the same (Jaccard similarity). So a changed
comma or a repeated sentence makes no new conversation. Another headline below a long shared instruction does, although
most pieces are the same, and so does another figure on a page.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from fintune.records import Message

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

_PIECE_BYTES = 8
_SPACE = re.compile(r"\s+")
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_WORD = re.compile(r"\w+")
_MAX_COMPARED = 16
"""Conversations with one question that are compared one by one; more of them have an index."""
_ODD = 0x9E3779B97F4A7C15
_FILLERS = {"a", "an", "the", "please"}
"""Words that make no other question."""


def normalize_text(text: str) -> str:
    """Return the text in lower case with single spaces."""
    return _SPACE.sub(" ", text).strip().casefold()


def digest_texts(texts: Iterable[str]) -> bytes:
    """Return a digest of 16 bytes, the same for texts that differ in case and white space alone."""
    digest = hashlib.blake2b(digest_size=16)
    for text in texts:
        digest.update(normalize_text(text).encode("utf-8"))
        digest.update(b"\0")
    return digest.digest()


def digest_messages(messages: Sequence[Message]) -> bytes:
    """Return the digest of a conversation's roles and contents."""
    return digest_texts(part for message in messages for part in (message.role, message.content))


class NearDuplicates:
    """Find, for one conversation after the other, an earlier one that it nearly repeats.

    Args:
        similarity: Jaccard similarity from which two texts are near duplicates.
    """

    def __init__(self, similarity: float) -> None:
        self._similarity = similarity
        self._num_kept = 0
        self._kept: defaultdict[bytes, list[tuple[int, Sequence[Message]]]] = defaultdict(list)
        self._indexes: dict[bytes, _Index] = {}

    def find(self, messages: Sequence[Message]) -> int | None:
        """Return the number of an earlier conversation that this one repeats. If there is none, keep this one.

        Numbers count the conversations that were kept, from 0.
        """
        key = _key(messages)
        kept = self._kept[key]
        if len(kept) == _MAX_COMPARED:
            self._indexes[key] = _Index(self._similarity)
            for place, (_, other) in enumerate(kept):
                self._indexes[key].add(place, other)
        index = self._indexes.get(key)
        for place in range(len(kept)) if index is None else index.find(messages):
            number, other = kept[place]
            if _are_similar(other, messages, self._similarity):
                return number
        if index is not None:
            index.add(len(kept), messages)
        kept.append((self._num_kept, messages))
        self._num_kept += 1
        return None


class _Index:
    """Find, among many conversations with one question, those whose answers can be similar.

    The pieces of all answers are in one order. If two answers share at least the needed part of their pieces, they also
    share one of their first pieces. So many count as first that fewer than the needed part are left.
    """

    def __init__(self, similarity: float) -> None:
        self._similarity = similarity
        self._places: defaultdict[int, list[int]] = defaultdict(list)

    def add(self, place: int, messages: Sequence[Message]) -> None:
        for piece in self._first_pieces(messages):
            self._places[piece].append(place)

    def find(self, messages: Sequence[Message]) -> list[int]:
        return sorted({place for piece in self._first_pieces(messages) for place in self._places.get(piece, ())})

    def _first_pieces(self, messages: Sequence[Message]) -> list[int]:
        import numpy as np

        # The product orders the pieces like chance, so that a common beginning is not always among the first.
        pieces = np.unique(_pieces(_join_contents(messages, "assistant")) * np.uint64(_ODD))
        num_needed = math.ceil(self._similarity * pieces.size - 1e-6)
        first: list[int] = pieces[: pieces.size - num_needed + 1].tolist()
        return first


def _key(messages: Sequence[Message]) -> bytes:
    """Return a digest of what is the same in near duplicates: system message, words of the user, and all numbers."""
    words = set(_WORD.findall(normalize_text(_join_contents(messages, "user", "tool")))) - _FILLERS
    numbers = _NUMBER.findall(_join_contents(messages, "user", "assistant"))
    return digest_texts([_join_contents(messages, "system"), " ".join(sorted(words)), " ".join(numbers)])


def _are_similar(a: Sequence[Message], b: Sequence[Message], similarity: float) -> bool:
    # The shorter text first.
    return all(
        jaccard(_join_contents(a, role), _join_contents(b, role)) >= similarity for role in ("assistant", "user")
    )


def jaccard(a: str, b: str) -> float:
    """Return the share of the pieces of either text that both texts have."""
    import numpy as np

    pieces_a, pieces_b = np.unique(_pieces(a)), np.unique(_pieces(b))
    num_shared = np.intersect1d(pieces_a, pieces_b, assume_unique=True).size
    return float(num_shared / (pieces_a.size + pieces_b.size - num_shared))


def _join_contents(messages: Sequence[Message], *roles: str) -> str:
    return "\n".join(message.content for message in messages if message.role in roles)


def _pieces(text: str) -> Array:
    """Return every run of 8 bytes as a 64-bit number, with repetitions; at least one."""
    import numpy as np

    data = np.frombuffer(normalize_text(text).encode("utf-8").ljust(_PIECE_BYTES, b"\0"), dtype=np.uint8)
    windows: Array = (
        np.ascontiguousarray(np.lib.stride_tricks.sliding_window_view(data, _PIECE_BYTES)).view("<u8").ravel()
    )
    return windows
