"""Every manipulation is found where it was planted, as what it is; and nothing is found where nothing was done."""

from __future__ import annotations

import struct

import captures
import discovered
import numpy as np
import pytest
from builders import hooks, kernels, paging
from builders.hooks import Victim
from builders.machine import Guest
from builders.paging import PAGE, HostRam
from readers import memory_of

from volatility3_ept.core import audit, audit_bytes, audit_diff, audit_kernel, audit_mapdiff, gpamap, mask, search
from volatility3_ept.core.audit_finding import MAX_ROWS, Finding, Kind, Severity, capped
from volatility3_ept.core.memory import FileSource, HostMemory

FREE = 0x80_0000


def results(ram: HostRam, disassemble=None) -> list[Finding]:
    memory = memory_of(ram)
    return list(audit.audit(search.discover(memory), memory, disassemble=disassemble).findings)


def grave(found: list[Finding]) -> list[tuple[Kind, Severity, int | None]]:
    """Return what is above info, without text."""
    return [(f.kind, f.severity, f.gpa) for f in found if f.severity > Severity.INFO]


@pytest.fixture
def victim() -> Victim:
    return Victim(HostRam())


@pytest.mark.parametrize("shape", [paging.EPT_4, paging.NPT_4], ids=lambda shape: shape.name)
def test_a_guest_that_nobody_touched_gives_no_finding(shape):
    assert results(Victim(HostRam(), shape).ram) == []


# 1. Rights


def test_an_execute_only_hook_is_found_with_its_shadow_copy(victim):
    gpa = hooks.execute_only_hook(victim)
    found = results(victim.ram)
    assert grave(found) == [(Kind.UNREADABLE_PAGE, Severity.HIGH, gpa)]
    (only,) = found
    assert f"{victim.frame(gpa):#x}" in only.evidence
    assert "55488" in only.evidence, "the bytes that were replaced"
    assert "kernel's code" in only.evidence


def test_an_execute_only_page_outside_the_kernel_is_medium(victim):
    gpa = hooks.rights(victim, victim.data[2] + 8 * PAGE, hooks.EXECUTE_ONLY)
    assert grave(results(victim.ram)) == [(Kind.UNREADABLE_PAGE, Severity.MEDIUM, gpa)]


@pytest.mark.parametrize(
    ("part", "bits", "expected"),
    [
        ("code", hooks.NO_EXECUTE, Severity.HIGH),
        ("data", hooks.NO_EXECUTE, Severity.LOW),
        ("code", hooks.READ_ONLY, Severity.INFO),
    ],
)
def test_a_page_with_other_rights_than_its_neighbours(victim, part, bits, expected):
    """W alone is what dirty logging and KSM take away all the time."""
    gpa = hooks.rights(victim, getattr(victim, part)[4], bits)
    (only,) = results(victim.ram)
    assert (only.kind, only.severity) == (Kind.ODD_RIGHTS, expected)
    assert only.gpa == (gpa if expected else None)


def test_the_last_page_of_code_has_no_neighbour_on_one_side_and_is_not_judged(victim):
    hooks.rights(victim, victim.code[-1], hooks.NO_EXECUTE)
    assert grave(results(victim.ram)) == []


# 2. Views


def test_a_second_view_in_an_eptp_list_is_found_with_the_bytes_that_differ(victim):
    gpa = victim.code[5]
    hooks.second_view(victim, {gpa: (victim.shadow(gpa), None)})
    found = results(victim.ram, lambda code, address: [f"{len(code)} bytes at {address:#x}"])
    assert grave(found) == [(Kind.VIEW_FRAME, Severity.HIGH, gpa)]
    row = next(f for f in found if f.kind is Kind.VIEW_FRAME)
    assert "+0x40: 55488" in row.evidence
    assert f"16 bytes at {0xFFFF_FFFF_8100_5040:#x}" in row.evidence


