"""Confidential guests: what says that the host cannot read a guest, what it can read all the same, and why.

AMD says so in the VMCB: SEV encrypts memory, SEV-ES the registers as well (they are in a VMSA that the host cannot
read, and the save area of the VMCB is not the guest's), SEV-SNP protects the integrity of both; its mark is in the
VMSA, and a newer VMCB repeats it. Intel's TDX leaves less: control structures and secure EPT of a TD lie in memory
with a key of their own, so that no VMCS is found. What the host has is the shared EPT, which maps nothing below the
shared bit, and in KVM a mirror of the secure one. A capture holds ciphertext for private pages, and plain text for
shared ones.

That is also what the pages themselves tell: bytes of ciphertext are spread evenly. Compressed and encrypted files are
as even, so that pages alone are never more than a hint.

Sources: AMD APM Vol. 2, "Secure Encrypted Virtualization", "Encrypted State (SEV-ES)", "Secure Nested Paging
(SEV-SNP)", appendix "Layout of VMCB"; Intel "TDX Module Base Specification", "TD Private Memory Management"; Linux
``arch/x86/include/asm/svm.h``, ``arch/x86/kvm/vmx/tdx.c``, ``arch/x86/kvm/mmu/tdp_mmu.c`` (mirror page tables).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from volatility3_ept.core.control import ControlStructure, Criterion
from volatility3_ept.core.gpamap import GuestMap
from volatility3_ept.core.layouts import vmsa_layout
from volatility3_ept.core.memory import HostMemory, Int64
from volatility3_ept.core.root import EPT, Root
from volatility3_ept.spec import bits, registers, vmcb
from volatility3_ept.spec.vmcb import NestedControl

#: The name under which a machine's evidence holds what is said here.
NAME: Final = "confidential"
_MEMORY: Final = f"{NAME} memory"
#: Where this criterion holds the guest's page tables were read: they are no ciphertext, whatever other pages are.
_PARSES: Final = "guest page tables"
#: Pages that are looked at; the same ones of the same memory in every run.
SAMPLE_PAGES: Final = 512
_SEED: Final = 0x5E7
#: Chi-square of 4096 bytes over 256 values, 16 expected of each. Ciphertext has 255 in the mean, with a deviation of
#: 22.6: beyond six of them lies one page in millions. Text, code and tables are in the thousands.
_EXPECTED: Final = bits.PAGE_SIZE / 256
_EVEN: Final = 255 + 6 * 22.6
#: Share of the written pages of a sample from which on memory as a whole passes for ciphertext.
_MOST: Final = 0.75
_FEW_PAGES: Final = 16
#: GPA bit that tells shared from private memory in a TD, by the width of its guest-physical addresses (GPAW).
_SHARED_BITS: Final = (47, 51)


@dataclass(frozen=True, slots=True)
class Sample:
    """What a sample of a memory's pages holds. Pages that are zero throughout were never written."""

    pages: int = 0
    zero: int = 0
    even: int = 0

    @property
    def share(self) -> float:
        """Share of the written pages whose bytes are spread as those of ciphertext are."""
        return self.even / (self.pages - self.zero) if self.pages > self.zero else 0.0

    @property
    def is_ciphertext(self) -> bool:
        """Tell whether nearly everything that was written looks like ciphertext."""
        return self.pages - self.zero >= _FEW_PAGES and self.share >= _MOST

    def __str__(self) -> str:
        """Return the statistics in one line."""
        written = self.pages - self.zero
        return f"{self.even} of {written} written pages in a sample of {self.pages} look like ciphertext"


def sample(memory: HostMemory) -> Sample:
    """Look at up to :data:`SAMPLE_PAGES` pages of a memory, evenly chosen from all of it."""
    addresses = _addresses(memory)
    if not addresses.size:
        return Sample()
    words, good = memory.words(addresses)
    pages = np.ascontiguousarray(words[good]).view(np.uint8).reshape(-1, bits.PAGE_SIZE)
    zero = ~pages.any(axis=1)
    return Sample(len(pages), int(zero.sum()), int(is_even(pages).sum()))


