"""Turns what a capture's machines reported into ``truth.json`` and its page lists.

The sources, none of which is EPT, NPT or code of the plugins:

* the monitor's memory slots, the frames /proc/PID/pagemap gives for them and the
  bytes /proc/PID/mem shows there (``guest/report.c``, run in the host);
* registers, as KVM hands them to the monitor;
* consoles: ``ps``, /proc/iomem, /proc/kallsyms, /proc/version at each level;
* addresses of VMCSs and VMCBs: the host kernel's own list of virtual machines, read
  from the image with the types in its BTF, and under QEMU the emulator's log of VMRUN.
"""

from __future__ import annotations

import gzip
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from isf_from_btf import Btf

PAGE = 4096
FRAME = 0x000F_FFFF_FFFF_F000
VMCB_NESTED_CR3 = 0xB0
ZERO_SHA256 = "ad7facb2586fc6e966c004d7d1d16b024f5805ff7cb47c7a85dabd8b48892ca7"

Records = dict[tuple[str, str], bytes]
Fields = dict[str, Any]


# ---- reports


def records(stream: bytes) -> Records:
    """Return the records of ``guest/report.c`` by kind and name; later ones replace earlier ones."""
    found: Records = {}
    for match in re.finditer(rb"@@REPORT (\w+) (\S+) (\d+)\n", stream):
        kind, name, size = match[1].decode(), match[2].decode(), int(match[3])
        data = stream[match.end() : match.end() + size]
        if len(data) == size:
            found[kind, name] = data
    return found


def text(found: Records, name: str) -> str:
    """Return a reported file as text, empty if there is none."""
    return found.get(("file", name), b"").decode("utf-8", "replace").replace("\r", "")


def processes(ps: str) -> list[Fields]:
    """Return the rows of ``ps -o pid,ppid,comm,args``, without ``ps`` itself."""
    rows = re.findall(r"^ *(\d+) +(\d+) (.{16}) (.*)$", ps, re.MULTILINE)
    return [
        {"pid": int(pid), "ppid": int(ppid), "comm": comm.strip(), "args": args.strip()}
        for pid, ppid, comm, args in rows
        if comm.strip() != "ps"
    ]


def kallsyms(lines: str) -> dict[str, str]:
    """Return the addresses of the symbols asked for."""
    return {name: f"0x{address}" for address, name in re.findall(r"^([0-9a-f]{16}) \w (\S+)", lines, re.MULTILINE)}


def section(console: str, name: str) -> str:
    """Return what the guest's console shows below ``== name``."""
    return console.partition(f"== {name}\n")[2].partition("\n== ")[0]


def memslots(lines: str) -> list[Fields]:
    """Return the ``memslot`` lines of a monitor."""
    rows = re.findall(r"memslot (\d+) gpa=0x([0-9a-f]+) size=0x([0-9a-f]+) hva=0x([0-9a-f]+) (\S+)", lines)
    return [
        {
            "slot": int(slot),
            "gpa": hex(int(gpa, 16)),
            "size": hex(int(size, 16)),
            "hva": hex(int(hva, 16)),
            "what": what,
        }
        for slot, gpa, size, hva, what in rows
    ]


def registers(lines: str) -> list[Fields]:
    """Return the registers of each vCPU, from ``vmm.c`` or from QEMU's ``info registers -a``."""
    if "vcpu 0 rip=" in lines:
        return [
            {"vcpu": int(vcpu), **dict(re.findall(r"(\w+)=(0x[0-9a-f]+)", rest))}
            for vcpu, rest in re.findall(r"vcpu (\d+) (rip=.*)", lines)
        ]
    wanted = {
        "rip": r"RIP=([0-9a-f]+)",
        "rsp": r"RSP=([0-9a-f]+)",
        "rflags": r"RFL=([0-9a-f]+)",
        "cr0": r"CR0=([0-9a-f]+)",
        "cr2": r"CR2=([0-9a-f]+)",
        "cr3": r"CR3=([0-9a-f]+)",
        "cr4": r"CR4=([0-9a-f]+)",
        "efer": r"EFER=([0-9a-f]+)",
        "gdt_base": r"GDT= *([0-9a-f]+)",
        "idt_base": r"IDT= *([0-9a-f]+)",
        "gs_base": r"GS =[0-9a-f]+ ([0-9a-f]+)",
        "fs_base": r"FS =[0-9a-f]+ ([0-9a-f]+)",
    }
    cpus = []
    for vcpu, block in enumerate(re.split(r"CPU#\d+", lines)[1:]):
        found = {key: re.search(pattern, block) for key, pattern in wanted.items()}
        cpus.append({"vcpu": vcpu, **{key: hex(int(m[1], 16)) for key, m in found.items() if m}})
    return cpus


def pages(data: bytes) -> dict[int, tuple[int, str]]:
    """Return ``{gpa: (frame, sha256)}`` of a page report."""
    rows = (line.split() for line in data.decode().splitlines() if line and not line.startswith("#"))
    return {int(gpa, 16): (int(frame, 16), sha256) for gpa, frame, sha256 in rows}


