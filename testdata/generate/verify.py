"""Check a capture against its own ground truth, by the plainest means.

Shares no code with the plugins or with the writer of the captures: it reads the
ELF core with ``struct``, takes the SLAT root from ``truth.json`` (as the emulated
processor held it), walks four levels in a loop, and compares every guest page
that the truth lists:

* the host frame the truth names holds the bytes the truth names;
* where the SLAT maps the page, it maps it to that frame.

Pages in the truth and not in the SLAT are counted and printed: they are what
recovery through the VMM's own mapping has to find. For a guest that was running
when its host was frozen, differences are reported as drift, not as errors.

Usage::

    python verify.py testdata/kvm-ept [testdata/built/npt-two ...] [--json]
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import mmap
import struct
import sys
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

PAGE = 4096
FRAME = 0x000F_FFFF_FFFF_F000
LARGE = 1 << 7


class Memory:
    """Physical memory in an ELF core."""

    def __init__(self, path: Path) -> None:
        """Map the file and note its segments."""
        with path.open("rb") as stream:
            self.data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        (phoff,) = struct.unpack_from("<Q", self.data, 0x20)
        phentsize, phnum = struct.unpack_from("<HH", self.data, 0x36)
        rows = [struct.unpack_from("<IIQQQQQQ", self.data, phoff + i * phentsize) for i in range(phnum)]
        loads = [(paddr, offset, size) for kind, _, offset, _, paddr, size, _, _ in rows if kind == 1]
        self.loads = sorted(loads)
        self.starts = [paddr for paddr, _, _ in self.loads]

    def page(self, hpa: int) -> bytes | None:
        """Return the page at ``hpa``, or None where the machine has no RAM."""
        index = bisect_right(self.starts, hpa) - 1
        if index < 0:
            return None
        paddr, offset, size = self.loads[index]
        position = offset + hpa - paddr
        return self.data[position : position + PAGE] if hpa + PAGE <= paddr + size else None


class GuestMemory:
    """Physical memory of a guest, as the truth lists its pages: no SLAT involved."""

    def __init__(self, memory: Memory, pages_file: Path) -> None:
        """Read the list."""
        self.memory = memory
        self.frames = {gpa: hpa for gpa, hpa, _ in truth_pages(pages_file)}

    def page(self, gpa: int) -> bytes | None:
        """Return the page at ``gpa``, or None where the guest has none."""
        hpa = self.frames.get(gpa & -PAGE)
        return None if hpa is None else self.memory.page(hpa)


def leaves(memory: Memory | GuestMemory, slat: str, root: int, stats: Counter[str]) -> Iterator[tuple[int, int, int]]:
    """Yield ``(gpa, hpa, size)`` of each leaf below ``root`` that leads to RAM; count the rest."""
    present = 0b111 if slat == "ept" else 0b1
    pending = [(root & FRAME, 39, 0)]
    while pending:
        table_hpa, shift, base = pending.pop()
        table = memory.page(table_hpa)
        if table is None:
            stats["tables outside RAM"] += 1
            continue
        for index, entry in enumerate(struct.unpack("<512Q", table)):
            if not entry & present:
                continue
            gpa, size = base + (index << shift), 1 << shift
            if slat == "ept" and entry & 0b11 == 0b10:
                stats["mmio markers"] += 1
            elif shift == 12 or (shift < 39 and entry & LARGE):
                hpa = entry & FRAME & -size
                if memory.page(hpa) is None:
                    stats["mmio markers" if slat == "npt" else "leaves outside RAM"] += 1
                    continue
                stats[{12: "4K", 21: "2M", 30: "1G"}[shift] + " leaves"] += 1
                yield gpa, hpa, size
            else:
                pending.append((entry & FRAME, shift - 9, gpa))


def truth_pages(path: Path) -> Iterator[tuple[int, int, str]]:
    """Yield ``(gpa, hpa, sha256)`` of each page the truth lists."""
    with gzip.open(path, "rt", encoding="ascii") as lines:
        for line in lines:
            if not line.startswith("#"):
                gpa, frame, sha256 = line.split()[:3]
                yield int(gpa, 16), int(frame, 16) * PAGE, sha256


def check_guest(memory: Memory, directory: Path, truth: dict[str, Any], guest: dict[str, Any]) -> dict[str, Any]:
    """Compare one guest with its truth; the result holds counts and the pages out of the SLAT."""
    stats: Counter[str] = Counter()
    mapped: dict[int, int] = {}
    roots = {
        int(item["slat_root"], 16)
        for item in truth["control_structures"]
        if item.get("guest") == guest["name"] and item.get("role") in ("current", "shadow") and item.get("slat_root")
    }
    for root in roots:
        for gpa, hpa, size in leaves(memory, truth["slat"], root, stats):
            mapped.update({gpa + offset: hpa + offset for offset in range(0, size, PAGE)})
    counts = Counter(dict.fromkeys(("pages", "bytes agree", "bytes differ", "mapped", "frame differs"), 0))
    absent: list[int] = []
    differing: list[int] = []
    listed = set()
    for gpa, hpa, sha256 in truth_pages(directory / guest["pages_file"]):
        listed.add(gpa)
        counts["pages"] += 1
        data = memory.page(hpa)
        agree = data is not None and hashlib.sha256(data).hexdigest() == sha256
        counts["bytes agree" if agree else "bytes differ"] += 1
        if not agree:
            differing.append(gpa)
        if gpa in mapped:
            counts["mapped"] += 1
            counts["frame differs"] += mapped[gpa] != hpa
        else:
            absent.append(gpa)
    counts.update(check_nested(memory, directory, truth, guest))
    slots = [(int(slot["gpa"], 16), int(slot["size"], 16)) for slot in guest["memslots"]]
    extra = [gpa for gpa in mapped if gpa not in listed]
    in_slots = [gpa for gpa in extra if any(start <= gpa < start + size for start, size in slots)]
    return {
        "guest": guest["name"],
        "running": guest["running"],
        **counts,
        "differing ranges": ranges(differing),
        "absent from the SLAT": len(absent),
        "absent ranges": ranges(absent),
        "mapped, in a slot, not in the truth": len(in_slots),
        "mapped outside the slots": ranges(sorted(set(extra) - set(in_slots))),
        **stats,
    }


def ranges(gpas: Sequence[int]) -> list[str]:
    """Return sorted page addresses as ``start-end`` strings."""
    merged: list[list[int]] = []
    for gpa in gpas:
        if merged and merged[-1][1] == gpa:
            merged[-1][1] += PAGE
        else:
            merged.append([gpa, gpa + PAGE])
    return [f"{start:#x}-{end:#x}" for start, end in merged]


def check_nested(memory: Memory, directory: Path, truth: dict[str, Any], guest: dict[str, Any]) -> dict[str, int]:
    """Walk the SLAT that a guest keeps for its own guest, through the guest's page list."""
    counts: Counter[str] = Counter()
    for item in truth["control_structures"]:
        if item.get("guest") != guest["name"] or item.get("role") != "nested" or not item.get("slat_root"):
            continue
        parent = next(other for other in truth["guests"] if other["name"] == guest["parent"])
        inside = GuestMemory(memory, directory / parent["pages_file"])
        expected = {gpa: frame for gpa, frame, _ in truth_pages(directory / guest["pages_in_parent_file"])}
        counts.update({"nested SLAT agrees": 0, "nested SLAT differs": 0})
        for gpa, parent_gpa, size in leaves(inside, truth["slat"], int(item["slat_root"], 16), Counter()):
            for offset in range(0, size, PAGE):
                if gpa + offset in expected:
                    agree = expected[gpa + offset] == parent_gpa + offset
                    counts["nested SLAT agrees" if agree else "nested SLAT differs"] += 1
    return dict(counts)


