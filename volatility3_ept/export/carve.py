"""A machine as an image of its own: the one entry to this room.

::

    carve(Image.of(machine, below), Path("out"), Format.ELF)

writes ``out/guest-0.elf`` and ``out/guest-0.elf.json``. Both appear when they are whole, or not at all.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from volatility3_ept.core import coverage
from volatility3_ept.core.control import ControlStructure
from volatility3_ept.core.coverage import Coverage
from volatility3_ept.core.machines import Machine
from volatility3_ept.core.memory import HostMemory
from volatility3_ept.export import chunks, cpu, elf, manifest, plan, vmcoreinfo
from volatility3_ept.export.digest import Digest
from volatility3_ept.export.output import Output, OutputError
from volatility3_ept.export.plan import Format, Hole, Plan
from volatility3_ept.spec.bits import size_name

#: Called with percent done and what is being done.
Progress = Callable[[float, str], Any]
#: Holes beyond this are not hashed (a minute or so): a table that maps a page at the end of the address space would
#: make a sparse file of petabytes.
_MOST_ZEROS: Final = 1 << 36


def silent(percent: float, text: str) -> None:
    """Report to nobody."""


@dataclass(frozen=True)
class Image:
    """What is to be written. ``about`` goes into the manifest as it is.

    ``start`` and ``stop`` bound the guest-physical addresses; a raw image begins at ``start``.
    """

    name: str
    memory: HostMemory
    coverage: Coverage
    vcpus: tuple[ControlStructure, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)
    start: int = 0
    stop: int | None = None

    @classmethod
    def of(cls, machine: Machine, below: HostMemory, start: int = 0, stop: int | None = None) -> Image:
        """Return the image of a machine whose tables and frames are addresses of ``below``.

        ``below`` is the capture's memory, or that of the machine :attr:`Machine.tables_in`.
        """
        about: dict[str, Any] = {
            "id": machine.id,
            "root": str(machine.root),
            "system": machine.system,
            "found_by": machine.found_by,
        }
        if machine.confidential:
            about["confidential"] = list(machine.confidential)
        covered = coverage.account(machine.guest_map, below, machine.recovery)
        vcpus = tuple(vcpu for vcpu in machine.vcpus if vcpu.holds_registers)
        return cls(file_name(machine.id, start, stop), machine.memory, covered, vcpus, about, start, stop)

    @property
    def end(self) -> int:
        """The first address that is not written: where the guest's memory ends, unless another end was given."""
        top = max(self.coverage.top, self.memory.top)
        return top if self.stop is None else min(self.stop, top)

    @property
    def present(self) -> int:
        """Bytes of memory that will be written."""
        return chunks.clip(self.memory, self.start, self.end).size


def file_name(machine: str, start: int = 0, stop: int | None = None) -> str:
    """Return the name of an image without its suffix. Nothing that a guest could choose goes into it."""
    allowed = "".join(letter if letter.isascii() and (letter.isalnum() or letter == "-") else "." for letter in machine)
    if not start and stop is None:
        return f"guest-{allowed}"
    return f"guest-{allowed}-{start:#x}-" + ("end" if stop is None else f"{stop:#x}")


@dataclass(frozen=True)
class Carved:
    """One written image: its size, how much of its range is memory and how much holes, and its SHA-256.

    ``sha256`` is None where it was not wanted, and for a file of so many zeros that nobody would wait for it.
    """

    path: Path
    manifest: Path
    format: Format
    size: int
    present: int
    holes: int
    sha256: str | None
    unreadable: int = 0


def names(image: Image, format_: Format) -> tuple[str, str]:
    """Return the names of the image and of its manifest."""
    name = f"{image.name}{format_.suffix}"
    return name, f"{name}.json"


def check(image: Image, folder: Path, format_: Format, overwrite: bool = False) -> None:
    """Raise OutputError when one of the files exists already and is not to be replaced."""
    for name in names(image, format_):
        Output(folder, name, overwrite)


