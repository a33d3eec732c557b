"""Lets QEMU itself write dumps of a given memory: a machine that never runs, with that memory as its RAM."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

BINARY = "qemu-system-x86_64"
MIB = 1 << 20


class Qemu:
    """A stopped machine whose RAM is a file; changes to it stay in QEMU."""

    def __init__(self, memory: Path, machine: str) -> None:
        """Start it; skip the test where QEMU is not installed. The size of the file must be whole MiB."""
        if shutil.which(BINARY) is None:
            pytest.skip("no QEMU (Debian: qemu-system-x86)")
        size = memory.stat().st_size
        backend = f"memory-backend-file,id=pc.ram,size={size},mem-path={memory},share=off"
        command = f"{BINARY} -S -accel tcg -cpu qemu64 -nodefaults -display none -m {size // MIB} -qmp stdio".split()
        self._process = subprocess.Popen(
            [*command, "-object", backend, "-machine", f"{machine},memory-backend=pc.ram"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.command("qmp_capabilities")

    def __enter__(self) -> Qemu:
        return self

    def __exit__(self, *_: object) -> None:
        self.command("quit")
        self._process.communicate(timeout=60)

    def command(self, name: str, **arguments: Any) -> Any:
        """Return the answer to a command; AssertionError with QEMU's reason when it fails."""
        self._process.stdin.write(json.dumps({"execute": name, "arguments": arguments}).encode() + b"\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            answer = json.loads(line)
            assert "error" not in answer, answer["error"]
            if "return" in answer:
                return answer["return"]
        raise AssertionError("QEMU has ended")

    def elf(self, path: Path) -> None:
        """``dump-guest-memory``, as ``virsh dump --memory-only`` calls it."""
        self.command("dump-guest-memory", paging=False, protocol=f"file:{path}")

    def kdump(self, path: Path) -> None:
        """``dump-guest-memory -z``."""
        self.command("dump-guest-memory", paging=False, protocol=f"file:{path}", format="kdump-zlib")

    def migrate(self, path: Path) -> None:
        """``migrate "exec:cat > path"``: what ``virsh save`` and ``savevm`` keep, without their own headers."""
        self.command("migrate", uri=f"exec:cat > {path}")
        while (status := self.command("query-migrate")["status"]) not in ("completed", "failed"):
            time.sleep(0.05)
        assert status == "completed"