def test_a_view_without_a_list_is_found_by_its_structure(victim):
    gpa = victim.code[5]
    hooks.second_view(victim, {gpa: (victim.frame(gpa), hooks.NO_EXECUTE)}, vmfunc=False)
    found = results(victim.ram)
    assert (Kind.VIEWS, Severity.INFO) in [(f.kind, f.severity) for f in found]
    assert (Kind.VIEW_RIGHTS, Severity.HIGH, gpa) in grave(found)


def test_a_list_that_vmfunc_may_not_use_is_no_list(victim):
    gpa = victim.code[5]
    hooks.second_view(victim, {gpa: (victim.shadow(gpa), None)})
    victim.ram.write_entry(victim.structure + 0x380, 0)
    assert all("EPTP list" not in f.evidence for f in results(victim.ram))


def test_a_list_full_of_roots_is_bounded(victim):
    """512 entries, each a hierarchy: the ones beyond the limit are counted."""
    hooks.second_view(victim, {})
    (page,) = struct.unpack("<Q", victim.ram.page(victim.structure)[0x388:0x390])
    for slot in range(2, 60):
        victim.ram.write_entry(page + 8 * slot, victim.ram.allocate() | 0x5E)
    memory = memory_of(victim.ram)
    result = audit.audit(search.discover(memory), memory)
    assert any("59 views; the first 32" in note for note in result.notes)
    assert grave(list(result.findings)) == []


# 3. Frames


def test_kernel_code_at_a_second_writable_address(victim):
    gpa = victim.code[2]
    hooks.alias(victim, victim.frame(gpa))
    found = results(victim.ram)
    assert grave(found) == [(Kind.ALIAS, Severity.HIGH, gpa)]
    assert f"{FREE:#x}" in found[0].evidence


def test_data_at_a_second_writable_address(victim):
    frame = victim.ram.allocate()
    victim.ram.write(frame, hooks.code(77))
    for number in range(2):
        hooks.alias(victim, frame, FREE + number * PAGE)
    assert grave(results(victim.ram)) == [(Kind.ALIAS, Severity.MEDIUM, FREE)]


@pytest.mark.parametrize("case", ["zero page", "read-only", "ROM shadow"])
def test_what_hypervisors_map_twice_is_info(victim, case):
    frame = victim.ram.allocate()
    if case != "zero page":
        victim.ram.write(frame, hooks.code(9))
    first = 0xF_0000 if case == "ROM shadow" else FREE
    bits = hooks.READ_ONLY if case == "read-only" else None
    hooks.alias(victim, frame, first, bits)
    hooks.alias(victim, frame, 0xFFFF_0000, bits)
    (only,) = results(victim.ram)
    assert (only.kind, only.severity) == (Kind.ALIAS, Severity.INFO)


def test_a_frame_at_three_addresses(victim):
    gpa = victim.code[2]
    for number in range(2):
        hooks.alias(victim, victim.frame(gpa), FREE + number * PAGE)
    assert grave(results(victim.ram)) == [(Kind.ALIAS, Severity.HIGH, gpa)]


def test_a_device_that_is_mapped_twice_is_info(victim):
    frames = [victim.ram.allocate() for _ in range(32)]
    for number, frame in enumerate(frames[::2] + frames[1::2]):
        victim.ram.write(frame, hooks.code(number))
        for base in (FREE, 3 * FREE):
            hooks.alias(victim, frame, base + number * PAGE)
    (only,) = results(victim.ram)
    assert (only.kind, only.severity, only.length) == (Kind.ALIAS, Severity.INFO, 32 * PAGE)


def pair() -> tuple[HostRam, Victim, Victim]:
    ram = HostRam()
    return ram, Victim(ram), Victim(ram)


def test_a_frame_of_two_guests():
    ram, first, second = pair()
    frame = ram.allocate()
    ram.write(frame, hooks.code(5))
    for each in (first, second):
        hooks.alias(each, frame, FREE)
    assert grave(results(ram)) == [(Kind.SHARED, Severity.MEDIUM, FREE)]


def test_another_guests_kernel():
    ram, first, second = pair()
    hooks.alias(first, second.frame(second.code[1]))
    assert grave(results(ram)) == [(Kind.SHARED, Severity.HIGH, FREE)]


