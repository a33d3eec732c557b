"""Recall and precision of layout inference, on real control structures rewritten into layouts it has not seen.

    python tests/infer_table.py            # the table of docs/layout-inference.md
    python tests/infer_table.py --random 20

Every field value of the VMCSs in the captures is written where another layout has the field, under a revision
identifier that no table knows; the layout is then inferred and compared, field by field, with the one that was used.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import captures  # noqa: E402
import numpy as np  # noqa: E402
from builders import layouts  # noqa: E402

from volatility3_ept.core import infer, roots  # noqa: E402
from volatility3_ept.core.infer_model import TARGETS, Inferred, KnownRoot  # noqa: E402
from volatility3_ept.core.memory import HostMemory  # noqa: E402
from volatility3_ept.core.source import FileSource  # noqa: E402

UNKNOWN_ID = 0x5A5A_0001
#: The layout in which each capture's VMCSs are.
NATIVE = {"kvm-ept": "bochs_3_0", "ept-two": "bochs_2_7", "ept-thp": "bochs_2_7", "ept-nested": "bochs_2_7"}
#: Layouts without EPT, or without places for the controls.
LEFT_OUT = ("intel_penryn",)


@dataclass(frozen=True)
class Host:
    """A capture: its memory, the roots found by structure, the field values of its VMCSs by address."""

    memory: HostMemory
    roots: tuple[KnownRoot, ...]
    values: dict[int, dict[str, int]]


@functools.cache
def host(name: str) -> Host:
    """Load a capture; its control structures are named by its ground truth."""
    capture = captures.manifest()[name]
    image = np.memmap(capture.path, dtype=np.uint8, mode="c")  # changes stay in this process
    memory = HostMemory.from_segments(FileSource(image), capture._segments)
    found = [f for f in roots.find(memory) if f.root.kind == "EPT"]
    known = tuple(KnownRoot.of(memory, f.root, f.guest_map) for f in found)
    native = layouts.known()[NATIVE[name]]
    structures = [s for s in capture.truth["control_structures"] if s["kind"] == "vmcs" and "gpa_of" not in s]
    places = [int(structure["hpa"], 0) for structure in structures]
    values = {place: native.read(capture.page(place)) for place in places}
    for link in {value["VMCS_LINK_POINTER"] for value in values.values()}:
        if link in memory:
            # A shadow VMCS has the identifier of the one that links to it.
            at = int(memory.locate(np.array([link]))[0])
            image[at : at + 4] = np.frombuffer((UNKNOWN_ID | 1 << 31).to_bytes(4, "little"), dtype=np.uint8)
    return Host(memory, known, values)


def inferred(where: Host, layout: layouts.Layout, revision: int = UNKNOWN_ID) -> Inferred:
    """Infer a layout from the capture's VMCSs rewritten into it."""
    pages = {address: layout.write(revision, values) for address, values in where.values.items()}
    return infer.infer(pages, where.roots, where.memory)


def compare(result: Inferred, layout: layouts.Layout) -> dict[str, str]:
    """Say of each field that the layout has: right, wrong (each certain or likely), or unknown."""
    said = {}
    for name in TARGETS:
        item, truth = result.fields[name], layout.fields.get(name)
        if item.offset is not None:
            said[name] = f"{item.certainty} {'right' if truth == (item.offset, item.size) else 'wrong'}"
        elif truth is not None:
            said[name] = "unknown"
    if "GUEST_CS_ACCESS_RIGHTS" in layout.fields or result.ar_format is not None:
        said["(access rights form)"] = _judged(result.ar_format and result.ar_format.value, layout.rights)
    return said


def _judged(found: str | None, truth: str | None) -> str:
    if found is None:
        return "unknown"
    return "certain right" if found == truth else "certain wrong"


def random_layout(seed: int) -> layouts.Layout:
    """Return a random layout: of five, two are a processor's, two a hypervisor's, and one is loose."""
    makers = (layouts.processor, layouts.hypervisor, layouts.processor, layouts.hypervisor, layouts.loose)
    return makers[seed % len(makers)](seed)


def random_layouts(count: int) -> list[layouts.Layout]:
    """Return the first random layouts."""
    return [random_layout(seed) for seed in range(count)]


