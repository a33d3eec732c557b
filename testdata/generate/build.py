"""Make the captures: hosts with virtual machines, frozen, with what is true of them.

Usage::

    python testdata/generate/build.py --list
    python testdata/generate/build.py npt-one none [--work DIR]
    python testdata/generate/build.py all

Needs Debian (or a container or VM of it), root for ``apt-get install`` of what is
missing, and no virtualization: the host's processor is emulated, by QEMU with SVM and
nested paging or by Bochs with VMX and EPT. Each capture goes to
``testdata/built/NAME/`` and into ``testdata/manifest.toml``, symbol tables to
``testdata/built/symbols/KERNEL/linux/``, the time of each step to ``built/NAME/build.log``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bochs
import debian
import elfcore
import isf_from_btf
import manifest
import qemu
import truth
import verify

CLOUD = "6.1.0-53-cloud-amd64"
GENERIC = "6.1.0-53-amd64"
NO_REBOOT = "panic=-1"
#: Freed memory is zeroed: images pack twice as well, at the price of deleted data.
SCRUB = "init_on_free=1"
BUILT = manifest.TESTDATA / "built"
SYMBOLS = BUILT / "symbols"
INNER = "inner"


@dataclass(frozen=True)
class Guest:
    """One virtual machine of the host."""

    name: str
    mib: int
    high_mib: int = 0
    cpus: int = 1
    kernel: str = CLOUD
    gig: bool = False
    running: bool = False
    nested: bool = False

    def spec(self, append: str) -> str:
        """Return the line that ``guest/host-init`` starts it by."""
        options = f"guest={self.name} busy={int(self.running)} nested={int(self.nested)}"
        words = (self.name, self.mib, self.high_mib, self.cpus, self.kernel, int(self.gig))
        return " ".join(map(str, words)) + f" console=ttyS0 {append} {options}"


@dataclass(frozen=True)
class Capture:
    """A host to be built."""

    about: str
    slat: str
    emulator: str
    mib: int
    guests: tuple[Guest, ...] = ()
    thp: str = "always"
    cpus: int = 1
    model: str = ""
    append: str = ""
    kernel: str = CLOUD
    sizes: str = "4K and 2M leaves"
    scrub: bool = True

    @property
    def kernels(self) -> list[str]:
        """The kernels in it, the host's first, each once."""
        return list(dict.fromkeys((self.kernel, *(guest.kernel for guest in self.guests))))


def npt(about: str, mib: int, *guests: Guest, **more: Any) -> Capture:
    """Return a capture made under QEMU, with Debian's QEMU as the monitor."""
    return Capture(about, "npt", "qemu", mib, guests, **more)


def ept(about: str, mib: int, *guests: Guest, **more: Any) -> Capture:
    """Return a capture made under Bochs, with ``guest/vmm.c`` as the monitor."""
    return Capture(about, more.pop("slat", "ept"), "bochs", mib, guests, **{"model": "corei7_skylake_x", **more})


CAPTURES: dict[str, Capture] = {
    "npt-one": npt("one guest", 320, Guest("vm1", 96)),
    "npt-two": npt("two guests of different size", 448, Guest("vm1", 112), Guest("vm2", 80)),
    "npt-nested": npt("KVM in KVM: a guest that runs a guest of its own", 448, Guest("vm1", 160, nested=True)),
    "none": npt("KVM is loaded, nothing runs", 256, sizes="no leaves"),
    "other-kernel": npt("the guest runs another kernel build", 448, Guest("vm1", 160, kernel=GENERIC)),
    "ept-two": ept(
        "two guests, the second running while the host is frozen",
        320,
        Guest("vm1", 80, 8),
        Guest("vm2", 80, running=True),
        model="corei7_haswell_4770",
    ),
    "ept-thp": ept("one guest, 2M and 4K leaves", 256, Guest("vm1", 80, 8)),
    "ept-4k": ept("one guest, 4K leaves only", 256, Guest("vm1", 80, 8), thp="never", sizes="4K leaves"),
    "ept-1g": ept(
        "one guest with a 1G leaf above 4 GiB",
        6144,
        Guest("vm1", 80, gig=True),
        append="hugepagesz=1G hugepages=1",
        scrub=False,  # it would touch all 6 GiB, of which Bochs holds two
        sizes="4K, 2M and 1G leaves",
    ),
    "npt-smp": npt("a guest with two vCPUs", 320, Guest("vm1", 96, cpus=2), cpus=2),
    "same-kernel": npt(
        "host and guest on one kernel build, 4K leaves only",
        256,
        Guest("vm1", 80),
        thp="never",
        sizes="4K leaves",
    ),
    "ept-nested": ept("KVM in KVM: a guest that runs a guest of its own", 320, Guest("vm1", 112, nested=True)),
}


