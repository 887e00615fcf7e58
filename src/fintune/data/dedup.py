"""Find duplicate conversations: exact ones by a digest, near ones by MinHash and an exact comparison.

A text is the set of its 8-byte pieces. One pass of one hash function puts them into 128 bins, and the smallest hash of
each bin is the signature (one-permutation hashing; an empty bin borrows from the next one, Shrivastava and Li 2014).
Conversations with an equal band of the signature are candidates. They are near duplicates only if questions and
answers, each by themselves, are as similar as the option says, the system message is the same, and so are all numbers,
in order. Pages and answers of finance often differ in nothing but a figure.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from fintune.records import Message

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

_NUM_BINS = 128
_PIECE_BYTES = 8
_MAX_MISSED = 1e-3
"""Bands are as wide as possible while they miss at most this share of the near duplicates."""
_TOLERANCE = 0.15
"""Texts are not compared if the share of equal bins is this much below the similarity of near duplicates."""
_SPACE = re.compile(r"\s+")
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


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
        num_expected: Number of conversations that will come, for which memory is reserved.
    """

    def __init__(self, similarity: float, num_expected: int) -> None:
        import numpy as np

        self._similarity = similarity
        self._band_width = _band_width(similarity)
        self._signatures = np.zeros((num_expected, _NUM_BINS), dtype=np.uint64)
        self._kept: list[Sequence[Message]] = []
        self._bands: defaultdict[tuple[int, bytes], list[int]] = defaultdict(list)

    def find(self, messages: Sequence[Message]) -> int | None:
        """Return the number of an earlier conversation that this one repeats. If there is none, keep this one.

        Numbers count the conversations that were kept, from 0.
        """
        import numpy as np

        signature = _signature(_pieces(_join_contents(messages, "user", "assistant")))
        starts = range(0, _NUM_BINS, self._band_width)
        bands = [(start, signature[start : start + self._band_width].tobytes()) for start in starts]
        candidates = sorted({number for band in bands for number in self._bands.get(band, ())})
        if candidates:
            share_equal = (self._signatures[candidates] == signature).mean(axis=1)
            for index in np.flatnonzero(share_equal >= self._similarity - _TOLERANCE):
                number = candidates[int(index)]
                if are_near_duplicates(self._kept[number], messages, self._similarity):
                    return number
        number = len(self._kept)
        self._kept.append(messages)
        self._signatures[number] = signature
        for band in bands:
            self._bands[band].append(number)
        return None


def are_near_duplicates(a: Sequence[Message], b: Sequence[Message], similarity: float) -> bool:
    """Whether two conversations are near duplicates. The comparison is exact, not an estimate."""
    return (
        normalize_text(_join_contents(a, "system")) == normalize_text(_join_contents(b, "system"))
        and _numbers(a) == _numbers(b)
        and all(
            jaccard(_join_contents(a, role), _join_contents(b, role)) >= similarity
            for role in ("assistant", "user")  # the shorter text first
        )
    )


def jaccard(a: str, b: str) -> float:
    """Return the share of the pieces of either text that both texts have."""
    import numpy as np

    pieces_a, pieces_b = np.unique(_pieces(a)), np.unique(_pieces(b))
    num_shared = np.intersect1d(pieces_a, pieces_b, assume_unique=True).size
    return float(num_shared / (pieces_a.size + pieces_b.size - num_shared))


def _join_contents(messages: Sequence[Message], *roles: str) -> str:
    return "\n".join(message.content for message in messages if message.role in roles)


def _numbers(messages: Sequence[Message]) -> list[str]:
    return _NUMBER.findall(_join_contents(messages, "user", "assistant"))


def _pieces(text: str) -> Array:
    """Return every run of 8 bytes as a mixed 64-bit number, with repetitions; at least one."""
    import numpy as np

    data = np.frombuffer(normalize_text(text).encode("utf-8").ljust(_PIECE_BYTES, b"\0"), dtype=np.uint8)
    windows = np.ascontiguousarray(np.lib.stride_tricks.sliding_window_view(data, _PIECE_BYTES)).view("<u8").ravel()
    # The finaliser of splitmix64 is a bijection, so different pieces stay different.
    mixed = (windows ^ (windows >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    pieces: Array = mixed ^ (mixed >> np.uint64(31))
    return pieces


def _signature(pieces: Array) -> Array:
    """Return the smallest piece of each bin; shape [_NUM_BINS].

    An empty bin borrows from the next bin that is not empty, and adds the distance to it.
    """
    import numpy as np

    empty = np.uint64(2**64 - 1)
    smallest = np.full(_NUM_BINS, empty, dtype=np.uint64)
    np.minimum.at(smallest, (pieces >> np.uint64(57)).astype(np.intp), pieces)
    filled = np.flatnonzero(smallest != empty)
    bins = np.arange(_NUM_BINS)
    following = filled[np.searchsorted(filled, bins) % filled.size]
    distance = ((following - bins) % _NUM_BINS).astype(np.uint64)
    signature: Array = smallest[following] + distance * np.uint64(0x9E3779B97F4A7C15)
    return signature


def _band_width(similarity: float) -> int:
    widths = (64, 32, 16, 8, 4, 2, 1)
    return next(w for w in widths if (1 - similarity**w) ** (_NUM_BINS // w) <= _MAX_MISSED or w == 1)
