"""A guest's virtual address space, from the state of its vCPUs: which paging mode, which tables, and on what evidence.

Nothing is guessed. CR0, CR3, CR4 and EFER of a vCPU select the mode (SDM Vol. 3A, "Paging Modes and Control Bits"), and
a mode is believed when the tables parse in it: where the guest was executing, or its IDT, GDT or stack, translates.
With several vCPUs the one whose tables hold most of a kernel stands for the guest.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from volatility3_ept.core import guestcpu, guesthalves
from volatility3_ept.core import walk as walks
from volatility3_ept.core.control import Criterion
from volatility3_ept.core.guestcpu import Registers
from volatility3_ept.core.machines import Machine
from volatility3_ept.core.memory import HostMemory
from volatility3_ept.core.walk import Walk
from volatility3_ept.spec import ia32e
from volatility3_ept.spec.bits import bit
from volatility3_ept.spec.ia32e import Ia32Format

NAME = "virtual addresses"


@dataclass(frozen=True, slots=True)
class AddressSpace:
    """A guest-virtual address space.

    ``mode`` is None where paging is off: then every linear address is the guest-physical one. ``cr3`` is the register
    that leads to all of it: of a pair of tables the kernel's half, and ``user_cr3`` is then the half that the vCPU had
    loaded. ``held_by`` says whose it is. ``kernel_entries`` counts the entries of the kernel's half of its top table.
    """

    mode: Ia32Format | None
    cr3: int = 0
    user_cr3: int | None = None
    held_by: str = ""
    kernel_entries: int = 0

    @property
    def root(self) -> int:
        """Guest-physical address of the top table: CR3 without PCID and flags."""
        return self.mode.root_hpa(self.cr3) if self.mode else 0

    def at(self, gva: int) -> tuple[Ia32Format, int]:
        """Return the mode and the CR3 that the guest uses for an address: of a pair, by the half that it lies in.

        Raises:
            ValueError: paging is off.
        """
        if self.mode is None:
            raise ValueError("paging is off: a linear address is the guest-physical one")
        is_kernel = gva & bit(self.mode.address_bits - 1)
        if self.user_cr3 is None or is_kernel:
            return self.mode, self.cr3
        return self.mode.from_memory, self.user_cr3

    def pdptes(self, memory: HostMemory) -> tuple[int, ...]:
        """Return the four PDPTEs of PAE, those that the processor holds or those at CR3; empty in other modes.

        Where CR3's memory is not in ``memory`` (guest-physical), none is present.
        """
        if self.mode is None or not self.mode.pae_directory:
            return ()
        data = memory.read(self.root, 32)
        in_memory = tuple(int.from_bytes((data or bytes(32))[at : at + 8], "little") for at in range(0, 32, 8))
        return self.mode.pdptes or in_memory


@dataclass(frozen=True, slots=True)
class Decision:
    """An address space, or None, and why."""

    space: AddressSpace | None
    evidence: tuple[Criterion, ...] = ()

    def __str__(self) -> str:
        """Return the evidence in one line."""
        return "; ".join(str(item) for item in self.evidence)


def decide(memory: HostMemory, states: Iterable[Registers], found: tuple[Ia32Format, int] | None = None) -> Decision:
    """Return the address space that stands for a guest, whose guest-physical memory is ``memory``.

    ``states`` are the registers of its vCPUs. ``found`` is the mode and top table that a search of the memory gave; it
    counts where no vCPU's tables parse.
    """
    judged = [(state, of_vcpu(memory, state)) for state in states]
    spaces = [(state, item) for state, item in judged if item.space is not None]
    paged = [(state, item) for state, item in spaces if item.space and item.space.mode]
    if paged:
        best = max((item for _, item in paged), key=lambda item: item.space.kernel_entries if item.space else 0)
        return _searched(memory, _chosen(best, len(judged)))
    failed = tuple(criterion for state, item in judged if not item.space for criterion in item.evidence)
    if found:
        mode, cr3 = found
        text = f"{mode.name} tables at {mode.root_hpa(cr3):#x}, which the search of the guest's memory found"
        space = AddressSpace(mode, cr3, held_by="page tables", kernel_entries=_kernel_entries(memory, mode, cr3))
        return Decision(space, (*failed, Criterion(NAME, True, text, 3)))
    # A vCPU that was never started has paging off: that says nothing of a guest whose other vCPUs do not parse.
    if spaces and not any(guestcpu.formats(state) for state, _ in judged):
        return _chosen(spaces[0][1], len(judged))
    return Decision(None, failed or (Criterion(NAME, None, "no control structure of this machine is known"),))


def of_vcpu(memory: HostMemory, state: Registers) -> Decision:
    """Return the address space of one vCPU. Of a pair of tables the kernel's half where it lies beside the user's."""
    if state.is_empty:
        return Decision(None, (Criterion(NAME, None, _by(state, "the registers are empty")),))
    mode, parses = guestcpu.prove(memory, state)
    said = replace(parses, detail=_by(state, parses.detail))
    if mode is None:
        if guestcpu.formats(state):
            return Decision(None, (said,))
        return Decision(AddressSpace(None, held_by=state.held_by), (said, _unpaged(state)))
    evidence = [said, *_pdptes(memory, mode, state.cr3)]
    kernel, why = guesthalves.linux_kernel_half(memory, mode, state.cr3)
    evidence += [why] if why else []
    if kernel is None:
        entries = _kernel_entries(memory, mode, state.cr3)
        return Decision(AddressSpace(mode, state.cr3, None, state.held_by, entries), tuple(evidence))
    half = mode.from_memory
    entries = _kernel_entries(memory, half, kernel)
    return Decision(AddressSpace(half, kernel, state.cr3, state.held_by, entries), tuple(evidence))


def nominal(state: Registers) -> AddressSpace | None:
    """Return the address space that registers name although nothing translates in it: a walk there says why."""
    modes = guestcpu.formats(state)
    return AddressSpace(modes[0], state.cr3, held_by=state.held_by) if modes else None


def of_machine(machine: Machine) -> Decision:
    """Return the address space that stands for a machine."""
    return decide(machine.memory, states(machine), found(machine))


def states(machine: Machine) -> tuple[Registers, ...]:
    """Return the registers of a machine's vCPUs."""
    return tuple(guestcpu.registers(vcpu) for vcpu in machine.vcpus)


