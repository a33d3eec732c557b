"""What is known of the memory that a page was found in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from volatility3_ept.spec import bits


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on the physical addresses that a page of that memory can name."""

    #: Width of physical addresses in bits.
    maxphyaddr: int = bits.MAX_PHYSICAL_BITS
    #: First address past the memory.
    physical_top: int | None = None
    #: Whether an address is in the capture; None when that cannot be told.
    present: Callable[[int], bool | None] | None = None

    def fits(self, address: int) -> bool:
        """Tell whether the physical address width and the end of memory allow an address."""
        return not address >> self.maxphyaddr and (self.physical_top is None or address < self.physical_top)

    def holds_page(self, address: int) -> bool | None:
        """Tell whether the page at an address is in the capture; None when that is not known."""
        if not self.fits(address):
            return False
        return None if self.present is None else self.present(address)
