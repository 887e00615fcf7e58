"""Relevance and similarity of texts by their words.

`rank_lines` ranks the lines of a page by relevance to a question (BM25: Robertson and Zaragoza 2009). `SimilarTexts`
finds similar texts by the cosine of their words, weighted by how rare they are (TF-IDF: Salton and Buckley 1988).
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from functools import lru_cache

_WORD = re.compile(r"[a-z]+|\d+(?:[.,]\d+)*")
_ENDINGS = (("ies", "y"), ("sses", "ss"), ("ing", ""), ("ed", ""), ("es", ""), ("s", ""))
_STOP = frozenset(
    """a an and are as at be been between by did do does during for from had has have how if in into is it its many much
    of on or than that the their then there these this to was were what when which who will with would""".split()  # noqa: SIM905
)

SATURATION, LENGTH = 1.2, 0.75
"""BM25's k1 and b, with their usual values."""

TABLE_BONUS = 4.0
"""Score that a table row gains over a sentence: two thirds of FinQA's evidence are rows, and rows are short."""

NEIGHBOUR = 0.1
"""Share of its neighbours' scores that a line gains, so that of equal lines the one beside a good line is kept.

This value and the table bonus were chosen on every second training record with evidence, at 512 and 768 tokens.
"""


def content_words(text: str) -> list[str]:
    """Return words and numbers in lower case, without stop words and without the endings of plurals and verbs."""
    return [_stem(word) for word in _WORD.findall(text.lower()) if word not in _STOP]


@lru_cache(maxsize=1 << 16)  # a report's words recur on every page
def _stem(word: str) -> str:
    for ending, new in _ENDINGS:
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word.removesuffix(ending) + new
    return word


def rank_lines(question: str, lines: Sequence[str], rows: Collection[int], *, first: Collection[int] = ()) -> list[int]:
    """Return the indices of ``lines``, the most relevant to the question first; equal lines keep the order of the page.

    Args:
        question: The question; its years count as words.
        lines: The lines of the page.
        rows: Indices of the lines that are table rows.
        first: Indices that come before all others.
    """
    line_counts = [Counter(content_words(line)) for line in lines]
    frequency = Counter(word for counts in line_counts for word in counts)
    question_words = sorted(set(content_words(question)))
    mean_length = sum(counts.total() for counts in line_counts) / max(1, len(line_counts)) or 1.0
    own = []
    for k, counts in enumerate(line_counts):
        length = 1 - LENGTH + LENGTH * counts.total() / mean_length
        score = TABLE_BONUS if k in rows else 0.0
        for word in question_words:
            weight = math.log(1 + len(lines) / frequency[word]) if counts[word] else 0.0
            score += weight * counts[word] * (SATURATION + 1) / (counts[word] + SATURATION * length)
        own.append(score)
    padded = [0.0, *own, 0.0]
    scores = [own[k] + NEIGHBOUR * (padded[k] + padded[k + 2]) for k in range(len(own))]
    return sorted(range(len(own)), key=lambda k: (k not in first, -scores[k], k))


class SimilarTexts:
    """Texts that other texts are compared with.

    Args:
        texts: Any number of texts. A text without words is similar to no text.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        counts = [Counter(content_words(text)) for text in texts]
        frequency = Counter(word for text_counts in counts for word in text_counts)
        # Smoothed, so that a word in every text still counts a little.
        self._weights = {word: 1 + math.log((1 + len(texts)) / (1 + number)) for word, number in frequency.items()}
        self._texts_with: dict[str, list[tuple[int, float]]] = defaultdict(list)
        for index, text_counts in enumerate(counts):
            for word, weight in self._vector(text_counts).items():
                self._texts_with[word].append((index, weight))

    def nearest(self, text: str) -> Iterator[tuple[int, float]]:
        """Yield index and cosine of every text that shares a word, the most similar first; equals keep their order."""
        cosines: dict[int, float] = defaultdict(float)
        for word, weight in self._vector(Counter(content_words(text))).items():
            for index, other in self._texts_with[word]:
                cosines[index] += weight * other
        yield from sorted(cosines.items(), key=lambda item: (-round(item[1], 9), item[0]))

    def _vector(self, counts: Counter[str]) -> dict[str, float]:
        """Return the weight of every known word; the length of the vector is 1."""
        raw = {word: number * self._weights[word] for word, number in counts.items() if word in self._weights}
        length = math.sqrt(math.fsum(value * value for value in raw.values())) or 1.0
        return {word: value / length for word, value in raw.items()}
