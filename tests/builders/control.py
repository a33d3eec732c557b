"""Writes VMCS and VMCB pages from literal offsets and architectural values.

Nothing of the package under test is imported: an offset or a mask that is wrong there must not be wrong here too.
Offsets: measured tables of Nehalem, Westmere, Haswell and Penryn, Linux ``vmcs12.h``, and the rules of Bochs and Xen.
"""

from __future__ import annotations

import struct

PAGE = 4096

REVISIONS = {
    "haswell": 0x12,
    "nehalem": 0x0E,
    "westmere": 0x0F,
    "penryn": 0x0D,
    "kvm": 0x11E57ED0,
    "kvm_3x": 0x11E57ED0,
    "bochs_2_7": 0x2B,
    "bochs_3_0": 0x2B,
    "bochs_2026": 0x2B,
    "xen": 0x04,  # Xen shows the identifier of the processor below
    "xen_4_2": 0x40000001,
}

# field, encoding, then byte offsets; "-" where a layout lacks the field.
_OFFSETS = """
                        encoding haswell nehalem westmere penryn kvm kvm_3x
eptp                    201a     140     e8      140      -      78  70
link                    2800     f8      f8      f8       20     b0  80
vpid                    0000     ce      2f0     dc       -      3c0 388
pin                     4000     128     128     128      40     2e8 2b0
proc                    4002     120     120     120      48     2ec 2b4
proc2                   401e     124     124     124      3f0    324 2ec
exit                    400c     15c     13c     15c      70     300 2c8
entry                   4012     2b8     148     294      88     30c 2d4
msr_bitmap              2004     2f8     b0      2f8      d0     38  38
guest_cr0               6800     208     2d8     2d8      300    1a8 170
guest_cr3               6802     210     2e0     2e0      308    1b0 178
guest_cr4               6804     218     2e8     2e8      310    1b8 180
guest_rsp               681c     1d0     1d0     1d0      330    218 1e0
guest_rip               681e     1d8     1d8     1d8      338    220 1e8
guest_rflags            6820     1e0     1e0     1e0      340    228 1f0
guest_efer              2806     110     110     110      -      c8  98
guest_cs_rights         4816     32      22c     -        12c    374 33c
guest_tr_rights         4822     72      2bc     -        1bc    38c 354
guest_activity          4826     13c     18c     21c      258    394 35c
host_cs                 0c02     c2      304     304      1c8    3d8 39c
host_ss                 0c04     c4      308     308      1d0    3da 39e
host_tr                 0c0c     cc      318     318      1f0    3e2 3a6
host_efer               2c02     318     328     328      -      108 d0
host_cr0                6c00     328     338     338      380    248 210
host_cr3                6c02     330     340     340      388    250 218
host_cr4                6c04     338     348     348      390    258 220
host_gs_base            6c08     358     358     358      3a0    268 230
host_tr_base            6c0a     360     360     360      3a8    270 238
host_gdtr_base          6c0c     348     368     368      3b0    278 240
host_idtr_base          6c0e     340     370     370      3b8    280 248
host_rsp                6c14     300     388     388      3d0    298 260
host_rip                6c16     308     390     390      3d8    2a0 268
"""
_HEADER, *_ROWS = (line.split() for line in _OFFSETS.split("\n") if line.strip())
ENCODINGS = {row[0]: int(row[1], 16) for row in _ROWS}

