"""Find VMCSs: a cheap test for all pages, a full account for one page.

No single test decides. A revision identifier alone is as common as a small number, processors that nobody has
a table for write identifiers nobody knows, and every field of a VMCS in memory may be stale, because the
processor keeps the current one to itself. So a page is a candidate when enough of the fields that every
hypervisor must set correctly are right under one layout, and the layout under which most holds is the one
reported.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Final, NamedTuple

import numpy as np

from volatility3_ept.core import vmcs_checks
from volatility3_ept.core.anchors import Anchor, Flags, Rows, Words, anchor, count
from volatility3_ept.core.control import ControlStructure
from volatility3_ept.core.layouts import Layout, load_layouts
from volatility3_ept.core.limits import Limits
from volatility3_ept.core.memory import Int64
from volatility3_ept.spec import bits, registers, vmcs
from volatility3_ept.spec.ept import Eptp

_ALL: Final = bits.field(63, 0)
#: Abort indicators beyond the architectural ones have been seen; none of them was large.
_MAX_ABORT: Final = 0xFFF
#: Anchors that must pass when the layout claims the page's revision identifier: half of them, and never fewer
#: than 3.
_FEWEST_ANCHORS: Final = 3
#: Anchors that may fail when it does not, and how many there must be to go without the identifier at all.
_MISSES_WITHOUT_ID: Final = 2
_ENOUGH_WITHOUT_ID: Final = 7
#: Below this score a page is not worth a report.
_FLOOR: Final = 0.4


class _Probe(NamedTuple):
    """The anchors of one layout. ``eptp`` is also among ``anchors``."""

    layout: Layout
    eptp: Anchor | None
    anchors: tuple[Anchor, ...]

    @property
    def needed_with_id(self) -> int:
        return max(_FEWEST_ANCHORS, len(self.anchors) // 2)

    @property
    def needed_without_id(self) -> int:
        return len(self.anchors) - _MISSES_WITHOUT_ID

    @property
    def works_without_id(self) -> bool:
        return self.eptp is not None and len(self.anchors) >= _ENOUGH_WITHOUT_ID


def _eptp_patterns() -> tuple[tuple[int, int], ...]:
    """Memory type UC or WB, 4 or 5 levels, bits 6 and 7 as they please, reserved bits zero."""
    mask = bits.field(63, bits.MAX_PHYSICAL_BITS) | bits.field(11, 8) | bits.field(5, 0)
    return tuple((mask, (levels - 1) << 3 | memory_type) for levels in (4, 5) for memory_type in (0, 6))


#: Field, accepted (mask, value) pairs, bits of which one must be set.
_ANCHORS: Final[tuple[tuple[str, tuple[tuple[int, int], ...], int], ...]] = (
    ("EPTP", _eptp_patterns(), bits.field(51, 12)),
    *(
        (name, ((rule.must_be_one | rule.must_be_zero, rule.must_be_one),), 0)
        for name, rule in vmcs.CONTROL_RULES.items()
    ),
    ("HOST_CR0", ((bits.field(63, 32) | registers.CR0_VMX_FIXED, registers.CR0_VMX_FIXED),), 0),
    ("HOST_CR4", ((registers.CR4_RESERVED | registers.CR4_VMXE, registers.CR4_VMXE),), 0),
    ("VMCS_LINK_POINTER", ((_ALL, vmcs.NO_LINK), (bits.field(63, 52) | bits.field(11, 0), 0)), _ALL),
)


@functools.cache
def _probes() -> tuple[_Probe, ...]:
    return tuple(_probe(layout) for layout in load_layouts())


def _probe(layout: Layout) -> _Probe:
    placed = {
        name: anchor(name, layout.fields[name].offset, *accepts, nonzero=nonzero)
        for name, accepts, nonzero in _ANCHORS
        if name in layout.fields
    }
    return _Probe(layout, placed.get("EPTP"), tuple(placed.values()))


def candidates(words: Words) -> Flags:
    """Tell for each page whether it may be a VMCS under some layout.

    ``words`` has one row of 512 little-endian words per page and may be a view of a mapped file; pages are
    not copied.
    """
    found = np.zeros(len(words), dtype=np.bool_)
    head = words[:, 0]
    headed = ((head & np.uint64(vmcs.REVISION_ID)) != 0) & (head >> np.uint64(32) <= np.uint64(_MAX_ABORT))
    rows: Rows = np.flatnonzero(headed)
    if not len(rows):
        return found
    identifiers = head[rows] & np.uint64(vmcs.REVISION_ID)
    for probe in _probes():
        known = np.isin(identifiers, np.array(sorted(probe.layout.revision_ids), dtype=np.uint64))
        _mark(found, words, rows[known], probe, probe.needed_with_id)
        if probe.works_without_id and probe.eptp is not None:
            others = rows[~known]
            shaped = others[probe.eptp.test(words, others)]
            _mark(found, words, shaped, probe, probe.needed_without_id)
    return found


def named_roots(words: Words) -> Int64:
    """Return for each page the EPT table that it names under the layout whose anchors fit best; 0 where there is none.

    Fast and rough: to put many candidates in order, :func:`examine` decides. ``words`` as for :func:`candidates`.
    """
    named = np.zeros(len(words), dtype=np.int64)
    best = np.zeros(len(words))
    rows = np.arange(len(words))
    identifiers = words[:, 0] & np.uint64(vmcs.REVISION_ID)
    for probe in _probes():
        if probe.eptp is None:
            continue
        known = np.isin(identifiers, np.array(sorted(probe.layout.revision_ids), dtype=np.uint64))
        fit = count(probe.anchors, words, rows) / len(probe.anchors) + known
        better = fit > best
        named[better] = (words[better, probe.eptp.column] & np.uint64(bits.field(51, 12))).astype(np.int64)
        best[better] = fit[better]
    return named


def _mark(found: Flags, words: Words, rows: Rows, probe: _Probe, needed: int) -> None:
    if len(rows):
        found[rows[count(probe.anchors, words, rows) >= needed]] = True


def examine(
    page: bytes | Words,
    hpa: int,
    maxphyaddr: int = bits.MAX_PHYSICAL_BITS,
    physical_top: int | None = None,
    present: Callable[[int], bool | None] | None = None,
) -> ControlStructure | None:
    """Judge one page as a VMCS under every layout and return the account under the best one.

    ``hpa`` is the page's address, ``physical_top`` the first address past the memory it was found in,
    ``present`` tells whether an address is in the capture. None when no layout makes sense of the page at
    all; a near miss comes back with a verdict of REJECTED or POSSIBLE and says what failed.
    """
    raw = page if isinstance(page, bytes) else np.ascontiguousarray(page).tobytes()
    limits = Limits(maxphyaddr, physical_top, present)
    row = np.frombuffer(raw, dtype="<u8").reshape(1, -1)
    first = np.zeros(1, dtype=np.intp)
    judged = [
        _account(raw, hpa, probe.layout, limits)
        for probe in _probes()
        if count(probe.anchors, row, first)[0] >= _FEWEST_ANCHORS
    ]
    best = max(judged, key=_balance, default=None)
    return best if best is not None and best.score >= _FLOOR else None


def examine_as(
    layout: Layout,
    page: bytes,
    hpa: int,
    maxphyaddr: int = bits.MAX_PHYSICAL_BITS,
    physical_top: int | None = None,
    present: Callable[[int], bool | None] | None = None,
) -> ControlStructure:
    """Judge one page as a VMCS under one layout, whatever else it may be; arguments as for :func:`examine`."""
    return _account(page, hpa, layout, Limits(maxphyaddr, physical_top, present))


def _account(raw: bytes, hpa: int, layout: Layout, limits: Limits) -> ControlStructure:
    header = int.from_bytes(raw[:4], "little")
    values = _architectural(layout, raw)
    eptp = Eptp(values.get("EPTP", 0))
    return ControlStructure(
        kind="VMCS",
        hpa=hpa,
        layout=layout.name,
        revision_id=header & vmcs.REVISION_ID,
        is_shadow=bool(header & vmcs.SHADOW_INDICATOR),
        root_raw=eptp.raw,
        root_hpa=eptp.root_hpa if eptp.raw else 0,
        levels=eptp.levels if eptp.levels in (4, 5) else 0,
        vpid_or_asid=values.get("VPID"),
        fields=values,
        evidence=vmcs_checks.judge(values, layout, limits),
        raw=raw,
        table=layout,
    )


def _architectural(layout: Layout, raw: bytes) -> dict[str, int]:
    """Read all fields as VMREAD would give them, undoing the stored form of access rights."""
    values = layout.read_all(raw)
    if layout.ar_format is not None:
        for name in values:
            if name.endswith("_ACCESS_RIGHTS"):
                values[name] = layout.ar_format.unpack(values[name])
    return values


def _balance(structure: ControlStructure) -> int:
    """Weigh what holds against what fails: of two flawless layouts the one with more to judge wins."""
    return sum(item.weight if item.held else -item.weight for item in structure.evidence if item.held is not None)
