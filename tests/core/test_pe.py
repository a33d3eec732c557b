"""Images are identified by what they say, whatever is paged out, and whatever they lie about."""

from __future__ import annotations

import importlib.util
import random
import struct
from pathlib import Path

import pefile
import pytest
from builders.windows_pe import DATA, GUID, GUID_TEXT, NT, PAGE, RDATA, RESOURCES, Pe

from volatility3_ept.core import pe, rsds
from volatility3_ept.core.rsds import Pdb


class Reader:
    """Reads an image's pages, and counts the bytes that were asked for."""

    def __init__(self, image: Pe, without: tuple[int, ...] = ()) -> None:
        self.pages: dict[int, bytearray] = {}
        for rva, data in image.parts().items():
            page = self.pages.setdefault(rva & -PAGE, bytearray(PAGE))
            page[rva % PAGE : rva % PAGE + len(data)] = data
        for rva in without:
            del self.pages[rva]
        self.asked = 0

    def __call__(self, rva: int, length: int) -> bytes | None:
        self.asked += length
        pages = range(rva & -PAGE, rva + length, PAGE)
        if any(page not in self.pages for page in pages):
            return None
        joined = b"".join(self.pages[page] for page in pages)
        return bytes(joined[rva % PAGE : rva % PAGE + length])


def test_everything_that_a_symbol_table_needs():
    assert pe.identify(Reader(Pe())) == pe.Image(
        0x8664, 0x12000, "10.0.19041.1234", "10.0.19041.9", Pdb("ntkrnlmp.pdb", GUID_TEXT, 1)
    )


def test_the_name_of_the_symbol_table_is_volatilitys():
    assert Pdb("ntkrnlmp.pdb", GUID_TEXT, 1).isf == f"windows/ntkrnlmp.pdb/{GUID_TEXT}-1.json.xz"


def test_a_32_bit_image():
    image = pe.identify(Reader(Pe(machine=0x14C, pdb="ntkrpamp.pdb", version=(6, 1, 7601, 17514))))
    assert (image.machine, image.file_version, image.pdb.name) == (0x14C, "6.1.7601.17514", "ntkrpamp.pdb")


@pytest.mark.parametrize(("page", "lost", "missing"), [
    (RDATA, {"pdb": None}, "debug directory not in memory"),
    (RESOURCES, {"file_version": "", "product_version": ""}, "resource directory not in memory"),
])  # fmt: skip
def test_what_is_paged_out_is_said_to_be_missing_and_the_rest_is_known(page, lost, missing):
    image, whole = pe.identify(Reader(Pe(), without=(page,))), pe.identify(Reader(Pe()))
    assert image.missing == (missing,)
    assert {name: getattr(image, name) for name in lost} == lost
    kept = [name for name in ("machine", "size", "pdb", "file_version") if name not in lost]
    assert [getattr(image, name) for name in kept] == [getattr(whole, name) for name in kept]


def test_an_image_without_its_header_is_none():
    assert pe.identify(Reader(Pe(), without=(0,))) is None


@pytest.mark.parametrize(("at", "form", "value"), [
    (0x00, "<H", 0x4D5A), (0x3C, "<I", 0), (0x3C, "<I", 0xFFFF_FFF0), (0x3C, "<I", PAGE - 0x100), (NT, "<I", 0x454E),
    (NT + 4, "<H", 0x1C0), (NT + 6, "<H", 0), (NT + 6, "<H", 0xFFFF), (NT + 24, "<H", 0x107),
    (NT + 24 + 56, "<I", 0xFFFF_F000), (NT + 24 + 56, "<I", 0x10),
], ids=lambda value: hex(value) if isinstance(value, int) else value)  # fmt: skip
def test_a_header_that_no_loader_takes_is_none(at, form, value):
    reader = Reader(Pe())
    struct.pack_into(form, reader.pages[0], at, value)
    assert pe.identify(reader) is None


@pytest.mark.parametrize(("page", "at", "value"), [
    (0, NT + 24 + 112 + 8 * 6, 0xFFFF_FF00),  # the debug directory's address
    (0, NT + 24 + 112 + 8 * 6, 0),
    (RDATA, 28 + 20, 0xFFFF_FFFF),  # the record's address
    (RDATA, 28 + 20, 0),
], ids=["directory outside", "directory nowhere", "record outside", "record nowhere"])  # fmt: skip
def test_a_pdb_that_leads_nowhere_costs_the_pdb_and_no_more(page, at, value):
    reader = Reader(Pe())
    struct.pack_into("<I", reader.pages[page], at, value)
    image = pe.identify(reader)
    assert (image.pdb, image.file_version) == (None, "10.0.19041.1234")


