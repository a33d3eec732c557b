"""What a control structure says of its guest: paging mode, registers, and whether its page tables parse.

The pair (root, guest CR3) is validated together: the page that the guest was executing must translate through the
guest's own tables, read through EPT or NPT. Nothing else in a control structure is so hard to get right by accident.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

from volatility3_ept.core import keybits
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
        "fs_base": "GUEST_FS_BASE",
        "sysenter_eip": "GUEST_IA32_SYSENTER_EIP",
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
        "fs_base": "FS_BASE",
        "kernel_gs_base": "KERNEL_GS_BASE",
        "lstar": "LSTAR",
        "sysenter_eip": "SYSENTER_EIP",
    },
}


#: Where a VMCS keeps the PDPTEs of a guest that uses PAE paging (SDM Vol. 3C, "Guest Register State"). A VMCB has no
#: such fields: with nested paging the processor reads them from memory (APM Vol. 2, "Nested Paging", "PAE").
_PDPTES = tuple(f"GUEST_PDPTE{number}" for number in range(4))


@dataclass(frozen=True, slots=True)
class Registers:
    """A guest's registers as its control structure holds them: those of the last exit, stale while the guest runs.

    ``pdptes`` are the four PDPTEs, empty where the structure has none; ``held_by`` names the structure. A VMCS does not
    hold ``kernel_gs_base`` and ``lstar``: they are 0 then.
    """

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
    fs_base: int = 0
    kernel_gs_base: int = 0
    lstar: int = 0
    sysenter_eip: int = 0
    pdptes: tuple[int, ...] = ()
    held_by: str = ""

    @property
    def linear_rip(self) -> int:
        """The linear address that was executed: in 64-bit mode CS has no base."""
        return self.rip if self.efer & ia32e.EFER_LMA else self.cs_base + self.rip

    @property
    def is_empty(self) -> bool:
        """Tell whether nothing was ever saved: CR0.ET is 1 in every processor."""
        return not self.cr0 & (ia32e.CR0_ET | ia32e.CR0_PE)

    def __str__(self) -> str:
        """Return the registers as text that :meth:`parse` reads back; those that are 0 are left out."""
        parts = [f"held_by={self.held_by}"] if self.held_by else []
        parts += [f"{name}={getattr(self, name):#x}" for name in _NUMBERS if getattr(self, name)]
        parts += [f"pdptes={'+'.join(f'{entry:#x}' for entry in self.pdptes)}"] if self.pdptes else []
        return ",".join(parts)

    @classmethod
    def parse(cls, text: str) -> Registers:
        """Return the registers that a text holds; ValueError when it is none that :meth:`__str__` wrote."""
        values: dict[str, int | str | tuple[int, ...]] = {}
        for part in filter(None, text.split(",")):
            name, _, value = part.partition("=")
            if name == "held_by" and value.isprintable():
                values[name] = value
            elif name == "pdptes":
                values[name] = tuple(_word(entry) for entry in value.split("+"))
            elif name in _NUMBERS:
                values[name] = _word(value)
            else:
                raise ValueError(f"{name!r} is no register")
        found = cls(**values)  # type: ignore[arg-type]
        if len(found.pdptes) not in (0, 4):
            raise ValueError(f"{len(found.pdptes)} PDPTEs")
        return found


_NUMBERS = tuple(item.name for item in fields(Registers) if item.name not in ("pdptes", "held_by"))


def _word(text: str) -> int:
    value = int(text, 16)
    if not 0 <= value < 1 << 64:
        raise ValueError(f"{text}: no 64-bit number")
    return value


def registers(structure: ControlStructure) -> Registers:
    """Return the guest's registers; fields that the layout lacks are 0."""
    held = structure.fields if structure.holds_registers else {}
    pdptes = tuple(held[name] for name in _PDPTES if name in held) if structure.kind == "VMCS" else ()
    where = f" in machine {structure.held_in}" if structure.held_in else ""
    return Registers(
        **{ours: held.get(theirs, 0) for ours, theirs in _NAMES[structure.kind].items()},
        pdptes=pdptes if len(pdptes) == len(_PDPTES) else (),
        held_by=f"{structure.kind} at {structure.hpa:#x}{where}",
    )


def formats(state: Registers) -> tuple[Ia32Format, ...]:
    """Return the paging modes that the registers allow, the most likely one first; none where paging is off.

    EFER is often stale or not saved at all; with PAE on, long mode is then tried as well. PAE is tried with the PDPTEs
    of the VMCS before those at CR3: the processor uses the former, and memory may have changed since.
    """
    first = ia32e.guest_format(state.cr0, state.cr4, state.efer)
    if first is None:
        return ()
    if not state.cr4 & ia32e.CR4_PAE or state.efer & ia32e.EFER_LMA:
        return (first,)
    long_mode = ia32e.five_level() if state.cr4 & ia32e.CR4_LA57 else ia32e.four_level()
    pae = [ia32e.pae()]
    if any(entry & ia32e.PRESENT for entry in state.pdptes):
        pae.insert(0, ia32e.pae(pdptes=state.pdptes))
    return (*pae, long_mode) if first.name != long_mode.name else (first, *pae)


def paging(memory: HostMemory, state: Registers) -> tuple[Ia32Format | None, Criterion]:
    """Return the guest's paging mode and the evidence that its tables parse through ``memory`` (guest-physical).

    None where paging is off or nothing parses; the criterion says which. The mode reads every table from memory, so
    that it serves for any value of CR3: :func:`prove` gives the one with the vCPU's own PDPTEs.
    """
    mode, criterion = prove(memory, state)
    return mode and mode.from_memory, criterion


def prove(memory: HostMemory, state: Registers) -> tuple[Ia32Format | None, Criterion]:
    """Do what :func:`paging` does; the mode is the vCPU's own, with the PDPTEs that it holds."""
    name = "guest page tables"
    modes = formats(state)
    if not modes:
        if not state.cr0 & ia32e.CR0_PE and not state.rip and not state.cr3:
            return None, Criterion(name, None, "the guest's registers are empty, or where nobody can read them")
        readable = state.linear_rip in memory
        return None, Criterion(name, readable or None, "paging is off; the code that ran is "
                               + ("mapped" if readable else "not mapped"), 3)  # fmt: skip
    modes = tuple(keybits.for_guest(memory, mode, state.cr3) for mode in modes)
    for mode in modes:
        for what, address in _landmarks(state):
            if walks.walk(memory, mode, state.cr3, address).outcome is Outcome.MAPPED:
                source = ", PDPTEs of the VMCS" if mode.pdptes else ""
                return mode, Criterion(name, True, f"{mode.name}{source}: {what} {address:#x} translates", 5)
    last = walks.walk(memory, modes[0], state.cr3, state.linear_rip)
    return None, Criterion(name, False, f"{modes[0].name}: RIP {state.linear_rip:#x} does not: {last.reason}", 5)


def _landmarks(state: Registers) -> Iterable[tuple[str, int]]:
    """Addresses that every running guest has mapped, the strongest first."""
    return ((what, address) for what, address in (
        ("RIP", state.linear_rip), ("IDT", state.idtr_base), ("GDT", state.gdtr_base), ("RSP", state.rsp)
    ) if address)  # fmt: skip
