"""The parts of the page that do not depend on what it shows: style, patterns, behaviour.

``map.css`` and ``map.js`` lie beside this module.
"""

from __future__ import annotations

from importlib import resources
from typing import Final

from volatility3_ept.core.coverage import Fate

#: For each fate: its class in the page, and what it means to a reader.
FATES: Final = {
    Fate.MAPPED: ("mapped", "EPT or NPT leads to the page, and the capture holds it."),
    Fate.RECOVERED: (
        "recovered",
        "EPT or NPT had lost the page; the host's own page tables still knew it.",
    ),
    Fate.OUTSIDE: ("outside", "The page is known, and the capture does not hold the frame it lies in."),
    Fate.MMIO: ("mmio", "A device of the virtual machine, no memory."),
    Fate.SWAPPED: ("swapped", "The host had moved the page to its swap space: it is not in its memory."),
    Fate.MIGRATING: ("migrating", "The host was moving the page, or took its frame out of use."),
    Fate.ELSEWHERE: ("elsewhere", "In the memory of a device, or a marker without a page."),
    Fate.MISCONFIGURED: ("misconfigured", "The processor would refuse the entry that leads here."),
    Fate.UNREADABLE: ("unreadable", "The table that would tell is not in the capture."),
    Fate.NEVER_BACKED: ("never", "The guest has not used it, or gave it back: no page was there to lose."),
    Fate.NOT_MAPPED: ("none", "No table and no slot knows it: a hole in the address space."),
}


def _pattern(name: str, body: str) -> str:
    head = f'<pattern id="p-{name}" width="6" height="6" patternUnits="userSpaceOnUse">'
    return f'{head}<rect width="6" height="6" style="fill:var(--{name})"/>{body}</pattern>'


_LINES = '<path d="M-1 5L5 -1M1 7L7 1" style="stroke:var(--stroke);stroke-width:1.3;fill:none"/>'
_BACK = '<path d="M-1 1L5 7M1 -1L7 5" style="stroke:var(--stroke);stroke-width:1.3;fill:none"/>'
_DOTS = '<circle cx="3" cy="3" r="1.2" style="fill:var(--stroke)"/>'
_BARS = '<path d="M0 3H6" style="stroke:var(--stroke);stroke-width:1.6"/>'
_UPRIGHT = '<path d="M3 0V6" style="stroke:var(--stroke);stroke-width:1.6"/>'
PATTERNS: Final = '<svg width="0" height="0" style="position:absolute" aria-hidden="true"><defs>' + "".join(
    _pattern(name, body)
    for name, body in (
        ("recovered", _LINES), ("outside", _LINES + _BACK), ("mmio", _DOTS), ("swapped", _BACK), ("migrating", _BARS),
        ("elsewhere", _UPRIGHT), ("unreadable", _DOTS + _LINES), ("never", _DOTS),
    )
) + "</defs></svg>"  # fmt: skip


def style() -> str:
    """Return the style sheet, light and dark."""
    return _beside("map.css")


def script() -> str:
    """Return what shows the addresses under the pointer; the numbers come from the JSON beside each picture."""
    return _beside("map.js")


def _beside(name: str) -> str:
    return resources.files(__package__ or "").joinpath(name).read_text(encoding="utf-8")
