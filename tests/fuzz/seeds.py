"""First inputs from the real captures in ``testdata``: their tables and control structures, read when they are needed.

Nothing of a capture is copied into the tests. Where the captures are absent the targets begin with nothing.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import captures
from builders import paging
from fuzz import spaces, structures, tables

_NAMES = ("kvm-ept", "kvm-npt")
_FRAME = 0x000F_FFFF_FFFF_F000


def none() -> Iterator[bytes]:
    """No inputs."""
    return iter(())


def _captures() -> Iterator[captures.Capture]:
    return (capture for name, capture in captures.manifest().items() if name in _NAMES and capture.path.exists())


def _structures(kind: str) -> Iterator[bytes]:
    for capture in _captures():
        for place in capture.truth["control_structures"]:
            if place["kind"] == kind:
                yield capture.page(int(place["hpa"], 0))


def vmcs_pages() -> Iterator[bytes]:
    """Every VMCS of the captures, as it is."""
    return (bytes([structures.PAGE_ITSELF]) + page for page in _structures("vmcs"))


def vmcb_pages() -> Iterator[bytes]:
    """Every VMCB of the captures, as it is."""
    return (bytes([structures.PAGE_ITSELF]) + page for page in _structures("vmcb"))


def hierarchies() -> Iterator[bytes]:
    """The first tables of each level of the EPT and NPT of the captures, read in every dialect."""
    for capture in _captures():
        for place in capture.truth["control_structures"]:
            # EPTP by the layout of the emulator that made the capture; nCR3 by the manual's only one.
            at, name = (0x278, paging.EPT_4.name) if place["kind"] == "vmcs" else (0xB0, paging.NPT_4.name)
            (root,) = struct.unpack_from("<Q", capture.page(int(place["hpa"], 0)), at)
            pages = _tables(capture, root & _FRAME)
            if pages:
                for author in range(len(tables.AUTHORS)):
                    yield bytes([tables.NAMES.index(name), author, 0, 0]) + spaces.image(root, pages)


def _tables(capture: captures.Capture, root: int, most: int = 12) -> dict[int, dict[int, int]]:
    """Return some tables by address, each with the first of its entries that are not zero."""
    found: dict[int, dict[int, int]] = {}
    level = [root]
    for _ in range(4):
        below: list[int] = []
        for table in level[: most // 4 + 1]:
            try:
                words = struct.unpack("<512Q", capture.page(table))
            except LookupError:
                continue
            found[table] = dict([(index, word) for index, word in enumerate(words) if word][:24])
            below += [word & _FRAME for word in found[table].values() if not word & 0x80]
        level = below
    return dict(list(found.items())[:most])


def root_texts() -> Iterator[bytes]:
    """Inputs that spell roots, by the number of each fragment."""
    for numbers in ((0, 2, 6), (1, 2, 7, 3, 8, 2, 10), (0, 2, 6, 3, 17, 2, 19), (1, 2, 7, 3, 13, 2, 14)):
        yield bytes(numbers)


def headers() -> Iterator[bytes]:
    """The headers of the captures, as a file of their own."""
    for capture in _captures():
        with capture.path.open("rb") as file:
            yield bytes([2]) + file.read(0x2000)
