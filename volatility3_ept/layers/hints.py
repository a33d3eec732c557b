"""Column types that a person and a script both can read."""

from __future__ import annotations

from volatility3_ept.spec.bits import size_name


class Bytes(int):
    """A number of bytes: ``87.1M`` for a person, the plain number in ``-r json``."""

    def __str__(self) -> str:
        """Return the size in the largest fitting unit."""
        return size_name(int(self))

    def __format__(self, spec: str) -> str:
        """Format the text, not the number."""
        return format(str(self), spec)
