"""One control-structure field in words: what a person wants to read beside the raw value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from volatility3_ept.spec import vmcb, vmcs, vmcs_exits
from volatility3_ept.spec.bits import bit
from volatility3_ept.spec.ept import Eptp

_CR0: Final = {0: "PE", 1: "MP", 2: "EM", 3: "TS", 4: "ET", 5: "NE", 16: "WP", 18: "AM", 29: "NW", 30: "CD", 31: "PG"}
_CR4: Final = {
    0: "VME", 1: "PVI", 2: "TSD", 3: "DE", 4: "PSE", 5: "PAE", 6: "MCE", 7: "PGE", 8: "PCE", 9: "OSFXSR",
    10: "OSXMMEXCPT", 11: "UMIP", 12: "LA57", 13: "VMXE", 14: "SMXE", 16: "FSGSBASE", 17: "PCIDE", 18: "OSXSAVE",
    19: "KL", 20: "SMEP", 21: "SMAP", 22: "PKE", 23: "CET", 24: "PKS", 25: "UINTR", 27: "LASS", 28: "LAM_SUP",
    32: "FRED",
}  # fmt: skip
_EFER: Final = {
    0: "SCE", 8: "LME", 10: "LMA", 11: "NXE", 12: "SVME", 13: "LMSLE", 14: "FFXSR", 15: "TCE", 20: "UAIE", 21: "AIBRSE",
}  # fmt: skip
_RFLAGS: Final = {
    0: "CF", 2: "PF", 4: "AF", 6: "ZF", 7: "SF", 8: "TF", 9: "IF", 10: "DF", 11: "OF", 14: "NT", 16: "RF", 17: "VM",
    18: "AC", 19: "VIF", 20: "VIP", 21: "ID",
}  # fmt: skip


def field(kind: str, name: str, value: int) -> str:
    """Return what a field of a VMCS or VMCB says, empty where the number itself says it all."""
    for describe in (_vmcs if kind == "VMCS" else _vmcb, _register):
        text = describe(name, value)
        if text:
            return text
    return ""


def _named(names: dict[int, str]) -> Callable[[int], str]:
    return lambda value: " ".join(text for number, text in names.items() if value & bit(number))


_REGISTERS: Final[dict[str, Callable[[int], str]]] = {
    "CR0": _named(_CR0),
    "CR4": _named(_CR4),
    "EFER": _named(_EFER),
    "RFLAGS": _named(_RFLAGS),
}


def _register(name: str, value: int) -> str:
    last = name.removeprefix("GUEST_").removeprefix("HOST_").removeprefix("IA32_")
    if last == "CR3":
        return f"page table at {value & ~0xFFF & (1 << 52) - 1:#x}" + (
            f", PCID {value & 0xFFF}" if value & 0xFFF else ""
        )
    return _REGISTERS[last](value) if last in _REGISTERS else ""


def _vmcs(name: str, value: int) -> str:
    if name in vmcs.CONTROL_FLAGS:
        return " ".join(vmcs.control_names(name, value))
    if name in ("EPTP", "SHARED_EPTP") and value:
        return eptp(value)
    if name == "EXIT_REASON":
        return vmcs_exits.reason_name(value)
    if name == "VMCS_LINK_POINTER":
        return "none" if value == vmcs.NO_LINK else "shadow VMCS"
    if name == "GUEST_ACTIVITY_STATE":
        known = {int(state): state.name for state in vmcs.ActivityState}
        return known.get(value, "reserved")
    if name == "VMX_ABORT_INDICATOR":
        known = {int(abort): abort.name for abort in vmcs.Abort}
        return known.get(value, "not architectural") if value else "none"
    if name.endswith("_ACCESS_RIGHTS"):
        return _rights(vmcs.AccessRights(value))
    return ""


def _vmcb(name: str, value: int) -> str:
    if name in vmcb.INTERCEPTS:
        return " ".join(vmcb.intercept_names(name, value))
    if name == "EXITCODE":
        return vmcb.exit_name(value)
    if name == "TLB_CONTROL":
        return vmcb.TLB_CONTROLS.get(value, "reserved")
    if name == "NP_SEV_CONTROL":
        return " ".join(flag.name or "" for flag in vmcb.NestedControl if value & flag)
    if name in ("ALLOWED_SEV_FEATURES", "GUEST_SEV_FEATURES"):
        return " ".join(flag.name or "" for flag in vmcb.SevFeatures if value & flag)
    if name.endswith("_ATTRIB"):
        return _rights(vmcb.SegmentAttributes(value))
    return ""


def _rights(rights: vmcs.AccessRights | vmcb.SegmentAttributes) -> str:
    if isinstance(rights, vmcs.AccessRights) and rights.is_unusable:
        return "unusable"
    if not rights.is_present:
        return "not present"
    kind = "code" if rights.is_code_or_data and rights.type & 8 else "data" if rights.is_code_or_data else "system"
    return f"{kind}, type {rights.type}, DPL {rights.dpl}" + (", 64-bit" if rights.is_long else "")


def eptp(raw: int) -> str:
    """Return an EPT pointer in words."""
    pointer = Eptp(raw)
    memory_type = {0: "UC", 6: "WB"}.get(pointer.memory_type, f"type {pointer.memory_type}")
    flags = ", A/D on" if pointer.access_dirty else ", A/D off"
    return f"table at {pointer.root_hpa:#x}, {pointer.levels} levels, {memory_type}{flags}"
