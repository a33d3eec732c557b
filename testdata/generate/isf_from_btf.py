"""Make a Volatility 3 symbol table (ISF) of a running Linux kernel, without its debug package.

Three files that every Debian, Ubuntu, Fedora ... kernel of the last years offers to
root are enough::

    cat /sys/kernel/btf/vmlinux > btf          # all types of the kernel
    cat /proc/kallsyms > kallsyms              # all symbols (as root, or addresses are 0)
    cat /proc/version > version                # the banner Volatility looks for
    python isf_from_btf.py --btf btf --kallsyms kallsyms --version version -o linux/NAME.json.xz

Put the result below ``DIRECTORY/linux/`` and run ``vol -s DIRECTORY ...``. All three
may be gzipped. See docs/isf-from-btf.md for what such a table lacks.

BTF: Documentation/bpf/btf.rst of the kernel. ISF: schema 6.2.0 of Volatility 3.
"""

from __future__ import annotations

import argparse
import base64
import gzip
import hashlib
import json
import lzma
import struct
import sys
from collections.abc import Iterator, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

VERSION = "1.0.0"
SCHEMA = "6.2.0"
#: Where a kernel without KASLR has ``_text``; the table holds these addresses.
LINKED_TEXT = 0xFFFF_FFFF_8100_0000
KERNEL_IMAGE = 0xFFFF_FFFF_8000_0000
BTF_MAGIC = 0xEB9F

Type = dict[str, Any]


class Kind(IntEnum):
    """Kinds of BTF types (include/uapi/linux/btf.h)."""

    VOID = 0
    INT = 1
    PTR = 2
    ARRAY = 3
    STRUCT = 4
    UNION = 5
    ENUM = 6
    FWD = 7
    TYPEDEF = 8
    VOLATILE = 9
    CONST = 10
    RESTRICT = 11
    FUNC = 12
    FUNC_PROTO = 13
    VAR = 14
    DATASEC = 15
    FLOAT = 16
    DECL_TAG = 17
    TYPE_TAG = 18
    ENUM64 = 19


QUALIFIERS = (Kind.TYPEDEF, Kind.VOLATILE, Kind.CONST, Kind.RESTRICT, Kind.TYPE_TAG)
AGGREGATES = (Kind.STRUCT, Kind.UNION)
ENUMS = (Kind.ENUM, Kind.ENUM64)

#: Words after the common header: (format of one, how many; None is "vlen of them").
TRAILERS: dict[Kind, tuple[str, int | None]] = {
    Kind.INT: ("<I", 1),
    Kind.ARRAY: ("<III", 1),
    Kind.STRUCT: ("<III", None),
    Kind.UNION: ("<III", None),
    Kind.ENUM: ("<Ii", None),
    Kind.FUNC_PROTO: ("<II", None),
    Kind.VAR: ("<I", 1),
    Kind.DATASEC: ("<III", None),
    Kind.DECL_TAG: ("<i", 1),
    Kind.ENUM64: ("<III", None),
}


class BtfType(NamedTuple):
    """One type: ``value`` is its size or the type it refers to, by kind."""

    kind: Kind
    name: str
    value: int
    flag: bool
    items: list[tuple[int, ...]]


