"""One address through one hierarchy, keeping every entry the hardware would have read.

This is the reference that everything faster must equal (:mod:`.leaves` is held to it by a property test).

A walk ends for one of these reasons: the page is mapped; an entry is not present; an entry is one that the hardware
refuses (:data:`~volatility3_ept.spec.paging.Outcome.MISCONFIGURED`); it is a hypervisor's marker for MMIO; the table
is not in the capture (unreadable, which is not the same as absent); or the page it maps is not in the capture.
"""

from __future__ import annotations

from dataclasses import dataclass

from volatility3_ept.core.memory import HostMemory
from volatility3_ept.spec import dialect as dialects
from volatility3_ept.spec.dialect import Dialect, State
from volatility3_ept.spec.paging import Access, EntryKind, Format, Level, Outcome


@dataclass(frozen=True, slots=True)
class Step:
    """One entry of a walk: where it lies (in the space that holds the tables), its raw value, what it is.

    ``is_held``: the processor has it in a register (a PDPTE of PAE) and reads no memory; the address is then the one
    that CR3 names, whatever is there now.
    """

    level: Level
    entry_address: int
    entry: int | None
    kind: EntryKind = EntryKind.ABSENT
    access: Access = Access.NONE
    state: State = State.PLAIN
    flags: tuple[str, ...] = ()
    is_held: bool = False


@dataclass(frozen=True, slots=True)
class Walk:
    """The translation of one address. ``target`` is set when a page was found, even one outside the capture."""

    address: int
    steps: tuple[Step, ...]
    outcome: Outcome
    target: int | None = None
    page_size: int = 0
    access: Access = Access.NONE
    memory_type: int = 0

    @property
    def state(self) -> State:
        """The state of the entry that the walk ended at."""
        return self.steps[-1].state if self.steps else State.PLAIN

    @property
    def reason(self) -> str:
        """Say in one line why the walk ends where it ends."""
        last = self.steps[-1] if self.steps else None
        if last is None:
            return f"address {self.address:#x} is wider than the hierarchy translates"
        where = f"{last.level.name} {'that the processor holds' if last.is_held else f'at {last.entry_address:#x}'}"
        return {
            Outcome.MAPPED: f"by the {where}",
            Outcome.NOT_PRESENT: f"the {where}",
            Outcome.MISCONFIGURED: f"the processor refuses the {where}",
            Outcome.MMIO: f"the {where} is a hypervisor's marker, no memory",
            Outcome.UNREADABLE: f"the {where} is not in the capture",
            Outcome.OUT_OF_RANGE: f"the page that the {where} maps is not in it",
        }[self.outcome]


def walk(memory: HostMemory, fmt: Format, root: int, address: int, dialect: Dialect = dialects.GENERIC) -> Walk:
    """Translate one address.

    ``root`` is the raw root register (EPTP, nCR3, CR3) and ``address`` a guest-physical address (a guest-virtual
    one, canonical or not, for a guest's own tables). Access is the AND over all levels, as the processor computes it.
    """
    address &= (1 << 64) - 1
    is_upper_half = fmt.is_linear and address >> (fmt.address_bits - 1) == (1 << (65 - fmt.address_bits)) - 1
    if address >> fmt.address_bits and not is_upper_half:
        return Walk(address, (), Outcome.NOT_PRESENT)
    steps: list[Step] = []
    access, table = Access.ALL, fmt.root_hpa(root)
    for level in fmt.levels:
        step, restored = _read(memory, fmt, dialect, level, table + fmt.entry_bytes * level.index(address), address)
        steps.append(step)
        if step.entry is None:
            return Walk(address, tuple(steps), Outcome.UNREADABLE)
        if step.kind in _ENDS:
            return Walk(address, tuple(steps), _ENDS[step.kind])
        access &= step.access
        if step.kind is EntryKind.LEAF:
            target = fmt.frame(restored, level) | address & (level.page_size - 1)
            outcome = Outcome.MAPPED if target in memory else Outcome.OUT_OF_RANGE
            return Walk(address, tuple(steps), outcome, target, level.page_size, access, fmt.memory_type(restored))
        table = fmt.table(restored)
    raise AssertionError("the last level is always a leaf")


_ENDS = {
    EntryKind.ABSENT: Outcome.NOT_PRESENT,
    EntryKind.MISCONFIGURED: Outcome.MISCONFIGURED,
    EntryKind.MMIO: Outcome.MMIO,
}


def _read(
    memory: HostMemory, fmt: Format, dialect: Dialect, level: Level, entry_address: int, address: int
) -> tuple[Step, int]:
    """Read and classify one entry; returns it and its value with a hypervisor's tracking undone."""
    held = fmt.held(level)
    if held:
        entry = held[level.index(address)]
    else:
        raw = memory.read(entry_address, fmt.entry_bytes)
        if raw is None:
            return Step(level, entry_address, None), 0
        entry = int.from_bytes(raw, "little")
    first = address & ~(level.page_size - 1)  # a marker holds the first address that its entry translates
    kind, restored, state = dialect.kind(fmt, entry, level, first)
    own = Access(int(fmt.rights(restored, level)) & int(Access.ALL)) if kind else Access.NONE
    own_bits = dialect.software_bits(fmt)
    flags = fmt.flags(restored & ~own_bits, level) + dialect.software(fmt, entry, level) if entry else ()
    step = Step(level, entry_address, entry, EntryKind(int(kind)), own, State(int(state)), flags, bool(held))
    return step, int(restored)
