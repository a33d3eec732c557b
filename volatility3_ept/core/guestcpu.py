"""What a control structure says of its guest: paging mode, registers, and whether its page tables parse.

The pair (root, guest CR3) is validated together: the page that the guest was executing must translate through the
guest's own tables, read through EPT or NPT. Nothing else in a control structure is so hard to get right by accident.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from volatility3_ept.core import walk as walks
from volatility3_ept.core.control import ControlStructure, Criterion
from volatility3_ept.core.memory import HostMemory
from volatility3_ept.spec import ia32e
from volatility3_ept.spec.ia32e import Ia32Format
from volatility3_ept.spec.paging import Outcome

_NAMES = {
    "VMCS": {
        "cr0": "GUEST_CR0",
        "cr3": "GUEST_CR3",
        "cr4": "GUEST_CR4",
        "efer": "GUEST_IA32_EFER",
        "rip": "GUEST_RIP",
        "rsp": "GUEST_RSP",
        "rflags": "GUEST_RFLAGS",
        "cs_base": "GUEST_CS_BASE",
        "gs_base": "GUEST_GS_BASE",
        "idtr_base": "GUEST_IDTR_BASE",
        "gdtr_base": "GUEST_GDTR_BASE",
    },
    "VMCB": {
        "cr0": "CR0",
        "cr3": "CR3",
        "cr4": "CR4",
        "efer": "EFER",
        "rip": "RIP",
        "rsp": "RSP",
        "rflags": "RFLAGS",
        "cs_base": "CS_BASE",
        "gs_base": "GS_BASE",
        "idtr_base": "IDTR_BASE",
        "gdtr_base": "GDTR_BASE",
    },
}


@dataclass(frozen=True, slots=True)
class Registers:
    """A guest's registers as its control structure holds them: those of the last exit, stale while the guest runs."""

    cr0: int = 0
    cr3: int = 0
    cr4: int = 0
    efer: int = 0
    rip: int = 0
    rsp: int = 0
    rflags: int = 0
    cs_base: int = 0
    gs_base: int = 0
    idtr_base: int = 0
    gdtr_base: int = 0

    @property
    def linear_rip(self) -> int:
        """The linear address that was executed: in 64-bit mode CS has no base."""
        return self.rip if self.efer & ia32e.EFER_LMA else self.cs_base + self.rip


def registers(structure: ControlStructure) -> Registers:
    """Return the guest's registers; fields that the layout lacks are 0."""
    return Registers(**{ours: structure.fields.get(theirs, 0) for ours, theirs in _NAMES[structure.kind].items()})


def formats(state: Registers) -> tuple[Ia32Format, ...]:
    """Return the paging modes that the registers allow, the most likely one first; none where paging is off.

    EFER is often stale or not saved at all; with PAE on, long mode is then tried as well.
    """
    first = ia32e.guest_format(state.cr0, state.cr4, state.efer)
    if first is None:
        return ()
    if not state.cr4 & ia32e.CR4_PAE or state.efer & ia32e.EFER_LMA:
        return (first,)
    long_mode = ia32e.five_level() if state.cr4 & ia32e.CR4_LA57 else ia32e.four_level()
    return (first, long_mode) if first.name != long_mode.name else (first, ia32e.pae())


def paging(memory: HostMemory, state: Registers) -> tuple[Ia32Format | None, Criterion]:
    """Return the guest's paging mode and the evidence that its tables parse through ``memory`` (guest-physical).

    None where paging is off or nothing parses; the criterion says which.
    """
    name = "guest page tables"
    modes = formats(state)
    if not modes:
        if not state.cr0 & ia32e.CR0_PE and not state.rip and not state.cr3:
            return None, Criterion(name, None, "the guest's registers are empty")
        readable = state.linear_rip in memory
        return None, Criterion(name, readable or None, "paging is off; the code that ran is "
                               + ("mapped" if readable else "not mapped"), 3)  # fmt: skip
    for mode in modes:
        for what, address in _landmarks(state):
            if walks.walk(memory, mode, state.cr3, address).outcome is Outcome.MAPPED:
                return mode, Criterion(name, True, f"{mode.name}: {what} {address:#x} translates", 5)
    last = walks.walk(memory, modes[0], state.cr3, state.linear_rip)
    return None, Criterion(name, False, f"{modes[0].name}: RIP {state.linear_rip:#x} does not: {last.reason}", 5)


def _landmarks(state: Registers) -> Iterable[tuple[str, int]]:
    """Addresses that every running guest has mapped, the strongest first."""
    return ((what, address) for what, address in (
        ("RIP", state.linear_rip), ("IDT", state.idtr_base), ("GDT", state.gdtr_base), ("RSP", state.rsp)
    ) if address)  # fmt: skip