@pytest.mark.parametrize("case", ["read-only", "a shared-memory device"])
def test_what_guests_share_is_info(case):
    ram, first, second = pair()
    frames = [ram.allocate() for _ in range(1 if case == "read-only" else 32)]
    bits = hooks.READ_ONLY if case == "read-only" else None
    for number, frame in enumerate(frames[::2] + frames[1::2]):  # No two of them continue each other in the host.
        ram.write(frame, hooks.code(number))
        hooks.alias(first, frame, FREE + number * PAGE, bits)
        hooks.alias(second, frame, 3 * FREE + number * PAGE, bits)
    (only,) = results(ram)
    assert (only.kind, only.severity) == (Kind.SHARED, Severity.INFO)


# 4. Exposure


def test_a_guest_that_maps_its_own_ept(victim):
    table = victim.tables.table_pages[-1]
    hooks.alias(victim, table)
    found = results(victim.ram)
    assert (Kind.EXPOSURE, Severity.HIGH, FREE) in grave(found)
    assert {f.kind for f in found if f.severity > Severity.INFO} == {Kind.EXPOSURE}


def test_a_guest_that_reads_its_control_structure(victim):
    victim.tables.map(FREE, victim.ram.allocate())
    victim.tables.map(FREE, victim.tables.table_pages[1], bits=hooks.READ_ONLY)
    assert grave(results(victim.ram)) == [(Kind.EXPOSURE, Severity.MEDIUM, FREE)]


def test_another_guests_tables_and_the_page_of_the_guest_that_holds_them():
    ram, first, second = pair()
    hooks.alias(first, second.tables.table_pages[2])
    found = [f for f in results(ram) if f.severity > Severity.INFO]
    assert [(f.machine, f.kind, f.gpa) for f in found] == [("0", Kind.EXPOSURE, FREE)]
    assert "machine 1's" in found[0].evidence


def test_the_hypervisors_code():
    ram = HostRam()
    host = kernels.Hypervisor(ram)
    guest = host.guest()
    values = host.vmcs(guest)
    guest.vcpu(host_cr3=values["HOST_CR3"], host_rip=values["HOST_RIP"], host_rsp=values["HOST_RSP"])
    assert grave(results(ram)) == []
    code = host.tables.get(kernels.HOST_KERNEL, "PTE") & ~0xFFF & (1 << 52) - 1
    guest.tables.map(FREE, code)
    found = [f for f in results(ram) if f.severity > Severity.INFO]
    assert {(f.kind, f.gpa, f.hpa) for f in found} == {(Kind.EXPOSURE, FREE, code)}
    assert any("code" in f.evidence for f in found)


def test_the_tables_of_a_hypervisor_in_a_guest_are_that_guests_own():
    ram = HostRam()
    outer = Guest(ram, paging.EPT_4, pages=96)
    outer.vcpu()
    inner = Guest(outer.ram, paging.EPT_4, pages=16, layout="kvm")
    inner.vcpu()
    assert grave(results(ram)) == []


# 5. Thin hypervisors


@pytest.mark.parametrize("shape", [paging.EPT_4, paging.NPT_4], ids=lambda shape: shape.name)
def test_a_hypervisor_under_a_running_system(shape):
    found = results(hooks.Thin(shape=shape).ram)
    assert grave(found) == [(Kind.THIN, Severity.HIGH, PAGE)]
    assert "100.0% of the guest lies at its own address" in found[0].evidence


def test_one_that_hides_nothing_is_exposed_too():
    found = results(hooks.Thin(hidden=False).ram)
    assert {f.kind for f in found if f.severity > Severity.INFO} == {Kind.THIN, Kind.EXPOSURE}
    assert "in the guest" in next(f for f in found if f.kind is Kind.THIN).evidence


def test_windows_own_hypervisor_is_called_by_its_name():
    image = b"MZ".ljust(0x80, b"\0") + hooks.pdb_record(b"hvix64")
    (only,) = results(hooks.Thin(image=image).ram)
    assert (only.kind, only.severity) == (Kind.THIN, Severity.INFO)
    assert "hvix64.pdb 030201000504070608090A0B0C0D0E0F1" in only.evidence


