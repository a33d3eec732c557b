"""What runs in a guest, as far as its memory says: a kernel banner, or nothing."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np

from volatility3_ept.core.memory import HostMemory

#: Linux init/version.c: ``linux_banner``. The build user and compiler follow the release.
_LINUX = re.compile(rb"Linux version (\d+\.\d+[\w.+~-]{0,64}) \([\x20-\x7e]{1,400}")
#: The PDB path in the debug directory of every Windows kernel; the GUID and age before it name the symbols.
_WINDOWS = re.compile(rb"RSDS[\x00-\xff]{20}(ntkrnlmp|ntkrpamp|ntoskrnl|ntkrla57|ntkrnlpa)\.pdb\x00")
#: One banner more or less decides nothing; this many are enough to stop looking.
_ENOUGH = 8


def system(memory: HostMemory) -> str:
    """Return the guest's system in a few words, or ``unknown``. Guest bytes are reduced to plain characters."""
    banners: Counter[str] = Counter()
    windows: Counter[str] = Counter()
    for _, rows in memory.blocks():
        data = rows.reshape(-1).view(np.uint8).data
        banners.update(match[1].decode("ascii") for match in _LINUX.finditer(data))
        windows.update(match[1].decode("ascii") for match in _WINDOWS.finditer(data))
        if banners.total() + windows.total() >= _ENOUGH:
            break
    if windows:
        return f"Windows ({windows.most_common(1)[0][0]}.pdb)"
    if banners:
        return f"Linux {banners.most_common(1)[0][0]}"
    return "unknown"
