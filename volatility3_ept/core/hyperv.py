"""Hyper-V and virtualization-based security: which part a machine plays, as far as images in memory say.

Hyper-V runs below all Windows systems of its computer: the root partition, which owns the devices and sees nearly all
of physical memory at its own addresses, and the child partitions. With virtualization-based security a partition has
two virtual trust levels (VTL), each with an EPT or NPT of its own: VTL0 with the ordinary kernel, and VTL1 with the
secure kernel, whose pages VTL0's tables do not map. Source: Hypervisor Top-Level Functional Specification,
"Partitions", "Virtual Secure Mode".

An image alone proves little: a Linux host that has a Windows disk in its file cache has one of Hyper-V too. That it
runs, the host's registers in a VMCS say, or a root partition that no other hypervisor would build.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from volatility3_ept.core import rsds
from volatility3_ept.core.gpamap import GuestMap
from volatility3_ept.core.gva import Space
from volatility3_ept.core.machines import Discovery, Machine
from volatility3_ept.core.memory import HostMemory
from volatility3_ept.core.root import Root
from volatility3_ept.core.rsds import Pdb
from volatility3_ept.spec import ia32e
from volatility3_ept.spec.bits import PAGE_SIZE

#: Share of a root partition's memory that lies at its own addresses; the rest is what the hypervisor emulates.
_IDENTITY: Final = 0.9
_MAX_VCPUS: Final = 4
#: Hyper-V's image has some two megabytes.
_MAX_IMAGE: Final = 8 << 20
_STEP: Final = 2 << 20


@dataclass(frozen=True, slots=True)
class Role:
    """What a machine is to Hyper-V, in a few words, and each thing that was seen."""

    name: str
    evidence: tuple[str, ...]


def role(machine: Machine, discovery: Discovery, host_memory: HostMemory) -> Role | None:
    """Return a machine's role; None where no running Hyper-V and no secure kernel speaks for one.

    ``host_memory`` is the capture's physical memory. It is searched only where some machine runs Windows.
    """
    if not any(_is_windows(m) for m in discovery.all()):
        return None
    names, evidence = [], []
    below = _below(machine, discovery, host_memory)
    hypervisor = _hypervisor(machine, discovery, below)
    if hypervisor:
        share = _identity(machine.guest_map)
        names.append(f"Hyper-V {'root' if share >= _IDENTITY else 'child'} partition")
        evidence += [hypervisor, f"{share:.0%} of its memory lies at its own addresses in the memory below"]
    inner = next(filter(None, (_hypervisor(child, discovery, machine.memory) for child in machine.children
                               if child.tables_in == machine.id)), "")  # fmt: skip
    if inner:
        names.append("Hyper-V host")
        evidence.append(f"in its memory: {inner}")
    secure = list(_levels(machine, discovery, host_memory))
    if secure:
        names.append("VTL1 (securekernel)" if machine.system.startswith("Windows secure") else "VTL0 and VTL1")
        evidence += secure
    return Role(", ".join(names), tuple(evidence)) if names else None


def _is_windows(machine: Machine) -> bool:
    return machine.system.startswith("Windows")


def _below(machine: Machine, discovery: Discovery, host_memory: HostMemory) -> HostMemory:
    holder = discovery.find(machine.tables_in) if machine.tables_in else None
    return holder.memory if holder else host_memory


def _hypervisor(machine: Machine, discovery: Discovery, below: HostMemory) -> str:
    """Say why Hyper-V runs the machine, whose tables lie in the memory ``below``; empty where nothing says so."""
    for vcpu in machine.vcpus[:_MAX_VCPUS]:
        rip, cr3 = vcpu.host_rip, vcpu.host_cr3
        pdb = _around(Space(below, ia32e.four_level(), cr3), rip) if rip and cr3 else None
        if pdb is not None:
            return f"{pdb}: its image is around the host's RIP {rip:#x} in the {vcpu.kind} at {vcpu.hpa:#x}"
    # A VMCB holds no state of its host. Then a root partition beside the machine, or the machine itself, must do.
    siblings = [m for m in discovery.all() if m.tables_in == machine.tables_in]
    if any(vcpu.host_rip for m in siblings for vcpu in m.vcpus):
        return ""
    if not any(_is_windows(m) and _identity(m.guest_map) >= _IDENTITY for m in siblings):
        return ""
    for record in rsds.search(below):
        own = any(m.guest_map.to_gpas(record.address) for m in siblings)
        if record.pdb.stem in rsds.HYPERVISORS and not own:
            return f"{record.pdb} at {record.address:#x}, in no guest's memory, beside a Windows at its own addresses"
    return ""


def _around(space: Space, rip: int) -> Pdb | None:
    """Return what names Hyper-V's image in the pages around an address of its code; its header may be discarded."""
    first = max((space.plain(rip) & -PAGE_SIZE) - _MAX_IMAGE, 0)
    for start in range(first, first + 2 * _MAX_IMAGE, _STEP):
        targets = space.translate(np.arange(start, start + _STEP, PAGE_SIZE, dtype=np.int64))
        rows, _ = space.memory.words(targets[targets >= 0])
        for _, pdb in rsds.within(rows.reshape(-1).view(np.uint8).data):
            if pdb.stem in rsds.HYPERVISORS:
                return pdb
    return None


def _identity(guest_map: GuestMap) -> float:
    """Return the share of a map's bytes that lie at their own addresses in the memory below."""
    same = guest_map.gpas == guest_map.hpas
    return float(guest_map.lengths[same].sum()) / max(guest_map.mapped_bytes, 1)


def _levels(machine: Machine, discovery: Discovery, host_memory: HostMemory) -> Iterator[str]:
    """Yield what speaks for VTL1: a secure kernel and no other, or one that not every root of the machine maps."""
    if machine.system.startswith("Windows secure"):
        yield f"the only kernel in its view is {machine.system}"
    if not machine.views:
        return
    roots = [(machine.root, machine.guest_map), *_views(machine, discovery, host_memory)]
    for record in rsds.search(machine.memory):
        if record.pdb.stem not in rsds.SECURE_KERNELS:
            continue
        address = np.array([record.address])
        mapped = [root for root, guest in roots if guest.to_hpa(address)[0] >= 0]
        hidden = [root for root, guest in roots if guest.to_hpa(address)[0] < 0]
        if mapped and hidden:
            yield (
                f"{record.pdb} at GPA {record.address:#x}: mapped by {', '.join(map(_named, mapped))} (VTL1), "
                f"not by {', '.join(map(_named, hidden))} (VTL0)"
            )
            return


def _named(root: Root) -> str:
    return f"{root.kind} root {root.raw:#x}"


def _views(machine: Machine, discovery: Discovery, host_memory: HostMemory) -> Iterator[tuple[Root, GuestMap]]:
    for view in machine.views:
        holder = discovery.find(view.tables_in) if view.tables_in else None
        yield view.root, view.root.traverse(holder.memory if holder else host_memory)