def test_a_file_of_that_name_in_the_guest_is_no_excuse():
    thin = hooks.Thin()
    thin.ram.write(0x8_0100, hooks.pdb_record(b"hvix64"))
    assert grave(results(thin.ram)) == [(Kind.THIN, Severity.HIGH, PAGE)]


def test_two_guests_are_no_thin_hypervisor():
    thin = hooks.Thin()
    second = Guest(thin.ram)
    second.vcpu()
    assert Kind.THIN not in {f.kind for f in results(thin.ram)}


# 6. Entries


@pytest.mark.parametrize(
    ("entry", "reason"),
    [(0x32, "W without R"), (0x17, "reserved memory type 2"), (0x3F, "reserved memory type 7")],
    ids=["write-only", "type 2", "type 7"],
)
def test_an_entry_that_the_processor_refuses(victim, entry, reason):
    victim.tables.put(FREE, "PTE", victim.ram.allocate() | entry)
    found = results(victim.ram)
    assert grave(found) == [(Kind.MISCONFIGURED, Severity.MEDIUM, FREE)]
    assert reason in found[0].evidence


def test_a_single_page_of_ram_that_is_not_cached(victim):
    gpa = hooks.rights(victim, victim.data[1], hooks.UNCACHED)
    found = results(victim.ram)
    assert grave(found) == [(Kind.MEMORY_TYPE, Severity.LOW, gpa)]
    assert "UC" in found[0].evidence


# 7. Substitution


def test_a_frame_in_the_place_of_another(victim):
    gpa = hooks.substitute(victim)
    found = results(victim.ram)
    assert grave(found) == [(Kind.SUBSTITUTED, Severity.HIGH, gpa)]
    assert f"{victim.frame(gpa):#x}" in found[0].evidence


def test_a_page_that_the_guests_own_tables_put_there(victim):
    copy = hooks.guest_remap(victim)
    found = results(victim.ram)
    assert grave(found) == [(Kind.GUEST_REMAP, Severity.HIGH, copy)]


def test_a_page_of_code_elsewhere_with_other_bytes_is_a_page_that_moved(victim):
    gpa = victim.code[3]
    frame = victim.ram.allocate()
    victim.ram.write(frame, hooks.code(99)[::-1])
    victim.tables.map(gpa, frame)
    assert grave(results(victim.ram)) == []


# Two captures


def test_what_changed_between_two_captures():
    before, after = Victim(HostRam()), Victim(HostRam())
    hooked = hooks.execute_only_hook(after)
    fresh = hooks.alias(after, after.ram.allocate())
    known = memory_of(before.ram), memory_of(after.ram)
    found = audit_diff.compare(*((search.discover(each), each) for each in known))
    assert [(f.kind, f.severity, f.gpa) for f in found] == [
        (Kind.CHANGED_FRAME, Severity.HIGH, hooked),
        (Kind.CHANGED_PRESENT, Severity.INFO, fresh),
    ]
    assert "RWX became --X" in found[0].evidence
    assert audit_diff.compare(*((search.discover(each), each) for each in (known[0], known[0]))) == []


def test_a_machine_that_came_and_one_that_went():
    ram, first, _ = pair()
    alone = Victim(HostRam())
    assert alone.guest.root == first.guest.root
    memories = memory_of(ram), memory_of(alone.ram)
    (gone,) = audit_diff.compare(*((search.discover(each), each) for each in memories))
    assert (gone.machine, gone.kind) == ("1", Kind.CHANGED_MACHINE)


# The parts


def test_pages_side_by_side():
    page = hooks.code(1)
    difference = audit_bytes.of(page, hooks.patched(page))
    assert difference.is_copy
    assert [first for first, _ in difference.places] == [hooks.AT]
    assert audit_bytes.of(page, page).text(None, None) == "the bytes are equal"
    assert not audit_bytes.of(page, page[::-1]).is_copy
    assert "iced-x86 is not installed" in difference.text(None, 0x1000)


