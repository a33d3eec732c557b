"""What every EPT-capable processor with a known layout keeps at one and the same offset.

A good guess for an unknown one, and no more: it needs company that is proven, and never makes a field certain.
Source: the tables of Nehalem, Westmere and Haswell in ``symbols/vmcs``, three families of three.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import numpy as np

from volatility3_ept.core.control import Criterion
from volatility3_ept.core.infer_model import Certainty, Findings
from volatility3_ept.core.infer_view import View

_COMMON: Final[Mapping[str, int]] = MappingProxyType(
    {
        "VMCS_LINK_POINTER": 0xF8,
        "GUEST_IA32_EFER": 0x110,
        "PROC_BASED_EXEC_CONTROLS": 0x120,
        "SECONDARY_PROC_EXEC_CONTROLS": 0x124,
        "PIN_BASED_EXEC_CONTROLS": 0x128,
        "EXIT_REASON": 0x16C,
        "GUEST_DR7": 0x1C8,
        "GUEST_RSP": 0x1D0,
        "GUEST_RIP": 0x1D8,
        "GUEST_RFLAGS": 0x1E0,
        "HOST_FS_BASE": 0x350,
        "HOST_GS_BASE": 0x358,
        "HOST_TR_BASE": 0x360,
    }
)
#: Fields of them that must be proven at their places, none elsewhere.
_COMPANY: Final = 6
#: Basic exit reasons that exist end well below this; bits 26:16 are zero.
_LAST_REASON: Final = 0x7F
_REASON_RESERVED: Final = 0x07FF_0000


def common_places(view: View, found: Findings) -> None:
    """Name the exit reason where the other common fields are proven to be where processors keep them."""
    proven = {name: offset for name in _COMMON if (offset := found.certain(name)) is not None}
    agree = sum(_COMMON[name] == offset for name, offset in proven.items())
    place = _COMMON["EXIT_REASON"]
    values = view.dwords[:, place // 4]
    valid = ((values & np.uint32(_REASON_RESERVED)) == 0) & ((values & np.uint32(0xFFFF)) <= _LAST_REASON)
    if agree < _COMPANY or agree < len(proven) or not valid.all():
        found.reject("EXIT_REASON", "its values fit in many places, and the order around it is not known")
        return
    company = Criterion("place common to processors", True, f"{agree} other fields are where all of them keep them", 3)
    found.put("EXIT_REASON", place, Certainty.LIKELY, company, Criterion("exit reasons", True, "exist"))
