"""A host under Bochs: the emulated processor has VMX with EPT, or SVM with nested paging.

Debian's Bochs has neither debugger nor a way to save memory, so the guest's RAM is
read out of the stopped process: Bochs keeps it in blocks of 128 KiB, in the order in
which they were first touched, and has a table of pointers to them.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from debian import BOCHS_PACKAGES, run, version
from qemu import EmulatorError, wait_for

PACKAGES = BOCHS_PACKAGES
BLOCK = 128 << 10
#: Bochs takes no more for itself; what a larger machine touches beyond goes to a file.
MOST_MIB = 2048
EDGE = 64 << 20
#: What the table holds for a block that is not in memory, if the machine is larger than that.
ABSENT = (0, (1 << 64) - 1)

# error/info: with any other action a signal handler of 2.7 deadlocks in its own log.
# sound: the default driver ends the process where there is no sound card.
CONFIG = """\
display_library: rfb, options="timeout=0"
cpu: model={model}, count=1, ips=100000000, reset_on_triple_fault=1, ignore_bad_msrs=1
memory: guest={mib}, host={host_mib}
romimage: file=/usr/share/bochs/BIOS-bochs-latest
vgaromimage: file=/usr/share/bochs/VGABIOS-lgpl-latest
vga: extension=vbe, update_freq=1
pci: enabled=1, chipset=i440fx
ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14
ata0-master: type=cdrom, path={directory}/host.iso, status=inserted
ata1: enabled=0
boot: cdrom
com1: enabled=1, mode=file, dev={directory}/serial.txt
port_e9_hack: enabled=1
clock: sync=none, time0=1767225600
log: {directory}/bochs.log
panic: action=fatal
error: action=ignore
info: action=ignore
debug: action=ignore
floppya: type=none
sound: waveoutdrv=dummy, waveindrv=dummy, midioutdrv=dummy
"""

ISOLINUX = """\
SERIAL 0 115200
DEFAULT host
PROMPT 0
TIMEOUT 1
LABEL host
 KERNEL /vmlinuz
 INITRD /initrd.gz
 APPEND console=ttyS0,115200 tsc=reliable {append}
"""


class Bochs:
    """A running Bochs; leaves its logs in ``directory``."""

    def __init__(self, directory: Path, kernel: Path, initramfs: Path, mib: int, model: str, append: str) -> None:
        """Start the machine from a CD with the kernel on it."""
        self.directory, self.mib = directory, mib
        self.serial, self.report = directory / "serial.txt", directory / "report.bin"
        self._make_iso(kernel, initramfs, append)
        config = CONFIG.format(model=model, mib=mib, host_mib=min(mib, MOST_MIB), directory=directory)
        (directory / "bochsrc").write_text(config)
        (directory / "continue").write_text("c\n")
        binary = shutil.which("bochs-bin") or shutil.which("bochs")
        if not binary:
            raise EmulatorError("no bochs in PATH")
        with self.report.open("wb") as report, (directory / "stderr.txt").open("wb") as errors:
            self.process = subprocess.Popen(
                [binary, "-q", "-f", "bochsrc", "-rc", "continue"],
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=report,
                stderr=errors,
            )

    def _make_iso(self, kernel: Path, initramfs: Path, append: str) -> None:
        """Write a bootable CD."""
        tree = self.directory / "iso"
        (tree / "isolinux").mkdir(parents=True, exist_ok=True)
        shutil.copy(kernel, tree / "vmlinuz")
        shutil.copy(initramfs, tree / "initrd.gz")
        for file in ("/usr/lib/ISOLINUX/isolinux.bin", "/usr/lib/syslinux/modules/bios/ldlinux.c32"):
            shutil.copy(file, tree / "isolinux")
        (tree / "isolinux" / "isolinux.cfg").write_text(ISOLINUX.format(append=append))
        boot = ("-b", "isolinux/isolinux.bin", "-c", "isolinux/boot.cat", "-no-emul-boot")
        table = ("-boot-load-size", "4", "-boot-info-table")
        run("xorriso", "-as", "mkisofs", "-quiet", "-o", self.directory / "host.iso", *boot, *table, tree)

    def wait_for(self, text: str, seconds: float) -> None:
        """Wait until the serial port has said ``text``."""
        wait_for(self.serial, text, seconds, self.process)

    def freeze(self, raw: Path) -> list[dict[str, Any]]:
        """Stop the process and write the memory of the machine in it."""
        os.kill(self.process.pid, signal.SIGSTOP)
        time.sleep(0.3)
        blocks = block_table(self.process.pid, self.mib << 20)
        with raw.open("wb") as out, Path(f"/proc/{self.process.pid}/mem").open("rb", buffering=0) as memory:
            for number, address in enumerate(blocks):
                if address:
                    out.seek(number * BLOCK)
                    out.write(read(memory, address, BLOCK))
            out.truncate(self.mib << 20)
        return []

    def end(self) -> None:
        """End the emulator."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def read(memory: BinaryIO, address: int, size: int) -> bytes:
    """Read from the memory of a process."""
    memory.seek(address)
    data = b""
    while len(data) < size:
        chunk = memory.read(size - len(data))
        if not chunk:
            break
        data += chunk
    return data


def block_table(pid: int, size: int) -> list[int]:
    """Return the address of each block of the machine's RAM, 0 for those never touched.

    The table is the run of pointers, each absent or to a page within one large
    writable mapping, with the most pointers that are not absent.
    """
    segments = []
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        match = re.match(r"([0-9a-f]+)-([0-9a-f]+) rw", line)
        if match:
            segments.append((int(match[1], 16), int(match[2], 16)))
    vector_size = min(size, MOST_MIB << 20)
    large = [(start, end) for start, end in segments if end - start >= vector_size]
    count = size // BLOCK
    best: tuple[int, list[int]] = (0, [])
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for start, size_read in places(segments, vector_size):
            data = read(memory, start, size_read)
            words = array("Q", data[: len(data) // 8 * 8])
            for low, high in large:
                for first, last in runs(words, low, high):
                    pointers = words[first : min(last, first + count)]
                    used = sum(pointer not in ABSENT for pointer in pointers)
                    if last - first >= count and used > best[0]:
                        best = (used, [0 if pointer in ABSENT else pointer for pointer in pointers])
    if not best[0]:
        raise EmulatorError("no table of memory blocks in the process")
    if size > vector_size and best[0] >= vector_size // BLOCK:
        raise EmulatorError(f"the machine has touched more than {MOST_MIB} MiB, the rest is in a file")
    return best[1]


def places(segments: Sequence[tuple[int, int]], vector_size: int) -> Iterator[tuple[int, int]]:
    """Yield ``(start, size)`` of the memory to search.

    Of a mapping as large as the machine's RAM, only the ends: a large table is mapped
    by itself, and the kernel may have merged it with the RAM next to it.
    """
    for start, end in segments:
        if end - start < vector_size:
            yield start, end - start
        else:
            yield start, EDGE
            yield end - EDGE, EDGE


def runs(words: array[int], low: int, high: int) -> list[tuple[int, int]]:
    """Return the stretches of absent and page addresses in ``[low, high)``, at least one of the latter."""
    found, start, used = [], 0, False
    for index, word in enumerate(words):
        if word in ABSENT or (low <= word < high and not word & 0xFFF):
            used = used or word not in ABSENT
            continue
        if used:
            found.append((start, index))
        start, used = index + 1, False
    if used:
        found.append((start, len(words)))
    return found


def describe() -> str:
    """Return the emulator's name and version, for the manifest."""
    return f"Bochs {version('bochs')}"
