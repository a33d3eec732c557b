"""What a VMCS should satisfy, criterion by criterion.

Source: Intel SDM Vol. 3C, "VM Entries" ("Checks on VMX Controls and Host-State Area", "Checks on the Guest
State Area"). The processor checks these at VM entry; memory may hold an older state, so each is a piece of
evidence and none decides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from volatility3_ept.core.control import Criterion
from volatility3_ept.core.layouts import Layout
from volatility3_ept.core.limits import Limits
from volatility3_ept.spec import bits, registers, vmcs
from volatility3_ept.spec.ept import Eptp
from volatility3_ept.spec.vmcs import AccessRights, Entry, Exit, Proc, Proc2

_PAGE_OFFSET: Final = bits.PAGE_SIZE - 1
#: LAM bits of CR3, which processors with linear-address masking accept.
_CR3_LAM: Final = bits.field(62, 61)


@dataclass(frozen=True, slots=True)
class _View:
    """The decoded fields of one page under one layout."""

    values: Mapping[str, int]
    layout: Layout
    limits: Limits

    def get(self, name: str) -> int | None:
        return self.values.get(name)

    def has(self, field: str, control: int) -> bool | None:
        """Tell whether a control is on; None when the layout has no such field."""
        value = self.get(field)
        return None if value is None else bool(value & control)

    @property
    def never_ran(self) -> bool:
        """Tell whether the guest state is all zero: not launched yet, or not written back."""
        return not any(self.get(name) for name in ("GUEST_CR0", "GUEST_RIP", "GUEST_RFLAGS"))

    def canonical(self, name: str) -> bool:
        """Tell whether a field that is an address of the host is canonical; a missing field passes."""
        width = 57 if (self.get("HOST_CR4") or 0) & registers.CR4_LA57 else 48
        return bits.is_canonical(self.get(name) or 0, width)


def judge(values: Mapping[str, int], layout: Layout, limits: Limits) -> tuple[Criterion, ...]:
    """Judge a decoded page; the answer keeps the order of the checks."""
    view = _View(values, layout, limits)
    return tuple(check(view) for check in _CHECKS)


def _unjudged(name: str, why: str, weight: int = 1) -> Criterion:
    return Criterion(name, None, why, weight)


def _revision(view: _View) -> Criterion:
    identifier = (view.get("VMCS_REVISION_ID") or 0) & vmcs.REVISION_ID
    seen = vmcs.REVISION_SEEN_ON.get(identifier)
    detail = f"{identifier:#x}, {seen or 'not seen before'}"
    if identifier in view.layout.revision_ids:
        return Criterion("revision id", True, detail, 2)
    held = None if seen is None or view.layout.any_revision_id else False
    return Criterion("revision id", held, detail, 2)


def _abort(view: _View) -> Criterion:
    value = view.get("VMX_ABORT_INDICATOR") or 0
    known = value in vmcs.Abort._value2member_map_
    return Criterion("abort indicator", known, vmcs.Abort(value).name if known else f"{value:#x}")


def _eptp(view: _View) -> Criterion:
    raw = view.get("EPTP")
    if raw is None:
        return _unjudged("EPTP", "not in this layout")
    faults = Eptp(raw).faults(view.limits.maxphyaddr)
    return Criterion("EPTP", not faults, ", ".join((f"{raw:#x}", *faults)), 3, essential=True)


def _root(view: _View) -> Criterion:
    raw = view.get("EPTP")
    if not raw:
        return _unjudged("EPT root", "no EPTP")
    root = Eptp(raw).root_hpa
    held = view.limits.holds_page(root)
    if held is False and view.layout.is_software:
        return _unjudged("EPT root", f"{root:#x} is not in this memory: an address of the guest that wrote it?", 2)
    word = {True: "in the capture", False: "not in the capture", None: "not looked up"}[held]
    return Criterion("EPT root", held, f"{root:#x} {word}", 2)


def _ept_enabled(view: _View) -> Criterion:
    secondary = view.has("PROC_BASED_EXEC_CONTROLS", Proc.SECONDARY_CONTROLS)
    enabled = view.has("SECONDARY_PROC_EXEC_CONTROLS", Proc2.ENABLE_EPT)
    if secondary is None or enabled is None or view.get("EPTP") is None:
        return _unjudged("EPT enabled", "not in this layout")
    return Criterion("EPT enabled", secondary and enabled, f"secondary controls {secondary}, EPT {enabled}", 2)


def _controls(field: str, name: str) -> Callable[[_View], Criterion]:
    """Build the check of one control word against the bits that every processor fixes."""
    rule = vmcs.CONTROL_RULES[field]

    def check(view: _View) -> Criterion:
        value = view.get(field)
        if value is None:
            return _unjudged(name, "not in this layout", 2)
        detail = f"{value:#x}" if rule.holds(value) else f"{value:#x}, must have {rule.must_be_one:#x}"
        return Criterion(name, rule.holds(value), detail, 2)

    return check


def _host_cr0(view: _View) -> Criterion:
    value = view.get("HOST_CR0")
    if value is None:
        return _unjudged("host CR0", "not in this layout", 2)
    fixed = registers.CR0_VMX_FIXED
    faults = registers.cr0_faults(value) + (() if value & fixed == fixed else ("PE, NE or PG clear",))
    return Criterion("host CR0", not faults, ", ".join((f"{value:#x}", *faults)), 2)


def _host_cr4(view: _View) -> Criterion:
    value = view.get("HOST_CR4")
    if value is None:
        return _unjudged("host CR4", "not in this layout", 2)
    faults = list(registers.cr4_faults(value))
    if not value & registers.CR4_VMXE:
        faults.append("VMXE clear")
    if view.has("VM_EXIT_CONTROLS", Exit.HOST_64_BIT) and not value & registers.CR4_PAE:
        faults.append("64-bit host without PAE")
    return Criterion("host CR4", not faults, ", ".join((f"{value:#x}", *faults)), 2)


def _host_cr3(view: _View) -> Criterion:
    value = view.get("HOST_CR3")
    if value is None:
        return _unjudged("host CR3", "not in this layout")
    frame = value & ~_CR3_LAM & ~_PAGE_OFFSET
    fits = not frame >> view.limits.maxphyaddr if view.layout.is_software else view.limits.fits(frame)
    return Criterion("host CR3", bool(frame) and fits, f"{value:#x}")


def _host_rip(view: _View) -> Criterion:
    value = view.get("HOST_RIP")
    if value is None:
        return _unjudged("host RIP", "not in this layout")
    return Criterion("host RIP", bool(value) and view.canonical("HOST_RIP"), f"{value:#x}")


def _host_selectors(view: _View) -> Criterion:
    names = [f"HOST_{name}_SELECTOR" for name in ("ES", "CS", "SS", "DS", "FS", "GS", "TR")]
    selectors = [value for value in map(view.get, names) if value is not None]
    if len(selectors) < len(names):
        return _unjudged("host selectors", "not in this layout", 2)
    right = view.get("HOST_CS_SELECTOR") and view.get("HOST_TR_SELECTOR") and not any(value & 7 for value in selectors)
    return Criterion("host selectors", bool(right), " ".join(f"{value:x}" for value in selectors), 2)


def _host_bases(view: _View) -> Criterion:
    names = [f"HOST_{name}_BASE" for name in ("FS", "GS", "TR", "GDTR", "IDTR")]
    wrong = [name for name in names if not view.canonical(name)]
    wrong += [name for name in names[2:] if view.get(name) == 0]
    return Criterion("host bases", not wrong, "not canonical, or zero: " + ", ".join(wrong) if wrong else "canonical")


def _host_efer(view: _View) -> Criterion:
    value = view.get("HOST_IA32_EFER")
    if value is None or not view.has("VM_EXIT_CONTROLS", Exit.LOAD_EFER):
        return _unjudged("host EFER", "not loaded at exits")
    long_mode = registers.EFER_LMA | registers.EFER_LME
    wanted = long_mode if view.has("VM_EXIT_CONTROLS", Exit.HOST_64_BIT) else 0
    return Criterion("host EFER", not registers.efer_faults(value) and value & long_mode == wanted, f"{value:#x}")


def _link(view: _View) -> Criterion:
    value = view.get("VMCS_LINK_POINTER")
    if value is None:
        return _unjudged("link pointer", "not in this layout", 2)
    if value == vmcs.NO_LINK:
        return Criterion("link pointer", True, "none", 2)
    held = bool(value) and not value & _PAGE_OFFSET and not value >> view.limits.maxphyaddr
    return Criterion("link pointer", held, f"shadow VMCS at {value:#x}" if held else f"{value:#x}", 2)


def _vpid(view: _View) -> Criterion:
    value = view.get("VPID")
    if value is None or not view.has("SECONDARY_PROC_EXEC_CONTROLS", Proc2.ENABLE_VPID):
        return _unjudged("VPID", "not enabled")
    return Criterion("VPID", value != 0, f"{value}")


def _bitmaps(view: _View) -> Criterion:
    used = [
        (name, value)
        for name, control in (
            ("IO_BITMAP_A", Proc.IO_BITMAPS),
            ("IO_BITMAP_B", Proc.IO_BITMAPS),
            ("MSR_BITMAP", Proc.MSR_BITMAPS),
        )
        if view.has("PROC_BASED_EXEC_CONTROLS", control) and (value := view.get(name)) is not None
    ]
    if not used:
        return _unjudged("bitmap addresses", "none in use")
    wrong = [f"{name}={value:#x}" for name, value in used if value & _PAGE_OFFSET or value >> view.limits.maxphyaddr]
    return Criterion("bitmap addresses", not wrong, ", ".join(wrong) or "4K aligned")


def _guest_control_registers(view: _View) -> Criterion:
    cr0, cr4 = view.get("GUEST_CR0"), view.get("GUEST_CR4")
    if view.never_ran or cr0 is None or cr4 is None:
        return _unjudged("guest CR0 and CR4", "no guest state")
    faults = registers.cr0_faults(cr0) + registers.cr4_faults(cr4)
    # VM entry fixes VMXE in the guest's real CR4 too; what the guest sees comes from the read shadow.
    if not cr4 & registers.CR4_VMXE:
        faults += ("VMXE clear in CR4",)
    return Criterion("guest CR0 and CR4", not faults, ", ".join((f"{cr0:#x} {cr4:#x}", *faults)))


def _guest_flags(view: _View) -> Criterion:
    value = view.get("GUEST_RFLAGS")
    if view.never_ran or value is None:
        return _unjudged("guest RFLAGS", "no guest state")
    return Criterion("guest RFLAGS", not registers.rflags_faults(value), f"{value:#x}")


def _guest_efer(view: _View) -> Criterion:
    """Judge LMA only where entry loads EFER: elsewhere the field is stale for good."""
    value = view.get("GUEST_IA32_EFER")
    if view.never_ran or value is None or not view.has("VM_ENTRY_CONTROLS", Entry.LOAD_EFER):
        return _unjudged("guest EFER", "not loaded at entries")
    agrees = bool(value & registers.EFER_LMA) == view.has("VM_ENTRY_CONTROLS", Entry.GUEST_64_BIT)
    return Criterion("guest EFER", not registers.efer_faults(value) and agrees, f"{value:#x}")


def _guest_segments(view: _View) -> Criterion:
    raw_cs, raw_tr = view.get("GUEST_CS_ACCESS_RIGHTS"), view.get("GUEST_TR_ACCESS_RIGHTS")
    if view.never_ran or raw_cs is None or raw_tr is None or view.layout.ar_format is None:
        return _unjudged("guest segments", "no guest state, or not in this layout", 2)
    cs, tr = AccessRights(raw_cs), AccessRights(raw_tr)
    code = cs.is_code_or_data and cs.is_present and cs.type in (3, 9, 11, 13, 15)
    task = tr.is_present and not tr.is_code_or_data and not tr.is_unusable and tr.type in (3, 11)
    right = code and task and not cs.has_reserved and not tr.has_reserved
    return Criterion(
        "guest segments", right, f"CS {raw_cs:#x}, TR {raw_tr:#x}, stored as {view.layout.ar_format.value}", 2
    )


def _guest_activity(view: _View) -> Criterion:
    value = view.get("GUEST_ACTIVITY_STATE")
    if value is None:
        return _unjudged("guest activity", "not in this layout")
    known = value in vmcs.ActivityState._value2member_map_
    return Criterion("guest activity", known, vmcs.ActivityState(value).name if known else f"{value:#x}")


_CHECKS: Final[tuple[Callable[[_View], Criterion], ...]] = (
    _revision,
    _abort,
    _eptp,
    _root,
    _ept_enabled,
    _controls("PIN_BASED_EXEC_CONTROLS", "pin-based controls"),
    _controls("PROC_BASED_EXEC_CONTROLS", "processor-based controls"),
    _controls("VM_EXIT_CONTROLS", "exit controls"),
    _controls("VM_ENTRY_CONTROLS", "entry controls"),
    _host_cr0,
    _host_cr4,
    _host_cr3,
    _host_rip,
    _host_selectors,
    _host_bases,
    _host_efer,
    _link,
    _vpid,
    _bitmaps,
    _guest_control_registers,
    _guest_flags,
    _guest_efer,
    _guest_segments,
    _guest_activity,
)
