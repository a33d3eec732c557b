"""Kind 5: a hypervisor that was put under a running system, and the ordinary ones that look the same."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from uuid import UUID

import numpy as np

from volatility3_ept.core import gpamap, mask
from volatility3_ept.core import walk as walks
from volatility3_ept.core.audit_finding import Finding, Kind, Ranges, Severity, Subject
from volatility3_ept.core.memory import HostMemory
from volatility3_ept.spec import ia32e
from volatility3_ept.spec.bits import PAGE_SIZE

#: Share of a guest's memory that lies at its own address in the host, and of the host's memory that the guest has.
_IDENTITY, _NEARLY_ALL = 0.95, 0.8
#: The PDB record of a program: signature, GUID, age, file name. Of these, what Windows' own hypervisor leaves.
_RECORD = re.compile(
    rb"RSDS([\x00-\xff]{16})([\x00-\xff]{4})(hvix64|hvax64|hvaa64|hvloader|securekernel\w{0,4})\.pdb\x00"
)
#: Pages before the hypervisor's entry point in which its image may begin.
_IMAGE_PAGES = 2048
#: Records that are named.
_NAMED = 4


def findings(level: Sequence[Subject]) -> Iterator[Finding]:
    """Yield the machine that is the whole computer, if it is the only one over its memory."""
    if len(level) != 1:
        return
    subject = level[0]
    guest_map, below = subject.machine.guest_map, subject.below
    total = guest_map.mapped_bytes
    same = int(guest_map.lengths[guest_map.gpas == guest_map.hpas].sum())
    present = gpamap.union(below.starts, below.starts + below.lengths)
    held = gpamap.overlap_bytes(guest_map.frame_ranges(), present)
    if not total or same < _IDENTITY * total or held < _NEARLY_ALL * below.size:
        return
    text = f"{same / total:.1%} of the guest lies at its own address, and it has {held / below.size:.1%} of all memory"
    name = known(subject)
    if name:
        text += f"; {name}"
    else:
        text += f"; {_where(subject)}"
    grave = Severity.INFO if name else Severity.HIGH
    top = int(guest_map.gpas[0])
    yield Finding(subject.machine.id, Kind.THIN, grave, top, total, subject.machine.root.address, text)


def known(subject: Subject) -> str:
    """Name the ordinary hypervisor that a machine runs on, by what its guest cannot have written; empty if none.

    Windows' hypervisor is recognised by the PDB record of the image that HOST_RIP lies in, or of one in memory that it
    keeps from the guest. The same record in the guest's own memory proves nothing: a file in a cache has it too.
    """
    names = sorted(set(_entry_image(subject)) | set(_hidden_images(subject)))
    if names:
        return f"Windows VBS or Hyper-V, this is its root partition: {', '.join(names[:_NAMED])}"
    if subject.machine.root.dialect.lower() == "xen":
        return "Xen by its entries: a PVH dom0 looks like this"
    return ""


def _entry_image(subject: Subject) -> Iterator[str]:
    """Yield the records in the image that the hypervisor's entry point lies in."""
    for vcpu in subject.machine.vcpus:
        cr3, rip = vcpu.host_cr3, vcpu.host_rip
        if vcpu.held_in != subject.machine.tables_in or not cr3 or not rip:
            continue
        five = bool(vcpu.fields.get("HOST_CR4", 0) & ia32e.CR4_LA57)
        fmt = ia32e.five_level() if five else ia32e.four_level()
        data = b""
        for number in range(_IMAGE_PAGES):
            target = walks.walk(subject.below, fmt, cr3, (rip & -PAGE_SIZE) - number * PAGE_SIZE).target
            page = None if target is None else subject.below.read(target & -PAGE_SIZE, PAGE_SIZE)
            if page is None:
                break
            data = page + data
            if page.startswith(b"MZ"):
                break
        if data.startswith(b"MZ"):
            yield from _records(data)
        return


def _hidden_images(subject: Subject) -> Iterator[str]:
    """Yield the records in memory that the guest's map does not lead to."""
    starts, lengths = mask.without(subject.below, [subject.machine.guest_map])
    hidden = subject.below.remap(starts, lengths, starts)
    for _, rows in hidden.blocks():
        yield from _records(rows.reshape(-1).view(np.uint8).tobytes())


def _records(data: bytes) -> Iterator[str]:
    for match in _RECORD.finditer(data):
        age = int.from_bytes(match[2], "little")
        yield f"{match[3].decode('ascii')}.pdb {UUID(bytes_le=match[1]).hex.upper()}{age:X}"


def _where(subject: Subject) -> str:
    """Say whether the hypervisor itself lies in memory that its guest can reach."""
    frames = Ranges(*subject.machine.guest_map.frame_ranges())
    root = bool(frames.hold(np.array([subject.machine.root.address]))[0])
    text = f"its tables are {'in the guest itself' if root else 'hidden from the guest'}"
    for vcpu in subject.machine.vcpus:
        target = _entry(subject.below, vcpu.host_cr3, vcpu.host_rip)
        if target is not None and vcpu.held_in == subject.machine.tables_in:
            reach = "in the guest's own memory" if frames.hold(np.array([target]))[0] else "hidden from the guest"
            return f"{text}; it is entered at HPA {target:#x}, {reach}"
    return f"{text}; no image of a known hypervisor was found"


def _entry(below: HostMemory, cr3: int | None, rip: int | None) -> int | None:
    return walks.walk(below, ia32e.four_level(), cr3, rip).target if cr3 and rip else None