def test_the_difference_of_two_maps_equals_looking_page_by_page(victim):
    hooks.execute_only_hook(victim)
    other = Victim(HostRam())
    hooks.alias(other, other.ram.allocate())
    maps = [search.discover(memory_of(each.ram)).machines[0].guest_map for each in (victim, other)]
    found = audit_mapdiff.difference(*maps)
    pages = {gpa + at for gpa, size in zip(found.gpas.tolist(), found.lengths.tolist(), strict=True)
             for at in range(0, size, PAGE)}  # fmt: skip
    seen = []
    for each in maps:
        seen.append({run.gpa + at: (run.hpa + at, run.access) for run in each.runs()
                     for at in range(0, run.length, PAGE)})  # fmt: skip
    assert pages == {gpa for gpa in seen[0] | seen[1] if seen[0].get(gpa) != seen[1].get(gpa)}


def test_rows_beyond_the_limit_are_counted():
    rows = [Finding("0", Kind.ALIAS, Severity.MEDIUM, n * PAGE, PAGE, None, "") for n in range(MAX_ROWS + 7)]
    *kept, last = capped(rows)
    assert len(kept) == MAX_ROWS
    assert (last.length, last.evidence[:6]) == (7 * PAGE, "7 more")


@pytest.mark.parametrize("name", captures.every())
def test_a_clean_capture_gives_nothing_above_info(name, capsys):
    below, found = discovered.capture(name)
    result = audit.audit(found, below)
    alarms = grave(list(result.findings))
    machines = found.all()
    kernels = [audit_kernel.find(machine) for machine in machines]
    assert all(kernel.code.starts.size for kernel in kernels), "the audit looked at a kernel's code"
    with capsys.disabled():
        size = sum(machine.guest_map.mapped_bytes for machine in machines)
        infos = len(result.findings) - len(alarms)
        print(
            f"\n{name}: {len(alarms)} false alarms in {len(machines)} machines, {size >> 20} MiB; {infos} infos", end=""
        )
    assert alarms == []


# The same in the memory of real guests