class Btf:
    """The types of a kernel or, with ``base``, of one of its modules (split BTF)."""

    def __init__(self, data: bytes, base: Btf | None = None) -> None:
        """Parse ``data``, the contents of /sys/kernel/btf/* or of a ``.BTF`` section."""
        header = struct.unpack_from("<HBBIIIII", data)
        magic, _, _, header_size, type_offset, type_size, string_offset, string_size = header
        if magic != BTF_MAGIC:
            raise ValueError(f"not BTF: magic {magic:#x}")
        self._base: Btf | None = base
        self._first_string: int = base.string_end if base else 0
        self._strings = data[header_size + string_offset :][:string_size]
        self.string_end: int = self._first_string + string_size
        self.types: list[BtfType] = list(base.types) if base else [BtfType(Kind.VOID, "void", 0, False, [])]
        self.types += self._parse(data[header_size + type_offset :][:type_size])

    def _parse(self, data: bytes) -> Iterator[BtfType]:
        position = 0
        while position < len(data):
            name, info, value = struct.unpack_from("<III", data, position)
            position += 12
            kind = Kind(info >> 24 & 0x1F)
            layout, count = TRAILERS.get(kind, ("<I", 0))
            end = position + struct.calcsize(layout) * (info & 0xFFFF if count is None else count)
            items = list(struct.iter_unpack(layout, data[position:end]))
            position = end
            yield BtfType(kind, self.string(name), value, bool(info >> 31), items)

    def string(self, offset: int) -> str:
        """Return the string at an offset into the string section."""
        if self._base and offset < self._first_string:
            return self._base.string(offset)
        start = offset - self._first_string
        return self._strings[start : self._strings.index(b"\0", start)].decode()

    def strip(self, number: int) -> int:
        """Return the type behind typedefs and qualifiers."""
        while self.types[number].kind in QUALIFIERS:
            number = self.types[number].value
        return number

    def size(self, number: int) -> int:
        """Return the size of a type in bytes."""
        btf_type = self.types[self.strip(number)]
        if btf_type.kind is Kind.PTR:
            return 8
        if btf_type.kind is Kind.ARRAY:
            element, _, count = btf_type.items[0]
            return count * self.size(element)
        return btf_type.value

    def find(self, kind: Kind, name: str) -> BtfType:
        """Return the last complete type of that kind and name (a module's own before the kernel's)."""
        for btf_type in reversed(self.types):
            if btf_type.kind is kind and btf_type.name == name:
                return btf_type
        raise KeyError(f"{kind.name} {name}")

    def find_size(self, name: str) -> int:
        """Return the size of a struct in bytes."""
        return self.find(Kind.STRUCT, name).value

    def offset(self, struct_name: str, path: str) -> int:
        """Return the offset in bytes of a member such as ``arch.mmu``, through anonymous members too."""
        current, total = self.find(Kind.STRUCT, struct_name), 0
        for name in path.split("."):
            offset, number = self._member(current, name)
            total += offset
            current = self.types[self.strip(number)]
        return total

    def _member(self, aggregate: BtfType, name: str) -> tuple[int, int]:
        for name_offset, number, bits in aggregate.items:
            offset = (bits & 0xFFFFFF if aggregate.flag else bits) // 8
            member_name = self.string(name_offset)
            if member_name == name:
                return offset, number
            inner = self.types[self.strip(number)]
            if not member_name and inner.kind in AGGREGATES:
                try:
                    inner_offset, found = self._member(inner, name)
                except KeyError:
                    continue
                return offset + inner_offset, found
        raise KeyError(f"{aggregate.name}.{name}")


def base_type(kind: str, size: int, signed: bool) -> Type:
    """Return an ISF base type."""
    return {"kind": kind, "size": size, "signed": signed, "endian": "little"}


