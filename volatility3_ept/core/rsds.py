"""RSDS records: the PDB name, GUID and age that a linker leaves in a Windows image, and that name its symbol table.

The record is the data of a CodeView entry in the debug directory: ``RSDS``, a GUID, an age, the name of the PDB.
Source: Microsoft's PDB repository, ``langapi/include/cvinfo.h`` and ``PDB/dbi/locator.h`` (``RSDSI``).
"""

from __future__ import annotations

import functools
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from volatility3_ept.core.memory import HostMemory

#: Names that Microsoft's builds of the kernel have: SMP and UP, with and without PAE, with 5-level paging.
KERNELS: Final = ("ntkrnlmp", "ntkrpamp", "ntoskrnl", "ntkrla57", "ntkrnlpa")
#: The kernel of virtual trust level 1, where virtualization-based security is on.
SECURE_KERNELS: Final = ("securekernel", "securekernella57")
#: Hyper-V itself, for Intel's and for AMD's processors.
HYPERVISORS: Final = ("hvix64", "hvax64")

_HEAD: Final = struct.Struct("<4sIHH8sI")
_NAME: Final = "|".join((*KERNELS, *SECURE_KERNELS, *HYPERVISORS))
_RECORD: Final = re.compile(rb"RSDS[\x00-\xff]{20}(?:" + _NAME.encode() + rb")\.pdb\x00")
#: Copies lie in file caches, and a hostile guest can write as many as it likes.
MAX_RECORDS: Final = 256


@dataclass(frozen=True, slots=True)
class Pdb:
    """What names a PDB. ``guid`` is 32 hexadecimal digits in the order in which symbol servers write them."""

    name: str
    guid: str
    age: int

    def __str__(self) -> str:
        """Return ``ntkrnlmp.pdb GUID-age``, as Volatility names its symbol tables."""
        return f"{self.name} {self.guid}-{self.age}"

    @property
    def stem(self) -> str:
        """The name in lower case without its ending."""
        return self.name.lower().removesuffix(".pdb")

    @property
    def isf(self) -> str:
        """Path of the symbol table below a folder that ``vol -s`` is given."""
        return f"windows/{self.name}/{self.guid}-{self.age}.json.xz"


@dataclass(frozen=True, slots=True)
class Record:
    """A record and where it lies in the memory that was searched."""

    address: int
    pdb: Pdb


def parse(data: bytes) -> Pdb | None:
    """Return what a record names; None where the bytes are none, or the name is not a plain file name."""
    if len(data) <= _HEAD.size or not data.startswith(b"RSDS"):
        return None
    _, first, second, third, rest, age = _HEAD.unpack_from(data)
    return named(data[_HEAD.size :].partition(b"\0")[0], f"{first:08X}{second:04X}{third:04X}{rest.hex().upper()}", age)


def named(path: bytes, guid: str, age: int) -> Pdb | None:
    """Return a PDB's identity, its name without the folders of the machine that built it; None for no plain name."""
    name = path.replace(b"/", b"\\").rpartition(b"\\")[2]
    return Pdb(name.decode("ascii"), guid, age) if re.fullmatch(rb"[\w.+-]{1,64}", name) else None


def within(data: bytes | memoryview) -> Iterator[tuple[int, Pdb]]:
    """Yield offset and identity of the records in some bytes: of Windows kernels, secure kernels and Hyper-V."""
    for match in _RECORD.finditer(data):
        pdb = parse(match[0])
        if pdb is not None:
            yield match.start(), pdb


@functools.lru_cache(maxsize=16)
def search(memory: HostMemory) -> tuple[Record, ...]:
    """Return the records of Windows kernels, secure kernels and of Hyper-V in a memory, ascending by address.

    At most :data:`MAX_RECORDS`. A record that lies on two pages is not found: physically they need not be neighbours.
    """
    found = []
    for address, rows in memory.blocks():
        data = rows.reshape(-1).view(np.uint8).data
        found += [Record(address + offset, pdb) for offset, pdb in within(data)]
        if len(found) >= MAX_RECORDS:
            break
    return tuple(found[:MAX_RECORDS])
