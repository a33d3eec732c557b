"""Assembly for a person to read, where iced-x86 is installed: an optional extra of this package."""

from __future__ import annotations

import importlib
from collections.abc import Callable


def disassembler() -> Callable[..., list[str]] | None:
    """Return a function from bytes, their address and the mode in bits to instructions; None without iced-x86.

    A last instruction that the bytes cut off is left out.
    """
    try:
        iced = importlib.import_module("iced_x86")
    except ImportError:
        return None
    formatter = iced.Formatter(iced.FormatterSyntax.NASM)

    def disassemble(code: bytes, address: int, bits: int = 64) -> list[str]:
        decoder = iced.Decoder(bits, code, ip=address & (1 << 64) - 1)
        return [formatter.format(each) for each in decoder if not each.is_invalid]

    return disassemble
