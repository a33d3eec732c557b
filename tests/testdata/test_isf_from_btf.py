"""The symbol table made from BTF and kallsyms: types, bit fields, KASLR, banner."""

from __future__ import annotations

import base64
import gzip
import struct

import isf_from_btf
import pytest
from isf_from_btf import Kind


class BtfWriter:
    """Builds BTF type by type; each method returns the number of the new type."""

    def __init__(self):
        self.strings, self.types, self.count = b"\0", b"", 0

    def string(self, text):
        if not text:
            return 0
        offset = len(self.strings)
        self.strings += text.encode() + b"\0"
        return offset

    def add(self, kind, name, value=0, items=(), vlen=0, flag=False):
        info = kind << 24 | vlen | flag << 31
        self.types += struct.pack("<III", self.string(name), info, value)
        self.types += b"".join(struct.pack(f"<{len(item)}I", *item) for item in items)
        self.count += 1
        return self.count

    def integer(self, name, size, signed=False):
        return self.add(Kind.INT, name, size, [(signed << 24 | 8 * size,)])

    def struct(self, name, size, members, kind=Kind.STRUCT, flag=False):
        items = [(self.string(member), number, bits) for member, number, bits in members]
        return self.add(kind, name, size, items, len(items), flag)

    def data(self):
        header = struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(self.types), len(self.types), len(self.strings))
        return header + self.types + self.strings


@pytest.fixture
def btf():
    """A kernel of six structs."""
    w = BtfWriter()
    long = w.integer("long unsigned int", 8)
    integer = w.integer("unsigned int", 4)
    char = w.integer("char", 1, signed=True)
    w.struct("list_head", 16, [("next", w.count + 2, 0), ("prev", w.count + 2, 64)])
    w.add(Kind.PTR, "", w.count)  # to list_head
    const = w.add(Kind.CONST, "", integer)
    w.add(Kind.TYPEDEF, "u32", const)
    comm = w.add(Kind.ARRAY, "", 0, [(char, long, 16)])
    inner = w.struct("", 8, [("a", integer, 0), ("b", w.count, 32)])
    w.struct("task_struct", 40, [("pid", w.count - 2, 0), ("comm", comm, 64), ("", inner, 192)])
    w.struct("flags", 4, [("low", integer, 3 << 24 | 0), ("high", integer, 5 << 24 | 3)], flag=True)
    w.add(Kind.ENUM, "zone", 4, [(w.string("DMA"), 0), (w.string("NONE"), 0xFFFF_FFFF)], 2)
    w.add(Kind.VAR, "runqueues", w.count - 1, [(0,)])
    return w.data()


KALLSYMS = """\
0000000000010000 A runqueues
ffffffffa3000000 T _text
ffffffffa3001000 T start_kernel
ffffffffa4000000 D linux_banner
ffffffffa4001000 D init_task
ffffffffa4002000 D something
ffffffffa4003000 d __already_done.5
ffffffffc0001000 t kvm_init\t[kvm]
"""


@pytest.fixture
def isf(btf):
    return isf_from_btf.convert(btf, KALLSYMS, "Linux version 9.9\n", "vmlinux")


def test_a_struct_has_its_members_with_offsets_and_types(isf):
    task = isf["user_types"]["task_struct"]
    assert (task["kind"], task["size"]) == ("struct", 40)
    assert task["fields"]["comm"] == {
        "offset": 8,
        "type": {"kind": "array", "count": 16, "subtype": {"kind": "base", "name": "char"}},
    }


def test_an_anonymous_member_is_marked_and_its_type_named(isf):
    field = isf["user_types"]["task_struct"]["fields"]["unnamed_field_18"]
    assert field["anonymous"]
    assert set(isf["user_types"][field["type"]["name"]]["fields"]) == {"a", "b"}


def test_a_struct_may_point_to_itself(isf):
    assert isf["user_types"]["list_head"]["fields"]["next"]["type"] == {
        "kind": "pointer",
        "subtype": {"kind": "struct", "name": "list_head"},
    }


def test_bit_fields(isf):
    fields = isf["user_types"]["flags"]["fields"]
    assert [(f["offset"], f["type"]["bit_position"], f["type"]["bit_length"]) for f in fields.values()] == [
        (0, 0, 3),
        (0, 3, 5),
    ]


def test_a_negative_enum_constant_makes_the_base_signed(isf):
    zone = isf["enums"]["zone"]
    assert zone["constants"] == {"DMA": 0, "NONE": -1}
    assert isf["base_types"][zone["base"]]["signed"]


def test_kaslr_is_taken_out_of_addresses_of_the_kernel_only(isf):
    assert isf["symbols"]["_text"]["address"] == 0xFFFF_FFFF_8100_0000
    assert isf["symbols"]["init_task"]["address"] == 0xFFFF_FFFF_8200_1000
    assert isf["symbols"]["runqueues"]["address"] == 0x10000  # an offset within per-CPU data


def test_symbols_are_typed_by_declaration_by_btf_or_not_at_all(isf):
    types = {name: symbol["type"] for name, symbol in isf["symbols"].items()}
    assert types["init_task"] == {"kind": "struct", "name": "task_struct"}
    assert types["runqueues"] == {"kind": "struct", "name": "flags"}
    assert types["start_kernel"] == {"kind": "function"}
    assert types["something"] == {"kind": "base", "name": "void"}


def test_symbols_of_modules_and_noise_are_left_out(isf):
    assert not {"kvm_init", "__already_done.5"} & set(isf["symbols"])


def test_the_banner_is_the_one_volatility_compares(isf):
    assert base64.b64decode(isf["symbols"]["linux_banner"]["constant_data"]) == b"Linux version 9.9\n\0"


def test_kallsyms_read_without_root_is_refused(btf):
    with pytest.raises(ValueError, match="as root"):
        isf_from_btf.convert(btf, KALLSYMS.replace("ffffffffa3000000", "0" * 16), "v", "vmlinux")


def test_something_else_than_btf_is_refused():
    with pytest.raises(ValueError, match="not BTF"):
        isf_from_btf.Btf(bytes(64))


def test_offsets_of_members_through_anonymous_ones(btf):
    assert isf_from_btf.Btf(btf).offset("task_struct", "b") == 28


def test_a_module_extends_the_types_of_its_kernel(btf):
    base = isf_from_btf.Btf(btf)
    own = b"own\0"
    record = struct.pack("<III", base.string_end, Kind.STRUCT << 24 | 1, 8) + struct.pack("<III", 1, 1, 0)
    header = struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(record), len(record), len(own))
    module = isf_from_btf.Btf(header + record + own, base)
    assert module.find(Kind.STRUCT, "own").value == 8
    assert module.offset("task_struct", "comm") == 8


def test_the_command_reads_gzipped_input_and_writes_xz(btf, tmp_path, capsys):
    (tmp_path / "btf.gz").write_bytes(gzip.compress(btf))
    (tmp_path / "kallsyms").write_text(KALLSYMS)
    (tmp_path / "version").write_text("Linux version 9.9\n")
    output = tmp_path / "linux" / "k.json.xz"
    arguments = [
        "--btf",
        tmp_path / "btf.gz",
        "--kallsyms",
        tmp_path / "kallsyms",
        "--version",
        tmp_path / "version",
    ]
    assert isf_from_btf.main([*map(str, arguments), "-o", str(output)]) == 0
    assert output.read_bytes().startswith(b"\xfd7zXZ")
    assert "symbols" in capsys.readouterr().out
