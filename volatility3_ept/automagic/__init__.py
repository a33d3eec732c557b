"""How ``--guest`` reaches every plugin: Volatility finds these classes because they exist."""

from __future__ import annotations

from volatility3_ept.automagic.selector import GuestGuard, GuestSelector
from volatility3_ept.automagic.stacker import GuestStacker

__all__ = ["GuestGuard", "GuestSelector", "GuestStacker"]
