"""Some values of a GGUF file's header, without the rest of it.

The gguf package makes an array of every string of the vocabulary, seconds for a hundred thousand tokens; here strings
that nobody asked for are stepped over. The layout is that of ggml's docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Collection
from pathlib import Path

from fintune.errors import ModelError

_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_START = struct.Struct("<4sIQQ")
_LENGTH = struct.Struct("<Q")
_TYPE = struct.Struct("<I")

Values = tuple[int | float | bool, ...]


def numbers(path: Path, wanted: Collection[str]) -> dict[str, Values]:
    """Numbers and arrays of numbers by their key, those that the file has; a single number is an array of one.

    Raises:
        ModelError: The header cannot be read.
    """
    found: dict[str, Values] = {}
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            _, version, _, num_pairs = _START.unpack_from(data)
            if version not in (2, 3):
                raise ModelError(f"{path}: GGUF version {version} is not known", hint="export the model again")
            at = _START.size
            for _ in range(num_pairs):
                key, at = _text(data, at)
                (kind,) = _TYPE.unpack_from(data, at)
                values, at = _value(data, at + _TYPE.size, kind)
                if key in wanted:
                    found[key] = values
        except (struct.error, KeyError, UnicodeDecodeError):
            raise ModelError(f"{path}: its header is damaged", hint="export the model again") from None
    return found


def _text(data: mmap.mmap, at: int) -> tuple[str, int]:
    (length,) = _LENGTH.unpack_from(data, at)
    at += _LENGTH.size
    return data[at : at + length].decode(), at + length


def _value(data: mmap.mmap, at: int, kind: int) -> tuple[Values, int]:
    """A value and where the next thing begins; a string is stepped over."""
    if kind == _STRING:
        return (), _behind_strings(data, at, 1)
    number = 1
    if kind == _ARRAY:
        kind, number = struct.unpack_from("<IQ", data, at)
        at += 12
        if kind == _STRING:
            return (), _behind_strings(data, at, number)
    form = f"<{number}{_FORMATS[kind]}"
    return struct.unpack_from(form, data, at), at + struct.calcsize(form)


def _behind_strings(data: mmap.mmap, at: int, number: int) -> int:
    read = _LENGTH.unpack_from
    for _ in range(number):
        at += 8 + read(data, at)[0]
    return at
