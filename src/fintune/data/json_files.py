"""Text of JSON files, plain or gzip, told by the content."""

from __future__ import annotations

import zlib
from pathlib import Path

from fintune.errors import DataError

_GZIP_MAGIC = b"\x1f\x8b"
_PIECE = 1 << 16
_AGAIN = "copy or download it again"


def read_text(path: Path, *, hint: str, encoding_hint: str | None = None) -> tuple[str, str | None]:
    """Read a file; of a damaged gzip file, what comes before the damage.

    Args:
        path: The file.
        hint: What a reader is told about the form that was expected.
        encoding_hint: What a reader is told instead where the file is not UTF-8.

    Returns:
        The text, which holds more than white space, and what is damaged, or None.

    Raises:
        DataError: The file is missing, unreadable or empty, or not UTF-8.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DataError("no such file", path=path, hint="check its name") from None
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror or error})", path=path) from None
    damage = None
    if data.startswith(_GZIP_MAGIC):
        data, damage = _unzip(data)
    try:
        text = data.decode("utf-8-sig", errors="strict" if damage is None else "ignore")
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 text (byte {error.start})", path=path, hint=encoding_hint or hint) from None
    if not text.strip():
        raise DataError(damage or "the file is empty", path=path, hint=_AGAIN if damage else hint)
    return text, damage


def read_whole_text(path: Path, *, hint: str, encoding_hint: str | None = None) -> str:
    """Read a file; :func:`read_text` for one that must not be damaged.

    Raises:
        DataError: As there, and where it is damaged.
    """
    text, damage = read_text(path, hint=hint, encoding_hint=encoding_hint)
    if damage:
        raise DataError(damage, path=path, hint=_AGAIN)
    return text


def _unzip(data: bytes) -> tuple[bytes, str | None]:
    parts: list[bytes] = []
    while data:
        unzip = zlib.decompressobj(wbits=31)
        try:
            # In pieces, so that what comes before damage is kept.
            for start in range(0, len(data), _PIECE):
                parts.append(unzip.decompress(data[start : start + _PIECE]))
                if unzip.eof:
                    break
        except zlib.error as error:
            return b"".join(parts), f"damaged gzip file ({error})"
        if not unzip.eof:
            return b"".join(parts), "truncated gzip file"
        rest = unzip.unused_data + data[start + _PIECE :]
        data = rest.lstrip(b"\0")
    return b"".join(parts), None
