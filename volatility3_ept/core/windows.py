"""The Windows kernel of a guest: where its image lies, through which page tables, and which symbols it needs.

The registers of a vCPU come first: the handlers in its interrupt descriptor table, the system call entry, the
processor control region all lead into the kernel that runs, and its image begins at the first header below them. An
RSDS record found in memory comes second: a file in a cache has one too, so there the guest's page tables must lead to
it. Without page tables the image is identified where it lies, and no address in the guest's own space is given.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np

from volatility3_ept.core import guestcpu, guesthalves, kernelspace, leaves, pe, rsds, winregs, wintables
from volatility3_ept.core.guestcpu import Registers
from volatility3_ept.core.gva import Space
from volatility3_ept.core.memory import HostMemory, Int64
from volatility3_ept.core.pe import Image
from volatility3_ept.core.rsds import Record
from volatility3_ept.spec import dialect, ia32e
from volatility3_ept.spec.bits import PAGE_SIZE
from volatility3_ept.spec.ia32e import Ia32Format

#: How far below an address the header of its image is looked for, and how many headers are read on the way.
_MAX_KERNEL: Final = 32 << 20
_MAX_HEADERS: Final = 8
_STEP: Final = 512
#: vCPUs that are asked, and values of CR3 that are tried: any one of them will do.
_MAX_TRIED: Final = 4
#: RSDS records that are followed to a header. Few are mapped where kernels are; more were written to cost time.
_MAX_FOLLOWED: Final = 64


@dataclass(frozen=True)
class Kernel:
    """A kernel that was found. ``gpa`` and ``base`` are where its header lies: guest-physical, and as a sign-extended
    GVA, which is None where page tables are missing.

    ``space`` maps it; ``how`` is the evidence in one line. ``by_registers``: a vCPU's registers lead to it.
    ``is_shadowed``: the vCPU had a user's page tables loaded, which do not map the kernel, and others were found.
    """

    image: Image
    how: str
    gpa: int
    base: int | None = None
    space: Space | None = None
    by_registers: bool = False
    is_shadowed: bool = False

    @property
    def is_secure(self) -> bool:
        """Tell whether this is the kernel of virtual trust level 1."""
        return self.image.pdb is not None and self.image.pdb.stem in rsds.SECURE_KERNELS

    @property
    def version(self) -> str:
        """Version, as far as it is known: of the file, or what the page says that all processes share."""
        own = self.image.file_version.rpartition(".")[0]
        return own or (wintables.version(self.space) if self.space else "")

    @property
    def name(self) -> str:
        """The system in one line, with the identity of its symbols."""
        words = ["Windows", *(["secure kernel"] if self.is_secure else []), *([self.version] if self.version else [])]
        return f"{' '.join(words)} ({self.image.pdb or 'its PDB record is not in memory'})"

    @property
    def why(self) -> str:
        """The evidence, and what of the image could not be read, in one line."""
        lost = f"; {', '.join(self.image.missing)}" if self.image.missing else ""
        return f"{pe.MACHINES[self.image.machine]} kernel image of {self.image.size:#x} bytes, {self.how}{lost}"


def find(
    memory: HostMemory,
    fmt: Ia32Format | None = None,
    spaces: Iterable[int] = (),
    states: Iterable[Registers] = (),
) -> Kernel | None:
    """Return the Windows kernel in a guest-physical memory; None where there is none.

    ``fmt`` and ``spaces`` are the paging mode and values of CR3 where they are known, ``states`` the vCPUs' registers.
    A secure kernel is returned where there is no ordinary one: the tables of VTL1 map the memory of VTL0 too.
    """
    spaces, secure = tuple(spaces), None
    for state in itertools.islice(states, _MAX_TRIED):
        kernel = _by_registers(memory, state)
        if kernel is not None and not kernel.is_secure:
            return kernel
        secure = secure or kernel
    kernel = _by_record(memory, fmt, spaces, rsds.KERNELS)
    return kernel or secure or _by_record(memory, fmt, spaces, rsds.SECURE_KERNELS)


def _by_registers(memory: HostMemory, state: Registers) -> Kernel | None:
    """Follow the registers of a vCPU through its own page tables, then through the kernel's where it has others."""
    fmt, _ = guestcpu.paging(memory, state)
    if fmt is None:
        return None
    own = Space(memory, fmt, state.cr3)
    marks = winregs.landmarks(state, own)
    where = f"the {state.held_by or 'vCPU'}"
    kernel = _marked(own, marks, where)
    if kernel is not None or not marks:
        return kernel
    for other in _kernel_spaces(state, own, marks):
        kernel = _marked(other, marks, f"{where}, whose CR3 {state.cr3:#x} is a user's (KVA shadow)", True)
        if kernel is not None:
            return kernel
    return None


def _kernel_spaces(state: Registers, own: Space, marks: list[winregs.Landmark]) -> Iterator[Space]:
    """Yield address spaces that agree with a user's on where the landmarks lie: the kernel's half of a pair."""
    address = next((mark.gva for mark in marks if mark.is_own), marks[0].gva)
    target = own.physical(address)
    if target < 0:
        return
    named = winregs.kernel_tables(state, own)
    half, _ = guesthalves.windows_kernel_half(own.memory, own.fmt, own.cr3) if not named else (None, None)
    pairs = (Space(own.memory, own.fmt, cr3) for cr3 in (*named, *([half] if half else [])))
    for space in itertools.chain(pairs, wintables.spaces(own.memory, own.fmt)):
        if space.physical(address) == target:
            yield space