class Converter:
    """Collects the ISF sections ``base_types``, ``user_types`` and ``enums`` from BTF."""

    def __init__(self, btf: Btf) -> None:
        """Convert every named type of ``btf`` and whatever those refer to."""
        self.btf = btf
        self.base_types: dict[str, Type] = {
            "void": base_type("void", 0, False),
            "pointer": base_type("int", 8, False),
        }
        self.user_types: dict[str, Type] = {}
        self.enums: dict[str, Type] = {}
        self._typedef_names: dict[int, str] = {}
        self._defined = {t.name for t in btf.types if t.kind in AGGREGATES and t.name}
        for btf_type in btf.types:
            if btf_type.kind is Kind.TYPEDEF:
                target = btf.strip(btf_type.value)
                if btf.types[target].kind in (*AGGREGATES, *ENUMS) and not btf.types[target].name:
                    self._typedef_names.setdefault(target, btf_type.name)
        for btf_type in btf.types:
            if btf_type.kind is Kind.INT:
                self._integer(btf_type)
        for number, btf_type in enumerate(btf.types):
            name = btf_type.name or self._typedef_names.get(number, "")
            if btf_type.kind in AGGREGATES and name:
                self._aggregate(number, name)
            elif btf_type.kind in ENUMS and name:
                self._enum(number, name)

    def reference(self, number: int) -> Type:
        """Return the ISF description of a type as used by a member or a symbol."""
        number = self.btf.strip(number)
        btf_type = self.btf.types[number]
        kind = btf_type.kind
        if kind is Kind.VOID:
            return {"kind": "base", "name": "void"}
        if kind is Kind.INT:
            return {"kind": "base", "name": self._integer(btf_type)}
        if kind is Kind.FLOAT:
            self.base_types.setdefault(btf_type.name, base_type("float", btf_type.value, True))
            return {"kind": "base", "name": btf_type.name}
        if kind is Kind.PTR:
            return {"kind": "pointer", "subtype": self.reference(btf_type.value)}
        if kind is Kind.ARRAY:
            element, _, count = btf_type.items[0]
            return {"kind": "array", "count": count, "subtype": self.reference(element)}
        if kind in AGGREGATES:
            return {"kind": _isf_kind(kind), "name": self._aggregate(number, self._name(number))}
        if kind in ENUMS:
            return {"kind": "enum", "name": self._enum(number, self._name(number))}
        if kind is Kind.FWD:
            isf_kind = "union" if btf_type.flag else "struct"
            if btf_type.name not in self._defined:
                self.user_types.setdefault(btf_type.name, {"kind": isf_kind, "size": 0, "fields": {}})
            return {"kind": isf_kind, "name": btf_type.name}
        return {"kind": "function"}

    def _name(self, number: int) -> str:
        """Return a type's name, its typedef's, or one made from its number."""
        own = self.btf.types[number].name
        if own:
            return own
        typedef = self._typedef_names.get(number)
        return typedef if typedef and typedef not in self._defined else f"unnamed_{number:x}"

    def _integer(self, btf_type: BtfType) -> str:
        encoding = btf_type.items[0][0] >> 24 & 0xF
        is_char = encoding & 2 or btf_type.name in ("char", "signed char", "unsigned char")
        kind = "bool" if encoding & 4 else "char" if is_char else "int"
        signed = bool(encoding & 1) or btf_type.name == "char"
        self.base_types.setdefault(btf_type.name, base_type(kind, btf_type.value, signed))
        return btf_type.name

    def _enum(self, number: int, name: str) -> str:
        if name in self.enums:
            return name
        btf_type = self.btf.types[number]
        constants = {}
        for name_offset, *words in btf_type.items:
            value = words[0] if btf_type.kind is Kind.ENUM else words[0] | words[1] << 32
            constants[self.btf.string(name_offset)] = value
        is_signed = any(value < 0 for value in constants.values())
        base = f"enum_base_{'s' if is_signed else 'u'}{8 * btf_type.value}"
        self.base_types.setdefault(base, base_type("int", btf_type.value, is_signed))
        self.enums[name] = {"size": btf_type.value, "base": base, "constants": constants}
        return name

    def _aggregate(self, number: int, name: str) -> str:
        if self.user_types.get(name, {"size": 0})["size"]:
            return name
        btf_type = self.btf.types[number]
        fields: dict[str, Any] = {}
        # Entered before its members, which may point back to it.
        self.user_types[name] = {"kind": _isf_kind(btf_type.kind), "size": btf_type.value, "fields": fields}
        for name_offset, member, bits in btf_type.items:
            width = bits >> 24 if btf_type.flag else 0
            bit_offset = bits & 0xFFFFFF if btf_type.flag else bits
            field = (
                self._bitfield(member, bit_offset, width, btf_type.value)
                if width
                else {
                    "type": self.reference(member),
                    "offset": bit_offset // 8,
                }
            )
            field_name = self.btf.string(name_offset)
            if not field_name:
                field_name = f"unnamed_field_{field['offset']:x}"
                field["anonymous"] = True
            while field_name in fields:
                field_name += "_"
            fields[field_name] = field
        return name

    def _bitfield(self, member: int, bit_offset: int, width: int, aggregate_size: int) -> Type:
        """Return a bit field within its storage unit, moved back if the unit would leave the aggregate."""
        unit = self.btf.size(member)
        offset = bit_offset // (8 * unit) * unit
        if offset + unit > aggregate_size:
            offset = max(0, aggregate_size - unit)
        isf_type = {
            "kind": "bitfield",
            "bit_position": bit_offset - 8 * offset,
            "bit_length": width,
            "type": self.reference(member),
        }
        return {"type": isf_type, "offset": offset}


def _isf_kind(kind: Kind) -> str:
    return "struct" if kind is Kind.STRUCT else "union"


