"""Kind 5: a hypervisor that was put under a running system, and the ordinary ones that look the same."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from uuid import UUID

import numpy as np

from volatility3_ept.core import audit_spaces, gpamap, mask
from volatility3_ept.core.audit_finding import Finding, Kind, Ranges, Severity, Subject
from volatility3_ept.core.audit_kernel import Kernel
from volatility3_ept.spec.bits import PAGE_SIZE

#: Share of a guest's memory that lies at its own address in the host, and of the host's memory that the guest has.
_IDENTITY, _NEARLY_ALL = 0.95, 0.8
#: The PDB record of a program: signature, GUID, age, file name. Of these, what Windows' own hypervisor leaves.
_RECORD = re.compile(
    rb"RSDS([\x00-\xff]{16})([\x00-\xff]{4})(hvix64|hvax64|hvaa64|hvloader|securekernel\w{0,4})\.pdb\x00"
)
#: Pages before the hypervisor's entry point in which its image may begin.
_IMAGE_PAGES = 2048
#: VMCALL; RET, and VMMCALL; RET (Hyper-V's TLFS, "Establishing the Hypercall Interface").
_HYPERCALLS = np.array([0xC3C1_010F, 0xC3D9_010F])
#: Pages of a kernel's code that are looked at for them, and those of a step.
MAX_CODE_PAGES, _CHUNK = 1 << 18, 1024
#: Records that are named.
_NAMED = 4


def findings(level: Sequence[Subject], kernels: Sequence[Kernel]) -> Iterator[Finding]:
    """Yield the machines that are the whole computer. Others may run beside one: guests of the same hypervisor."""
    for subject, kernel in zip(level, kernels, strict=True):
        yield from _whole(subject, kernel)


def _whole(subject: Subject, kernel: Kernel) -> Iterator[Finding]:
    """Yield a machine if nearly all memory is its own, at its own address."""
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
    page = _hypercall_page(subject, kernel)
    if page is not None:
        text += f"; a hypercall page at GPA {page:#x}"
    grave = Severity.INFO if name else Severity.HIGH
    top = int(guest_map.gpas[0])
    yield Finding(subject.machine.id, Kind.THIN, grave, top, total, subject.machine.root.address, text)


def known(subject: Subject) -> str:
    """Name the ordinary hypervisor that a machine runs on, by what its guest cannot have written; empty if none.

    Windows' hypervisor is recognised by the PDB record of the image that HOST_RIP lies in, or of one in memory that it
    keeps from the guest. The same record in the guest's own memory proves nothing: a file in a cache has it too.
    """
    names = sorted(set(_entry_image(subject)) | set(_hidden_images(subject)))
    if names or subject.role:
        role = subject.role.name if subject.role else "this is its root partition"
        seen = names[:_NAMED] or list(subject.role.evidence if subject.role else ())
        return f"Windows VBS or Hyper-V, {role}: {', '.join(seen)}"
    if subject.machine.root.dialect.lower() == "xen":
        return "Xen by its entries: a PVH dom0 looks like this"
    return ""


def _entry_image(subject: Subject) -> Iterator[str]:
    """Yield the records in the image that the hypervisor's entry point lies in."""
    for vcpu in subject.vcpus:
        space, rip = audit_spaces.of_vcpu(vcpu, subject.below), vcpu.host_rip
        if space is None or not rip:
            continue
        pages: list[bytes] = []
        for number in range(_IMAGE_PAGES):
            target = space.target((rip & -PAGE_SIZE) - number * PAGE_SIZE)
            page = None if target is None else subject.below.read(target & -PAGE_SIZE, PAGE_SIZE)
            if page is None:
                break
            pages.append(page)
            if page.startswith(b"MZ"):
                yield from _records(b"".join(reversed(pages)))
                break
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


def _hypercall_page(subject: Subject, kernel: Kernel) -> int | None:
    """Return where a guest has the page through which it calls Hyper-V: code that begins with the call and returns.

    Alone it proves nothing: other hypervisors offer one too, and a guest can write one.
    """
    starts, ends = kernel.code.starts, kernel.code.ends
    left = MAX_CODE_PAGES
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        pages = np.arange(start, min(end, start + left * PAGE_SIZE), PAGE_SIZE, dtype=np.int64)
        for part in range(0, pages.size, _CHUNK):
            words, held = subject.machine.memory.words(pages[part : part + _CHUNK])
            heads = (words[:, 0] & np.uint64(0xFFFF_FFFF)).astype(np.int64)
            hits = np.flatnonzero(held & np.isin(heads, _HYPERCALLS))
            if hits.size:
                return int(pages[part + hits[0]])
        left -= pages.size
        if left <= 0:
            break
    return None


def _where(subject: Subject) -> str:
    """Say whether the hypervisor itself lies in memory that its guest can reach."""
    frames = Ranges(*subject.machine.guest_map.frame_ranges())
    root = bool(frames.hold(np.array([subject.machine.root.address]))[0])
    text = f"its tables are {'in the guest itself' if root else 'hidden from the guest'}"
    for vcpu in subject.vcpus:
        space = audit_spaces.of_vcpu(vcpu, subject.below)
        target = space.target(vcpu.host_rip) if space and vcpu.host_rip else None
        if target is not None:
            reach = "in the guest's own memory" if frames.hold(np.array([target]))[0] else "hidden from the guest"
            return f"{text}; it is entered at HPA {target:#x}, {reach}"
    return f"{text}; no image of a known hypervisor was found"
