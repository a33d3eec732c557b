"""The guests of the real captures as images: equal to the ground truth, and opened by the tools that people use."""

from __future__ import annotations

import functools
import hashlib
import json
import lzma
import os
import shutil
import subprocess
from pathlib import Path

import captures
import discovered
import pytest
from export import images

from volatility3_ept.export import carve
from volatility3_ept.export.plan import Format

PAGE = 4096
COMMITTED = ["kvm-ept", "kvm-npt"]
#: More than one vCPU, and a guest in a guest.
BUILT = [pytest.param(name, marks=pytest.mark.corpus) for name in ("npt-smp", "npt-nested", "ept-nested")]


@functools.cache
def carved(name: str, format_: Format, folder: Path) -> carve.Carved:
    below, _ = discovered.capture(name)
    (machine,) = discovered.guests(name)
    (folder / name).mkdir(exist_ok=True)
    return carve.carve(carve.Image.of(machine, below), folder / name, format_)


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("carved")


def truth(name: str) -> captures.GuestTruth:
    """Return the truth of the one guest of the host itself."""
    (guest,) = [guest for guest in captures.get(name).guests if guest.facts["parent"] == "host"]
    return guest


def digests(guest: captures.GuestTruth) -> dict[int, str]:
    return {gpa: digest for gpa, (_, digest) in guest.pages.items()}


@pytest.mark.parametrize("format_", [Format.LIME, Format.ELF], ids=str)
@pytest.mark.parametrize("name", [*COMMITTED, *BUILT])
def test_every_page_of_the_guest_and_no_other_is_in_it(name, format_, folder):
    done = carved(name, format_, folder)
    ranges = images.lime(done.path) if format_ is Format.LIME else images.elf(done.path)[0]
    written, expected = images.pages(ranges), digests(truth(name))
    assert set(written) >= set(expected)
    slots = truth(name).facts["memslots"]
    outside = [gpa for gpa in set(written) - set(expected) if not any(_holds(slot, gpa) for slot in slots)]
    assert set(written) - set(expected) == set(outside), "a page in a slot that the VMM does not have"
    assert {gpa: written[gpa] for gpa in expected} == expected


def _holds(slot: dict[str, str], gpa: int) -> bool:
    return int(slot["gpa"], 0) <= gpa < int(slot["gpa"], 0) + int(slot["size"], 0)


@pytest.mark.parametrize(
    ("name", "stop"),
    [("kvm-npt", 1 << 28), *(pytest.param(name, None, marks=pytest.mark.slow) for name in COMMITTED)],
)
def test_raw_holds_each_page_at_its_address_and_nothing_else(name, stop, tmp_path):
    """Whole, these two take their seconds: they have memory above 4 GiB, and zeros are hashed as everything else."""
    image = carve.Image.of(discovered.guests(name)[0], discovered.capture(name)[0], stop=stop)
    done = carve.carve(image, tmp_path, Format.RAW)
    expected = {gpa: digest for gpa, digest in digests(truth(name)).items() if stop is None or gpa < stop}
    with done.path.open("rb") as file:
        for gpa, digest in expected.items():
            file.seek(gpa)
            assert hashlib.sha256(file.read(PAGE)).hexdigest() == digest
    stray = [gpa for start, end in images.extents(done.path) for gpa in range(start, end, PAGE) if gpa not in expected]
    assert stray == []
    zero = hashlib.sha256(bytes(PAGE)).hexdigest()
    filled = sum(digest != zero for digest in expected.values())
    assert done.path.stat().st_blocks * 512 <= 1.02 * filled * PAGE


@pytest.mark.parametrize("name", COMMITTED)
def test_carving_twice_gives_the_same_files(name, folder, tmp_path):
    done = carved(name, Format.ELF, folder)
    below, _ = discovered.capture(name)
    again = carve.carve(carve.Image.of(discovered.guests(name)[0], below), tmp_path, Format.ELF)
    assert again.sha256 == done.sha256 == hashlib.sha256(done.path.read_bytes()).hexdigest()
    assert again.manifest.read_bytes() == done.manifest.read_bytes()


