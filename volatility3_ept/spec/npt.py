"""AMD nested paging: the host's own paging mode, walked as user accesses.

Source: AMD APM Vol. 2, "Nested Paging", with "Nested Paging and VMRUN/#VMEXIT", "Nested versus Guest Page Faults"
(every nested walk is a user access, so the user bit must be set at each level) and "Secure Memory Encryption" (the
C-bit). nCR3 is VMCB offset 0B0h and, unlike CR3, has no PCID.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

from volatility3_ept.spec import bits, ia32e
from volatility3_ept.spec.paging import Entries, Level


@dataclass(frozen=True)
class NptFormat(ia32e.Ia32Format):
    """A nested hierarchy. The user right, at every level, is the right of the guest to reach the page at all."""

    is_linear: ClassVar[bool] = False

    def rights(self, entry: Entries, level: Level) -> Entries:
        """As in ordinary paging. An entry without US gives no right: a nested walk is a user access."""
        own = super().rights(entry, level)
        reachable = (own >> 3) & 1
        return own * reachable

    def present(self, entry: Entries) -> Entries:
        """Bit 0. An entry without US is present, and gives no rights."""
        return (entry & ia32e.PRESENT) != 0


def npt_format(levels: int = 4, physical_bits: int = bits.MAX_PHYSICAL_BITS, key_bits: int = 0) -> NptFormat:
    """Return the nested format of a host in the given mode.

    ``levels`` 5, 4, 3 (PAE) and 2 (32-bit) follow the host's CR4 and EFER at VMRUN; ValueError for another number.
    """
    modes = {
        5: ia32e.five_level(physical_bits, key_bits),
        4: ia32e.four_level(physical_bits, key_bits),
        3: ia32e.pae(physical_bits),
        2: ia32e.legacy(),
    }
    if levels not in modes:
        raise ValueError(f"NPT has 5, 4, 3 (PAE) or 2 (32-bit) levels, not {levels}")
    base = modes[levels]
    return NptFormat(
        f"NPT, {base.name}",
        base.levels,
        base.physical_bits,
        base.key_bits,
        base.entry_bytes,
        base.root_mask,
        base.pae_directory,
    )


NPT_4: Final = npt_format(4)
NPT_5: Final = npt_format(5)
