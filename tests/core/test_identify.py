"""What runs in a guest: strings decide by where they lie, and nothing is made of more than there is."""

from __future__ import annotations

import pytest
from builders import paging
from builders.paging import PAGE, GuestRam, HostRam, Tables
from readers import memory_of

from volatility3_ept.core import identify, kernelspace, signatures
from volatility3_ept.core.memory import HostMemory
from volatility3_ept.spec import ia32e

KERNEL = 0xFFFF_FFFF_8100_0000
DIRECT_MAP = 0xFFFF_8880_0000_0000
READ_ONLY, WRITABLE = 1 << 63 | 0x61, 1 << 63 | 0x63
USER = 0x67


def banner(release: str, build: str = "#1 SMP Debian", end: bytes = b"\n\0") -> bytes:
    return f"Linux version {release} (me@here) (gcc 12) {build}".encode() + end


WINDOWS = b"RSDS" + bytes(range(20)) + b"ntkrnlmp.pdb\0"


class Machine:
    """A guest-physical memory of 64 pages with page tables of its own in the first ones."""

    def __init__(self, shape: paging.Shape = paging.LONG_4) -> None:
        self.ram = HostRam()
        for page in range(64):
            self.ram.page(page * PAGE)
        self.own = Tables(GuestRam(self.ram, {page * PAGE: page * PAGE for page in range(1, 64)}), shape)
        self.free = 60

    def put(self, text: bytes, *places: tuple[int, int], offset: int = 0x100) -> None:
        """Write a text into a page of its own, and map that page at these ``(address, low bits)``."""
        page, self.free = self.free * PAGE, self.free - 1
        self.ram.write(page + offset, text)
        for address, bits in places:
            self.own.map(address, page, bits=bits)

    def identify(self, *spaces: int, mode: ia32e.Ia32Format | None = None) -> identify.Identity:
        """Ask what runs here, with this CR3 alone unless others are given."""
        return identify.identify(memory_of(self.ram), mode or ia32e.four_level(), spaces or (self.own.register,))


def test_the_kernels_own_constant_beats_every_file_in_the_page_cache():
    """A Linux guest with a Windows kernel file, another kernel's image and a log of a third in its memory."""
    guest = Machine()
    for _ in range(9):
        guest.put(WINDOWS, (DIRECT_MAP, WRITABLE))
    guest.put(banner("5.10.0-other"), (DIRECT_MAP + PAGE, WRITABLE))
    guest.put(banner("4.19.0-logged", end=b" and on"), (KERNEL + 0x10_0000, WRITABLE))
    guest.put(banner("6.1.0-mine"), (KERNEL, READ_ONLY), (DIRECT_MAP + 2 * PAGE, WRITABLE))
    found = guest.identify()
    assert (found.family, found.name, found.is_certain) == ("linux", "Linux 6.1.0-mine", True)
    assert found.banners == ("Linux version 6.1.0-mine (me@here) (gcc 12) #1 SMP Debian",)
    assert "GVA 0xffffffff81000100" in found.why


def test_a_line_of_the_log_is_not_the_kernels_constant():
    """Both in memory that the kernel can write, as where its constants are not protected."""
    guest = Machine()
    guest.put(banner("9.9.9-logged", end=b" and on"), (KERNEL, WRITABLE))
    guest.put(banner("6.1.0-mine"), (KERNEL + PAGE, WRITABLE))
    found = guest.identify()
    assert (found.name, found.is_certain) == ("Linux 6.1.0-mine", False)


def test_a_page_that_user_mode_may_reach_is_no_kernels():
    guest = Machine()
    guest.put(banner("6.1.0-fake"), (KERNEL, USER & ~2))
    for level in ("PML4E", "PDPTE", "PDE"):
        guest.own.put(KERNEL, level, guest.own.get(KERNEL, level) | USER)
    assert not guest.identify().is_certain


def test_rights_are_the_and_over_all_levels():
    """A leaf that allows writes, below a directory that does not, is constant."""
    guest = Machine()
    guest.put(banner("6.1.0-mine"), (KERNEL, WRITABLE))
    directory = guest.own.get(KERNEL, "PDPTE")
    guest.own.put(KERNEL, "PDPTE", directory & ~2)
    assert guest.identify().is_certain


def test_a_preliminary_banner_without_a_build_number_is_not_the_one_to_ask_for():
    guest = Machine()
    guest.put(banner("6.1.0", "# SMP Debian"), (KERNEL, READ_ONLY))
    guest.put(banner("6.1.0", "#7 SMP Debian"), (KERNEL + PAGE, READ_ONLY))
    found = guest.identify()
    assert [text[-13:] for text in found.banners] == ["#7 SMP Debian"]
    assert len(found.texts) == 2


