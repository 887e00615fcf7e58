"""Texts like a text: the cosine of their words, weighted by how rare they are (TF-IDF; Salton and Buckley 1988)."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from fintune.finqa.relevance import words


class SimilarTexts:
    """Texts to compare with.

    Args:
        texts: None, or as many as wanted; a text without a word is similar to none.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        counts = [Counter(words(text)) for text in texts]
        frequency = Counter(word for each in counts for word in each)
        # Smoothed, so that a word of every text still counts a little.
        self._weights = {word: 1 + math.log((1 + len(texts)) / (1 + number)) for word, number in frequency.items()}
        self._places: dict[str, list[tuple[int, float]]] = defaultdict(list)
        for place, each in enumerate(counts):
            for word, weight in self._vector(each).items():
                self._places[word].append((place, weight))

    def nearest(self, text: str) -> Iterator[tuple[int, float]]:
        """Index and cosine of every text that shares a word, the most similar first; of equals, the earlier one."""
        cosines: dict[int, float] = defaultdict(float)
        for word, weight in self._vector(Counter(words(text))).items():
            for place, other in self._places[word]:
                cosines[place] += weight * other
        yield from sorted(cosines.items(), key=lambda found: (-round(found[1], 9), found[0]))

    def _vector(self, counts: Counter[str]) -> dict[str, float]:
        """Weight of each known word; the vector's length is 1."""
        raw = {word: number * self._weights[word] for word, number in counts.items() if word in self._weights}
        length = math.sqrt(math.fsum(value * value for value in raw.values())) or 1.0
        return {word: value / length for word, value in raw.items()}