def write_pages(path: Path, listed: Mapping[int, tuple[int, str]]) -> None:
    """Write a page list: sorted, gzipped, the same for the same pages."""
    lines = [f"{gpa:#x}\t{frame:#x}\t{sha256}\n" for gpa, (frame, sha256) in sorted(listed.items())]
    body = "# gpa\thost_frame\tsha256\n" + "".join(lines)
    path.write_bytes(gzip.compress(body.encode(), 9, mtime=0))


# ---- the host kernel's own list of virtual machines


class HostKernel:
    """Reads the host kernel's KVM objects from the image, by the types in its BTF."""

    def __init__(self, raw: Path, btf: Btf, symbols: Mapping[str, str], iomem: str) -> None:
        """Find the kernel's page tables: its image lies where /proc/iomem says."""
        self._raw = raw.open("rb")
        self.btf = btf
        self.symbols = {name: int(address, 16) for name, address in symbols.items()}
        code = re.search(r"^ *([0-9a-f]+)-[0-9a-f]+ : Kernel code", iomem, re.MULTILINE)
        if not code:
            raise ValueError("no 'Kernel code' in /proc/iomem")
        self._root = self.symbols["init_top_pgt"] - self.symbols["_text"] + int(code[1], 16)

    def physical(self, hpa: int) -> int:
        """Return the quadword at a host-physical address."""
        self._raw.seek(hpa)
        return int(struct.unpack("<Q", self._raw.read(8))[0])

    def translate(self, va: int) -> int:
        """Return the host-physical address of a kernel address."""
        table = self._root
        for shift in (39, 30, 21, 12):
            entry = self.physical(table + 8 * (va >> shift & 0x1FF))
            if not entry & 1:
                raise ValueError(f"{va:#x} is not mapped in the host kernel")
            if shift == 12 or (entry & 0x80 and shift < 39):
                return (entry & FRAME & -(1 << shift)) | va & ((1 << shift) - 1)
            table = entry & FRAME
        raise AssertionError("the last level always maps")

    def read(self, va: int) -> int:
        """Return the quadword at a kernel address."""
        return self.physical(self.translate(va))

    def member(self, address: int, struct_name: str, path: str) -> int:
        """Return a 64-bit member."""
        return self.read(address + self.btf.offset(struct_name, path))

    def virtual_machines(self) -> Iterator[int]:
        """Yield the address of each ``struct kvm``."""
        head = self.symbols["vm_list"]
        node = self.read(head)
        while node != head:
            yield node - self.btf.offset("kvm", "vm_list")
            node = self.read(node)

    def vcpus(self, kvm: int) -> list[int]:
        """Return the vCPUs in the VM's xarray: one entry, or a node of 64."""
        entry = self.member(kvm, "kvm", "vcpu_array.xa_head")
        if entry & 3 != 2:
            return [entry] if entry else []
        slots = (entry & ~3) + self.btf.offset("xa_node", "slots")
        return [vcpu for vcpu in (self.read(slots + 8 * i) for i in range(64)) if vcpu]

    def memslots(self, kvm: int) -> list[Fields]:
        """Return the slots KVM itself has, ordered by guest-physical address."""
        slots = self.member(kvm, "kvm", "memslots")
        index = self.member(slots, "kvm_memslots", "node_idx") & 0xFFFFFFFF
        node_size = self.btf.find_size("rb_node")
        node_offset = self.btf.offset("kvm_memory_slot", "gfn_node") + index * node_size

        def below(node: int) -> Iterator[int]:
            if node:
                yield from below(self.member(node, "rb_node", "rb_left"))
                yield node - node_offset
                yield from below(self.member(node, "rb_node", "rb_right"))

        return [
            {
                "slot": self.member(slot, "kvm_memory_slot", "id") & 0xFFFF,
                "gpa": hex(self.member(slot, "kvm_memory_slot", "base_gfn") * PAGE),
                "size": hex(self.member(slot, "kvm_memory_slot", "npages") * PAGE),
                "hva": hex(self.member(slot, "kvm_memory_slot", "userspace_addr")),
            }
            for slot in below(self.member(slots, "kvm_memslots", "gfn_tree"))
        ]


def vmcb(kernel: HostKernel, hpa: int, **more: Any) -> Fields:
    """Describe a VMCB."""
    return {"kind": "vmcb", "hpa": hex(hpa), "slat_root": hex(kernel.physical(hpa + VMCB_NESTED_CR3)), **more}


def vmcs(kernel: HostKernel, hpa: int, root: int, **more: Any) -> Fields:
    """Describe a VMCS; its EPTP is the quadword in it that points at KVM's root."""
    found = [at for at in range(0, PAGE, 4) if kernel.physical(hpa + at) & FRAME == root and root]
    item = {"kind": "vmcs", "hpa": hex(hpa), "slat_root": hex(root), **more}
    if found:
        item |= {"eptp": hex(kernel.physical(hpa + found[0])), "eptp_offset": hex(found[0])}
    return item


