"""Large hosts, made fast: page tables by numpy, frames that are holes of a sparse file."""

from __future__ import annotations

import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import images
import numpy as np
import numpy.typing as npt
from builders import control
from builders import roots as built
from builders.paging import EPT_4, LONG_4, NPT_4, PAGE, GuestRam, HostRam, Shape

Addresses = npt.NDArray[np.uint64]
M2 = 1 << 21
GIB = 1 << 30
#: Pages of each guest that a kernel with page tables of its own fills.
_KERNEL_PAGES = 64

__all__ = ["GIB", "M2", "PAGE", "Tables", "filler", "frames", "images", "sparse_host", "tables"]


@dataclass(frozen=True)
class Tables:
    """A hierarchy as an array of tables, to be written at ``address``, the top table first."""

    address: int
    words: npt.NDArray[np.uint64]
    shape: Shape

    @property
    def register(self) -> int:
        return self.address | self.shape.register


def frames(count: int, base: int, stretch: int, page: int = PAGE, seed: int = 1) -> Addresses:
    """Return a frame for each guest page, from ``base`` on, each once.

    ``stretch`` is the mean number of neighbours that are neighbours in the host too: 1 scatters all, 0 leaves all in
    one piece.
    """
    number = np.arange(count, dtype=np.int64)
    if stretch == 0:
        return (number * page + base).astype(np.uint64)
    rng = np.random.default_rng(seed)
    if stretch == 1:
        rng.shuffle(number)
        return (number * page + base).astype(np.uint64)
    lengths = rng.geometric(1 / stretch, count // stretch * 2 + 64)
    ends = np.cumsum(lengths)
    lengths = lengths[: np.searchsorted(ends, count) + 1]
    lengths[-1] -= int(lengths.sum()) - count
    order = rng.permutation(lengths.size)
    in_host = np.empty_like(lengths)
    in_host[order] = np.cumsum(lengths[order]) - lengths[order]
    in_guest = np.cumsum(lengths) - lengths
    number += np.repeat(in_host - in_guest, lengths)
    return (number * page + base).astype(np.uint64)


def tables(address: int, targets: Addresses, page: int = PAGE, shape: Shape = EPT_4) -> Tables:
    """Return the hierarchy that maps guest-physical memory from 0 on to these frames; at most 512 GiB."""
    last = -(-targets.size // 512)
    directories = last if page == M2 else -(-last // 512)
    rows = 2 + (directories if page == M2 else directories + last)
    words = np.zeros((rows, 512), dtype=np.uint64)
    where = address + PAGE * np.arange(rows, dtype=np.uint64)
    words[0, 0] = where[1] | np.uint64(shape.top)
    words[1, :directories] = where[2 : 2 + directories] | np.uint64(shape.table)
    if page != M2:
        words[2 : 2 + directories].reshape(-1)[:last] = where[2 + directories :] | np.uint64(shape.table)
    leaf = shape.large if page == M2 else shape.page
    words[rows - last :].reshape(-1)[: targets.size] = targets | np.uint64(leaf)
    return Tables(address, words, shape)


def kernel(targets: Addresses, page: int, hierarchy: Tables, vmcs_at: int) -> HostRam:
    """Return the pages of a host that make the guest a machine: its kernel's page tables, and a control structure."""
    ram = HostRam()
    gpas = np.arange(_KERNEL_PAGES, dtype=np.int64) * PAGE
    placed = {int(gpa): int(targets[gpa // page]) + int(gpa) % page for gpa in gpas}
    own = built.plant_kernel(GuestRam(ram, placed, 1), LONG_4)
    if hierarchy.shape is NPT_4:
        page_bytes = control.vmcb(ncr3=hierarchy.register, cr3=own.root, rip=built.KERNEL)
    else:
        page_bytes = control.vmcs(eptp=hierarchy.register, guest_cr3=own.root, guest_rip=built.KERNEL)
    ram.write(vmcs_at, page_bytes)
    return ram


def sparse_host(path: Path, length: int, guests: list[tuple[Tables, HostRam]]) -> Path:
    """Write a raw image of that length; what is not written is a hole."""
    with path.open("wb") as file:
        file.truncate(length)
        for hierarchy, ram in guests:
            file.seek(hierarchy.address)
            hierarchy.words.tofile(file)
            for address, data in ram.runs():
                file.seek(address)
                file.write(data)
    return path


def filler(length: int, seed: int = 1) -> npt.NDArray[np.uint8]:
    """Return memory as hosts have it: a third zeros, a third file contents, a third pointers and small numbers."""
    rng = np.random.default_rng(seed)
    pages = length // PAGE
    out = np.zeros((pages, PAGE), dtype=np.uint8)
    library = Path(sysconfig.get_path("stdlib"))
    files = [*sorted(library.glob("*.py")), Path(sys.executable).resolve()]
    text = np.frombuffer(b"".join(path.read_bytes() for path in files), dtype=np.uint8)
    text = text[: text.size // PAGE * PAGE].reshape(-1, PAGE)
    kind = rng.integers(0, 3, pages)
    kind[0] = 0  # An image that begins with text is taken for a document.
    some = np.flatnonzero(kind == 1)
    out[some] = text[rng.integers(0, len(text), some.size)]
    for row in np.array_split(np.flatnonzero(kind == 2), max(pages // 4096, 1)):
        words = rng.integers(0, 1 << 30, (row.size, 512), dtype=np.uint64)
        words[:, ::2] |= np.uint64(0xFFFF_8880_0000_0000)
        words[:, 1::2] &= np.uint64(0xFFF)
        out[row] = words.view(np.uint8)
    return out.reshape(-1)
