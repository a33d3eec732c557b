"""Parsing of what the machines report."""

from __future__ import annotations

import gzip

import debian
import truth

STREAM = (
    b"noise of the emulator\n@@REPORT file host.version 14\nLinux version\n\n"
    b"\n@@REPORT pages vm1 80\n0x1000 0xfc01 " + b"a" * 64 + b"\n\n@@REPORT file cut 100\nshort"
)


def test_records_are_found_among_noise_and_cut_ones_left_out():
    found = truth.records(STREAM)
    assert set(found) == {("file", "host.version"), ("pages", "vm1")}
    assert truth.text(found, "host.version") == "Linux version\n"


def test_page_lines():
    assert truth.pages(b"0x1000 0xfc01 aa\n# present 1 absent 2\n") == {0x1000: (0xFC01, "aa")}


def test_a_page_list_is_sorted_and_the_same_each_time(tmp_path):
    truth.write_pages(tmp_path / "a", {0x2000: (2, "b"), 0x1000: (1, "a")})
    truth.write_pages(tmp_path / "b", {0x1000: (1, "a"), 0x2000: (2, "b")})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert gzip.decompress((tmp_path / "a").read_bytes()).decode().splitlines()[1:] == [
        "0x1000\t0x1\ta",
        "0x2000\t0x2\tb",
    ]


def test_processes_with_blanks_in_their_names():
    ps = "PID   PPID  COMMAND          COMMAND\n    1     0 init             {init} /bin/busybox sh\n"
    ps += "   85     1 my process       my process --with args\n  144     1 ps               ps -o pid\n"
    assert truth.processes(ps) == [
        {"pid": 1, "ppid": 0, "comm": "init", "args": "{init} /bin/busybox sh"},
        {"pid": 85, "ppid": 1, "comm": "my process", "args": "my process --with args"},
    ]


def test_registers_of_the_small_monitor():
    line = "vm1: vcpu 0 rip=0xffffffff8c4102ab cr3=0x1e3e005 efer=0xd01\n"
    assert truth.registers(line) == [{"vcpu": 0, "rip": "0xffffffff8c4102ab", "cr3": "0x1e3e005", "efer": "0xd01"}]


def test_registers_of_qemu():
    block = (
        "CPU#0\nRIP=ffffffffb0c102ab RFL=00000206 [---]\nFS =0000 0000000000000000 ffffffff 00c00000\n"
        "GS =0000 ffff8bad85800000 ffffffff 00c00000\nGDT=     fffffe0000001000 0000007f\n"
        "CR0=80050033 CR2=00000000005794a9 CR3=0000000005e88000 CR4=003106b0\nEFER=0000000000000d01\n"
    )
    first, second = truth.registers(block + block.replace("CPU#0", "CPU#1").replace("5e88000", "1234000"))
    assert first["gs_base"] == "0xffff8bad85800000"
    assert (first["vcpu"], first["cr3"], second["vcpu"], second["cr3"]) == (0, "0x5e88000", 1, "0x1234000")


def test_sections_of_a_console():
    console = "boot\n== version\nLinux version 6.1\n== ps\nrows\n== end\n"
    assert (truth.section(console, "version"), truth.section(console, "ps")) == ("Linux version 6.1", "rows")


def test_memory_slots():
    line = "vm1: memslot 2 gpa=0x100000000 size=0x800000 hva=0x7f0806603000 above-4G-4K-pages\n"
    assert truth.memslots(line) == [
        {
            "slot": 2,
            "gpa": "0x100000000",
            "size": "0x800000",
            "hva": "0x7f0806603000",
            "what": "above-4G-4K-pages",
        }
    ]


def test_the_address_of_a_modules_symbol():
    assert truth.kallsyms("ffffffffc0570a60 d vm_list\t[kvm]\n") == {"vm_list": "0xffffffffc0570a60"}


def test_an_initramfs_is_a_cpio_archive_with_directories_before_files():
    archive = gzip.decompress(debian.initramfs({"bin/sh": b"x" * 5, "init": b"#!/bin/sh\n"}))
    names = [part[104 - 6 :].split(b"\0")[0] for part in archive.split(b"070701")[1:]]
    positions = [archive.index(name) for name in (b"bin\0", b"dev\0", b"dev/console\0", b"bin/sh\0", b"TRAILER!!!")]
    assert positions == sorted(positions)
    assert len(names) == 6
    assert len(archive) % 4 == 0