def tally(where: Iterable[Host], which: Iterable[layouts.Layout]) -> dict[str, Counter[str]]:
    """Count the answers for each field over captures and layouts."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for layout in which:
        for one in where:
            for name, answer in compare(inferred(one, layout), layout).items():
                counts[name][answer] += 1
    return counts


def damaged(where: Host, layout: layouts.Layout, seed: int) -> Inferred:
    """Infer a layout from VMCSs with guest fields that were not written back and odd values in unused ones."""
    pages = {}
    for number, (address, values) in enumerate(where.values.items()):
        unused = [name for name in values if name not in TARGETS]
        pages[address] = layout.write(UNKNOWN_ID, layouts.stale(values, 100 * seed + number, unused))
    return infer.infer(pages, where.roots, where.memory)


_ROWS = (
    ("EPTP",), ("guest CR0, CR3, CR4", "GUEST_CR"), ("guest RSP, RIP, RFLAGS, DR7", "GUEST_R", "GUEST_DR7"),
    ("host CR0, CR3, CR4", "HOST_CR"), ("host RSP, RIP", "HOST_R"), ("link pointer", "VMCS_LINK"),
    ("guest EFER", "GUEST_IA32_EFER"), ("host EFER", "HOST_IA32_EFER"), ("PIN, PROC controls", "PIN_", "PROC_"),
    ("PROC2 controls", "SECONDARY"), ("exit, entry controls", "VM_EX", "VM_EN"),
    ("host FS, GS, TR base", "HOST_FS_B", "HOST_GS_B", "HOST_TR_B"), ("host GDTR, IDTR base", "HOST_GD", "HOST_ID"),
    ("guest GDTR, IDTR base", "GUEST_GD", "GUEST_ID"), ("host selectors", "HOST_*SEL"),
    ("guest segment bases", "GUEST_*BASE"), ("guest selectors", "GUEST_*SEL"), ("guest limits", "GUEST_*LIM"),
    ("guest access rights", "GUEST_*ACC"), ("form of access rights", "(acc"), ("exit reason", "EXIT_R"),
)  # fmt: skip


def _in_row(name: str, patterns: tuple[str, ...]) -> bool:
    return any(name.startswith(p.split("*")[0]) and p.split("*")[-1] in name for p in patterns)


def table(columns: dict[str, dict[str, Counter[str]]]) -> str:
    """Return the counts as a table: share that is certain and right (and likely and right); wrong ones in words."""
    lines = ["| field | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    used: set[str] = set()
    for title, *patterns in _ROWS:
        names = [
            n for n in (*TARGETS, "(access rights form)") if n not in used and _in_row(n, tuple(patterns) or (title,))
        ]
        used |= set(names)
        cells = [_cell(sum((counts[n] for n in names if n in counts), Counter())) for counts in columns.values()]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(count: Counter[str]) -> str:
    total = sum(count.values())
    if not total:
        return "-"
    text = f"{100 * count['certain right'] / total:.0f} %"
    text += f" + {100 * count['likely right'] / total:.0f} % likely" if count["likely right"] else ""
    for wrong in ("certain wrong", "likely wrong"):
        text += f" **{count[wrong]} {wrong}**" if count[wrong] else ""
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--random", type=int, default=200, metavar="N", help="number of random layouts")
    parser.add_argument("--damaged", type=int, default=200, metavar="N", help="number of random layouts with damage")
    parser.add_argument("--verbose", action="store_true", help="one line per known layout")
    options = parser.parse_args()
    hosts = {n: host(n) for n in NATIVE if captures.manifest()[n].path.exists()}
    everything = [x for n, x in layouts.known().items() if n not in LEFT_OUT]
    everything.append(layouts.whole_westmere())
    for one in everything if options.verbose else ():
        for name, where in hosts.items():
            answers = compare(inferred(where, one), one)
            print(f"{one.name} on {name}: {dict(Counter(answers.values()))}")
            print("   ", {n: a for n, a in answers.items() if "right" not in a or "likely" in a})
    picked = random_layouts(options.random)
    columns = {
        "known processors": [x for x in everything if x.name.startswith("intel")],
        "known hypervisors": [x for x in everything if not x.name.startswith(("intel", "hyperv"))],
        "enlightened VMCS": [x for x in everything if x.name.startswith("hyperv")],
        **{
            f"random {kind}": [x for x in picked if x.name.startswith(kind)]
            for kind in ("processor", "hypervisor", "loose")
        },
    }
    results = {f"{title} ({len(which)})": tally(hosts.values(), which) for title, which in columns.items()}
    print(f"captures: {', '.join(hosts)}\n")
    print(table(results))
    total: Counter[str] = Counter()
    for seed, layout in enumerate(random_layouts(options.damaged)):
        for where in hosts.values():
            total.update(compare(damaged(where, layout, seed), layout).values())
    print(f"\ndamaged, {options.damaged} random layouts: {dict(sorted(total.items()))}")
    wrong = total["certain wrong"] + sum(c["certain wrong"] for counts in results.values() for c in counts.values())
    print(f"wrong and called certain: {wrong}")


if __name__ == "__main__":
    main()
