"""The translation layers that Volatility sees, and the way from Volatility's layers down to host memory.

A plugin file that raises anything but ImportError at import stops every ``vol`` command. All of ours import this
package first, and it asks before they do: where numpy or a recent Volatility is missing, our plugins disappear, ``vol``
works on, and ``vol -vv`` says why.
"""

from __future__ import annotations

import importlib.util

from volatility3 import framework

#: Volatility's interface version that the layers and stackers are written for: release 2.28.
FRAMEWORK = (2, 28, 0)


def _check() -> None:
    """Raise ImportError, with the reason, when something is missing. numpy is looked for, not imported."""
    have = framework.interface_version()
    if have < FRAMEWORK:
        raise ImportError(f"volatility3_ept needs Volatility 3 {_dotted(FRAMEWORK)} or newer; this is {_dotted(have)}")
    if importlib.util.find_spec("numpy") is None:
        raise ImportError("volatility3_ept needs numpy: pip install numpy")


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(str(part) for part in version)


_check()
