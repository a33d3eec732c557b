"""The bits of a segment descriptor that VMCS and VMCB keep in the same places.

Source: Intel SDM Vol. 3A, "Segment Descriptors"; AMD APM Vol. 2, "Legacy Segment Descriptors".
"""

from __future__ import annotations

from dataclasses import dataclass

from volatility3_ept.spec.bits import bit


@dataclass(frozen=True)
class SegmentBits:
    """Descriptor bits 47:40, the low byte of access rights (VMCS) and of segment attributes (VMCB)."""

    raw: int

    @property
    def type(self) -> int:
        """Segment type, bits 3:0."""
        return self.raw & 0xF

    @property
    def is_code_or_data(self) -> bool:
        """Bit 4, S: clear for system segments."""
        return bool(self.raw & bit(4))

    @property
    def dpl(self) -> int:
        """Descriptor privilege level, bits 6:5."""
        return self.raw >> 5 & 3

    @property
    def is_present(self) -> bool:
        """Bit 7."""
        return bool(self.raw & bit(7))