def shorten(value: Any) -> Any:
    """Return a long list cut for printing."""
    return [*value[:6], "..."] if isinstance(value, list) and len(value) > 6 else value


def check(directory: Path) -> list[dict[str, Any]]:
    """Check every guest of the capture in ``directory``."""
    truth = json.loads((directory / "truth.json").read_text(encoding="utf-8"))
    memory = Memory(directory / "host.elf")
    return [check_guest(memory, directory, truth, guest) for guest in truth["guests"]]


def is_sound(result: dict[str, Any]) -> bool:
    """Return whether the truth of one guest holds (a running guest may have moved on)."""
    if result["pages"] == 0:
        return False
    wrong = result["bytes differ"] or result["frame differs"] or result.get("nested SLAT differs")
    return bool(result["running"] or not wrong)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: one line of counts per guest; exit status 1 if a truth does not hold."""
    parser = argparse.ArgumentParser(description="Check captures against their ground truth.")
    parser.add_argument("directories", type=Path, nargs="+")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    args = parser.parse_args(argv)
    results = {str(directory): check(directory) for directory in args.directories}
    if args.json:
        print(json.dumps(results, indent=1))
    else:
        for directory, guests in results.items():
            for result in guests:
                verdict = "sound" if is_sound(result) else "WRONG"
                shown = {key: shorten(value) for key, value in result.items()}
                print(f"{directory}: {verdict}: {shown}")
            if not guests:
                print(f"{directory}: no guests")
    return 0 if all(is_sound(result) for guests in results.values() for result in guests) else 1


if __name__ == "__main__":
    sys.exit(main())
