"""The two-dimensional walk: a guest-virtual address through the guest's tables, each read through EPT or NPT.

With four levels on both sides the processor makes up to 24 references: four nested ones for each of the guest's four
entries, the entries themselves, and four for the page. All are kept, in the order in which the processor makes them.
"""

from __future__ import annotations

from dataclasses import dataclass

from volatility3_ept.core import walk as walks
from volatility3_ept.core.memory import HostMemory
from volatility3_ept.core.root import Root
from volatility3_ept.core.walk import Step, Walk
from volatility3_ept.spec.ia32e import Ia32Format
from volatility3_ept.spec.paging import Access, Outcome


@dataclass(frozen=True, slots=True)
class Reference:
    """One guest-physical address that the walk needed: its nested walk, and the guest entry read there.

    ``step`` is None for the last one, the page itself.
    """

    gpa: int
    nested: Walk
    step: Step | None

    @property
    def count(self) -> int:
        """Memory references that this stands for: the nested entries, and the guest's entry if it was reached."""
        read = self.step is not None and self.step.entry is not None and not self.step.is_held
        return len(self.nested.steps) + int(read)


@dataclass(frozen=True, slots=True)
class TwoDimensional:
    """The translation of one guest-virtual address. ``access`` is the AND over both hierarchies."""

    gva: int
    references: tuple[Reference, ...]
    outcome: Outcome
    gpa: int | None
    hpa: int | None
    page_size: int
    access: Access
    reason: str


def _nested(below: HostMemory, root: Root, step: Step) -> Walk:
    """Return the nested walk to a guest's entry; one without references for an entry that the processor holds."""
    if step.is_held:
        return Walk(step.entry_address, (), Outcome.MAPPED)
    return root.walk(below, step.entry_address)


def walk(below: HostMemory, root: Root, guest: HostMemory, fmt: Ia32Format, cr3: int, gva: int) -> TwoDimensional:
    """Translate a guest-virtual address.

    ``below`` holds the second-level tables, ``guest`` is the guest-physical memory they give; ``fmt`` and ``cr3`` are
    the guest's paging mode and its CR3 (PCID and flag bits are ignored).
    """
    inner = walks.walk(guest, fmt, cr3, gva)
    references = [Reference(step.entry_address, _nested(below, root, step), step) for step in inner.steps]
    if inner.target is None:
        outcome, reason = inner.outcome, f"guest: {inner.reason}"
        stopped = references[-1].nested if references else None
        if outcome is Outcome.UNREADABLE and stopped is not None and stopped.outcome is not Outcome.MAPPED:
            # The guest's table is missing because EPT or NPT does not lead to it: that is the reason to give.
            outcome, reason = stopped.outcome, f"guest-physical {stopped.address:#x}: {stopped.reason}"
        return TwoDimensional(gva, tuple(references), outcome, None, None, 0, Access.NONE, reason)
    last = root.walk(below, inner.target)
    references.append(Reference(inner.target, last, None))
    return TwoDimensional(
        gva,
        tuple(references),
        last.outcome,
        inner.target,
        last.target,
        min(inner.page_size, last.page_size) if last.page_size else inner.page_size,
        inner.access & last.access,
        f"guest-physical {inner.target:#x}: {last.reason}",
    )
