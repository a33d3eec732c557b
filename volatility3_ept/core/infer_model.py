"""What layout inference returns: offsets of fields, each with its evidence and how sure it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType
from typing import Final

from volatility3_ept.core.control import Criterion
from volatility3_ept.core.gpamap import GuestMap
from volatility3_ept.core.layouts import Field, Layout
from volatility3_ept.core.memory import HostMemory, Int64
from volatility3_ept.core.root import Root
from volatility3_ept.spec import vmcs_fields
from volatility3_ept.spec.vmcs import AccessRightsFormat

SEGMENTS: Final = ("ES", "CS", "SS", "DS", "FS", "GS", "LDTR", "TR")
HOST_SEGMENTS: Final = ("ES", "CS", "SS", "DS", "FS", "GS", "TR")

#: The fields that are looked for.
TARGETS: Final[tuple[str, ...]] = (
    "EPTP",
    "VMCS_LINK_POINTER",
    "PIN_BASED_EXEC_CONTROLS",
    "PROC_BASED_EXEC_CONTROLS",
    "SECONDARY_PROC_EXEC_CONTROLS",
    "VM_EXIT_CONTROLS",
    "VM_ENTRY_CONTROLS",
    "EXIT_REASON",
    *("GUEST_CR0", "GUEST_CR3", "GUEST_CR4", "GUEST_DR7", "GUEST_RSP", "GUEST_RIP", "GUEST_RFLAGS"),
    *("GUEST_IA32_PAT", "GUEST_IA32_EFER", "HOST_IA32_PAT", "HOST_IA32_EFER"),
    *("HOST_CR0", "HOST_CR3", "HOST_CR4", "HOST_RSP", "HOST_RIP"),
    *(f"HOST_{name}_BASE" for name in ("FS", "GS", "TR", "GDTR", "IDTR")),
    *(f"HOST_{name}_SELECTOR" for name in HOST_SEGMENTS),
    *(f"GUEST_{name}_BASE" for name in (*SEGMENTS, "GDTR", "IDTR")),
    *(f"GUEST_{name}_{part}" for name in SEGMENTS for part in ("SELECTOR", "LIMIT", "ACCESS_RIGHTS")),
)


class Certainty(str, Enum):
    """How sure an offset is.

    CERTAIN: a condition that the true field must meet, met nowhere else, or content that proves it. LIKELY: the rules
    of all known layouts put it there and its values fit. UNKNOWN: the evidence does not suffice; nothing is guessed.
    """

    CERTAIN = "certain"
    LIKELY = "likely"
    UNKNOWN = "unknown"

    def __str__(self) -> str:
        """Return the word as users read it."""
        return self.value


@dataclass(frozen=True, slots=True)
class InferredField:
    """Where a field is, why, and how sure that is. ``offset`` is None when it is unknown."""

    offset: int | None
    size: int
    certainty: Certainty
    evidence: tuple[Criterion, ...] = ()


@dataclass(frozen=True)
class KnownRoot:
    """An EPT root that is known already, and the memory of its guest: through it a guest's CR3 can be tried.

    ``frames`` are the ranges of host memory that the guest uses: what lies there is the guest's, and no control
    structure of this host.
    """

    address: int
    memory: HostMemory
    frames: tuple[Int64, Int64]

    @classmethod
    def of(cls, below: HostMemory, root: Root, guest_map: GuestMap) -> KnownRoot:
        """Return a root with the memory that its map gives; ``below`` holds tables and frames."""
        return cls(root.address, guest_map.memory(below), guest_map.frame_ranges())


@dataclass(frozen=True)
class Inferred:
    """The layout of the control structures with one revision identifier, as far as their content tells it.

    ``pages`` are the structures that agree; ``notes`` say what was left out and why. ``ar_format`` and
    ``segment_stride`` are None where they are not known; the stride is that of whole segment slots, or of one access
    rights field where each kind of field has its own array.
    """

    revision_id: int
    fields: Mapping[str, InferredField]
    ar_format: AccessRightsFormat | None = None
    segment_stride: int | None = None
    pages: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def is_control_structure(self) -> bool:
        """Tell whether the pages are believed to be control structures at all."""
        return any(self.fields[name].certainty is Certainty.CERTAIN for name in ("EPTP", "GUEST_CR3", "HOST_CR3"))

    def known(self, least: Certainty = Certainty.CERTAIN) -> dict[str, InferredField]:
        """Return the fields whose place is known, those that are only likely on request."""
        wanted = (Certainty.CERTAIN, least)
        return {
            name: item for name, item in self.fields.items() if item.certainty in wanted and item.offset is not None
        }

    def explain(self) -> str:
        """Say in lines of text what was inferred, and from what."""
        lines = [f"VMCS layout of revision id {self.revision_id:#x}, from {len(self.pages)} pages"]
        lines += [f"access rights {self.ar_format or 'unknown'}, segment stride {self.segment_stride or 'unknown'}"]
        for name, item in self.fields.items():
            where = "unknown" if item.offset is None else f"{item.offset:#x} {item.certainty}"
            lines.append(f"{name}: {where}")
            lines += [f"  {criterion}" for criterion in item.evidence]
        return "\n".join([*lines, *self.notes])


@dataclass
class Findings:
    """Fields as they are found. An offset that one field has certainly is not given to another."""

    fields: dict[str, InferredField] = field(default_factory=dict)
    ar_format: AccessRightsFormat | None = None
    segment_stride: int | None = None
    notes: list[str] = field(default_factory=list)

    def put(self, name: str, offset: int, certainty: Certainty, *evidence: Criterion, size: int = 0) -> None:
        """Note a field, unless a surer place for it is known already."""
        if name in self.fields and self.fields[name].certainty is Certainty.CERTAIN:
            return
        size = size or vmcs_fields.BY_NAME[name].width.size_bytes
        self.fields[name] = InferredField(offset, size, certainty, evidence)

    def reject(self, name: str, why: str) -> None:
        """Note why a field stays unknown."""
        if name not in self.fields:
            size = vmcs_fields.BY_NAME[name].width.size_bytes
            self.fields[name] = InferredField(None, size, Certainty.UNKNOWN, (Criterion("place", None, why),))

    def certain(self, name: str) -> int | None:
        """Return the offset of a field that is certain, else None."""
        item = self.fields.get(name)
        return item.offset if item is not None and item.certainty is Certainty.CERTAIN else None

    def settled(self) -> Mapping[str, InferredField]:
        """Return all fields; two claims on the same bytes cancel the weaker one, or both when they are equal."""
        for name in TARGETS:
            self.reject(name, "nothing in these pages shows where it is")
        owners: dict[int, list[str]] = {}
        for name, item in self.fields.items():
            for byte in range(item.offset or 0, (item.offset or 0) + item.size) if item.offset is not None else ():
                owners.setdefault(byte, []).append(name)
        for byte, names in owners.items():
            if len(names) > 1:
                self._withdraw(names, byte)
        return MappingProxyType({name: self.fields[name] for name in TARGETS})

    def _withdraw(self, names: list[str], byte: int) -> None:
        sure = [name for name in names if self.fields[name].certainty is Certainty.CERTAIN]
        for name in names if len(sure) != 1 else [name for name in names if name not in sure]:
            why = f"{' and '.join(names)} both fit the byte at {byte:#x}"
            self.fields[name] = InferredField(
                None, self.fields[name].size, Certainty.UNKNOWN, (Criterion("place", None, why),)
            )


def agreement(inferred: Inferred, known: Layout) -> tuple[int, int]:
    """Count the certain fields that a known layout has at the same place, and those that it has elsewhere.

    With none elsewhere the unknown identifier is, as far as can be seen, one more of that layout's.
    """
    shared = {name: item for name, item in inferred.known().items() if name in known.fields}
    same = sum(known.fields[name].offset == item.offset for name, item in shared.items())
    return same, len(shared) - same


def layout(inferred: Inferred, least: Certainty = Certainty.CERTAIN) -> Layout:
    """Return the inferred layout in the form in which known ones are used; by default only what is certain."""
    fields = {"VMCS_REVISION_ID": Field(0, 4), "VMX_ABORT_INDICATOR": Field(4, 4)}
    known = inferred.known(least)
    for name, item in sorted(known.items(), key=lambda pair: pair[1].offset or 0):
        fields[name] = Field(item.offset or 0, item.size)
    return Layout(
        name=f"inferred_{inferred.revision_id:x}",
        revision_ids=frozenset({inferred.revision_id}),
        ar_format=inferred.ar_format,
        size=4096,
        fields=MappingProxyType(fields),
        provenance=MappingProxyType(
            {
                "provenance": "inferred",
                "revision_id_rule": "fixed",
                "likely": sorted(n for n, item in known.items() if item.certainty is Certainty.LIKELY),
            }
        ),
        is_software=False,
    )