class Log:
    """Times the steps of one build, on the screen and in a file."""

    def __init__(self, path: Path) -> None:
        """Start a new file."""
        self._path = path
        self._path.write_text("")

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time one step."""
        start = time.monotonic()
        yield
        self.line(f"{name:<28} {time.monotonic() - start:7.1f} s")

    def line(self, text: str) -> None:
        """Add a line."""
        print(text, flush=True)
        with self._path.open("a") as stream:
            stream.write(text + "\n")


def symbols_file(release: str) -> Path:
    """Return where the symbol table of a kernel goes: a directory of its own, for ``vol -s``."""
    return SYMBOLS / release / "linux" / f"debian-{release}.json.xz"


def symbols(kernel: debian.Kernel, work: Path) -> bytes:
    """Boot a kernel once to learn its symbols; write its ISF and return its BTF."""
    directory = work / "symbols" / kernel.release
    cached = directory / "btf.gz"
    if not (cached.exists() and symbols_file(kernel.release).exists()):
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "initrd.gz").write_bytes(debian.Ingredients(work).symbols())
        machine = qemu.Qemu(directory, kernel.image, directory / "initrd.gz", 512, 1, NO_REBOOT)
        try:
            machine.wait_for("SYMBOLS-DONE", 300)
            time.sleep(1)
        finally:
            machine.end()
        found = truth.records(machine.report.read_bytes())
        for name in ("btf.gz", "kallsyms.gz", "version"):
            (directory / name).write_bytes(found["file", name])
        btf, names = isf_from_btf.read(cached), isf_from_btf.read(directory / "kallsyms.gz").decode()
        banner = (directory / "version").read_text()
        isf = isf_from_btf.convert(btf, names, banner, f"vmlinux-{kernel.release}")
        isf_from_btf.write(isf, symbols_file(kernel.release))
    return isf_from_btf.read(cached)


def emulate(name: str, capture: Capture, work: Path, log: Log) -> tuple[Path, bytes, str, dict[str, Any]]:
    """Run the host until it says it is done, and freeze it.

    Returns the raw memory, the report, the console and what the emulator itself knows.
    """
    kernel = debian.Kernel(capture.kernel, work)
    guests = {guest.name: (debian.Kernel(guest.kernel, work), guest.nested) for guest in capture.guests}
    on_qemu = capture.emulator == "qemu"
    append = f"{NO_REBOOT} {SCRUB if capture.scrub else ''}"
    if not on_qemu:
        append += " loglevel=4 mitigations=off nowatchdog audit=0 random.trust_cpu=on"
    conf = {
        "VMM": "qemu" if on_qemu else "vmm",
        "THP": capture.thp,
        "GUESTS": " ".join(guest.name for guest in capture.guests),
        "RUNNING": " ".join(guest.name for guest in capture.guests if guest.running),
        "HANDSHAKE": "1" if on_qemu and capture.guests else "",
        **{f"SPEC_{guest.name}": guest.spec(append) for guest in capture.guests},
    }
    text = "".join(f'{key}="{value}"\n' for key, value in conf.items())
    with log.step("programs and initramfs"):
        image = debian.Ingredients(work).host(kernel, guests, text, on_qemu)
        directory = work / "run" / name
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        (directory / "initrd.gz").write_bytes(image)
    raw = directory / "host.raw"
    known: dict[str, Any] = {}
    host_append = f"{append} {capture.append}".strip()
    machine: qemu.Qemu | bochs.Bochs
    if on_qemu:
        machine = qemu.Qemu(directory, kernel.image, directory / "initrd.gz", capture.mib, capture.cpus, host_append)
    else:
        machine = bochs.Bochs(directory, kernel.image, directory / "initrd.gz", capture.mib, capture.model, host_append)
    try:
        if isinstance(machine, qemu.Qemu) and capture.guests:
            with log.step("boot to guests ready"):
                machine.wait_for("HOST-WAITS", 600)
            with log.step("log of VMRUN"):
                known["vmrun"] = {hex(address): count for address, count in machine.vmruns().items()}
            machine.answer()
        with log.step("to the host's end"):
            machine.wait_for("HOST-DONE", 1500)
            time.sleep(1)
        with log.step("freeze and write memory"):
            known["cpus"] = machine.freeze(raw)
    finally:
        machine.end()
    return raw, machine.report.read_bytes(), machine.serial.read_text(errors="replace"), known


def describe_guests(capture: Capture, found: truth.Records, target: Path) -> list[dict[str, Any]]:
    """Write consoles and page lists; return the truth of every guest, nested ones last."""
    described = []
    for guest in capture.guests:
        entry = truth.guest_truth(found, guest.name)
        entry |= {"running": guest.running, "symbols": f"linux/debian-{guest.kernel}.json.xz"}
        described.append(entry)
        listed = truth.pages(found["pages", guest.name])
        truth.write_pages(target / entry["pages_file"], listed)
        (target / entry["console"]).write_text(truth.text(found, f"{guest.name}.console"))
        if not guest.nested:
            continue
        own = truth.records(found["file", f"{guest.name}.report"])
        lines = truth.text(own, f"{INNER}.console")
        own |= {("file", f"{INNER}.{kind}"): lines.encode() for kind in ("slots", "registers")}
        entry = truth.guest_truth(own, INNER) | {"level": 3, "parent": guest.name}
        entry["vmm_pid"] = int(lines.rpartition("pid ")[2].split()[0])
        composed = {
            gpa: (listed[frame * truth.PAGE][0], sha256)
            for gpa, (frame, sha256) in truth.pages(own["pages", INNER]).items()
            if frame * truth.PAGE in listed
        }
        truth.write_pages(target / entry["pages_file"], composed)
        entry["pages_in_parent_file"] = f"pages-{INNER}-in-{guest.name}.tsv.gz"
        truth.write_pages(target / entry["pages_in_parent_file"], truth.pages(own["pages", INNER]))
        described.append(entry)
    return described


def build(name: str, work: Path) -> None:
    """Make one capture."""
    capture, target = CAPTURES[name], work / "finished" / name
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    log = Log(target / "build.log")
    start = time.monotonic()
    log.line(f"== {name}: {capture.about}")
    emulator = qemu if capture.emulator == "qemu" else bochs
    with log.step("packages"):
        debian.install((*debian.COMPILER_PACKAGES, *qemu.PACKAGES, *emulator.PACKAGES))
    btfs = {}
    for release in capture.kernels:
        with log.step(f"symbols {release}"):
            btfs[release] = symbols(debian.Kernel(release, work), work)
    raw, stream, console, known = emulate(name, capture, work, log)
    with log.step("ELF core"), raw.open("rb") as source, (target / "host.elf").open("wb") as out:
        elfcore.write(source, out, [elfcore.Region(0, 0, raw.stat().st_size)])
    with log.step("truth"):
        found = truth.records(stream)
        host = truth.host_truth(found, raw.stat().st_size, known["cpus"])
        host["symbols"] = f"linux/debian-{capture.kernel}.json.xz"
        guests = describe_guests(capture, found, target)
        structures = structures_of(capture, work, target, btfs[capture.kernel], raw, host, guests)
        document = {
            "schema": 1,
            "capture": name,
            "about": capture.about,
            "slat": capture.slat,
            "host": host,
            "control_structures": structures,
            **({"vmrun": known["vmrun"]} if "vmrun" in known else {}),
            "guests": guests,
        }
        (target / "host.console.txt").write_text(console.replace("\r", ""))
        write_json(target / "truth.json", document)
    with log.step("verification"):
        results = verify.check(target)
        for result in results:
            log.line(f"{result['guest']}: {'sound' if verify.is_sound(result) else 'WRONG'}: {result}")
        for guest, result in zip(guests, results, strict=True):
            if guest["running"]:
                guest |= {"pages_drifted": result["bytes differ"], "drifted": result["differing ranges"]}
        write_json(target / "truth.json", document)
    log.line(f"{'total':<28} {time.monotonic() - start:7.1f} s")
    if not all(map(verify.is_sound, results)):
        raise SystemExit(f"{name}: the truth does not hold, see {target / 'build.log'}")
    entry = describe(name, capture, work, target, guests, results)
    BUILT.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(BUILT / name, ignore_errors=True)
    shutil.move(target, BUILT / name)
    manifest.update(name, entry)
    raw.unlink()


def structures_of(
    capture: Capture,
    work: Path,
    target: Path,
    base: bytes,
    raw: Path,
    host: dict[str, Any],
    guests: list[dict[str, Any]],
) -> list[dict[str, Any]]:
    """Find the control structures in the host kernel's objects; note KVM's own slots in ``guests``."""
    module = "kvm-intel" if capture.slat == "ept" else "kvm-amd"
    module_btf = debian.Kernel(capture.kernel, work).module_btf(module)
    btf = isf_from_btf.Btf(module_btf, isf_from_btf.Btf(base))
    kernel = truth.HostKernel(raw, btf, host["kallsyms"], "\n".join(host["iomem"]))
    names = {guest["vmm_pid"]: guest["name"] for guest in guests if guest["level"] == 2}
    nested = {guest["parent"]: guest["name"] for guest in guests if guest["level"] == 3}
    found, slots = truth.control_structures(kernel, capture.slat, names, nested)
    for guest in guests:
        if guest["name"] in slots:
            guest["kvm_memslots"] = slots[guest["name"]]
    for item in found:
        if item["role"] == "nested":
            locate_nested(kernel, item, target / f"pages-{item['gpa_of']}.tsv.gz")
    return found


def locate_nested(kernel: truth.HostKernel, item: dict[str, Any], pages_file: Path) -> None:
    """Add the host-physical address of a control structure in a guest's memory, by that guest's page list."""
    gpa = int(item["gpa"], 16)
    frames = {page: hpa for page, hpa, _ in verify.truth_pages(pages_file)}
    if gpa in frames:
        item["hpa"] = hex(frames[gpa])
        if item["kind"] == "vmcb":
            item["slat_root"] = hex(kernel.physical(frames[gpa] + truth.VMCB_NESTED_CR3))


def describe(
    name: str,
    capture: Capture,
    work: Path,
    target: Path,
    guests: list[dict[str, Any]],
    results: list[dict[str, Any]],
) -> dict[str, Any]:
    """Return the capture's entry in the manifest."""
    elf = target / "host.elf"
    with elf.open("rb") as stream:
        memory_sha256 = elfcore.raw_sha256(stream)
    emulator = qemu if capture.emulator == "qemu" else bochs
    monitor = "Debian's microvm QEMU" if capture.emulator == "qemu" else "guest/vmm.c"
    module = "kvm-intel" if capture.slat == "ept" else "kvm-amd"
    return {
        "file": f"built/{name}/host.elf",
        "truth": f"built/{name}/truth.json",
        "format": "elf-core",
        "committed": False,
        "size": elf.stat().st_size,
        "sha256": manifest.file_sha256(elf),
        "memory_size": capture.mib << 20,
        "memory_sha256": memory_sha256,
        "slat": capture.slat,
        "about": capture.about,
        "host": f"Debian, Linux {capture.kernel}, {capture.cpus} CPU, {capture.mib} MiB",
        "hypervisor": f"KVM ({module}), {capture.slat.upper()} with {capture.sizes}; monitor: {monitor}",
        "emulator": emulator.describe(),
        "kernels": [debian.Kernel(release, work).describe() for release in capture.kernels],
        "symbols": [str(symbols_file(release).relative_to(manifest.TESTDATA)) for release in capture.kernels],
        "made": f"python testdata/generate/build.py {name}",
        "guests": [
            {
                "name": guest["name"],
                "level": guest["level"],
                "running": guest["running"],
                **({"kernel": guest["kernel"]} if "kernel" in guest else {}),
                "memslots": [f"{slot['gpa']}+{slot['size']}" for slot in guest["memslots"]],
                "pages_present": result["pages"],
                "pages_zero": guest["pages_zero"],
                "pages_mapped": result["mapped"],
                "pages_absent": result["absent from the SLAT"],
                "pages_drifted": result["bytes differ"],
            }
            for guest, result in zip(guests, results, strict=True)
        ],
    }


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write JSON for reading."""
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Make memory images of hosts with virtual machines.")
    parser.add_argument("names", nargs="*", help="captures to make, or 'all'")
    parser.add_argument("--work", type=Path, default=manifest.TESTDATA / "work", help="directory for work files")
    parser.add_argument("--list", action="store_true", help="list the captures")
    args = parser.parse_args(argv)
    if args.list or not args.names:
        for name, capture in CAPTURES.items():
            print(f"{name:<14} {capture.slat}, {capture.mib} MiB: {capture.about}")
        return 0
    names = list(CAPTURES) if args.names == ["all"] else args.names
    unknown = [name for name in names if name not in CAPTURES]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; --list shows the captures")
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    for name in names:
        build(name, work)
    return 0


if __name__ == "__main__":
    sys.exit(main())
