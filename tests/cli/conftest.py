from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import captures
import pytest
from builders import machine, paging
from builders.machine import Guest
from builders.paging import PAGE, HostRam
from cli import containers, running

#: Memory above everything else in the small host, and last in its files: what a cut takes away.
UNUSED = 0x20_0000


@pytest.fixture(scope="session")
def vol(tmp_path_factory) -> running.Volatility:
    """The real ``vol``, with all results shared."""
    return running.Volatility(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="session")
def host() -> tuple[HostRam, list[Guest]]:
    """A host of little more than 1 MiB with holes in its memory, one EPT guest (0) and one NPT guest (1)."""
    ram, guests = machine.host(paging.EPT_4, paging.NPT_4)
    ram.page(0x2000)
    for address in range(UNUSED, UNUSED + 0x8000, PAGE):
        ram.page(address)
    return ram, guests


@pytest.fixture(scope="session")
def small(host, tmp_path_factory) -> Path:
    """That host as an ELF core. Volatility knows the system of neither guest."""
    return containers.elf(host[0], tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def real() -> captures.Capture:
    """A real capture with a Linux host and a Linux guest, whose symbols are beside it."""
    return captures.get("kvm-ept")


@dataclass
class Pslist:
    """Runs ``linux.pslist`` on the real capture, once per machine, and saves its configuration."""

    vol: running.Volatility
    capture: captures.Capture
    folder: Path
    _runs: dict[str, running.Result] = field(default_factory=dict)

    def __call__(self, guest: str = "") -> tuple[running.Result, Path]:
        """Return the run with ``--guest``, or without where it is empty, and the configuration."""
        config = self.folder / f"{guest or 'plain'}.json"
        if guest not in self._runs:
            options = ["--guest", guest] if guest else []
            self._runs[guest] = self.vol(*self._where, *options, "--save-config", config, "linux.pslist").check()
        return self._runs[guest], config

    def again(self, config: Path) -> running.Result:
        """Return the run that has nothing but the configuration."""
        return self.vol("-s", captures.SYMBOLS, "-c", config, "linux.pslist")

    def refused(self, guest: str) -> running.Result:
        """Return the run with a guest that is not there."""
        return self.vol(*self._where, "--guest", guest, "linux.pslist")

    @property
    def _where(self) -> list[str | Path]:
        return ["-s", captures.SYMBOLS, "-f", self.capture.path]


@pytest.fixture(scope="session")
def pslist(vol, real, tmp_path_factory) -> Pslist:
    """``linux.pslist`` of the real capture."""
    return Pslist(vol, real, tmp_path_factory.mktemp("pslist"))
