"""Text and headers that a guest made up: bounded to read, plain to print, and never more than one guest's own word."""

from __future__ import annotations

import json
import struct

import pytest
from builders import machine, paging
from builders.machine import Guest
from builders.paging import PAGE, HostRam
from readers import memory_of

from volatility3_ept.core import identify, lineage, portrait, search
from volatility3_ept.core.memory import HostMemory
from volatility3_ept.export import html

#: ANSI escapes, a bell, bidirectional overrides, HTML, a formula of a spreadsheet, a line of its own.
ODD = [
    b"\x1b[2J\x1b]0;owned\x07",
    "‮txt.exe⁦".encode(),
    b"<script>alert(1)</script>",
    b"\"><img src=x onerror='alert(1)'>",
    b"=cmd|' /C calc'!A0",
    b"\r\nMachine\tKind\tRoot\r\n0\tEPT\t0x1",
    b"%s%n{0}\\x00",
]


def banner(text: bytes) -> bytes:
    return b"Linux version 6.6.6" + text + b" (" + text + b"@host) (gcc 12) #1 SMP\n\x00"


@pytest.fixture(scope="module")
def host() -> tuple[HostMemory, list[Guest]]:
    """One guest for each oddity, and an honest one beside them."""
    ram = HostRam()
    guests = []
    for text in [*ODD, b"-test"]:
        guests.append(Guest(ram, paging.EPT_4))
        guests[-1].vcpu()
        for page in range(4):
            gpa = guests[-1].kernel_gpa if not page else guests[-1].ram.allocate()
            guests[-1].ram.write(gpa, banner(text) + text * 8)
    return memory_of(ram), guests


def test_what_is_shown_of_a_guest_is_plain_text(host):
    memory, guests = host
    found = search.discover(memory)
    assert len(found.machines) == len(guests)
    for item in found.all():
        shown = [item.system, *map(str, item.evidence), *found.notes]
        assert all(text.isascii() and text.isprintable() for text in shown), shown
    assert found.machines[-1].system.startswith("Linux 6.6.6-test")


def test_an_index_and_its_json_hold_plain_text(host):
    memory, _ = host
    text = search.discover(memory).index.to_json("key")
    assert text.isascii()
    assert text.isprintable()
    assert json.loads(text)["key"] == "key"


def test_the_page_of_the_map_has_no_markup_of_a_guest(host):
    memory, _ = host
    found = search.discover(memory)
    lines = lineage.lines(found, memory)
    name = "<script>alert(2)</script>.raw"
    page = html.render(name, memory, portrait.portraits(lines, memory))
    for evil in ("<script>alert", "<img src=x", "onerror='alert", "\x1b", "‮"):
        assert evil not in page


def strings(*pages: bytes) -> HostMemory:
    return HostMemory.from_bytes(b"".join(page.ljust(PAGE, b"\0") for page in pages))


def test_banners_by_the_hundred_thousand_are_not_all_read():
    """The search ends when it has seen enough; what it then says is a string in memory, no certainty."""
    one = banner(b"-forged")
    memory = strings(*[one * (PAGE // len(one))] * 2000)
    found = identify.identify(memory)
    assert found.name == "Linux 6.6.6-forged"
    assert not found.is_certain


def test_contradictory_banners_decide_nothing():
    windows = b"RSDS" + bytes(range(16)) + struct.pack("<I", 1) + b"ntkrnlmp.pdb\0"
    memory = strings(banner(b"-a"), windows, banner(b"-b"), b"FreeBSD 14.0-RELEASE #0: Fri Nov 10\n\0", windows)
    found = identify.identify(memory)
    assert not found.is_certain
    assert "none decides" in found.why or " or " in found.name


def test_the_kernel_that_runs_outweighs_a_thousand_banners_beside_it():
    ram, (guest,) = machine.host(paging.EPT_4, pages=64)
    for _ in range(40):
        guest.ram.write(guest.ram.allocate(), (banner(b"-forged") * 40)[:PAGE])
    (only,) = search.discover(memory_of(ram)).machines
    assert only.system.startswith("Linux 6.6.6-test")


def portable_executable(at: int = 0x80, **fields: int) -> bytes:
    """Return the header of a 64-bit program, with numbers that no program has where they are given."""
    value = {"sections": 3, "optional": 0xF0, "image": 0x100_0000, "headers": 0x400, "entry": 0x1000, "debug": 0x2000,
             "debug_size": 28, "directories": 16, **fields}  # fmt: skip
    page = bytearray(PAGE)
    page[:2] = b"MZ"
    struct.pack_into("<I", page, 0x3C, value.get("lfanew", at))
    page[at : at + 4] = b"PE\0\0"
    struct.pack_into("<HHIIIHH", page, at + 4, 0x8664, value["sections"], 0, 0, 0, value["optional"], 0x22)
    struct.pack_into("<HBBIIIII", page, at + 24, 0x20B, 14, 0, 0x1000, 0, 0, value["entry"], 0x1000)
    struct.pack_into("<QII", page, at + 24 + 24, 0xFFFF_F800_0000_0000, 0x1000, 0x200)
    struct.pack_into("<II", page, at + 24 + 56, value["image"], value["headers"])
    struct.pack_into("<I", page, at + 24 + 108, value["directories"])
    struct.pack_into("<II", page, at + 24 + 112 + 8 * 6, value["debug"], value["debug_size"])
    return bytes(page)


ABSURD = [
    {"image": 0xFFFF_FFFF},
    {"image": 0, "headers": 0xFFFF_FFFF},
    {"sections": 0xFFFF},
    {"optional": 0xFFFF},
    {"lfanew": 0xFFFF_FFF0},
    {"lfanew": 0xFFE},
    {"debug": 0xFFFF_FFF0, "debug_size": 0xFFFF_FFFF},
    {"debug": 0x1000, "debug_size": 0x7FFF_FFFF},
    {"directories": 0xFFFF_FFFF},
]


@pytest.mark.parametrize("fields", ABSURD, ids=str)
def test_a_program_header_with_absurd_sizes(fields):
    """In every page of a guest, where its kernel runs too: nothing is read that the guest does not have."""
    ram, (guest,) = machine.host(paging.EPT_4, pages=64)
    page = portable_executable(**fields)
    for number in range(1, 32):
        gpa = guest.ram.allocate()
        guest.ram.write(gpa, page)
        guest.own.map(0xFFFF_F800_0000_0000 + number * PAGE, gpa)
    (only,) = search.discover(memory_of(ram)).machines
    assert only.system.startswith("Linux 6.6.6-test")
    alone = strings(*[page] * 64)
    assert identify.identify(alone).name.isprintable()
    assert not identify.identify(alone).is_certain
