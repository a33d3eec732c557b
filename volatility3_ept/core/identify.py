"""What runs in a guest, as far as its memory says, and on what evidence.

Strings decide by where they lie. One in the memory that the guest's own page tables map as its kernel, and that the
kernel itself cannot write, is the running kernel's; one that the kernel can write may be a line of its log; one that
lies anywhere else may be in a file. Only where the first kind is missing is all memory searched, and where the
strings of several systems are found there, none of them is chosen.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from volatility3_ept.core import kernelspace, signatures, windows
from volatility3_ept.core.control import Criterion
from volatility3_ept.core.guestcpu import Registers
from volatility3_ept.core.kernelspace import Stretch
from volatility3_ept.core.memory import HostMemory, Words
from volatility3_ept.core.signatures import Sighting
from volatility3_ept.spec.bits import PAGE_SIZE, size_name
from volatility3_ept.spec.ia32e import Ia32Format

UNKNOWN = "unknown"
_TAB = "\t"
_NUMBERED = re.compile(r"#\d")
#: One banner more or less decides nothing; this many are enough to stop looking.
_ENOUGH = 8
_MOST_TEXTS = 64
#: A kernel's image has some ten megabytes. More was mapped there to cost time.
_MOST_BYTES = 256 << 20
_STEP = 4 << 20
#: Firmware and boot loaders live below this address, or right below 4 GiB.
_LOW = 16 << 20
_ROM = (0xFF00_0000, 1 << 32)


@dataclass(frozen=True)
class Identity:
    """What runs in a guest. ``family`` is one of :data:`.signatures.NAMES`; empty where nothing decides.

    ``name`` is what users read; ``why`` is the evidence in one line; ``banners`` are the texts that name the kernel,
    several where they differ and nothing decides; ``texts`` adds those that lie in the same place and are no build's.
    All are printable. ``is_certain``: the text lies where only that kernel has it.
    """

    family: str = ""
    name: str = UNKNOWN
    why: str = "no system's version string was found"
    banners: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    is_certain: bool = False

    @property
    def row(self) -> str:
        """The name and the evidence as one text, for an index."""
        return f"{self.name}{_TAB}{'+' if self.is_certain else '?'}{self.why}"


def from_row(row: str) -> tuple[str, Criterion]:
    """Return the name and the evidence that a row holds; a row without evidence is a name."""
    name, _, rest = row.partition(_TAB)
    return name, Criterion("system", True if rest.startswith("+") else None, rest[1:], 0)


@dataclass(frozen=True, slots=True)
class _Mapped:
    """A string in a kernel's own memory."""

    sighting: Sighting
    gva: int
    is_constant: bool

    @property
    def rank(self) -> int:
        """Higher is closer to the kernel's own constant."""
        return 2 * self.is_constant + self.sighting.ends


def identify(
    memory: HostMemory,
    fmt: Ia32Format | None = None,
    spaces: Iterable[int] = (),
    states: Iterable[Registers] = (),
) -> Identity:
    """Return what runs in a guest-physical ``memory``.

    ``fmt`` and ``spaces`` are the guest's paging mode and values of CR3, ``states`` the registers of its vCPUs, where
    they are known.
    """
    spaces = tuple(spaces)
    kernel = kernelspace.stretches(memory, fmt, spaces)
    found, note = _mapped(memory, kernel)
    if found:
        return _by_mapping(found, note)
    image = windows.find(memory, fmt, spaces, states)
    if image is not None and image.space is not None:
        return _windows(image)
    identity = _by_strings(memory, fmt, spaces)
    return _windows(image) if image is not None and identity.family == "windows" else identity


def _windows(kernel: windows.Kernel) -> Identity:
    texts = (str(kernel.image.pdb),) if kernel.image.pdb else ()
    return Identity("windows", kernel.name, kernel.why, texts, texts, kernel.space is not None)