# BTF describes per-CPU variables only. These are the other data symbols that
# Volatility's Linux plugins read as typed objects, with their types as the kernel's
# sources declare them: "T" names a struct, union or base type, "*T" a pointer to it,
# "[N]T" an array; "()" is a function.
DATA_SYMBOLS = {
    "__cpu_online_mask": "cpumask",
    "__cpu_possible_mask": "cpumask",
    "__per_cpu_offset": "[8192]long unsigned int",
    "_totalram_pages": "atomic64_t",
    "boot_cpu_data": "cpuinfo_x86",
    "bpf_kallsyms": "list_head",
    "cap_last_cap": "int",
    "early_top_pgt": "[512]pgd_t",
    "ftrace_list_end": "ftrace_ops",
    "ftrace_mod_maps": "list_head",
    "ftrace_ops_list": "*ftrace_ops",
    "ftrace_ops_trampoline_list": "list_head",
    "ia32_sys_call_table": "[451]*()",
    "idt_table": "[256]gate_struct",
    "inet_protos": "[256]*net_protocol",
    "init_cred": "cred",
    "init_files": "files_struct",
    "init_fs": "fs_struct",
    "init_mm": "mm_struct",
    "init_net": "net",
    "init_nsproxy": "nsproxy",
    "init_pid_ns": "pid_namespace",
    "init_task": "task_struct",
    "init_top_pgt": "[512]pgd_t",
    "init_user_ns": "user_namespace",
    "init_uts_ns": "uts_namespace",
    "iomem_resource": "resource",
    "ioport_resource": "resource",
    "jiffies": "long unsigned int",
    "jiffies_64": "long unsigned int",
    "kallsyms_num_syms": "unsigned int",
    "keyboard_notifier_list": "atomic_notifier_head",
    "level4_kernel_pgt": "[512]pgd_t",
    "log_buf": "*char",
    "log_buf_len": "unsigned int",
    "mod_tree": "mod_tree_root",
    "module_addr_max": "long unsigned int",
    "module_addr_min": "long unsigned int",
    "module_kset": "*kset",
    "modules": "list_head",
    "net_namespace_list": "list_head",
    "node_data": "[1024]*pglist_data",
    "nr_cpu_ids": "unsigned int",
    "page_offset_base": "long unsigned int",
    "phys_base": "long unsigned int",
    "prb": "*printk_ringbuffer",
    "proc_root": "proc_dir_entry",
    "prog_idr": "idr",
    "rcu_state": "rcu_state",
    "saved_command_line": "*char",
    "slab_caches": "list_head",
    "socket_file_ops": "file_operations",
    "sockfs_dentry_operations": "dentry_operations",
    "super_blocks": "list_head",
    "swapper_pg_dir": "[512]pgd_t",
    "sys_call_table": "[451]*()",
    "taint_flags": "[19]taint_flag",
    "tainted_mask": "long unsigned int",
    "tk_core": "tk_core",
    "tty_drivers": "list_head",
    "vmalloc_base": "long unsigned int",
    "vmap_area_list": "list_head",
    "vmemmap_base": "long unsigned int",
}

#: Symbols no plugin asks for, a third of all.
NOISE = (
    ".L",
    "__UNIQUE_ID",
    "__already_done.",
    "__crc_",
    "__func__.",
    "__initcall__kmod",
    "__key.",
    "__ksymtab",
    "__kstrtab",
    "__pfx_",
    "___tp_str",
)


def declared_type(text: str, converter: Converter) -> Type:
    """Return the ISF type for the notation of ``DATA_SYMBOLS``; KeyError if the kernel lacks it."""
    if text.startswith("["):
        count, _, element = text[1:].partition("]")
        return {"kind": "array", "count": int(count), "subtype": declared_type(element, converter)}
    if text.startswith("*"):
        return {"kind": "pointer", "subtype": declared_type(text[1:], converter)}
    if text == "()":
        return {"kind": "function"}
    if text in converter.user_types:
        return {"kind": converter.user_types[text]["kind"], "name": text}
    if text in converter.base_types:
        return {"kind": "base", "name": text}
    raise KeyError(text)


