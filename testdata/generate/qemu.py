"""A host under QEMU's TCG: the emulated processor has SVM with nested paging, no VMX.

The host prints on its serial port and hands records out through port 0xE9; it is
stopped and its memory written through QMP.
"""

from __future__ import annotations

import json
import re
import socket
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

from debian import QEMU_PACKAGES, version

PACKAGES = QEMU_PACKAGES
BINARY = "qemu-system-x86_64"


class EmulatorError(RuntimeError):
    """The emulator or the host in it did not get to where it should."""


class Qemu:
    """A running QEMU; leaves its logs in ``directory``."""

    def __init__(self, directory: Path, kernel: Path, initramfs: Path, mib: int, cpus: int, append: str) -> None:
        """Start the machine."""
        self.directory, self.mib = directory, mib
        directory.mkdir(parents=True, exist_ok=True)
        self.serial, self.report = directory / "serial.txt", directory / "report.bin"
        for stale in (self.serial, self.report, directory / "qmp", directory / "answer"):
            stale.unlink(missing_ok=True)
        self.command = [
            *(BINARY, "-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", "EPYC,+svm,+npt"),
            *(
                "-smp",
                str(cpus),
                "-m",
                str(mib),
                "-nodefaults",
                "-no-user-config",
                "-display",
                "none",
                "-no-reboot",
            ),
            *("-kernel", str(kernel), "-initrd", str(initramfs)),
            *("-append", f"console=ttyS0 {append}".strip()),
            *("-serial", f"file:{self.serial}", "-serial", f"unix:{directory}/answer,server=on,wait=off"),
            *("-chardev", f"file,id=e9,path={self.report}", "-device", "isa-debugcon,iobase=0xe9,chardev=e9"),
            *("-qmp", f"unix:{directory}/qmp,server=on,wait=off", "-device", "vmcoreinfo"),
        ]
        with (directory / "emulator.log").open("wb") as log:
            self.process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self._qmp = self._connect("qmp").makefile("rwb")
        self._qmp.readline()
        self.qmp("qmp_capabilities")
        self._answers = self._connect("answer")

    def _connect(self, name: str) -> socket.socket:
        """Connect to a socket of the emulator as soon as it listens."""
        for _ in range(200):
            client = socket.socket(socket.AF_UNIX)
            try:
                client.connect(str(self.directory / name))
            except OSError:
                client.close()
                time.sleep(0.1)
            else:
                return client
        raise EmulatorError(f"no {name} socket: {(self.directory / 'emulator.log').read_text()}")

    def qmp(self, command: str, **arguments: Any) -> Any:
        """Execute one QMP command."""
        self._qmp.write(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        self._qmp.flush()
        while True:
            answer = json.loads(self._qmp.readline())
            if "error" in answer:
                raise EmulatorError(f"{command}: {answer['error']}")
            if "return" in answer:
                return answer["return"]

    def monitor(self, command: str) -> str:
        """Execute one command of the human monitor."""
        return str(self.qmp("human-monitor-command", **{"command-line": command}))

    def wait_for(self, text: str, seconds: float) -> None:
        """Wait until the serial port has said ``text``."""
        wait_for(self.serial, text, seconds, self.process)

    def answer(self) -> None:
        """Let a host go on that waits for a line on its second serial port."""
        self._answers.sendall(b"\n")

    def vmruns(self, seconds: float = 3.0) -> dict[int, int]:
        """Return how often each VMCB address was given to VMRUN, from QEMU's log of translated code."""
        log = self.directory / "vmrun.log"
        self.monitor(f"logfile {log}")
        self.monitor("log in_asm")
        time.sleep(seconds)
        self.monitor("log none")
        self.monitor(f"logfile {self.directory / 'emulator.log'}")
        found = re.findall(r"vmrun! ([0-9a-f]+)", log.read_text(errors="replace"))
        log.unlink()
        return {int(address, 16): count for address, count in sorted(Counter(found).items())}

    def freeze(self, raw: Path) -> list[dict[str, Any]]:
        """Stop the machine, write its memory, return what its processors held."""
        self.monitor("stop")
        raw.unlink(missing_ok=True)
        self.qmp("pmemsave", val=0, size=self.mib << 20, filename=str(raw))
        registers = self.monitor("info registers -a")
        (self.directory / "registers.txt").write_text(registers)
        cpus = []
        for cpu, text in enumerate(re.split(r"CPU#\d+", registers)[1:]):
            cr3 = re.search(r"CR3=([0-9a-f]+)", text)
            cpus.append({"cpu": cpu, "cr3": hex(int(cr3[1], 16)) if cr3 else None})
        return cpus

    def end(self) -> None:
        """End the emulator."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def wait_for(log: Path, text: str, seconds: float, process: subprocess.Popen[bytes]) -> None:
    """Wait until ``log`` contains ``text``; an early end or a FATAL line is an error."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        content = log.read_bytes() if log.exists() else b""
        if text.encode() in content:
            return
        fatal = re.search(rb"FATAL .*|Kernel panic.*", content)
        if fatal:
            raise EmulatorError(f"{log}: {fatal[0].decode(errors='replace').strip()}")
        if process.poll() is not None:
            raise EmulatorError(f"the emulator ended before {text!r}; see {log.parent}")
        time.sleep(0.2)
    raise EmulatorError(f"{text!r} did not appear in {log} within {seconds:.0f} s")


def describe() -> str:
    """Return the emulator's name and version, for the manifest."""
    return f"QEMU {version('qemu-system-x86')} (TCG, SVM with nested paging)"
