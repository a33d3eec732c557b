"""Decisions taken from bytes: one input is one case, and a small change of the input is a small change of the case."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Draw:
    """Reads bytes in order. When they are used up every number is 0 and every choice the first one."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def left(self) -> int:
        """Bytes that are not used yet."""
        return max(len(self._data) - self._at, 0)

    def take(self, length: int) -> bytes:
        """Return the next bytes, filled up with zeros."""
        part = self._data[self._at : self._at + length]
        self._at += length
        return part.ljust(length, b"\0")

    def rest(self) -> bytes:
        """Return all that is left."""
        return self.take(self.left)

    def number(self, width: int = 8) -> int:
        """Return an unsigned number of so many bytes."""
        return int.from_bytes(self.take(width), "little")

    def below(self, limit: int) -> int:
        """Return a number from 0 to ``limit - 1``, of as few bytes as it needs."""
        return self.number(max((limit - 1).bit_length() + 7 >> 3, 1)) % limit

    def flag(self, one_in: int = 2) -> bool:
        """Return True once in so many times."""
        return self.number(1) % one_in == one_in - 1

    def choice(self, options: Sequence[T]) -> T:
        """Return one of some things."""
        return options[self.below(len(options))]

    def word(self, *near: int) -> int:
        """Return a 64-bit number: one of those given, one close to it, one bit away from it, or any."""
        kind = self.below(4)
        if kind == 3 or not near:
            return self.number()
        value = self.choice(near)
        if kind == 1:
            value += self.below(256) - 128
        if kind == 2:
            value ^= 1 << self.below(64)
        return value & (1 << 64) - 1

    def text(self, fragments: Sequence[str]) -> str:
        """Return text glued together of fragments and of characters of all sorts."""
        parts: list[str] = []
        while self.left and len(parts) < 64:
            number = self.below(len(fragments) + 3)
            if number < len(fragments):
                parts.append(fragments[number])
            elif number == len(fragments):
                parts.append(chr(self.below(0x110000)))
            elif number == len(fragments) + 1:
                parts.append(chr(self.number(1)))
            else:
                parts.append(str(self.number(self.below(9))))
        return "".join(parts)
