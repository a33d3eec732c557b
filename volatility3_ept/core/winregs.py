"""What the registers of a vCPU say of a Windows kernel: addresses within its image, and where its page tables are.

Nothing is searched: each address is followed through the guest's own page tables, and each structure is believed only
where it names itself. Offsets are those that Microsoft keeps stable for debuggers.

Sources: Windows SDK and WDK headers (``ntddk.h``: ``KPCR``; ``wdbgexts.h``: ``DBGKD_GET_VERSION64``, whose ``KernBase``
debuggers rely on); QEMU ``windbgstub.c`` (``KPCR``); "KVA Shadow: Mitigating Meltdown on
Windows" (Microsoft Security Response Center, 2018), and the code of ``KiSystemCall64Shadow`` for the places of
``KPRCB.KernelDirectoryTableBase``.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

from volatility3_ept.core.guestcpu import Registers
from volatility3_ept.core.gva import Space

#: Vectors whose handlers are the kernel's own in every Windows: #DE, #BP, #UD, #DF, #GP, #PF.
_VECTORS: Final = (0, 3, 6, 8, 13, 14)
_INTERRUPT_GATES: Final = (0xE, 0xF)
#: KPCR: its own address, the version block, by the width of a pointer.
_SELF: Final = {8: 0x18, 4: 0x1C}
_VERSION_BLOCK: Final = {8: 0x108, 4: 0x34}
_KERN_BASE: Final = 0x10
#: gs:[9000h] (gs:[7000h] in the first builds that had it, [A000h] and [B000h] in Windows 11; fs:[5000h] in 32-bit
#: ones): CR3 of the kernel, for the way out of a user's page tables.
_KERNEL_CR3: Final = {8: (0x9000, 0xA000, 0xB000, 0x7000), 4: (0x5000,)}


class Landmark(NamedTuple):
    """An address that lies in a kernel's image if the guest runs Windows. ``gva`` is as the register holds it.

    ``is_own``: no driver's code can be there.
    """

    what: str
    gva: int
    is_own: bool


def landmarks(state: Registers, space: Space) -> list[Landmark]:
    """Return the addresses that a vCPU's registers lead to, the strongest first. Only kernel addresses are given."""
    found = [Landmark("KdVersionBlock", base, True) for base in _kern_bases(state, space)]
    found += [Landmark("LSTAR", state.lstar, True)]
    found += [Landmark(f"IDT handler {vector}", handler, True) for vector, handler in _handlers(state, space)]
    found += [Landmark("SYSENTER_EIP", state.sysenter_eip, True), Landmark("RIP", state.linear_rip, False)]
    return [mark for mark in found if space.is_kernel(mark.gva)]


def kernel_tables(state: Registers, space: Space) -> list[int]:
    """Return what the processor's control block calls CR3 of the kernel, where KVA shadow has loaded a user's."""
    size = _width(space)
    regions = _control_regions(state, space)
    values = [space.number(region + offset, size) for region in regions for offset in _KERNEL_CR3[size]]
    return [value for value in values if value in space.memory and space.fmt.root_hpa(value)]


def _width(space: Space) -> int:
    return 8 if len(space.fmt.levels) >= 4 else 4


def _control_regions(state: Registers, space: Space) -> list[int]:
    """Return the addresses of the processor control region: GS (FS in 32-bit mode), or what SWAPGS would load."""
    size = _width(space)
    bases = [state.gs_base, state.kernel_gs_base] if size == 8 else [state.fs_base]
    return [base for base in dict.fromkeys(bases)
            if space.is_kernel(base) and space.number(base + _SELF[size], size) == base]  # fmt: skip


def _kern_bases(state: Registers, space: Space) -> Iterator[int]:
    """Yield KernBase of the version block. Newer kernels encode their debugger data, and the pointer is then 0."""
    size = _width(space)
    for region in _control_regions(state, space):
        block = space.number(region + _VERSION_BLOCK[size], size)
        # In 32-bit systems KernBase is sign-extended to 64 bits.
        base = space.number(block + _KERN_BASE, 8) if block else 0
        if base:
            yield base if size == 8 else base & 0xFFFF_FFFF


def _handlers(state: Registers, space: Space) -> Iterator[tuple[int, int]]:
    """Yield vector and handler of gates in the interrupt descriptor table (SDM Vol. 3A, "IDT Descriptors")."""
    table = state.idtr_base
    long_mode = _width(space) == 8
    for vector in _VECTORS if space.is_kernel(table) else ():
        gate = space.read(table + vector * (16 if long_mode else 8), 16 if long_mode else 8)
        if gate is None or gate[5] & 0xF not in _INTERRUPT_GATES or not gate[5] & 0x80:
            continue
        low, middle = struct.unpack_from("<H", gate)[0], struct.unpack_from("<H", gate, 6)[0]
        high = struct.unpack_from("<I", gate, 8)[0] if long_mode else 0
        yield vector, high << 32 | middle << 16 | low