def running(memory: HostMemory, fmt: Ia32Format | None, spaces: Iterable[int]) -> Identity | None:
    """Return the kernel whose text the guest maps as its kernel's constant; None where that is not to be seen.

    The rest of memory is not searched.
    """
    found, note = _mapped(memory, kernelspace.stretches(memory, fmt, tuple(spaces)))
    identity = _by_mapping(found, note) if found else None
    return identity if identity is not None and identity.is_certain else None


def system(memory: HostMemory, fmt: Ia32Format | None = None, spaces: Iterable[int] = ()) -> str:
    """Return the guest's system in a few words, or ``unknown``. Guest bytes are reduced to plain characters."""
    return identify(memory, fmt, spaces).name


def _mapped(memory: HostMemory, kernel: list[Stretch]) -> tuple[list[_Mapped], str]:
    """Return the strings in the memory that is mapped as a kernel, and what was not looked at."""
    found: list[_Mapped] = []
    seen = 0
    # What the kernel cannot write comes first: a kernel whose own constant is found need not be read on.
    ordered = sorted(kernel, key=lambda piece: not piece.is_constant)
    for number, piece in enumerate(ordered):
        if not piece.is_constant and any(item.is_constant for item in found):
            return found, ""
        if seen >= _MOST_BYTES or number >= kernelspace.MOST:
            return found, f"; the guest maps more than {size_name(seen)} as its kernel, the rest was not searched"
        for start in range(0, piece.length, _STEP):
            data = _read(memory, piece.gpa + start, min(_STEP + signatures.LONGEST, piece.length - start))
            seen += min(_STEP, len(data))
            found += [
                _Mapped(item, piece.gva + start + item.offset, piece.is_constant)
                for item in itertools.islice(signatures.kernels(memoryview(data), is_mapped=True), _MOST_TEXTS)
                if item.offset < _STEP
            ]
            if len(found) >= _MOST_TEXTS:
                return found, f"; {len(found)} version strings were found and the rest was not searched"
    return found, ""


def _read(memory: HostMemory, gpa: int, length: int) -> bytes:
    """Return a piece of memory; pages that the capture lacks are zeros: the others of a large page are still there."""
    whole = memory.read(gpa, length)
    if whole is not None:
        return whole
    first = gpa & -PAGE_SIZE
    words, _ = memory.words(np.arange(first, gpa + length, PAGE_SIZE, dtype=np.int64))
    return words.tobytes()[gpa - first :][:length]


def _by_mapping(found: list[_Mapped], note: str) -> Identity:
    best = max(item.rank for item in found)
    chosen = [item for item in found if item.rank == best]
    texts = tuple(dict.fromkeys(item.sighting.text for item in chosen))
    # Since 6.1 a preliminary linux_banner, without the build's number, stays in the image (init/Makefile, version.o).
    chosen = [item for item in chosen if _NUMBERED.search(item.sighting.text)] or chosen
    first = chosen[0]
    names = list(dict.fromkeys(item.sighting.name for item in chosen))
    where = "memory that the guest maps as its kernel" + (", read-only" if first.is_constant else "")
    why = f"version string at GVA {first.gva:#x}, in {where}{note}"
    banners = tuple(dict.fromkeys(item.sighting.text for item in chosen))
    if len(names) > 1:
        family = _only_family(item.sighting for item in chosen)
        why = f"{len(names)} version strings in {where}: none of them decides{note}"
        return Identity(family, _either(names), why, banners, texts)
    if len(banners) > 1:
        why += f"; {len(banners)} texts there name this release"
    return Identity(first.sighting.family, first.sighting.name, why, banners, texts, first.is_constant)