def carve(
    image: Image,
    folder: Path,
    format_: Format = Format.ELF,
    overwrite: bool = False,
    progress: Progress = silent,
    source: Mapping[str, Any] | None = None,
    sums: bool = True,
    memory_sum: bool = False,
) -> Carved:
    """Write an image and its manifest. ``source`` is what the manifest says of the capture.

    ``sums``: compute the SHA-256 of the file. ``memory_sum``: also that of the memory in it, which is the same for all
    formats. Each costs about as much as the writing.

    Raises:
        OutputError: nothing was written; the message says why.
    """
    memory = chunks.clip(image.memory, image.start, image.end)
    present = chunks.stretches(memory)
    if not present:
        raise OutputError(f"{image.name}: no page of this machine is present there; nothing was written")
    whole, said = _planned(image, memory, present, format_)
    with ExitStack() as stack:
        file, beside = (stack.enter_context(Output(folder, name, overwrite)) for name in names(image, format_))
        _check_room(whole, folder)
        file.reserve(whole.size)
        hashed = [sums and whole.holes <= _MOST_ZEROS, memory_sum]
        digests = [stack.enter_context(closing(Digest())) if wanted else None for wanted in hashed]
        lost = _write(whole, memory, file, digests, progress)
        sha256, of_memory = (digest.hexdigest() if digest else None for digest in digests)
        result = Carved(
            file.path,
            beside.path,
            format_,
            whole.size,
            whole.present,
            image.end - image.start - whole.present,
            sha256,
            sum(length for _, length in lost),
        )
        facts = {
            "image": _about_file(image, result),
            "source": dict(source or {}),
            "machine": dict(image.about),
            **said,
            "memory": {
                "sha256": of_memory,
                "present": manifest.ranges(present),
                "unreadable": manifest.ranges(lost),
            },
            "coverage": manifest.coverage(image.coverage),
        }
        beside.write(manifest.text(facts).encode())
        file.publish()
        beside.publish()
    return result


def _planned(
    image: Image, memory: HostMemory, present: list[tuple[int, int]], format_: Format
) -> tuple[Plan, dict[str, Any]]:
    """Return the parts of the file, and what the manifest says of the notes in it."""
    if format_ is Format.LIME:
        return plan.lime(present), {}
    if format_ is not Format.ELF:
        return plan.plain(format_, present, image.start, image.end), {}
    vcpus = cpu.in_order(image.vcpus)
    cr3 = vcpus[0].values.get("cr3") if vcpus else None
    info, notes = vmcoreinfo.find(image.memory, cr3)
    body = b"".join(cpu.prstatus(item, number) for number, item in enumerate(vcpus, 1))
    body += b"".join(cpu.qemu_state(item) for item in vcpus) + (info.note() if info else b"")
    if elf.is_beyond_old_readers(present):
        notes += ("more than 65,534 stretches: readers that do not know PN_XNUM (Volatility) will not open the file",)
    return plan.elf(elf.front(body, present), present), {
        "vcpus": [manifest.cpu(number, item) for number, item in enumerate(vcpus)],
        "vmcoreinfo": manifest.vmcoreinfo(info),
        "notes": list(notes),
    }


def _about_file(image: Image, result: Carved) -> dict[str, Any]:
    return {
        "file": result.path.name,
        "format": str(result.format),
        "bytes": result.size,
        "sha256": result.sha256,
        "start": f"{image.start:#x}",
        "end": f"{image.end:#x}",
        "present": result.present,
        "holes": result.holes,
    }


def _check_room(whole: Plan, folder: Path) -> None:
    """Refuse before the disk is full what cannot fit; holes and zero pages of a sparse file may take nothing."""
    free = shutil.disk_usage(folder).free
    if not whole.format.is_sparse and whole.size > free:
        raise OutputError(f"{folder}: {size_name(whole.size)} are needed and {size_name(free)} are free")


def _write(
    whole: Plan, memory: HostMemory, file: Output, digests: Sequence[Digest | None], progress: Progress
) -> list[tuple[int, int]]:
    """Write all parts. Return the stretches that the capture lists and that cannot be read: zeros stand for them."""
    of_file = digests[0]
    lost: list[tuple[int, int]] = []
    text = f"Writing {file.path.name}"
    for part in whole.parts:
        progress(100 * file.position / whole.size, text)
        if isinstance(part, bytes):
            if of_file:
                of_file.update(part)
            file.write(part)
        elif isinstance(part, Hole):
            if of_file:
                of_file.zeros(part.length)
            _hole(file, part.length, whole.format)
        else:
            for chunk in chunks.chunks(memory, *part):
                for digest in filter(None, digests):
                    digest.update(chunk.data)
                lost += chunk.unreadable
                _store(file, chunk.data, whole.format)
                progress(100 * file.position / whole.size, text)
    progress(100, text)
    return lost


def _hole(file: Output, length: int, format_: Format) -> None:
    if format_ is not Format.PADDED:
        file.skip(length)
        return
    for left in range(length, 0, -chunks.CHUNK_SIZE):
        file.write(bytes(min(left, chunks.CHUNK_SIZE)))


def _store(file: Output, data: chunks.Bytes, format_: Format) -> None:
    """Write a chunk; in a sparse file its zero pages become holes."""
    if not format_.is_sparse or data.size % 4096:
        file.write(data)
        return
    done = 0
    for start, end in chunks.filled(data):
        file.skip(start - done)
        file.write(data[start:end])
        done = end
    file.skip(data.size - done)