def svm_structures(kernel: HostKernel, vcpu: int, own: Fields, shadow: Fields | None) -> Iterator[Fields]:
    """Yield the VMCBs of a vCPU; three of them if its guest runs a guest."""
    yield vmcb(kernel, kernel.member(vcpu, "vcpu_svm", "vmcb01.pa"), **own)
    if shadow:
        yield vmcb(kernel, kernel.member(vcpu, "vcpu_svm", "nested.vmcb02.pa"), **shadow)
        gpa = kernel.member(vcpu, "vcpu_svm", "nested.last_vmcb12_gpa")
        yield {"kind": "vmcb", "gpa": hex(gpa), "gpa_of": own["guest"], **shadow, "role": "nested"}


def vmx_structures(kernel: HostKernel, vcpu: int, own: Fields, shadow: Fields | None) -> Iterator[Fields]:
    """Yield the VMCSs of a vCPU; three of them if its guest runs a guest.

    The copy of the guest's own VMCS in the guest's memory may be stale, since KVM
    works on a cached one: that is where its EPTP is taken from.
    """
    page = kernel.translate(kernel.member(vcpu, "vcpu_vmx", "vmcs01.vmcs"))
    yield vmcs(kernel, page, kernel.member(vcpu, "kvm_vcpu", "arch.root_mmu.root.hpa") & FRAME, **own)
    if shadow:
        page = kernel.translate(kernel.member(vcpu, "vcpu_vmx", "nested.vmcs02.vmcs"))
        yield vmcs(kernel, page, kernel.member(vcpu, "kvm_vcpu", "arch.guest_mmu.root.hpa") & FRAME, **shadow)
        gpa = kernel.member(vcpu, "vcpu_vmx", "nested.current_vmptr")
        eptp = kernel.member(kernel.member(vcpu, "vcpu_vmx", "nested.cached_vmcs12"), "vmcs12", "ept_pointer")
        place = {"kind": "vmcs", "gpa": hex(gpa), "gpa_of": own["guest"], **shadow, "role": "nested"}
        yield place | {"slat_root": hex(eptp & FRAME), "eptp": hex(eptp)}


def control_structures(
    kernel: HostKernel, slat: str, names: Mapping[int, str], inner: Mapping[str, str]
) -> tuple[list[Fields], dict[str, list[Fields]]]:
    """Return the control structures, and by guest the slots KVM itself has.

    ``names`` maps the PID of a monitor to its guest, ``inner`` a guest to the guest it
    runs itself.
    """
    structures = svm_structures if slat == "npt" else vmx_structures
    found: list[Fields] = []
    slots = {}
    for kvm in kernel.virtual_machines():
        guest = names[kernel.member(kvm, "kvm", "userspace_pid") & 0xFFFFFFFF]
        slots[guest] = kernel.memslots(kvm)
        for number, vcpu in enumerate(kernel.vcpus(kvm)):
            own = {"guest": guest, "vcpu": number, "role": "current"}
            shadow = {"guest": inner[guest], "vcpu": number, "role": "shadow"} if guest in inner else None
            found += structures(kernel, vcpu, own, shadow)
    return found, slots


# ---- the whole


def guest_truth(found: Records, name: str) -> Fields:
    """Return what is known of one guest, except where its pages and control structures are."""
    console = text(found, f"{name}.console")
    listed = pages(found["pages", name])
    truth: Fields = {
        "name": name,
        "level": 2,
        "parent": "host",
        "running": False,
        "vmm_pid": int(text(found, f"{name}.pid") or 0),
        "pages_file": f"pages-{name}.tsv.gz",
        "pages_present": len(listed),
        "pages_zero": sum(sha256 == ZERO_SHA256 for _, sha256 in listed.values()),
        "memslots": memslots(text(found, f"{name}.slots")),
        "registers": registers(text(found, f"{name}.registers")),
    }
    banner = section(console, "version").strip()
    if banner:
        truth |= {
            "kernel": banner.split()[2],
            "version": banner,
            "cmdline": section(console, "cmdline").strip(),
            "processes": processes(section(console, "ps")),
            "kallsyms": kallsyms(section(console, "kallsyms")),
            "console": f"{name}.console.txt",
        }
    return truth


def host_truth(found: Records, memory_bytes: int, cpus: list[Fields]) -> Fields:
    """Return what is known of the host."""
    banner = text(found, "host.version").strip()
    parameters = re.findall(r"/sys/module/(\w+)/parameters/(\w+)=(\S*)", text(found, "host.parameters"))
    return {
        "kernel": banner.split()[2],
        "version": banner,
        "cmdline": text(found, "host.cmdline").strip(),
        "memory_bytes": memory_bytes,
        "processes": processes(text(found, "host.ps")),
        "kallsyms": kallsyms(text(found, "host.kallsyms")),
        "kvm_parameters": {f"{module}.{key}": value for module, key, value in parameters},
        "iomem": [line for line in text(found, "host.iomem").splitlines() if "RAM" in line or "Kernel" in line],
        "cpus": cpus,
        "console": "host.console.txt",
    }