# What KVM on a 64-bit Linux host leaves in a VMCS; a 64-bit guest with SMEP, SMAP and VMXE (fixed) in CR4.
DEFAULTS = {
    "eptp": 0x10_005E,
    "link": 0xFFFF_FFFF_FFFF_FFFF,
    "vpid": 3,
    "pin": 0x7F,
    "proc": 0xB5A0_6DFA,
    "proc2": 0x0012_14EF,
    "exit": 0x002F_FFFF,
    "entry": 0x0000_D3FF,
    "msr_bitmap": 0x0234_5000,
    "guest_cr0": 0x8005_0033,
    "guest_cr3": 0x0261_0001,
    "guest_cr4": 0x0037_26B0,
    "guest_rsp": 0xFFFF_FFFF_8280_3E90,
    "guest_rip": 0xFFFF_FFFF_8100_0000,
    "guest_rflags": 0x246,
    "guest_efer": 0xD01,
    "guest_cs_rights": 0xA09B,
    "guest_tr_rights": 0x8B,
    "guest_activity": 0,
    "host_cs": 0x10,
    "host_ss": 0x18,
    "host_tr": 0x40,
    "host_efer": 0xD01,
    "host_cr0": 0x8005_0033,
    "host_cr3": 0x0123_4003,
    "host_cr4": 0x0037_26F0,
    "host_gs_base": 0xFFFF_8880_0FC0_0000,
    "host_tr_base": 0xFFFF_FE00_0000_3000,
    "host_gdtr_base": 0xFFFF_FE00_0000_1000,
    "host_idtr_base": 0xFFFF_FE00_0000_0000,
    "host_rsp": 0xFFFF_C900_0040_3AE0,
    "host_rip": 0xFFFF_FFFF_C065_02DE,
}


def offsets(layout: str) -> dict[str, int]:
    """Return the byte offset of each field that a layout has."""
    if layout.startswith("bochs"):
        counts = {
            "bochs_2_7": (64, 64, 64, 64),
            "bochs_3_0": (0x20, 0x50, 0x30, 0x30),
            "bochs_2026": (0x20, 0x54, 0x30, 0x30),
        }[layout]
        return {name: _bochs(encoding, counts) for name, encoding in ENCODINGS.items()}
    if layout.startswith("xen"):
        return {name: _xen(encoding) for name, encoding in ENCODINGS.items()}
    column = 1 + _HEADER.index(layout)
    return {row[0]: int(row[column], 16) for row in _ROWS if row[column] != "-"}


def _bochs(encoding: int, counts: tuple[int, ...]) -> int:
    width, kind, index = encoding >> 13, encoding >> 10 & 3, encoding & 0x3FF
    return 0x10 + 16 * sum(counts[:width]) + 4 * (counts[width] * kind + index)


def _xen(encoding: int) -> int:
    width, kind, index = encoding >> 13, encoding >> 10 & 3, encoding >> 1 & 0x1F
    return 0x1F8 if encoding == 0 else 8 * (width << 7 | kind << 5 | index)


def _size(layout: str, name: str) -> int:
    if name.endswith("_rights") and layout == "haswell":
        return 2
    return (2, 8, 4, 8)[ENCODINGS[name] >> 13]


def _stored(layout: str, name: str, value: int) -> int:
    """Put access rights into the form that a processor stores: rotated left by 8, or packed into 16 bits."""
    if not name.endswith("_rights") or layout.startswith(("kvm", "xen")):
        return value
    if layout == "haswell":
        return value & 0xF0FF | (value >> 16 & 1) << 11
    return (value << 8 | value >> 24) & 0xFFFF_FFFF


def vmcs(layout: str = "haswell", *, revision: int | None = None, abort: int = 0, **values: int) -> bytes:
    """Write a VMCS; ``values`` replaces defaults by field name. Fields that the layout lacks are left out."""
    page = bytearray(PAGE)
    struct.pack_into("<II", page, 0, REVISIONS[layout] if revision is None else revision, abort)
    unknown = values.keys() - DEFAULTS.keys()
    if unknown:
        raise ValueError(f"no such fields: {unknown}")
    for name, offset in offsets(layout).items():
        value = _stored(layout, name, values.get(name, DEFAULTS[name]))
        size = _size(layout, name)
        page[offset : offset + size] = value.to_bytes(size, "little")
    return bytes(page)


