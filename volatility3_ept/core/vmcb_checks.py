"""What a VMCB should satisfy, criterion by criterion.

Source: AMD64 Architecture Programmer's Manual Vol. 2, "Secure Virtual Machine" ("Canonicalization and Consistency
Checks"), appendix "Layout of VMCB". VMRUN refuses a guest that fails one of the first two; the rest is evidence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from volatility3_ept.core.control import Criterion
from volatility3_ept.core.limits import Limits
from volatility3_ept.spec import bits, registers, vmcb
from volatility3_ept.spec.vmcb import Misc1, Misc2, NestedControl, SegmentAttributes

_PAGE_OFFSET: Final = bits.PAGE_SIZE - 1
_FRAME: Final = bits.field(bits.MAX_PHYSICAL_BITS - 1, bits.PAGE_SHIFT)
#: Where CPUID Fn8000_001F_EBX has put the memory-encryption bit so far.
_ENCRYPTION_BITS: Final = (47, 51)
#: A guest with encrypted state: these three controls together, and none that does not exist.
SEV_ES: Final = int(NestedControl.NP_ENABLE | NestedControl.SEV | NestedControl.SEV_ES)
SEV_ES_MASK: Final = SEV_ES | bits.field(63, 8)


def judge(values: Mapping[str, int], raw: bytes, limits: Limits) -> tuple[Criterion, ...]:
    """Judge a decoded page; the answer keeps the order of the checks."""
    view = _View(values, raw, limits)
    return tuple(check(view) for check in _CHECKS)


def root_address(ncr3: int, limits: Limits) -> int:
    """Return the address in an nCR3, without the memory-encryption bit if only so it lies inside memory."""
    root = ncr3 & _FRAME
    if limits.fits(root):
        return root
    stripped = (root & ~bits.bit(number) for number in _ENCRYPTION_BITS if root & bits.bit(number))
    return next((address for address in stripped if limits.fits(address)), root)


@dataclass(frozen=True, slots=True)
class _View:
    """The decoded fields of one page, and the page for what has no name."""

    values: Mapping[str, int]
    raw: bytes
    limits: Limits

    @property
    def nested(self) -> NestedControl:
        return NestedControl(self.values["NP_SEV_CONTROL"] & 0xFF)

    @property
    def is_encrypted(self) -> bool:
        """Tell whether the guest's registers are in a VMSA, which takes SEV and nested paging too."""
        return self.values["NP_SEV_CONTROL"] & SEV_ES_MASK == SEV_ES

    def is_zero(self, ranges: tuple[tuple[int, int], ...]) -> bool:
        return not any(any(self.raw[start:end]) for start, end in ranges)


def _vmrun(view: _View) -> Criterion:
    word = view.values["INTERCEPT_MISC2"]
    return Criterion("VMRUN intercept", bool(word & Misc2.VMRUN), f"{word:#x}", 3, essential=True)


def _asid(view: _View) -> Criterion:
    value = view.values["GUEST_ASID"]
    return Criterion("ASID", 0 < value <= vmcb.MAX_ASID, f"{value:#x}", 3, essential=True)


def _tlb_control(view: _View) -> Criterion:
    value = view.values["TLB_CONTROL"]
    return Criterion("TLB control", value in vmcb.TLB_CONTROLS, vmcb.TLB_CONTROLS.get(value, f"{value:#x}"))


def _reserved_control(view: _View) -> Criterion:
    return Criterion("reserved control bytes", view.is_zero(vmcb.RESERVED_CONTROL), "must be zero", 2)


def _nested_paging(view: _View) -> Criterion:
    control = view.nested
    names = [flag.name or "" for flag in NestedControl if control & flag]
    return Criterion("nested paging", NestedControl.NP_ENABLE in control, " ".join(names) or "off", 2)


def _ncr3(view: _View) -> Criterion:
    value = view.values["N_CR3"]
    if NestedControl.NP_ENABLE not in view.nested:
        return Criterion("nCR3", None, "nested paging is off", 3)
    held = bool(value & _FRAME) and not value & _PAGE_OFFSET and not value >> view.limits.maxphyaddr
    return Criterion("nCR3", held, f"{value:#x}", 3)


def _root(view: _View) -> Criterion:
    value = view.values["N_CR3"]
    if NestedControl.NP_ENABLE not in view.nested or not value:
        return Criterion("NPT root", None, "nested paging is off, or no nCR3", 2)
    root = root_address(value, view.limits)
    held = view.limits.holds_page(root)
    word = {True: "in the capture", False: "not in the capture", None: "not looked up"}[held]
    return Criterion("NPT root", held, f"{root:#x} {word}", 2)


