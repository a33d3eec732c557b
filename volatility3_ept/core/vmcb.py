"""Find VMCBs: a cheap test for all pages, a full account for one page.

Unlike a VMCS, a VMCB has one layout, and memory always holds what the hypervisor wrote last; only the guest's
state is that of the last exit. The state-save area of a guest with encrypted state (SEV-ES, SEV-SNP) is a
page of its own that the host cannot read, so for such a guest the control area has to do.

Look-alikes: the area that VMRUN saves the host to and Xen's host VMCBs have a save area but neither an ASID
nor the VMRUN intercept; a VMCB that a guest hypervisor keeps in its own memory is a true VMCB whose nCR3 is
an address of that guest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np

from volatility3_ept.core import vmcb_checks
from volatility3_ept.core.anchors import Anchor, Flags, Rows, Words, anchor, count, survivors
from volatility3_ept.core.control import ControlStructure
from volatility3_ept.core.layouts import vmcb_layout
from volatility3_ept.core.limits import Limits
from volatility3_ept.core.memory import Int64
from volatility3_ept.spec import bits, registers, vmcb
from volatility3_ept.spec.vmcb import Misc2, NestedControl

_DWORD: Final = bits.field(31, 0)
_ALL: Final = bits.field(63, 0)
_FRAME: Final = bits.field(bits.MAX_PHYSICAL_BITS - 1, bits.PAGE_SHIFT)
#: Below this score a page is not worth a report.
_FLOOR: Final = 0.5

#: What VMRUN demands of every guest, and the oldest reserved words. The word at 58H: ASID, then TLB_CONTROL,
#: then two reserved bytes (the one between is ERAP control).
_REQUIRED: Final[tuple[Anchor, ...]] = (
    anchor(
        "ASID and TLB control",
        vmcb.GUEST_ASID,
        *((0xFFFF_00FF_0000_0000 | _DWORD & ~vmcb.MAX_ASID, value << 32) for value in vmcb.TLB_CONTROLS),
        nonzero=vmcb.MAX_ASID,
    ),
    anchor("VMRUN intercept", vmcb.INTERCEPT_MISC2, (int(Misc2.VMRUN), int(Misc2.VMRUN))),
    *(anchor("reserved", offset, (_ALL, 0)) for offset in range(0x18, 0x38, 8)),
    anchor("reserved", 0x38, (_DWORD, 0)),
)
_PLAIN_EFER: Final = anchor("EFER", vmcb.EFER, (registers.EFER_RESERVED | registers.EFER_SVME, registers.EFER_SVME))
#: Of these, two must pass when the save area is the guest's.
_PLAIN: Final[tuple[Anchor, ...]] = (
    anchor("RFLAGS", vmcb.RFLAGS, (registers.RFLAGS_RESERVED | registers.RFLAGS_ONE, registers.RFLAGS_ONE)),
    anchor("CR0", vmcb.CR0, (registers.CR0_RESERVED, 0), nonzero=registers.CR0_ET | registers.CR0_PE),
    anchor("CR4", vmcb.CR4, (registers.CR4_RESERVED, 0), nonzero=bits.field(31, 0)),
    anchor("nCR3", vmcb.N_CR3, (~_FRAME & _ALL, 0), nonzero=_FRAME),
)
_PLAIN_NEEDED: Final = 2
_ENCRYPTED: Final[tuple[Anchor, ...]] = (
    anchor("SEV-ES", vmcb.NP_SEV_CONTROL, (vmcb_checks.SEV_ES_MASK, vmcb_checks.SEV_ES)),
    anchor("VMSA", vmcb.VMSA_POINTER, (~_FRAME & _ALL, 0), nonzero=_FRAME),
)


def candidates(words: Words) -> Flags:
    """Tell for each page whether it may be a VMCB.

    ``words`` has one row of 512 little-endian words per page and may be a view of a mapped file; pages are
    not copied.
    """
    found = np.zeros(len(words), dtype=np.bool_)
    rows: Rows = np.flatnonzero(words[:, vmcb.GUEST_ASID // 8])
    rows = survivors(_REQUIRED, words, rows)
    plain = rows[_PLAIN_EFER.test(words, rows)]
    found[plain[count(_PLAIN, words, plain) >= _PLAIN_NEEDED]] = True
    found[survivors(_ENCRYPTED, words, rows)] = True
    return found


def named_roots(words: Words) -> Int64:
    """Return for each page the address of the table that nCR3 names; 0 where nested paging is off.

    ``words`` as for :func:`candidates`.
    """
    nested = (words[:, vmcb.NP_SEV_CONTROL // 8] & np.uint64(int(NestedControl.NP_ENABLE))) != 0
    roots: Int64 = np.where(nested, words[:, vmcb.N_CR3 // 8] & np.uint64(_FRAME), np.uint64(0)).astype(np.int64)
    return roots


def examine(
    page: bytes | Words,
    hpa: int,
    maxphyaddr: int = bits.MAX_PHYSICAL_BITS,
    physical_top: int | None = None,
    present: Callable[[int], bool | None] | None = None,
) -> ControlStructure | None:
    """Judge one page as a VMCB.

    ``hpa`` is the page's address, ``physical_top`` the first address past the memory it was found in,
    ``present`` tells whether an address is in the capture. None when the page is nothing like a VMCB; a near
    miss comes back with a verdict of REJECTED or POSSIBLE and says what failed.
    """
    raw = page if isinstance(page, bytes) else np.ascontiguousarray(page).tobytes()
    limits = Limits(maxphyaddr, physical_top, present)
    values = vmcb_layout().read_all(raw)
    root_raw = values["N_CR3"] if values["NP_SEV_CONTROL"] & NestedControl.NP_ENABLE else 0
    structure = ControlStructure(
        kind="VMCB",
        hpa=hpa,
        layout=vmcb_layout().name,
        revision_id=None,
        is_shadow=False,
        root_raw=root_raw,
        root_hpa=vmcb_checks.root_address(root_raw, limits),
        levels=0,
        vpid_or_asid=values["GUEST_ASID"],
        fields=values,
        evidence=vmcb_checks.judge(values, raw, limits),
        raw=raw,
        table=vmcb_layout(),
    )
    return structure if structure.score >= _FLOOR and _is_runnable(structure) else None


def _is_runnable(structure: ControlStructure) -> bool:
    """Require one of VMRUN's two static demands, so that host save areas stay out."""
    return any(item.essential and item.held for item in structure.evidence)