@pytest.mark.parametrize("name", [*COMMITTED, *BUILT])
def test_the_coverage_in_the_manifest_adds_up(name, folder):
    said = json.loads(carved(name, Format.ELF, folder).manifest.read_text())
    totals = said["coverage"]["totals"]
    assert sum(totals.values()) == said["coverage"]["top"] == sum(size for _, size, _ in said["coverage"]["ranges"])
    assert totals["mapped"] + totals["recovered"] == said["image"]["present"]


@pytest.mark.corpus
@pytest.mark.parametrize("name", ["npt-nested", "ept-nested"])
def test_a_guest_of_a_guest(name, tmp_path):
    _, found = discovered.capture(name)
    (nested,) = [machine for machine in found.all() if machine.depth == 1]
    parent = found.find(nested.tables_in) if nested.tables_in else None
    below = parent.memory if parent else discovered.capture(name)[0]
    done = carve.carve(carve.Image.of(nested, below), tmp_path, Format.LIME)
    assert done.path.name == f"guest-{nested.id}.lime"
    (inner,) = [guest for guest in captures.get(name).guests if guest.facts["parent"] != "host"]
    written = images.pages(images.lime(done.path))
    expected = digests(inner)
    equal = sum(written.get(gpa) == digest for gpa, digest in expected.items())
    assert equal >= 0.9 * len(expected)


# Registers -----------------------------------------------------------------------------------------------------------


def registers(name: str) -> list[dict[str, int]]:
    rows = sorted(truth(name).facts["registers"], key=lambda row: row["vcpu"])
    return [{key: int(value, 0) for key, value in row.items() if isinstance(value, str)} for row in rows]


@pytest.mark.parametrize("name", [*COMMITTED, pytest.param("npt-smp", marks=pytest.mark.corpus)])
def test_the_manifest_s_registers_are_those_that_kvm_gave(name, folder):
    said = json.loads(carved(name, Format.ELF, folder).manifest.read_text())["vcpus"]
    expected = registers(name)
    assert len(said) == len(expected)
    for vcpu, given in zip(said, expected, strict=True):
        known = {key: int(value, 0) for key, value in vcpu["known"].items()}
        for key in ("rsp", "rflags", "cr0", "cr3", "cr4", "gs_base"):
            assert known[key] == given[key], key
        assert known["gdtr_base"] == given["gdt_base"]
        assert known["idtr_base"] == given["idt_base"]
        # The control structure of a halted vCPU holds the RIP of the halt; KVM reports the instruction behind it.
        assert given["rip"] - known["rip"] in (0, 1)
        assert "rbx" in vcpu["unknown"]


@pytest.mark.skipif(shutil.which("gdb") is None, reason="gdb is not installed")
@pytest.mark.parametrize("name", [*COMMITTED, pytest.param("npt-smp", marks=pytest.mark.corpus)])
def test_gdb_shows_the_registers_and_the_memory(name, folder):
    path, expected = carved(name, Format.ELF, folder).path, registers(name)
    show = 'thread apply all -ascending printf "R %lx %lx %lx %lx\\n", $rip, $rsp, $eflags, $gs_base'
    commands = [part for command in (f"core-file {path}", show, "x/1gx 0x1000") for part in ("-ex", command)]
    done = subprocess.run(["gdb", "-nx", "-batch", *commands], capture_output=True, text=True, timeout=60, check=True)
    shown = [[int(word, 16) for word in line.split()[1:]] for line in done.stdout.splitlines() if line.startswith("R ")]
    assert len(shown) == len(expected)
    for (rip, rsp, rflags, gs_base), given in zip(shown, expected, strict=True):
        assert given["rip"] - rip in (0, 1)
        assert (rsp, rflags, gs_base) == (given["rsp"], given["rflags"], given["gs_base"])
    word = int.from_bytes(images.elf(path)[0][0][0x1000:0x1008], "little")
    assert done.stdout.splitlines()[-1].split()[-1] == f"0x{word:016x}"


