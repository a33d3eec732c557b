"""Control structures of processors that no table describes: found by the roots they name, read by inference."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from volatility3_ept.core import layouts, vmcs
from volatility3_ept.core.control import ControlStructure
from volatility3_ept.core.likeness import Found
from volatility3_ept.core.memory import HostMemory
from volatility3_ept.core.root import EPT
from volatility3_ept.spec.bits import PAGE_SIZE

#: An inferred layout as an index keeps it: its ISF text, then the addresses of its pages.
Kept = tuple[str, ...]


def search(memory: HostMemory, found: Sequence[Found], examined: Iterable[int]) -> tuple[dict[str, Kept], list[str]]:
    """Infer the layouts of pages that name an EPT root and that no known layout explains.

    ``found`` are the roots that page tables gave, ``examined`` the pages that were examined under the known layouts.
    Returns the layouts by name, and what was cut short.
    """
    # Few captures need it, and a command that finds its index needs it never.
    from volatility3_ept.core import infer, isf

    known = [infer.KnownRoot.of(memory, item.root, item.guest_map) for item in found if item.root.kind == EPT]
    if not known:
        return {}, []
    groups = infer.candidate_pages(memory, known)
    seen = set(examined)
    kept: dict[str, Kept] = {}
    for revision, pages in sorted(groups.pages.items()):
        new = {address: page for address, page in pages.items() if address not in seen}
        for number, inferred in enumerate(infer.infer_all(new, known, memory) if new else ()):
            if inferred.is_control_structure:
                name = f"inferred_{revision:#x}" + (f"_{number}" if number else "")
                kept[name] = (isf.to_isf(inferred), *(f"{address:#x}" for address in sorted(inferred.pages)))
    return kept, list(groups.notes)


def unnamed(
    memory: HostMemory, found: Sequence[Found], named: Iterable[ControlStructure], examined: Iterable[int]
) -> tuple[dict[str, Kept], list[str]]:
    """Search if there is an EPT among ``found`` that none of the control structures in ``named`` names."""
    roots = {structure.root_hpa for structure in named}
    if all(item.root.kind != EPT or item.root.address in roots for item in found):
        return {}, []
    return search(memory, found, examined)


def structures(memory: HostMemory, kept: Mapping[str, Kept], physical_bits: int) -> list[ControlStructure]:
    """Return the control structures that inferred layouts describe, judged as any other."""
    accounts = []
    for name, (text, *addresses) in kept.items():
        try:
            layout = layouts.parse_isf(name, text)
            places = [int(address, 0) for address in addresses]
        except (ValueError, KeyError, TypeError):
            continue  # An index that somebody damaged: the pages are not looked at.
        for place in places:
            page = memory.read(place, PAGE_SIZE)
            if page is not None:
                accounts.append(vmcs.examine_as(layout, page, place, physical_bits, memory.top, memory.__contains__))
    return accounts
