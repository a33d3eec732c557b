"""What a kernel leaves in memory for a VMCS to point to: code, a stack, a GDT with a TSS, an IDT; and a VMCS of it all.

Nothing of the package is imported. Addresses are literal; field names are those of the manual's appendix.
"""

from __future__ import annotations

from dataclasses import dataclass

from .machine import KERNEL, Guest
from .paging import EPT_4, LONG_4, PAGE, HostRam, Shape, Tables

NX_DATA = 1 << 63 | 0x63
HOST_KERNEL = 0xFFFF_FFFF_A000_0000
VMRESUME = b"\x0f\x01\xc3"
STACK, GDT, IDT, TSS, DATA = (PAGE * number for number in (1, 2, 3, 4, 5))
#: Offset of the instruction behind VMRESUME in the code page.
BEHIND = 0x80


def furnish(tables: Tables, base: int, code_page: int | None = None) -> None:
    """Map a kernel at ``base``: its code (or a page that is there already), and the pages that registers point to."""
    ram = tables.ram
    code = ram.allocate() if code_page is None else code_page
    tables.map(base, code)
    ram.write(code + BEHIND - 3, VMRESUME)
    for offset in (STACK, GDT, IDT, TSS, DATA):
        page = ram.allocate()
        tables.map(base + offset, page, bits=NX_DATA)
        if offset == GDT:
            ram.write(page, _gdt(base + TSS))
        if offset == IDT:
            ram.write(page, b"".join(_gate(base + 0x100) for _ in range(32)))


def _gdt(task: int) -> bytes:
    flat = [0, 0x00CF_9B00_0000_FFFF, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF, 0, 0, 0, 0]
    low = 0x0000_8B00_0000_2087 | (task & 0xFF_FFFF) << 16 | (task >> 24 & 0xFF) << 56
    return b"".join(word.to_bytes(8, "little") for word in (*flat, low, task >> 32))


def _gate(handler: int) -> bytes:
    low = handler & 0xFFFF | 0x10 << 16 | 0x8E00 << 32 | (handler >> 16 & 0xFFFF) << 48
    return low.to_bytes(8, "little") + (handler >> 32).to_bytes(8, "little")


@dataclass
class Hypervisor:
    """A host kernel with page tables of its own."""

    ram: HostRam

    def __post_init__(self) -> None:
        self.tables = Tables(self.ram, LONG_4)
        furnish(self.tables, HOST_KERNEL)

    def guest(self, pages: int = 48, shape: Shape = EPT_4) -> Guest:
        """Return a guest whose kernel has everything too."""
        guest = Guest(self.ram, shape, pages)
        furnish(guest.own, KERNEL, guest.kernel_gpa)
        return guest

    def vmcs(self, guest: Guest, cpu: int = 0, **changed: int) -> dict[str, int]:
        """Return the field values of a vCPU, as KVM on a 64-bit Linux leaves them."""
        values = {
            **_CONTROLS,
            "VPID": 1 + cpu,
            "EPTP": guest.root,
            "MSR_BITMAP": 0x50_0000 + PAGE * cpu,
            **_state("GUEST", KERNEL, guest.own.register, 8 * cpu),
            **_state("HOST", HOST_KERNEL, self.tables.register, 8 * cpu),
            "HOST_RIP": HOST_KERNEL + BEHIND,
        }
        return {**values, **changed}


_CONTROLS = {
    "VMCS_LINK_POINTER": (1 << 64) - 1,
    "PIN_BASED_EXEC_CONTROLS": 0x7F,
    "PROC_BASED_EXEC_CONTROLS": 0xB5A0_6DFA,
    "SECONDARY_PROC_EXEC_CONTROLS": 0x0012_14EF,
    "VM_EXIT_CONTROLS": 0x002F_FFFF,
    "VM_ENTRY_CONTROLS": 0x0000_D3FF,
    "EXCEPTION_BITMAP": 0x6_0042,
    "CR0_GUEST_HOST_MASK": 0xFFFF_FFFF_FFFE_FFF7,
    "CR4_GUEST_HOST_MASK": 0xFFFF_FFFF_FFFE_F871,
    "CR0_READ_SHADOW": 0x8005_0033,
    "CR4_READ_SHADOW": 0x37_0EB0,
    "EXIT_REASON": 12,
    "GUEST_PHYSICAL_ADDRESS": 0xFEE0_0020,
    "TSC_OFFSET": 0xFFFF_FFFF_53DD_BBE3,
    "GUEST_DR7": 0x400,
    "GUEST_RFLAGS": 0x202,
    "GUEST_IA32_PAT": 0x0007_0406_0007_0406,
    "HOST_IA32_PAT": 0x0407_0506_0007_0106,
    "GUEST_IA32_EFER": 0xD01,
    "HOST_IA32_EFER": 0xD01,
    "GUEST_GDTR_LIMIT": 0x7F,
    "GUEST_IDTR_LIMIT": 0xFFF,
}
_RIGHTS = {"CS": 0xA09B, "SS": 0xC093, "TR": 0x8B, "LDTR": 0x1_0082}
_LIMITS = {"CS": 0xFFFF_FFFF, "SS": 0xFFFF_FFFF, "TR": 0x2087, "LDTR": 0xFFFF}
_SELECTORS = {"CS": 0x10, "SS": 0x18, "TR": 0x40}


def _state(part: str, base: int, cr3: int, moved: int) -> dict[str, int]:
    values = {
        "CR0": 0x8005_0033,
        "CR3": cr3,
        "CR4": 0x37_26F0,
        "RSP": base + STACK + 0x800 + moved,
        "RIP": base + 0x40 + moved,
        "GS_BASE": base + DATA + moved,
        "TR_BASE": base + TSS,
        "GDTR_BASE": base + GDT,
        "IDTR_BASE": base + IDT,
        "IA32_SYSENTER_CS": 0x10,
        "IA32_SYSENTER_ESP": base + DATA + 0x200,
        "IA32_SYSENTER_EIP": base + 0x200,
    }
    segments = ("ES", "CS", "SS", "DS", "FS", "GS", "LDTR", "TR")
    for name in segments:
        values[f"{name}_SELECTOR"] = _SELECTORS.get(name, 0)
        if part == "GUEST":
            values[f"{name}_ACCESS_RIGHTS"] = _RIGHTS.get(name, 0x1_0010)
            values[f"{name}_LIMIT"] = _LIMITS.get(name, 0)
    return {f"{part}_{name}": value for name, value in values.items()}