def found(machine: Machine) -> tuple[Ia32Format, int] | None:
    """Return the mode and the top table that the search found without a control structure; None where it did not."""
    if machine.paging is None or machine.guest_cr3 is None:
        return None
    return machine.paging, machine.guest_cr3


def walk(memory: HostMemory, space: AddressSpace, gva: int) -> Walk:
    """Translate one guest-virtual address to a guest-physical one; ValueError where paging is off."""
    mode, cr3 = space.at(gva)
    return walks.walk(memory, mode, cr3, gva)


def _chosen(item: Decision, count: int) -> Decision:
    if count < 2 or item.space is None:
        return item
    text = f"of {count} vCPUs, the one of the {item.space.held_by} stands for the guest"
    return Decision(item.space, (*item.evidence, Criterion(NAME, None, text)))


def _searched(memory: HostMemory, item: Decision) -> Decision:
    """Search for the kernel half of a table that looks like a user half and has no neighbour that is one."""
    space = item.space
    if space is None or space.mode is None or space.user_cr3 is not None:
        return item
    seen = guesthalves.top(memory, space.mode, space.cr3)
    if seen is None or not seen.may_be_user_half or guesthalves.maps_a_kernel(memory, space.mode, seen):
        return item
    kernel, why = guesthalves.windows_kernel_half(memory, space.mode, space.cr3)
    if kernel is None:
        return Decision(space, (*item.evidence, why))
    entries = _kernel_entries(memory, space.mode, kernel)
    return Decision(AddressSpace(space.mode, kernel, space.cr3, space.held_by, entries), (*item.evidence, why))


def _kernel_entries(memory: HostMemory, mode: Ia32Format, cr3: int) -> int:
    seen = guesthalves.top(memory, mode, cr3)
    return seen.kernel_entries if seen else 0


def _pdptes(memory: HostMemory, mode: Ia32Format, cr3: int) -> list[Criterion]:
    """Say where the PDPTEs of PAE come from, and whether memory agrees."""
    if not mode.pdptes:
        return []
    data = memory.read(mode.root_hpa(cr3), 32)
    same = data == b"".join(entry.to_bytes(8, "little") for entry in mode.pdptes)
    now = "memory at CR3 holds the same" if same else "memory at CR3 holds others now" if data else "CR3 leads nowhere"
    return [Criterion("PDPTEs", True, f"those of the VMCS; {now}")]


def _unpaged(state: Registers) -> Criterion:
    if state.cr0 & ia32e.CR0_PE:
        return Criterion(NAME, True, "paging is off: a linear address is the guest-physical one")
    text = f"real mode: segment base + offset (CS base {state.cs_base:#x}) is the guest-physical address"
    return Criterion(NAME, True, text)


def _by(state: Registers, text: str) -> str:
    return f"{state.held_by}: {text}" if state.held_by else text
