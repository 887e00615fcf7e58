from __future__ import annotations

import hashlib
import unicodedata

from fintune.export.gguf.probe_strings import NUM_STRINGS, probe_strings


def test_the_strings_are_the_same_on_every_machine():
    joined = "\0".join(probe_strings()).encode()
    assert hashlib.sha256(joined).hexdigest() == "ab1dd4f34daa812f74911034cbe5198a55ac67541b5fb5f94051adbdfa8bca35"


def test_they_are_many_different_and_composed():
    strings = probe_strings()
    assert len(strings) == len(set(strings)) == NUM_STRINGS == 2000
    assert all(unicodedata.is_normalized("NFC", text) for text in strings)


def test_they_hold_what_tokenizers_part_on():
    strings = probe_strings()
    for piece in ("  2", "\n\n", "\t", "1,", "$ ", "'s", "divide(", "#0", "\u00a0", "\r\n", "%", "Ж"):
        assert any(piece in text for text in strings), piece
    kinds = {unicodedata.category(char) for text in strings for char in text}
    assert {"Lu", "Ll", "Lo", "Nd", "No", "Sc", "Sm", "So", "Zs", "Cc", "Po", "Mn", "Cf"} <= kinds
