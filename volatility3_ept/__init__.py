"""Virtual machines in the memory of their host: EPT and NPT for Volatility 3."""

from __future__ import annotations

__version__ = "0.1.0"