GUEST_FIELDS = tuple(name for name in DEFAULTS if name.startswith("guest_"))


def never_launched(layout: str = "haswell", **values: int) -> bytes:
    """Write a VMCS whose controls and host state are set and whose guest state is all zero."""
    return vmcs(layout, **{**dict.fromkeys(GUEST_FIELDS, 0), **values})


def vmxon(revision: int = 0x12) -> bytes:
    """Write a VMXON region: a revision identifier, then nothing."""
    return struct.pack("<I", revision).ljust(PAGE, b"\0")


# VMCB: offset, size, and what KVM leaves there for a halted 64-bit Linux guest.
VMCB_FIELDS = {
    "intercept_cr": (0x00, 4, 0x0010_0010),
    "intercept_dr": (0x04, 4, 0x00FF_00FF),
    "intercept_exceptions": (0x08, 4, 0x0006_0042),
    "intercept_misc1": (0x0C, 4, 0xBD4C_8027),
    "intercept_misc2": (0x10, 4, 0x6E7F),
    "iopm": (0x40, 8, 0x0FA3_8000),
    "msrpm": (0x48, 8, 0x02A2_E000),
    "asid": (0x58, 4, 1),
    "tlb_control": (0x5C, 1, 0),
    "v_intr": (0x60, 8, 0x0100_0001),
    "exit_code": (0x70, 8, 0x78),
    "nested": (0x90, 8, 1),
    "event_injection": (0xA8, 8, 0),
    "ncr3": (0xB0, 8, 0x02A1_7000),
    "clean": (0xC0, 4, 0xDF7),
    "vmsa": (0x108, 8, 0),
    "cs_selector": (0x410, 2, 0x10),
    "cs_attributes": (0x412, 2, 0xA9B),
    "cs_limit": (0x414, 4, 0xFFFF_FFFF),
    "tr_selector": (0x490, 2, 0x40),
    "tr_attributes": (0x492, 2, 0x8B),
    "tr_base": (0x498, 8, 0xFFFF_FE00_0000_3000),
    "cpl": (0x4CB, 1, 0),
    "efer": (0x4D0, 8, 0x1D01),
    "cr4": (0x548, 8, 0x0035_06B0),
    "cr3": (0x550, 8, 0x01E3_A000),
    "cr0": (0x558, 8, 0x8005_0033),
    "dr7": (0x560, 8, 0x400),
    "dr6": (0x568, 8, 0xFFFF_0FF0),
    "rflags": (0x570, 8, 0x202),
    "rip": (0x578, 8, 0xFFFF_FFFF_9B21_02AA),
    "rsp": (0x5D8, 8, 0xFFFF_FFFF_9C20_3E90),
    "g_pat": (0x668, 8, 0x0007_0406_0007_0406),
}


def vmcb(**values: int) -> bytes:
    """Write a VMCB; ``values`` replaces defaults by field name."""
    page = bytearray(PAGE)
    unknown = values.keys() - VMCB_FIELDS.keys()
    if unknown:
        raise ValueError(f"no such fields: {unknown}")
    for name, (offset, size, default) in VMCB_FIELDS.items():
        page[offset : offset + size] = values.get(name, default).to_bytes(size, "little")
    return bytes(page)


def host_save_area() -> bytes:
    """Write what VMRUN saves of the host: a save area with EFER.SVME, under a control area of zeros."""
    return bytes(0x400) + vmcb()[0x400:]


def xen_host_vmcb() -> bytes:
    """Write Xen's per-CPU host VMCB, which VMLOAD and VMSAVE use: no intercepts, no ASID, no nCR3."""
    return host_save_area()


def sev_es_vmcb(**values: int) -> bytes:
    """Write the VMCB of a guest with encrypted state: the control area, a VMSA, and no save area."""
    page = vmcb(**{"nested": 0b111, "vmsa": 0x0345_6000, **values})
    return page[:0x400].ljust(PAGE, b"\0")