def parse_kallsyms(text: str) -> Iterator[tuple[str, int, bool]]:
    """Yield ``(name, address without KASLR, is a function)`` of each symbol of the kernel proper."""
    rows = [line.split() for line in text.splitlines()]
    rows = [row for row in rows if len(row) == 3]  # a module's symbols have a fourth word
    text_address = next((int(row[0], 16) for row in rows if row[2] == "_text"), 0)
    if not text_address:
        raise ValueError("kallsyms has no addresses: read /proc/kallsyms as root")
    slide = text_address - LINKED_TEXT
    for address_text, letter, name in rows:
        address = int(address_text, 16)
        yield name, address - slide if address >= KERNEL_IMAGE else address, letter in "tTwW"


def convert(btf: bytes, kallsyms: str, version: str, name: str) -> dict[str, Any]:
    """Return the ISF of a kernel."""
    parsed = Btf(btf)
    converter = Converter(parsed)
    if "timekeeper" in converter.user_types and "seqcount_raw_spinlock" in converter.user_types:
        # An anonymous struct of kernel/time/timekeeping.c, of which BTF knows nothing.
        converter.user_types["tk_core"] = {
            "kind": "struct",
            "size": 8 + converter.user_types["timekeeper"]["size"],
            "fields": {
                "seq": {"type": {"kind": "struct", "name": "seqcount_raw_spinlock"}, "offset": 0},
                "timekeeper": {"type": {"kind": "struct", "name": "timekeeper"}, "offset": 8},
            },
        }
    per_cpu = {t.name: t.value for t in parsed.types if t.kind is Kind.VAR}
    symbols: dict[str, Any] = {}
    for symbol, address, is_function in parse_kallsyms(kallsyms):
        if symbol in symbols or symbol.startswith(NOISE):
            continue
        isf_type: Type = {"kind": "function"} if is_function else {"kind": "base", "name": "void"}
        if symbol in DATA_SYMBOLS:
            try:
                isf_type = declared_type(DATA_SYMBOLS[symbol], converter)
            except KeyError as error:
                print(f"{symbol}: this kernel has no type {error}", file=sys.stderr)
        elif symbol in per_cpu:
            isf_type = converter.reference(per_cpu[symbol])
        symbols[symbol] = {"address": address, "type": isf_type}
    banner = version.rstrip("\0\n").encode() + b"\n\0"
    char = {"kind": "base", "name": "char"}
    symbols["linux_banner"]["type"] = {"kind": "array", "count": len(banner), "subtype": char}
    symbols["linux_banner"]["constant_data"] = base64.b64encode(banner).decode()
    origin = {"name": name, "hash_type": "sha256", "hash_value": hashlib.sha256(btf).hexdigest()}
    return {
        "metadata": {
            "producer": {"name": "isf_from_btf", "version": VERSION},
            "format": SCHEMA,
            "linux": {
                "symbols": [{"kind": "system-map", **origin}],
                "types": [{"kind": "dwarf", **origin}],
            },
        },
        "base_types": converter.base_types,
        "user_types": converter.user_types,
        "enums": converter.enums,
        "symbols": symbols,
    }


def read(path: Path) -> bytes:
    """Return the contents of a file, unpacked if it is gzipped."""
    data = path.read_bytes()
    return gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data


def write(isf: dict[str, Any], path: Path) -> int:
    """Write an ISF, packed if ``path`` ends in ``.xz``; return its size on disk."""
    data = json.dumps(isf, separators=(",", ":"), sort_keys=True).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.write_bytes(lzma.compress(data, preset=9) if path.suffix == ".xz" else data)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Make a Volatility 3 symbol table from BTF and kallsyms.")
    parser.add_argument("--btf", type=Path, required=True, help="copy of /sys/kernel/btf/vmlinux")
    parser.add_argument("--kallsyms", type=Path, required=True, help="copy of /proc/kallsyms, read as root")
    parser.add_argument("--version", type=Path, required=True, help="copy of /proc/version")
    parser.add_argument("-o", "--output", type=Path, required=True, help="NAME.json or NAME.json.xz")
    args = parser.parse_args(argv)
    isf = convert(read(args.btf), read(args.kallsyms).decode(), read(args.version).decode(), "vmlinux")
    size = write(isf, args.output)
    counts = ", ".join(f"{len(isf[section])} {section}" for section in ("user_types", "enums", "symbols"))
    print(f"{args.output}: {size} bytes; {counts}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