def test_two_kernels_in_one_image_are_both_named_and_none_is_chosen():
    guest = Machine()
    guest.put(banner("6.1.0-a"), (KERNEL, READ_ONLY))
    guest.put(banner("6.1.0-b"), (KERNEL + PAGE, READ_ONLY))
    found = guest.identify()
    assert found.name == "Linux 6.1.0-a or Linux 6.1.0-b"
    assert (len(found.banners), found.is_certain) == (2, False)


@pytest.mark.parametrize(("cr3", "expected"), [(0x1000, True), (0, True)], ids=["user half", "kernel half"])
def test_the_kernel_half_of_a_kpti_pair_is_looked_into(cr3, expected):
    """The user half lies in the page above, and maps no constant of the kernel."""
    guest = Machine()
    guest.put(banner("6.1.0-mine"), (KERNEL, READ_ONLY))
    root = 40 * PAGE
    guest.ram.write(root, bytes(guest.ram.page(guest.own.root)))
    assert guest.identify(root | cr3).is_certain is expected


@pytest.mark.parametrize(("shape", "mode", "kernel", "constant"), [
    (paging.LONG_5, ia32e.five_level(), KERNEL, READ_ONLY),
    (paging.PAE, ia32e.pae(), 0xC100_0000, READ_ONLY),
    (paging.LEGACY, ia32e.legacy(), 0xC100_0000, 0x61),
], ids=["LA57", "PAE", "32-bit"])  # fmt: skip
def test_every_paging_mode_leads_to_the_kernel(shape, mode, kernel, constant):
    guest = Machine(shape)
    guest.put(banner("6.1.0-mine"), (kernel, constant))
    guest.put(banner("5.0.0-other"))
    found = guest.identify(mode=mode)
    assert (found.name, found.is_certain) == ("Linux 6.1.0-mine", True)


@pytest.mark.parametrize(("where", "text", "name"), [
    (KERNEL, b"FreeBSD 13.2-RELEASE releng/13.2-n254617-525ecfdad597 GENERIC\n\0", "FreeBSD 13.2-RELEASE"),
    (KERNEL, b"NetBSD 9.3 (GENERIC) #0: Thu Aug  4 15:30:37 UTC 2022\n\0", "NetBSD 9.3"),
    (KERNEL, b"OpenBSD 7.4 (GENERIC.MP) #1397: Tue Oct 10 09:02:37 MDT 2023\n\0", "OpenBSD 7.4"),
    (0xFFFF_FF80_0020_0000, b"Darwin Kernel Version 22.6.0: Wed Jul  5 22:22:05 PDT 2023; root:xnu\0",
     "macOS (Darwin 22.6.0)"),
    (0xFFFF_82D0_4020_0000, b"Xen version 4.17.1 (Debian) (pkg-xen@lists) (gcc) debug=n\n\0", "Xen 4.17.1"),
    (KERNEL, b"Booting all finished, dropped to user space\n\0", "seL4"),
    (KERNEL, b"VMware ESXi 7.0.3 [Releasebuild-19193900 x86_64]\0", "VMware ESXi 7.0.3"),
])  # fmt: skip
def test_other_systems_are_known_by_the_text_in_their_kernel(where, text, name):
    guest = Machine()
    guest.put(text, (where, READ_ONLY))
    found = guest.identify()
    assert (found.name, found.is_certain) == (name, True)
    assert found.family in signatures.NAMES


def test_strings_of_two_systems_without_page_tables_decide_nothing():
    guest = Machine()
    guest.put(banner("6.1.0"))
    guest.put(WINDOWS)
    found = identify.identify(memory_of(guest.ram))
    assert found.family == ""
    assert "Linux 6.1.0" in found.name and "Windows" in found.name
    assert "none decides" in found.why


def test_windows_where_windows_maps_its_kernel_beats_a_linux_image_in_its_cache():
    guest = Machine()
    guest.put(WINDOWS, (0xFFFF_F801_2340_0000, READ_ONLY))
    guest.put(banner("5.15.0-WSL2"), (0xFFFF_9000_0000_0000, WRITABLE))
    found = guest.identify()
    assert (found.family, found.is_certain) == ("windows", True)


