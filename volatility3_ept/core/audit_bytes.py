"""Two pages side by side: what differs, byte by byte, and what it means where it is code."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from volatility3_ept.core.audit_finding import Disassembler
from volatility3_ept.core.memory import HostMemory, Int64, Words
from volatility3_ept.spec.bits import PAGE_SIZE

#: Pages whose copies are looked for in one pass over a memory, and words of each that are compared first.
MAX_WANTED, _SAMPLES = 16, 16
#: Pairs of pages that are compared to find the first that differs.
MAX_COMPARED_PAGES = 512
#: Share of equal words in two pages that are copies of each other but for a patch.
NEARLY = 0.75
#: Bytes of a patch that are printed, and stretches of one page.
_SHOWN_BYTES, _SHOWN_PLACES = 16, 3
#: A page with fewer words that are not zero says nothing: any other sparse page resembles it.
FEWEST_WORDS = 16
_LINES = 4


@dataclass(frozen=True)
class Difference:
    """How two pages differ. ``places`` are ``(first, last)`` byte offsets, neighbours joined; ``likeness`` 0 to 1."""

    likeness: float
    places: tuple[tuple[int, int], ...]
    first: bytes
    second: bytes
    #: Where a stretch was not compared to its end: how many of its pages were.
    only_pages: int = 0

    @property
    def is_copy(self) -> bool:
        """Tell whether one page is the other with a patch: most words equal, and not all bytes."""
        return bool(self.places) and self.likeness >= NEARLY

    def text(self, disassemble: Disassembler | None, address: int | None, page: int = 0) -> str:
        """Say what differs; as assembly too where ``address`` says that it is code, and where it runs.

        ``page`` is the distance of the two pages from the beginning of what is told about.
        """
        if not self.places:
            return "the bytes are equal" + (f" in the first {self.only_pages} pages" if self.only_pages else "")
        if not self.is_copy:
            return f"the bytes have little in common ({self.likeness:.0%} of the words equal)"
        size = sum(last - first + 1 for first, last in self.places)
        parts = [f"{size} bytes differ"]
        for first, last in self.places[:_SHOWN_PLACES]:
            end = min(last + 1, first + _SHOWN_BYTES)
            old, new = self.first[first:end].hex(), self.second[first:end].hex()
            parts.append(f"+{page + first:#x}: {old} | {new}")
            if address is not None:
                parts.append(self._assembly(disassemble, first, address))
        left = len(self.places) - _SHOWN_PLACES
        return "; ".join([*parts, *([f"{left} more places"] if left > 0 else [])])

    def _assembly(self, disassemble: Disassembler | None, at: int, address: int) -> str:
        if disassemble is None:
            return "bytes only: iced-x86 is not installed"
        both = (
            ", ".join(disassemble(page[at : at + _SHOWN_BYTES], address + at)[:_LINES])
            for page in (self.first, self.second)
        )
        return "code: " + " | ".join(both)


def compare(memory: HostMemory, first: int, second: int) -> Difference | None:
    """Compare two pages of a memory; None when one of them is not in the capture."""
    one, other = memory.read(first, PAGE_SIZE), memory.read(second, PAGE_SIZE)
    return None if one is None or other is None else of(one, other)


def first_difference(
    memories: tuple[HostMemory, HostMemory], frames: tuple[int, int], length: int
) -> tuple[int, Difference] | None:
    """Return how the first two pages that differ do, in two stretches of frames, and their distance from the start.

    At most :data:`MAX_COMPARED_PAGES` are compared, and the difference says so. None when no pair of pages is in the
    captures; where all are equal, the first pair.
    """
    offsets = np.arange(0, min(length, MAX_COMPARED_PAGES * PAGE_SIZE), PAGE_SIZE, dtype=np.int64)
    (one, held), (other, also) = (each.words(offsets + frame) for each, frame in zip(memories, frames, strict=True))
    both = np.flatnonzero(held & also)
    if not both.size:
        return None
    odd = both[(one[both] != other[both]).any(axis=1)]
    row = int(odd[0]) if odd.size else int(both[0])
    only = offsets.size if length > offsets.size * PAGE_SIZE else 0
    return int(offsets[row]), replace(of(one[row].tobytes(), other[row].tobytes()), only_pages=only)


def of(one: bytes, other: bytes) -> Difference:
    """Compare the bytes of two pages."""
    words = [np.frombuffer(page, dtype=np.uint64) for page in (one, other)]
    used = (words[0] | words[1]) != 0
    likeness = float((words[0] == words[1])[used].mean()) if used.any() else 1.0
    if used.sum() < FEWEST_WORDS and likeness < 1:
        likeness = 0.0
    at = np.flatnonzero(np.frombuffer(one, dtype=np.uint8) != np.frombuffer(other, dtype=np.uint8))
    if not at.size:
        return Difference(1.0, (), one, other)
    # Fewer than four equal bytes between two differences belong to the patch.
    cut = np.flatnonzero(np.diff(at) > 4)
    firsts, lasts = at[np.concatenate(([0], cut + 1))], at[np.append(cut, at.size - 1)]
    return Difference(likeness, tuple(zip(firsts.tolist(), lasts.tolist(), strict=True)), one, other)


def twins(memory: HostMemory, wanted: list[int]) -> dict[int, int]:
    """Return for pages of a memory another page that is a copy but for a patch: one pass for all of them.

    At most :data:`MAX_WANTED` are looked for; pages that hold next to nothing are not.
    """
    rows, held = memory.words(np.array(wanted[:MAX_WANTED], dtype=np.int64))
    places = [np.flatnonzero(row) for row in rows]
    sought = [n for n in range(len(rows)) if held[n] and places[n].size >= FEWEST_WORDS]
    best: dict[int, tuple[float, int]] = {}
    for address, block in memory.blocks() if sought else ():
        for number in sought:
            _best_in(block, address, wanted[number], rows[number], places[number], best)
    return {page: found for page, (_, found) in best.items()}


def _best_in(
    block: Words, address: int, page: int, row: Words, used: Int64, best: dict[int, tuple[float, int]]
) -> None:
    """Note the page of a block that resembles ``row`` most, if it is a copy with a patch and better than before."""
    sample = used[np.linspace(0, used.size - 1, _SAMPLES).astype(np.int64)]
    likely = np.flatnonzero((block[:, sample] == row[sample]).mean(axis=1) >= NEARLY)
    for index in likely.tolist():
        where = address + index * PAGE_SIZE
        share = float((block[index] == row).mean())
        if where != page and NEARLY <= share < 1 and share > best.get(page, (0.0, 0))[0]:
            best[page] = (share, where)