def _by_strings(memory: HostMemory, fmt: Ia32Format | None, spaces: tuple[int, ...]) -> Identity:
    """Search all memory in one pass, for want of a kernel's mapping."""
    found: list[Sighting] = []
    places: list[int] = []
    early: list[Sighting] = []
    heads: Counter[str] = Counter()
    for address, rows in memory.blocks():
        data = rows.reshape(-1).view(np.uint8).data
        new = list(itertools.islice(signatures.kernels(data), _MOST_TEXTS))
        found += new
        places += [address + item.offset for item in new]
        if len(found) >= _ENOUGH:
            break
        if address < _LOW or _ROM[0] <= address < _ROM[1]:
            early += itertools.islice(signatures.firmware(data), _ENOUGH)
        heads.update(_headers(rows))
    if found:
        return _from(found, _at_home(memory, fmt, spaces, found, places))
    if early:
        names = list(dict.fromkeys(item.name for item in early))
        return Identity(early[0].family, f"firmware: {', '.join(names)}", "no kernel's string; firmware's was found")
    if heads:
        counts = ", ".join(f"{count} {name}" for name, count in heads.most_common())
        return Identity(why=f"no system's version string was found; programs' headers at page starts: {counts}")
    return Identity()


def _at_home(
    memory: HostMemory, fmt: Ia32Format | None, spaces: tuple[int, ...], found: list[Sighting], places: list[int]
) -> list[Sighting]:
    """Return the strings of Windows' kernel that lie where Windows maps its images."""
    named = [(item, gpa) for item, gpa in zip(found, places, strict=True) if item.family == "windows"]
    if not named:
        return []
    images = kernelspace.windows_images(memory, fmt, spaces)
    return [item for item, gpa in named if any(run.gpa <= gpa < run.gpa + run.length for run in images)]


def _from(found: list[Sighting], at_home: list[Sighting]) -> Identity:
    """Decide among strings of which only some, or none, lie where their kernel maps them."""
    if at_home:
        others = _others(found, at_home[0].family)
        return Identity("windows", at_home[0].name, f"the image lies where the guest maps its kernel{others}",
                        (at_home[0].text,), is_certain=True)  # fmt: skip
    families = list(dict.fromkeys(item.family for item in found))
    # A constant of a kernel ends in a newline and a zero byte; a line of a log does not.
    better = [item for item in found if item.ends] or found
    better = [item for item in better if _NUMBERED.search(item.text)] or better
    counts = Counter(item.name for item in (better if len(families) == 1 else found))
    names = [name for name, _ in counts.most_common()]
    banners = tuple(dict.fromkeys(item.text for item in better))
    where = "in its memory; no page tables say that it is the kernel's"
    if len(families) > 1:
        return Identity("", _either(names), f"strings of {len(families)} systems {where}: none decides", banners)
    several = f"; also {', '.join(names[1:4])}" if len(names) > 1 else ""
    return Identity(families[0], names[0], f"version string {where}{several}", banners)


def _others(found: list[Sighting], family: str) -> str:
    names = dict.fromkeys(item.name for item in found if item.family != family)
    return f"; {', '.join(names)} in other memory" if names else ""


def _only_family(found: Iterable[Sighting]) -> str:
    families = {item.family for item in found}
    return families.pop() if len(families) == 1 else ""


def _either(names: list[str]) -> str:
    return " or ".join(names[:3]) + (f" or {len(names) - 3} more" if len(names) > 3 else "")


def _headers(rows: Words) -> Iterator[str]:
    """Yield the kind of each program whose header begins at a page's first byte."""
    first = rows[:, 0] & np.uint64(0xFFFF_FFFF)
    for name, magic in (("ELF", 0x464C_457F), ("Mach-O", 0xFEED_FACF), ("Mach-O", 0xFEED_FACE)):
        yield from [name] * int((first == np.uint64(magic)).sum())
    for row in np.flatnonzero((first & np.uint64(0xFFFF)) == 0x5A4D).tolist():
        page = rows[row].tobytes()
        at = int.from_bytes(page[0x3C:0x40], "little")
        if page[at : at + 4] == b"PE\0\0":
            yield "PE"