@pytest.mark.parametrize(("text", "name", "family"), [
    (b"SeaBIOS (version 1.16.2-debian-1.16.2-1)", "firmware: SeaBIOS 1.16.2-debian-1.16.2-1", "seabios"),
    (b"Welcome to GRUB!\n\n", "firmware: GRUB", "grub"),
    (bytes.fromhex("78e58c8c3d8a1c4f9935896185c32dd3") + bytes(8) + b"_FVH", "firmware: UEFI", "uefi"),
])  # fmt: skip
def test_firmware_counts_only_where_no_kernel_does(text, name, family):
    guest = Machine()
    guest.put(text)
    memory = memory_of(guest.ram)
    assert (identify.identify(memory).name, identify.identify(memory).family) == (name, family)
    guest.put(banner("6.1.0"))
    assert identify.identify(memory_of(guest.ram)).name == "Linux 6.1.0"


def test_an_unknown_system_gets_the_programs_that_lie_in_its_memory():
    guest = Machine()
    guest.put(b"\x7fELF\x02\x01\x01", offset=0)
    guest.put(b"MZ".ljust(0x3C, b"\0") + (0x80).to_bytes(4, "little") + bytes(0x40) + b"PE\0\0", offset=0)
    guest.put(b"MZ is no program here", offset=0)
    guest.put((0xFEED_FACF).to_bytes(4, "little"), offset=0)
    found = identify.identify(memory_of(guest.ram))
    assert found.name == "unknown"
    assert found.why.endswith("1 ELF, 1 Mach-O, 1 PE")


def test_guest_bytes_are_printable_and_short():
    text = b"Linux version 6.1\x1b[31m (a) (b) #1" + b"Linux version 6.1.0 (" + b"x" * 9000 + b"\n\0"
    found = identify.identify(HostMemory.from_bytes(text.ljust(4 * PAGE, b"\0")))
    assert found.name == "Linux 6.1.0"
    assert all(line.isprintable() and len(line) < signatures.LONGEST for line in (found.why, *found.banners))


def test_a_huge_alias_of_one_page_does_not_cost_its_size(monkeypatch):
    """A hostile guest maps a gigabyte of one page as its kernel; the search ends, and says so."""
    monkeypatch.setattr(identify, "_MOST_BYTES", 1 << 20)
    guest = Machine()
    page, table = 59 * PAGE, 58 * PAGE
    for number in range(512):
        guest.ram.write_entry(table + 8 * number, page | READ_ONLY)
        guest.own.put(KERNEL + number * 0x20_0000 & 0xFFFF_FFFF_BFFF_FFFF, "PDE", table | 0x23)
    read = []
    memory = memory_of(guest.ram)
    original = memory.read
    memory.read = lambda address, length: read.append(length) or original(address, length)
    assert identify.identify(memory, ia32e.four_level(), [guest.own.register]).name == "unknown"
    assert sum(read) < 3 << 20


def test_a_large_page_of_which_the_capture_lacks_a_part_is_searched_all_the_same():
    guest = Machine()
    base = 4 << 20
    for page in (0, 2, 511):
        guest.ram.page(base + page * PAGE)
    guest.ram.write(base + 2 * PAGE, banner("6.1.0-mine"))
    guest.own.map(KERNEL, base, 0x20_0000, bits=READ_ONLY | 0x80)
    assert guest.identify().is_certain


def test_thousands_of_version_strings_end_the_search(monkeypatch):
    guest = Machine()
    flood = banner("6.1.0-flood") * 40
    for number in range(40):
        guest.put(flood, (KERNEL + number * PAGE, READ_ONLY), offset=0)
    seen = []
    monkeypatch.setattr(identify, "_read", lambda *a: seen.append(a) or bytes(guest.ram.page(a[1]))[: a[2]])
    found = guest.identify()
    assert found.name == "Linux 6.1.0-flood"
    assert "the rest was not searched" in found.why
    assert len(seen) < 4


def test_what_was_found_survives_an_index():
    guest = Machine()
    guest.put(banner("6.1.0-mine"), (KERNEL, READ_ONLY))
    found = guest.identify()
    name, evidence = identify.from_row(found.row)
    assert (name, evidence.held, evidence.detail) == (found.name, True, found.why)


def test_running_says_nothing_of_a_kernel_that_is_not_to_be_seen():
    guest = Machine()
    guest.put(banner("6.1.0"))
    memory = memory_of(guest.ram)
    assert identify.running(memory, ia32e.four_level(), [guest.own.register]) is None
    assert identify.running(memory, None, [guest.own.register]) is None
    assert kernelspace.stretches(memory, ia32e.four_level(), [0xDEAD_BEEF_F000]) == []