def is_even(pages: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """Tell for each page (``uint8[n, 4096]``) whether its bytes are spread evenly, by chi-square."""
    places = pages.astype(np.int64) + 256 * np.arange(len(pages), dtype=np.int64)[:, None]
    counts = np.bincount(places.ravel(), minlength=256 * len(pages)).reshape(len(pages), 256)
    even: npt.NDArray[np.bool_] = ((counts - _EXPECTED) ** 2).sum(axis=1) / _EXPECTED <= _EVEN
    return even


def _addresses(memory: HostMemory) -> Int64:
    """Return the pages of the sample, ascending: one at a random place of each of equal parts of the memory."""
    counts = memory.lengths >> bits.PAGE_SHIFT
    ends = np.cumsum(counts)
    total = int(ends[-1]) if ends.size else 0
    if not total:
        return np.empty(0, dtype=np.int64)
    edges = np.linspace(0, total, min(SAMPLE_PAGES, total) + 1).astype(np.int64)
    chosen = np.random.default_rng(_SEED).integers(edges[:-1], edges[1:])
    segment = np.searchsorted(ends, chosen, side="right")
    addresses: Int64 = memory.starts[segment] + ((chosen - (ends - counts)[segment]) << bits.PAGE_SHIFT)
    return addresses


def technology(below: HostMemory, structures: Sequence[ControlStructure]) -> Criterion | None:
    """Return which of AMD's technologies the VMCBs of a machine name, and why; None where they name none.

    ``below`` is the memory that the VMSAs are addresses of.
    """
    marked = [s for s in structures if s.kind == "VMCB" and s.fields.get("NP_SEV_CONTROL", 0) & NestedControl.SEV]
    if not marked:
        return None
    first = marked[0]
    control = first.fields["NP_SEV_CONTROL"]
    where = f"VMCB at {first.hpa:#x}: NP_SEV_CONTROL {control:#x}"
    if first.holds_registers:
        return Criterion(
            NAME, True, f"SEV ({where}): memory that the guest keeps private is ciphertext, registers are not"
        )
    snp = _snp(below, first)
    name = "SEV-SNP" if snp else "SEV-ES"
    why = snp or "nothing that can be read says SEV-SNP, which the encrypted VMSA may"
    text = f"{name} ({where}; {why}): private memory is ciphertext, and the registers are in the VMSA"
    return Criterion(NAME, True, text)


def _snp(below: HostMemory, structure: ControlStructure) -> str:
    """Return what says SEV-SNP, empty where nothing does."""
    features = structure.fields.get("GUEST_SEV_FEATURES", 0)
    if features & vmcb.SNP_ACTIVE:
        return f"GUEST_SEV_FEATURES {features:#x}"
    address = structure.fields.get("VMSA_POINTER", 0) & bits.field(bits.MAX_PHYSICAL_BITS - 1, bits.PAGE_SHIFT)
    page = below.read(address, bits.PAGE_SIZE)
    if page is None or not _is_plain_vmsa(page):
        return ""
    features = vmsa_layout().read_all(page)["SEV_FEATURES"]
    return f"VMSA at {address:#x}, not encrypted: SEV_FEATURES {features:#x}" if features & vmcb.SNP_ACTIVE else ""


def _is_plain_vmsa(page: bytes) -> bool:
    """Tell whether a VMSA can be read: registers that no ciphertext would happen to hold."""
    fields = vmsa_layout().read_all(page)
    sound = fields["EFER"] & registers.EFER_SVME and not registers.efer_faults(fields["EFER"])
    return bool(sound and not registers.rflags_faults(fields["RFLAGS"]) and not registers.cr0_faults(fields["CR0"]))


def shared_half(root: Root, guest_map: GuestMap) -> Criterion | None:
    """Return that an EPT maps shared memory of a TD alone, where it maps nothing without the shared bit."""
    if root.kind != EPT or not len(guest_map):
        return None
    lowest = int(guest_map.gpas.min())
    # GPAW 48 has the shared bit in bit 47 and GPAW 52 in bit 51; with four levels there is no address above 48 bits.
    for number in _SHARED_BITS:
        if lowest >= bits.bit(number) and guest_map.top <= bits.bit(number + 1):
            text = f"TDX, possibly: nothing is mapped without GPA bit {number}, the shared bit of a trust domain; its"
            return Criterion(NAME, None, f"{text} private memory has a secure EPT of its own, which no host can read")
    return None


def pages(memory: HostMemory, root: Root, guest_map: GuestMap, said: Sequence[Criterion]) -> Iterator[Criterion]:
    """Yield what a machine's map and pages add to what its control structures said; nothing for an ordinary machine.

    ``memory`` is guest-physical.
    """
    known = any(item.name == NAME for item in said)
    shared = None if known else shared_half(root, guest_map)
    if shared is not None:
        yield shared
    seen = sample(memory)
    if known or shared is not None:
        yield Criterion(_MEMORY, None, f"{seen}; others are shared with the host, or were never encrypted")
    elif seen.is_ciphertext and not any(item.name == _PARSES and item.held for item in said):
        text = f"{seen}, and no control structure says why: the mirror of a trust domain's (TDX) secure EPT would look"
        yield Criterion(_MEMORY, None, f"{text} like this, and so would a cache of compressed or encrypted files")


def named(said: Sequence[Criterion]) -> str:
    """Return the technology that a machine's control structures name, empty where they name none."""
    return next((item.detail.split(" ", 1)[0] for item in said if item.name == NAME and item.held), "")


def notes(found: Sequence[Criterion]) -> tuple[str, ...]:
    """Return what a machine's evidence says of encryption, as sentences for a report."""
    return tuple(item.detail for item in found if item.name.startswith(NAME))
