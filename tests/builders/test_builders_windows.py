"""What the builder calls an image is one to pefile, read as a file in full: nothing of the package takes part."""

from __future__ import annotations

import struct

import pefile
import pytest
from builders.windows_pe import GUID_TEXT, RDATA, Pe


@pytest.mark.parametrize(("machine", "magic"), [(0x8664, 0x20B), (0x14C, 0x10B)])
def test_pefile_reads_the_image_as_a_file(machine, magic):
    pe = Pe(machine=machine)
    flat = bytearray(pe.size)
    for rva, data in pe.parts().items():
        flat[rva : rva + len(data)] = data
    struct.pack_into("<I", flat, RDATA + 28 + 24, RDATA + 0x40)  # in a file this pointer leads to the record
    image = pefile.PE(data=bytes(flat))
    assert (image.OPTIONAL_HEADER.Magic, image.OPTIONAL_HEADER.SizeOfImage) == (magic, pe.size)
    assert [section.Name.rstrip(b"\0") for section in image.sections] == [b".text", b".rdata", b".data", b".rsrc"]
    (record,) = [entry.entry for entry in image.DIRECTORY_ENTRY_DEBUG if entry.entry is not None]
    assert record.PdbFileName.rstrip(b"\0") == b"ntkrnlmp.pdb"
    assert record.Signature_String == f"{GUID_TEXT}1" == f"{pe.guid_text}1"
    assert sorted(entry.id for entry in image.DIRECTORY_ENTRY_RESOURCE.entries) == [11, 16]
    fixed = image.VS_FIXEDFILEINFO[0]
    assert (fixed.FileVersionMS, fixed.FileVersionLS) == (10 << 16, 19041 << 16 | 1234)
    assert fixed.ProductVersionLS == 19041 << 16 | 9
