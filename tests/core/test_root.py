"""Roots as text: what ``--guest`` takes, what a configuration keeps."""

from __future__ import annotations

import pytest
from builders import paging
from builders.paging import PAGE, HostRam
from hypothesis import given, settings
from hypothesis import strategies as st
from readers import memory_of

from volatility3_ept.core.root import EPT, NPT, Root, RootError


@pytest.mark.parametrize(("text", "kind", "address", "levels"), [
    ("eptp=0xfadf05e", EPT, 0xFADF000, 4), ("eptp=0xfadf066", EPT, 0xFADF000, 5), ("eptp=0xfadf000", EPT, 0xFADF000, 4),
    ("EPTP=0xfadf01e", EPT, 0xFADF000, 4), ("eptp=0xfadf000,levels=5", EPT, 0xFADF000, 5),
    ("ncr3=0x2a17000", NPT, 0x2A17000, 4), ("ncr3=0x2a17000,levels=5", NPT, 0x2A17000, 5),
    ("ncr3=0x27e0,levels=3", NPT, 0x27E0, 3), ("ncr3=0x2000,levels=2", NPT, 0x2000, 2),
    ("ncr3=0x800002a17000,cbit=47", NPT, 0x2A17000, 4), ("eptp=263057502", EPT, 0xFADF000, 4),
])  # fmt: skip
def test_a_root_as_an_analyst_writes_it(text, kind, address, levels):
    root = Root.parse(text)
    assert (root.kind, root.address, root.levels) == (kind, address, levels)


@pytest.mark.parametrize(("text", "words"), [
    ("", "not a root"), ("0xfadf05e", "not a root"), ("cr3=0x1000", "not a root"), ("eptp=", "not a number"),
    ("eptp=fadf05e", "not a number"), ("eptp=0xfadf016", "3 levels"), ("eptp=0x5e", "no table address"),
    ("ncr3=0", "no table address"), ("eptp=-4096", "no table address"), ("eptp=0x1000,levels=3", "3 levels"),
    ("ncr3=0x1000,levels=6", "6 levels"), ("eptp=0x105e,maxphyaddr=99", "32 to 52"),
    ("eptp=0x105e,colour=red", "colour"),
    ("eptp=0x105e,dialect=klingon", "klingon"), ("eptp=0x1000000000000105e", "no table address"),
])  # fmt: skip
def test_what_is_no_root_says_why_in_one_line(text, words):
    with pytest.raises(RootError, match=words) as error:
        Root.parse(text)
    assert "\n" not in str(error.value)


@settings(derandomize=True, max_examples=200)
@given(
    kind=st.sampled_from([EPT, NPT]),
    page=st.integers(1, (1 << 36) - 1),
    low=st.sampled_from([0, 0x1E, 0x5E, 0x66]),
    levels=st.sampled_from([4, 5]),
    bits=st.sampled_from([0, 46, 52]),
    mbec=st.booleans(),
    dialect=st.sampled_from(["", "kvm", "xen", "bhyve", "generic"]),
)
def test_text_and_root_round_trip(kind, page, low, levels, bits, mbec, dialect):
    raw = (page << 12 | (low if kind == EPT else 0)) & ((1 << (bits or 52)) - 1)
    if not raw >> 12:
        return
    root = Root(kind, raw, levels, bits, 0, mbec, dialect)
    assert Root.parse(str(root)) == root


def test_a_fingerprint_changes_with_the_table_and_is_empty_without_it():
    ram = HostRam()
    tables = paging.Tables(ram)
    tables.map(0, 0x5000)
    root = Root(EPT, tables.register)
    before = root.fingerprint(memory_of(ram))
    tables.map(1 << 39, 0x6000)
    after = root.fingerprint(memory_of(ram))
    ram.drop(tables.root)
    assert before != after
    assert len(before) == 16
    assert root.fingerprint(memory_of(ram)) == ""


def test_a_c_bit_in_root_and_entries_is_not_part_of_the_address():
    """Host memory encryption (SME) sets bit 47 in nCR3 and in every entry."""
    ram = HostRam()
    tables = paging.Tables(ram, paging.NPT_4)
    tables.back([0, PAGE])
    for table in tables.table_pages:
        for at in range(table, table + PAGE, 8):
            if ram.read_entry(at):
                ram.write_entry(at, ram.read_entry(at) | 1 << 47)
    root = Root.parse(f"ncr3={tables.root | 1 << 47:#x},cbit=47")
    assert root.traverse(memory_of(ram)).memory(memory_of(ram)).read(PAGE, 8) == PAGE.to_bytes(8, "little")


def test_a_map_that_is_held_is_not_made_again_and_one_that_is_not_is_let_go():
    tables = paging.Tables(HostRam(), paging.EPT_4)
    tables.back([0, 0x1000])
    memory = memory_of(tables.ram)
    first = Root.parse(f"eptp={tables.register:#x}").traverse(memory)
    assert Root.parse(f"eptp={tables.root:#x}").traverse(memory) is first
    assert Root.parse(f"eptp={tables.root:#x},dialect=xen").traverse(memory) is not first
    assert Root.parse(f"eptp={tables.root:#x},maxphyaddr=36").traverse(memory) is not first
    del first
    assert not memory.maps