@pytest.mark.parametrize(("page", "at", "value"), [
    (0, NT + 24 + 112 + 8 * 6 + 4, 0xFFFF_FFFF),  # size of the debug directory
    (RDATA, 28 + 16, 0x7FFF_FFFF),  # size of the record
    (RESOURCES, 14, 0xFFFF),  # entries of the resource root
    (RESOURCES, 0x60 + 14, 0xFFFF),
], ids=["debug entries", "record", "resource types", "resource names"])  # fmt: skip
def test_absurd_sizes_read_no_more_than_is_ever_read(page, at, value):
    reader = Reader(Pe())
    struct.pack_into("<I" if value > 0xFFFF else "<H", reader.pages[page], at, value)
    pe.identify(reader)
    assert reader.asked < 3 * PAGE


def test_nothing_is_read_beyond_the_image():
    """What lies there in memory is another image's."""
    image = pe.identify(Reader(Pe(size=RDATA)))
    assert (image.pdb, image.file_version) == (None, "")
    assert image.missing == ("debug directory outside the image", "resource directory outside the image")


def test_a_version_block_without_its_signature_is_none():
    reader = Reader(Pe())
    struct.pack_into("<I", reader.pages[RESOURCES], 0x100 + 40, 0xFEEF04BC)
    image = pe.identify(reader)
    assert (image.file_version, image.product_version, image.pdb.name) == ("", "", "ntkrnlmp.pdb")


@pytest.mark.parametrize("level", [0x1C, 0x74, 0xB4])
def test_a_resource_tree_that_leads_back_to_its_root_ends(level):
    reader = Reader(Pe())
    struct.pack_into("<I", reader.pages[RESOURCES], level, 1 << 31)
    image = pe.identify(reader)
    assert image.file_version == ""
    assert image.pdb is not None


def test_random_damage_never_raises_and_never_reads_much():
    rng = random.Random(19041)
    for _ in range(400):
        reader = Reader(Pe())
        for _ in range(rng.randrange(1, 24)):
            page = rng.choice((0, 0, RDATA, RESOURCES))
            at = rng.randrange(0x400) if page else rng.randrange(NT + 24 + 240)
            reader.pages[page][at] = rng.randrange(256)
        image = pe.identify(reader)
        assert reader.asked < 4 * PAGE
        if image is not None and image.pdb is not None:
            assert str(image.pdb).isprintable()


@pytest.mark.parametrize(("path", "name"), [
    (b"ntkrnlmp.pdb", "ntkrnlmp.pdb"), (b"d:\\os\\obj\\ntkrnlmp.pdb", "ntkrnlmp.pdb"), (b"/src/x.pdb", "x.pdb"),
    (b"\x1b[31m.pdb", None), (b"a b.pdb", None), (b"..\\..\\", None), (b"", None), (b"x" * 65, None),
    ("ß.pdb".encode(), None),
])  # fmt: skip
def test_a_pdbs_name_is_a_plain_file_name_or_there_is_none(path, name):
    record = rsds.parse(b"RSDS" + GUID + struct.pack("<I", 3) + path + b"\0rest")
    assert (record and record.name) == name


@pytest.mark.parametrize("data", [b"", b"RSDS", b"RSDS" + bytes(20), b"NB10" + bytes(30)])
def test_what_is_no_record_names_nothing(data):
    assert rsds.parse(data) is None


def launchers() -> list[Path]:
    """Return programs that Microsoft's linker made: what pip brings along to start scripts on Windows."""
    found = importlib.util.find_spec("pip")
    return sorted(Path(found.origin).parent.glob("_vendor/distlib/*.exe")) if found and found.origin else []


@pytest.mark.skipif(not launchers(), reason="this pip has no launchers for Windows")
def test_programs_of_microsofts_linker_are_read_in_memory_as_pefile_reads_their_files():
    for path in launchers():
        whole = pefile.PE(str(path))
        flat = bytearray(whole.OPTIONAL_HEADER.SizeOfImage)
        flat[: whole.OPTIONAL_HEADER.SizeOfHeaders] = path.read_bytes()[: whole.OPTIONAL_HEADER.SizeOfHeaders]
        for section in whole.sections:
            data = section.get_data()[: section.Misc_VirtualSize]
            flat[section.VirtualAddress : section.VirtualAddress + len(data)] = data
        image = pe.identify(lambda rva, length, flat=flat: bytes(flat[rva : rva + length]).ljust(length, b"\0"))
        record = next(entry.entry for entry in whole.DIRECTORY_ENTRY_DEBUG if entry.struct.Type == 2)
        fixed = whole.VS_FIXEDFILEINFO[0]
        assert (image.machine, image.size) == (whole.FILE_HEADER.Machine, whole.OPTIONAL_HEADER.SizeOfImage)
        assert f"{image.pdb.guid}{image.pdb.age:X}" == record.Signature_String
        assert image.pdb.name == f"{path.stem}.pdb"
        assert image.file_version.split(".")[:2] == [str(fixed.FileVersionMS >> 16), str(fixed.FileVersionMS & 0xFFFF)]
        assert image.missing == ()


def test_sections_are_not_needed():
    """Their table is not read at all: pages of it may be damaged."""
    reader = Reader(Pe())
    table = NT + 24 + 240
    reader.pages[0][table : table + 160] = b"\xff" * 160
    assert pe.identify(reader).pdb.name == "ntkrnlmp.pdb"
    assert DATA not in reader.pages
