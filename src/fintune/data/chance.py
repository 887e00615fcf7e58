"""Choices by a hash in place of a random number: another order of the rows or further rows change none of them."""

from __future__ import annotations

import hashlib

NUM_CHANCES = 2**64


def chance(data: bytes, purpose: str) -> int:
    """A number below ``NUM_CHANCES`` that depends on nothing but these."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, key=purpose.encode()).digest(), "big")