class Planted:
    """A real capture, in memory, with a second hand at its EPT or NPT."""

    def __init__(self, name: str) -> None:
        held = captures.get(name)
        self.path = held.path
        self.pages = {}
        (self.machine,) = discovered.capture(name)[1].machines
        guest_map = self.machine.guest_map
        self.below = discovered.capture(name)[0]
        self.kernel = audit_kernel.find(self.machine)
        starts, lengths = mask.without(self.below, [guest_map])
        # In the midst of empty memory: a single page of zeros may be a table of the host's.
        # Not by blocks(), which leaves out what the file system stores as holes: there every page is one of zeros.
        empty = (
            int(pages[row]) + 32 * PAGE
            for start, length in zip(starts.tolist(), lengths.tolist(), strict=True)
            for pages in np.split(np.arange(start, start + length, PAGE), range(4096, length // PAGE, 4096))
            if len(pages) >= 64
            for row in np.flatnonzero(np.convolve(~self.below.words(pages)[0].any(axis=1), np.ones(64), "valid") == 64)[
                ::64
            ]
        )
        self.free = empty
        # Pages of kernel code in 4K leaves, with the frames before and behind in their places.
        code = [
            gpa
            for start, end in zip(self.kernel.code.starts.tolist(), self.kernel.code.ends.tolist(), strict=True)
            for gpa in range(start + PAGE, min(end, start + 0x80_0000) - PAGE, PAGE)
        ]
        frames = guest_map.to_hpa(np.array(code))
        index = guest_map.find(np.array(code))[0]
        inner = (frames > 0) & (guest_map.words[index] >> 10 & 3 == 0)
        inner &= (guest_map.gpas[index] < np.array(code)) & (
            np.array(code) + PAGE < guest_map.gpas[index] + guest_map.lengths[index]
        )
        self.code = [gpa for gpa, good in zip(code, inner.tolist(), strict=True) if good]

    def write(self, hpa: int, data: bytes) -> None:
        """Write within a page, into a copy: in the file, pages that are alike are one."""
        page = self.pages.setdefault(hpa & ~0xFFF, bytearray(self.below.read(hpa & ~0xFFF, PAGE)))
        page[hpa & 0xFFF : (hpa & 0xFFF) + len(data)] = data

    @property
    def memory(self) -> HostMemory:
        """The capture with the pages that were written."""
        below, written = self.below, np.array(sorted(self.pages), dtype=np.int64)
        data = np.fromfile(self.path, dtype=np.uint8)
        present = gpamap.union(below.starts, below.starts + below.lengths)
        kept = below.remap(*(mask.subtract(present, (written, written + PAGE))[i] for i in (0, 1, 0)))
        segments = list(zip(kept.starts.tolist(), kept.lengths.tolist(), kept.offsets.tolist(), strict=True))
        segments += [(page, PAGE, data.size + PAGE * number) for number, page in enumerate(written.tolist())]
        new = b"".join(bytes(self.pages[page]) for page in written.tolist())
        return HostMemory.from_segments(FileSource(data.tobytes() + new), segments)

    def entry(self, gpa: int) -> tuple[int, int]:
        """Return where a page's leaf lies, and what it is."""
        step = self.machine.root.walk(self.below, gpa).steps[-1]
        return step.entry_address, step.entry

    def map_above(self, like: int, frames: list[int]) -> int:
        """Map frames above all memory of the guest, in a table of their own; return where."""
        first = self.machine.guest_map.top
        empty = self.machine.root.walk(self.below, first).steps[-1]
        assert (empty.level.name, empty.entry) == ("PDE", 0)
        table = next(self.free)
        entries = [self.entry(like)[1] & ~0xF_FFFF_FFFF_F000 | frame for frame in frames]
        self.write(table, struct.pack(f"<{len(entries)}Q", *entries))
        directory = self.machine.root.walk(self.below, like).steps[-2].entry
        self.write(empty.entry_address, (directory & ~0xF_FFFF_FFFF_F000 | table).to_bytes(8, "little"))
        return first

    def shadow(self, gpa: int, cleared: int) -> int:
        """Put a patched copy in a page's place, without some bits of its entry."""
        address, entry = self.entry(gpa)
        frame, copy = entry & 0xF_FFFF_FFFF_F000, next(self.free)
        self.write(copy, hooks.patched(self.below.read(frame, PAGE)))
        self.write(address, (entry & ~cleared & ~0xF_FFFF_FFFF_F000 | copy).to_bytes(8, "little"))
        return gpa


@pytest.mark.parametrize("name", ["kvm-ept", "kvm-npt"])
def test_manipulations_of_a_real_guest(name):
    real = Planted(name)
    expected = []
    pages = iter(real.code[8::24])
    if name == "kvm-ept":
        expected.append((Kind.UNREADABLE_PAGE, Severity.HIGH, real.shadow(next(pages), 3)))
    expected.append((Kind.SUBSTITUTED, Severity.HIGH, real.shadow(next(pages), 0)))
    # One page without X, one of whose frames appears again, and one of the hypervisor's own tables.
    gpa = next(pages)
    address, entry = real.entry(gpa)
    real.write(address, (entry ^ (4 if name == "kvm-ept" else 1 << 63)).to_bytes(8, "little"))
    expected.append((Kind.ODD_RIGHTS, Severity.HIGH, gpa))
    gpa = next(pages)
    table = real.machine.root.walk(real.below, gpa).steps[-1].entry_address & ~0xFFF
    above = real.map_above(gpa, [real.entry(gpa)[1] & 0xF_FFFF_FFFF_F000, table])
    expected += [(Kind.ALIAS, Severity.HIGH, gpa), (Kind.EXPOSURE, Severity.HIGH, above + PAGE)]
    memory = real.memory
    found = audit.audit(search.discover(memory), memory).findings
    assert set(grave(list(found))) == set(expected), [row for row in found if row.severity]
