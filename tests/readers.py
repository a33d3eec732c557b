"""Each shape that the builder writes, with the format that ought to read it."""

from __future__ import annotations

from builders import paging
from builders.paging import HostRam

from volatility3_ept.core.memory import HostMemory
from volatility3_ept.core.source import FileSource
from volatility3_ept.spec import ept, ia32e, npt

READERS = {
    paging.EPT_4: ept.EPT_4,
    paging.EPT_5: ept.EPT_5,
    paging.NPT_4: npt.NPT_4,
    paging.NPT_5: npt.NPT_5,
    paging.LONG_4: ia32e.four_level(),
    paging.LONG_5: ia32e.five_level(),
    paging.PAE: ia32e.pae(),
    paging.LEGACY: ia32e.legacy(),
}


def memory_of(ram: HostRam, prefix: bytes = bytes(32)) -> HostMemory:
    """Return the RAM as a capture with holes, at odd file offsets."""
    data, segments = ram.segments(prefix)
    return HostMemory.from_segments(FileSource(data), segments)
