"""Conversations that say the same: exact copies by a digest, near ones by MinHash and a check of every suspicion.

A text is the set of its 8-byte pieces. One pass of one hash function divides them into 128 bins, whose smallest values
are the signature (one-permutation hashing; empty bins borrow from the next one, Shrivastava and Li 2014). Bands of
equal signature values name suspects; two conversations count as near duplicates only when questions and answers, each
by themselves, are as similar as asked, the system message is the same, and so are all numbers, in order: pages and
answers of finance often differ by nothing but a figure.
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

NUM_BINS = 128
PIECE = 8
"""Bytes of a piece of text."""
_MISSED = 1e-3
"""Bands are as wide as they can be while at most this share of near duplicates escapes them."""
_DOUBT = 0.15
"""Signatures that agree in this much less than asked are not compared letter by letter."""
_SPACE = re.compile(r"\s+")
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


def plain(text: str) -> str:
    """Lower case, single spaces."""
    return _SPACE.sub(" ", text).strip().casefold()


def digest(texts: Iterable[str]) -> bytes:
    """The same for texts that are the same but for case and white space; 16 bytes."""
    found = hashlib.blake2b(digest_size=16)
    for text in texts:
        found.update(plain(text).encode("utf-8"))
        found.update(b"\0")
    return found.digest()


def digest_of(messages: Sequence[Message]) -> bytes:
    """``digest`` of a conversation: roles and contents."""
    return digest(part for message in messages for part in (message.role, message.content))


class NearDuplicates:
    """Finds, for conversations one after the other, an earlier one that it nearly repeats.

    Args:
        similarity: Jaccard similarity from which on two texts count as the same.
        num_expected: Conversations that will come, for the room that is taken at once.
    """

    def __init__(self, similarity: float, num_expected: int) -> None:
        import numpy as np

        self._similarity = similarity
        self._rows = _rows_a_band(similarity)
        self._signatures = np.zeros((num_expected, NUM_BINS), dtype=np.uint64)
        self._kept: list[Sequence[Message]] = []
        self._bands: defaultdict[tuple[int, bytes], list[int]] = defaultdict(list)

    def repeats(self, messages: Sequence[Message]) -> int | None:
        """The number (from 0, of those kept) of an earlier conversation that this one repeats; else it is kept."""
        import numpy as np

        signature = _signature(_pieces(_said(messages, "user", "assistant")))
        bands = [(start, signature[start : start + self._rows].tobytes()) for start in range(0, NUM_BINS, self._rows)]
        suspects = sorted({number for band in bands for number in self._bands.get(band, ())})
        if suspects:
            alike = (self._signatures[suspects] == signature).mean(axis=1)
            for place in np.flatnonzero(alike >= self._similarity - _DOUBT):
                number = suspects[int(place)]
                if near(self._kept[number], messages, self._similarity):
                    return number
        number = len(self._kept)
        self._kept.append(messages)
        self._signatures[number] = signature
        for band in bands:
            self._bands[band].append(number)
        return None


def near(a: Sequence[Message], b: Sequence[Message], similarity: float) -> bool:
    """Whether two conversations are near duplicates; exact, no estimate."""
    return (
        plain(_said(a, "system")) == plain(_said(b, "system"))
        and _numbers(a) == _numbers(b)
        and all(
            jaccard(_said(a, role), _said(b, role)) >= similarity for role in ("assistant", "user")
        )  # the short first
    )


def jaccard(a: str, b: str) -> float:
    """Share of the pieces of either text that both have."""
    import numpy as np

    pieces_a, pieces_b = np.unique(_pieces(a)), np.unique(_pieces(b))
    num_shared = np.intersect1d(pieces_a, pieces_b, assume_unique=True).size
    return float(num_shared / (pieces_a.size + pieces_b.size - num_shared))


def _said(messages: Sequence[Message], *roles: str) -> str:
    return "\n".join(message.content for message in messages if message.role in roles)


def _numbers(messages: Sequence[Message]) -> list[str]:
    return _NUMBER.findall(_said(messages, "user", "assistant"))


def _pieces(text: str) -> Array:
    """Every run of 8 bytes as a mixed 64-bit number, repetitions included; at least one."""
    import numpy as np

    data = np.frombuffer(plain(text).encode("utf-8").ljust(PIECE, b"\0"), dtype=np.uint8)
    windows = np.ascontiguousarray(np.lib.stride_tricks.sliding_window_view(data, PIECE)).view("<u8").ravel()
    # The finaliser of splitmix64: a bijection, so that different pieces stay different.
    mixed = (windows ^ (windows >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    found: Array = mixed ^ (mixed >> np.uint64(31))
    return found


def _signature(pieces: Array) -> Array:
    """Smallest piece of each bin, shape [NUM_BINS]; an empty bin has that of the next filled one, and how far it is."""
    import numpy as np

    empty = np.uint64(2**64 - 1)
    smallest = np.full(NUM_BINS, empty, dtype=np.uint64)
    np.minimum.at(smallest, (pieces >> np.uint64(57)).astype(np.intp), pieces)
    filled = np.flatnonzero(smallest != empty)
    places = np.arange(NUM_BINS)
    following = filled[np.searchsorted(filled, places) % filled.size]
    distance = ((following - places) % NUM_BINS).astype(np.uint64)
    found: Array = smallest[following] + distance * np.uint64(0x9E3779B97F4A7C15)
    return found


def _rows_a_band(similarity: float) -> int:
    widths = (64, 32, 16, 8, 4, 2, 1)
    return next(w for w in widths if (1 - similarity**w) ** (NUM_BINS // w) <= _MISSED or w == 1)