# drgn ----------------------------------------------------------------------------------------------------------------


def opened(path: Path):
    """Return the core in drgn, which must know it for a Linux kernel's."""
    drgn = pytest.importorskip("drgn")
    program = drgn.Program()
    program.set_core_dump(path)
    assert program.flags & drgn.ProgramFlags.IS_LINUX_KERNEL
    return program


@pytest.mark.parametrize("name", COMMITTED)
def test_drgn_knows_the_kernel_and_translates_its_addresses(name, folder):
    program, guest = opened(carved(name, Format.ELF, folder).path), truth(name)
    info = program["VMCOREINFO"].string_().decode()
    assert f"OSRELEASE={guest.facts['kernel']}\n" in info
    assert f"SYMBOL(_stext)={int(guest.facts['kallsyms']['_stext'], 0):x}\n" in info
    banner = program.read(int(guest.facts["kallsyms"]["linux_banner"], 0), len(guest.facts["version"]))
    assert banner.decode() == guest.facts["version"]
    gpa, (_, digest) = max(guest.pages.items())
    assert hashlib.sha256(program.read(gpa, PAGE, physical=True)).hexdigest() == digest


@pytest.mark.parametrize("name", COMMITTED)
def test_drgn_reads_the_task_list(name, folder):
    """Without debug information: the offsets are those of Volatility's table, the memory is read by drgn."""
    program, guest = opened(carved(name, Format.ELF, folder).path), truth(name)
    with lzma.open(captures.SYMBOLS / guest.facts["symbols"]) as file:
        fields = {key: value["offset"] for key, value in json.load(file)["user_types"]["task_struct"]["fields"].items()}
    first = int(guest.facts["kallsyms"]["init_task"], 0)
    found, task = set(), program.read_u64(first + fields["tasks"]) - fields["tasks"]
    while task != first and len(found) < 1000:
        name_ = program.read_c_string(task + fields["comm"], max_size=16).decode()
        found.add((program.read_u32(task + fields["pid"]), name_))
        task = program.read_u64(task + fields["tasks"]) - fields["tasks"]
    assert_processes(found, guest)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMITTED)
def test_drgn_lists_the_tasks_by_itself(name, folder):
    """With the kernel's debug information (Debian: linux-image-...-dbg; EPT_VMLINUX names another place)."""
    guest = truth(name)
    kernel = Path(os.environ.get("EPT_VMLINUX", f"/usr/lib/debug/boot/vmlinux-{guest.facts['kernel']}"))
    if not kernel.exists():
        pytest.skip(f"{kernel} is not there")
    program = opened(carved(name, Format.ELF, folder).path)
    program.load_debug_info([kernel])
    from drgn.helpers.linux.pid import for_each_task
    from drgn.helpers.linux.sched import idle_task

    assert_processes({(int(task.pid), task.comm.string_().decode()) for task in for_each_task(program)}, guest)
    for number, given in enumerate(registers(name)):
        frame = program.stack_trace(idle_task(program, number))[0]
        assert frame.register("rsp") == given["rsp"]
        assert frame.name == "native_safe_halt"


def assert_processes(found: set[tuple[int, str]], guest: captures.GuestTruth) -> None:
    """Every process that the guest's ``ps`` listed, and beside them at most what init has started since then.

    To the names of kworkers ``ps`` adds what they work on.
    """
    listed = guest.processes
    assert {pid for pid, _ in found} >= {pid for pid, _ in listed}
    assert found >= {row for row in listed if not row[1].startswith("kworker")}
    assert {name for pid, name in found if pid not in dict(listed)} <= {"sleep"}
