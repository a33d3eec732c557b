"""The Python interface for scripts and notebooks: open a capture, and read the machines in it.

>>> import volatility3_ept
>>> with volatility3_ept.open("host.raw") as capture:  # doctest: +SKIP
...     for machine in capture.machines:
...         print(machine.id, machine.system)

Raw images, LiME files and ELF cores are read as they lie. Volatility is imported for the other formats alone, and
where no file is to be opened not at all. Nothing is ever written to a capture.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

from volatility3_ept.core import containers, indexfile, lineage, portrait, search, sharing
from volatility3_ept.core.machines import Discovery
from volatility3_ept.core.memory import HostMemory, Int64
from volatility3_ept.core.owner import Answer, Owners
from volatility3_ept.core.root import Root
from volatility3_ept.core.sharing import Shared
from volatility3_ept.core.source import FileSource
from volatility3_ept.export import html
from volatility3_ept.export.output import OutputError
from volatility3_ept.machine import Machine, MissingMemoryError, Run, Translation, read
from volatility3_ept.spec import bits

__all__ = [
    "Capture",
    "CaptureError",
    "Machine",
    "MissingMemoryError",
    "OutputError",
    "Run",
    "Translation",
    "open_capture",
]

#: Told what is being done: percent, and the step.
Progress = Callable[[float, str], object]


class CaptureError(ValueError):
    """The file is no capture, or not a whole one. The message says which."""


def open_capture(
    path: str | Path,
    *,
    maxphyaddr: int = bits.MAX_PHYSICAL_BITS,
    recovery: bool = True,
    allow_truncated: bool = False,
    progress: Progress | None = None,
    index: bool | Path = True,
) -> Capture:
    """Open the memory image of a host. The search for machines starts when they are first asked for.

    ``maxphyaddr``, ``recovery`` and ``allow_truncated`` are the options of ``vol`` (``--no-recovery`` is the opposite
    of ``recovery``). ``progress`` is called with a percentage and a text while the capture is searched.

    ``index``: where things were found is kept in Volatility's cache folder, or in the one that is given, so that an
    unchanged file is not searched again, by this interface or by a plugin. False: nothing is read from there or kept.

    Raises:
        OSError: the file cannot be read.
        CaptureError: it is no capture, or shorter than its headers declare.
    """
    path = Path(path)
    found = containers.read(path)
    if found is None:
        return Capture(path, _by_volatility(path, allow_truncated), maxphyaddr, recovery, progress, index)
    if found.missing and not allow_truncated:
        raise CaptureError(f"{path}: the capture is truncated: {found.missing:,} bytes of memory are missing; "
                           "allow_truncated=True uses what is there")  # fmt: skip
    memory = HostMemory.from_segments(FileSource(path), [(s.start, s.length, s.offset) for s in found.segments])
    return Capture(path, memory, maxphyaddr, recovery, progress, index)


def _by_volatility(path: Path, allow_truncated: bool) -> HostMemory:
    from volatility3_ept.layers import errors, opening

    try:
        return opening.memory(path, allow_truncated)
    except errors.EptError as error:
        raise CaptureError(f"{path}: {error.message}") from None


class Capture:
    """A host's memory and the machines in it. Use it in a ``with`` statement, or call :meth:`close`."""

    def __init__(
        self,
        path: Path,
        memory: HostMemory,
        maxphyaddr: int,
        recovery: bool,
        progress: Progress | None,
        index: bool | Path = False,
    ) -> None:
        """Take an opened capture; :func:`open_capture` makes one."""
        self.path = path
        self.memory = memory
        self._options = (maxphyaddr, recovery)
        self._progress = progress
        self._index = indexfile.folder() if index is True else index

    def __enter__(self) -> Capture:
        """Return the capture."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let go of the file."""
        self.close()

    def close(self) -> None:
        """Let go of the file. The machines that were found can no longer be read."""
        none = np.empty(0, dtype=np.int64)
        self.memory = HostMemory(FileSource(b""), none, none, none)
        self.__dict__.pop("discovery", None)
        self.__dict__.pop("_owners", None)

    def __repr__(self) -> str:
        """Return the file and its size."""
        return f"<Capture {self.path.name}: {bits.size_name(self.memory.size)} of memory>"

    @functools.cached_property
    def discovery(self) -> Discovery:
        """Everything that the search gave: machines, what was not believed, and notes."""
        width, recover = self._options
        given = {"progress": self._progress} if self._progress else {}
        # A format that decodes is left out: only of a plain file is every change seen.
        if not self._index or not isinstance(self.memory.source, FileSource):
            return search.discover(self.memory, width, recover=recover, **given)  # type: ignore[arg-type]
        key = indexfile.key(self.path, self.memory, {"maxphyaddr": width, "recovery": recover})
        known = indexfile.load(self._index, key)
        found = search.discover(self.memory, width, known=known, recover=recover, **given)  # type: ignore[arg-type]
        if found.index != known:
            # A cache that cannot be written costs time, not the result.
            with contextlib.suppress(OSError):
                indexfile.save(self._index, key, found.index)
        return found

    @property
    def machines(self) -> list[Machine]:
        """Every machine, parents before the machines that run in them."""
        return [Machine(self, lineage.line(self.discovery, self.memory, found)) for found in self.discovery.all()]

    def machine(self, name: str) -> Machine:
        """Return a machine by its id (``"0"``, ``"0.1"``), or by a root (``"eptp=0xfadf05e"``).

        Raises:
            LookupError: there is none; the message names those there are.
        """
        if "=" in name:
            root = Root.parse(name).resolved(self.memory)
            return Machine(self, lineage.alone(name, root.traverse(self.memory), self.memory), root)
        found = self.discovery.find(name)
        if found is None:
            there = ", ".join(machine.id for machine in self.discovery.all()) or "none"
            raise LookupError(f"no machine {name!r} in {self.path.name}; there are: {there}")
        return Machine(self, lineage.line(self.discovery, self.memory, found))

    def read(self, hpa: int, length: int) -> bytes:
        """Return bytes of the host's memory; MissingMemoryError where the capture lacks one of them."""
        return read(self.memory, hpa, length, None, "outside the capture")

    def owner(self, hpas: int | Sequence[int] | Int64, length: int = 1) -> list[Answer]:
        """Return whose memory host-physical ranges are, question by question. Many cost little more than one."""
        return list(self._owners.ask(np.atleast_1d(np.asarray(hpas, dtype=np.int64)), length))

    def owner_of_offset(self, offsets: int | Sequence[int] | Int64, length: int = 1) -> list[Answer]:
        """Return the same for offsets in the capture file, as a scanner of files reports them.

        Only for raw images, LiME files, ELF cores and other formats whose memory lies in the file as it is.
        """
        if not isinstance(self.memory.source, FileSource):
            raise CaptureError(f"{self.path}: its memory does not lie in the file as it is; ask with addresses")
        return list(self._owners.at_offsets(np.atleast_1d(np.asarray(offsets, dtype=np.int64)), length))

    @functools.cached_property
    def _owners(self) -> Owners:
        return Owners(self.memory, lineage.lines(self.discovery, self.memory))

    def shared(self) -> dict[str, Shared]:
        """Return for each machine, by id, what it shares with itself and with others."""
        lines = lineage.lines(self.discovery, self.memory)
        return sharing.count(lines, [line.host_runs() for line in lines], self.memory)

    def html(self) -> str:
        """Return the page that ``ept.map --html`` writes."""
        lines = lineage.lines(self.discovery, self.memory)
        return html.render(self.path.name, self.memory, portrait.portraits(lines, self.memory))