def _permission_maps(view: _View) -> Criterion:
    used = [
        (name, view.values[name])
        for name, intercept in (("IOPM_BASE_PA", Misc1.IOIO), ("MSRPM_BASE_PA", Misc1.MSR))
        if view.values["INTERCEPT_MISC1"] & intercept
    ]
    if not used:
        return Criterion("permission maps", None, "none in use")
    wrong = [f"{name}={value:#x}" for name, value in used if not value or value >> view.limits.maxphyaddr]
    return Criterion("permission maps", not wrong, ", ".join(wrong) or "inside physical memory")


def _event_injection(view: _View) -> Criterion:
    value = view.values["EVENTINJ"]
    if not value & bits.bit(31):
        return Criterion("event injection", None, "none pending")
    legal = value >> 8 & 7 in (0, 2, 3, 4) and not value & bits.field(30, 12)
    return Criterion("event injection", legal, f"{value:#x}")


def _exit_code(view: _View) -> Criterion:
    name = vmcb.exit_name(view.values["EXITCODE"])
    return Criterion("exit code", not name.startswith("CODE_"), name)


def _vmsa(view: _View) -> Criterion:
    if not view.is_encrypted:
        return Criterion("VMSA", None, "guest state is not encrypted", 3)
    value = view.values["VMSA_POINTER"]
    held = bool(value & _FRAME) and not value & _PAGE_OFFSET and not value >> view.limits.maxphyaddr
    return Criterion("VMSA", held, f"{value:#x}", 3)


def _saved(
    name: str, weight: int, judge: Callable[[Mapping[str, int]], tuple[bool, str]]
) -> Callable[[_View], Criterion]:
    """Build a check of the save area, which is not judged when the guest's state is kept elsewhere."""

    def check(view: _View) -> Criterion:
        if view.is_encrypted:
            return Criterion(name, None, "kept in the VMSA", weight)
        held, detail = judge(view.values)
        return Criterion(name, held, detail, weight)

    return check


def _efer(values: Mapping[str, int]) -> tuple[bool, str]:
    value = values["EFER"]
    faults = registers.efer_faults(value) + (() if value & registers.EFER_SVME else ("SVME clear",))
    return not faults, ", ".join((f"{value:#x}", *faults))


def _control_registers(values: Mapping[str, int]) -> tuple[bool, str]:
    cr0, cr4 = values["CR0"], values["CR4"]
    faults = registers.cr0_faults(cr0) + registers.cr4_faults(cr4)
    return bool(cr0) and not faults, ", ".join((f"{cr0:#x} {cr4:#x}", *faults))


def _debug_registers(values: Mapping[str, int]) -> tuple[bool, str]:
    dr6, dr7 = values["DR6"], values["DR7"]
    return not (dr6 | dr7) >> 32, f"{dr6:#x} {dr7:#x}"


def _rflags(values: Mapping[str, int]) -> tuple[bool, str]:
    value = values["RFLAGS"]
    return not registers.rflags_faults(value), f"{value:#x}"


def _privilege(values: Mapping[str, int]) -> tuple[bool, str]:
    return values["CPL"] <= 3, str(values["CPL"])


def _segments(values: Mapping[str, int]) -> tuple[bool, str]:
    names = ("ES", "CS", "SS", "DS", "FS", "GS", "GDTR", "LDTR", "IDTR", "TR")
    odd = [name for name in names if SegmentAttributes(values[f"{name}_ATTRIB"]).has_reserved]
    code = SegmentAttributes(values["CS_ATTRIB"])
    return not odd and bool(code.raw), f"CS {code.raw:#x}" + (", reserved bits in " + " ".join(odd) if odd else "")


def _long_mode(values: Mapping[str, int]) -> tuple[bool, str]:
    cr0, cr4, efer = values["CR0"], values["CR4"], values["EFER"]
    code = SegmentAttributes(values["CS_ATTRIB"])
    if not (efer & registers.EFER_LME and cr0 & registers.CR0_PG):
        return True, "not in long mode"
    right = bool(cr4 & registers.CR4_PAE and cr0 & registers.CR0_PE) and not (code.is_long and code.is_default_32)
    return right, "64-bit code" if code.is_long else "compatibility mode"


def _reserved_save(view: _View) -> Criterion:
    if view.is_encrypted:
        return Criterion("reserved save bytes", None, "kept in the VMSA")
    return Criterion("reserved save bytes", view.is_zero(vmcb.RESERVED_SAVE), "must be zero")


_CHECKS: Final[tuple[Callable[[_View], Criterion], ...]] = (
    _vmrun,
    _asid,
    _tlb_control,
    _reserved_control,
    _nested_paging,
    _ncr3,
    _root,
    _permission_maps,
    _event_injection,
    _exit_code,
    _vmsa,
    _saved("EFER", 3, _efer),
    _saved("CR0 and CR4", 2, _control_registers),
    _saved("DR6 and DR7", 1, _debug_registers),
    _saved("RFLAGS", 2, _rflags),
    _saved("CPL", 1, _privilege),
    _saved("segments", 1, _segments),
    _saved("long mode", 1, _long_mode),
    _reserved_save,
)
