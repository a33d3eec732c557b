"""Virtual machines in the memory of their host: EPT and NPT for Volatility 3."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from volatility3_ept.api import open_capture as open  # noqa: A004  (volatility3_ept.open reads as it should)

__version__ = "0.1.0"
__all__ = ["__version__", "open"]


def __getattr__(name: str) -> Any:
    """Import what a script asks for when it asks: every ``vol`` command imports this package."""
    if name == "open":
        from volatility3_ept import api

        return api.open_capture
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
