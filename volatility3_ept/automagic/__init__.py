"""How ``--guest`` reaches every plugin: Volatility finds these classes because they exist."""

from __future__ import annotations

from volatility3_ept.automagic.kdump import KdumpStacker
from volatility3_ept.automagic.selector import GuestGuard, GuestSelector
from volatility3_ept.automagic.stacker import GuestStacker
from volatility3_ept.automagic.virtual import GuestVirtualStacker
from volatility3_ept.automagic.windows import GuestWindowsKernel, GuestWindowsStacker

__all__ = [
    "GuestGuard",
    "GuestSelector",
    "GuestStacker",
    "GuestVirtualStacker",
    "GuestWindowsKernel",
    "GuestWindowsStacker",
    "KdumpStacker",
]