def _marked(space: Space, marks: list[winregs.Landmark], where: str, is_shadowed: bool = False) -> Kernel | None:
    for mark in marks:
        found = _image_below(space, space.plain(mark.gva))
        if found is None or not _is_kernel(found[1], mark.is_own):
            continue
        base, image = found
        how = f"found from {mark.what} {mark.gva:#x} of {where}"
        return Kernel(image, how, space.physical(base), space.canonical(base), space, True, is_shadowed)
    return None


def _is_kernel(image: Image, is_own: bool) -> bool:
    """Tell whether an image is a kernel: by its PDB, or, where that is paged out, because no driver can be there."""
    if image.pdb is None:
        return is_own and bool(image.missing)
    return image.pdb.stem in (*rsds.KERNELS, *rsds.SECURE_KERNELS)


def _by_record(
    memory: HostMemory, fmt: Ia32Format | None, spaces: Iterable[int], names: Sequence[str]
) -> Kernel | None:
    """Start from RSDS records, through the page tables that are known, or those that map themselves, or none."""
    records = [record for record in rsds.search(memory) if record.pdb.stem in names]
    mapped = _mapped(memory, fmt, spaces, records) if records else iter(())
    for space, record, gva in itertools.islice(mapped, _MAX_FOLLOWED):
        found = _image_below(space, gva)
        if found is not None and found[1].pdb == record.pdb:
            base, image = found
            how = f"found from its RSDS record at GPA {record.address:#x} through CR3 {space.cr3:#x}"
            return Kernel(image, how, space.physical(base), space.canonical(base), space)
    flat = _Flat(memory)
    for record in records[:_MAX_FOLLOWED]:
        found = _image_below(flat, record.address)
        if found is not None and found[1].pdb == record.pdb:
            how = f"found from its RSDS record at GPA {record.address:#x}; no page tables are known that map it"
            return Kernel(found[1], how, found[0])
    return None


def _mapped(
    memory: HostMemory, fmt: Ia32Format | None, spaces: Iterable[int], records: Sequence[Record]
) -> Iterator[tuple[Space, Record, int]]:
    """Yield where address spaces map records among the kernel's images: the space, the record, its plain address."""
    for space in _spaces(memory, fmt, spaces):
        gvas, lengths, gpas = _images(space)
        for record in records:
            held = np.flatnonzero((gpas <= record.address) & (record.address < gpas + lengths))
            yield from ((space, record, int(gvas[run]) + record.address - int(gpas[run])) for run in held)


def _spaces(memory: HostMemory, fmt: Ia32Format | None, spaces: Iterable[int]) -> Iterator[Space]:
    if fmt is not None:
        yield from (Space(memory, fmt, cr3) for cr3 in list(dict.fromkeys(spaces))[:_MAX_TRIED])
    yield from wintables.spaces(memory, fmt or ia32e.four_level())


def _images(space: Space) -> tuple[Int64, Int64, Int64]:
    """Return ``(plain addresses, lengths, guest-physical addresses)`` of what is mapped where kernel images are."""
    if len(space.fmt.levels) >= 4:
        runs = kernelspace.windows_images(space.memory, space.fmt, [space.cr3])
        rows = [(space.plain(run.gva), run.length, run.gpa) for run in runs]
        table = np.array(rows, dtype=np.int64).reshape(-1, 3)
        return table[:, 0], table[:, 1], table[:, 2]
    whole = leaves.traverse(space.memory, space.fmt, space.cr3, dialect.GENERIC)
    kernel = whole.gpas >> 31 == 1
    return whole.gpas[kernel], whole.lengths[kernel], whole.hpas[kernel]


class _Addresses(Protocol):
    """An address space that can be read, and asked where many of its addresses lie in guest-physical memory."""

    @property
    def memory(self) -> HostMemory: ...
    def translate(self, gvas: Int64) -> Int64: ...
    def read(self, gva: int, length: int) -> bytes | None: ...


@dataclass(frozen=True)
class _Flat:
    """Guest-physical memory itself."""

    memory: HostMemory

    def translate(self, gvas: Int64) -> Int64:
        return np.where(self.memory.locate(gvas, 1) >= 0, gvas, np.int64(-1))

    def read(self, gva: int, length: int) -> bytes | None:
        return self.memory.read(gva, length)


def _image_below(space: _Addresses, address: int) -> tuple[int, Image] | None:
    """Return the base and identity of the image that holds an address: the first header below it that claims it."""
    first, headers = address & -PAGE_SIZE, 0
    for top in range(first, max(first - _MAX_KERNEL, -1), -_STEP * PAGE_SIZE):
        pages = np.arange(top, max(top - _STEP * PAGE_SIZE, -1), -PAGE_SIZE, dtype=np.int64)
        targets = space.translate(pages)
        pages, targets = pages[targets >= 0], targets[targets >= 0]
        rows, held = space.memory.words(targets)
        starts = held & ((rows[:, 0] & np.uint64(0xFFFF)) == np.uint64(0x5A4D))
        for base, row in zip(pages[starts].tolist(), rows[starts], strict=True):
            if not pe.plausible(row.tobytes()):
                continue
            image = pe.identify(lambda rva, length, base=base: space.read(base + rva, length))  # type: ignore[misc]
            headers += 1
            if image is not None and base + image.size > address:
                return base, image
            if headers >= _MAX_HEADERS:
                return None
    return None
