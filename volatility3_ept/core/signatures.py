"""What systems and firmware say of themselves in memory: version strings, and the headers of programs.

A string alone proves little: a log, a file in the page cache, a download say the same. Where it lies decides, and that
is for :mod:`.identify` to judge. Every text that leaves this module is printable ASCII and short.

Sources: Linux ``init/version.c`` (``linux_banner``); XNU ``config/version.c``; FreeBSD and NetBSD ``newvers.sh``,
OpenBSD ``conf/newvers.sh``; Xen ``common/version.c``, ``arch/x86/setup.c``; seL4 ``src/arch/x86/kernel/boot_sys.c``;
SeaBIOS ``src/bootsplash.c``; GRUB ``grub-core/kern/main.c``; UEFI PI specification, "Firmware Volume Header".
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

#: What a family's name is printed as; ``{}`` is the version that was found.
NAMES = {
    "linux": "Linux {}",
    "windows": "Windows ({}.pdb)",
    "darwin": "macOS (Darwin {})",
    "freebsd": "FreeBSD {}",
    "netbsd": "NetBSD {}",
    "openbsd": "OpenBSD {}",
    "xen": "Xen {}",
    "hyperv": "Hyper-V ({}.pdb)",
    "sel4": "seL4",
    "esxi": "VMware ESXi {}",
    "seabios": "SeaBIOS {}",
    "grub": "GRUB",
    "uefi": "UEFI",
}
#: Stages before a kernel. Their code stays in memory when a system has long been running.
FIRMWARE = ("seabios", "grub", "uefi")

# Each pattern begins with a literal, which the regular-expression engine looks for at the speed of memory; what must
# stand before it is asked afterwards. The name of the group that matched is the family.
_KERNELS = (
    re.compile(
        rb"ersion (?:"
        rb"(?<=Linux version )(?P<linux>\d+\.\d+[\w.+~-]{0,64}) \([\x20-\x7e]{1,400}"
        rb"|(?<=Darwin Kernel Version )(?P<darwin>\d+\.\d+[\w.]{0,16}): [\x20-\x7e]{1,200}"
        rb"|(?<=Xen version )(?P<xen>\d+\.\d+[\w.+~-]{0,32}) \([\x20-\x7e]{1,200})"
    ),
    re.compile(
        rb"BSD (?:"
        rb"(?<=FreeBSD )(?P<freebsd>\d+\.\d+-[A-Z]+[\w.-]{0,24}) [\x20-\x7e]{1,200}"
        rb"|(?<=NetBSD )(?P<netbsd>\d+\.\d+[\w.]{0,24}) \([\w.-]{1,64}\) #\d[\x20-\x7e]{1,200}"
        rb"|(?<=OpenBSD )(?P<openbsd>\d+\.\d+[\w-]{0,24}) \([\w.-]{1,64}\) #\d[\x20-\x7e]{1,200})"
    ),
    # The PDB path in the debug directory of an image; the GUID and age before it name the symbols.
    re.compile(
        rb"RSDS[\x00-\xff]{20}(?:(?P<windows>ntkrnlmp|ntkrpamp|ntoskrnl|ntkrla57|ntkrnlpa)"
        rb"|(?P<hyperv>hvix64|hvax64|hvaa64))\.pdb\x00"
    ),
)
#: Kernels whose strings are worth a look where a guest's page tables map a kernel, and nowhere else.
_MAPPED_ONLY = (
    re.compile(rb"Booting all finished, (?P<sel4>dropped to user space)"),
    re.compile(rb"VMware ESXi (?P<esxi>\d+\.\d+\.\d+) \[Releasebuild-\d+"),
)
_FIRMWARE = (
    re.compile(rb"SeaBIOS \(version (?P<seabios>[\x21-\x7e]{1,64})\)"),
    re.compile(rb"Welcome to (?P<grub>GRUB)!"),
    # EFI_FIRMWARE_FILE_SYSTEM2_GUID in the header of a firmware volume, and the signature 16 bytes later.
    re.compile(rb"\x78\xe5\x8c\x8c\x3d\x8a\x1c\x4f\x99\x35\x89\x61\x85\xc3\x2d\xd3[\x00-\xff]{8}(?P<uefi>_FVH)"),
)
#: Words that stand before the literal of a pattern and belong to the text.
_BEFORE = {
    "linux": len(b"Linux v"),
    "darwin": len(b"Darwin Kernel V"),
    "xen": len(b"Xen v"),
    "freebsd": len(b"Free"),
    "netbsd": len(b"Net"),
    "openbsd": len(b"Open"),
}
#: Longest text that a pattern can match: blocks that are searched one by one must overlap by so much.
LONGEST = 512


@dataclass(frozen=True, slots=True)
class Sighting:
    """One string. ``offset`` is that of its first byte in the data; ``text`` is printable ASCII.

    ``ends`` tells whether a newline and a zero byte follow, as in Linux's ``linux_banner``, and in no log.
    """

    family: str
    version: str
    text: str
    offset: int
    ends: bool = False

    @property
    def name(self) -> str:
        """The system in a few words."""
        return NAMES[self.family].format(self.version)


def kernels(data: memoryview, is_mapped: bool = False) -> Iterator[Sighting]:
    """Yield the strings of kernels; ``is_mapped``: the data is memory that a guest maps as its kernel."""
    for pattern in (*_KERNELS, *_MAPPED_ONLY) if is_mapped else _KERNELS:
        yield from _found(pattern, data)


def firmware(data: memoryview) -> Iterator[Sighting]:
    """Yield the strings of firmware and boot loaders."""
    for pattern in _FIRMWARE:
        yield from _found(pattern, data)


def _found(pattern: re.Pattern[bytes], data: memoryview) -> Iterator[Sighting]:
    for match in pattern.finditer(data):
        family = match.lastgroup or ""
        version = match[family].decode("ascii")
        first = match.start() - _BEFORE.get(family, 0)
        text = bytes(data[first : match.end()]).decode("ascii") if family in _BEFORE else NAMES[family].format(version)
        yield Sighting(family, version, text, first, bytes(data[match.end() : match.end() + 2]) == b"\n\x00")
