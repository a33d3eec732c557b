"""Control structures and the evidence for them: what the VMCS and VMCB finders return."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Final, Literal

from volatility3_ept.core.layouts import Layout
from volatility3_ept.spec import vmcb

Kind = Literal["VMCS", "VMCB"]

#: Share of the judged weight that must hold.
_LIKELY_SCORE: Final = 0.85
_POSSIBLE_SCORE: Final = 0.6


class Verdict(str, Enum):
    """What the page's own content says; whether it heads a machine is for its page tables to say."""

    LIKELY = "likely"
    POSSIBLE = "possible"
    REJECTED = "rejected"

    def __str__(self) -> str:
        """Return the word as users read it."""
        return self.value


@dataclass(frozen=True, slots=True)
class Criterion:
    """One thing that a control structure should satisfy, and whether this page does."""

    name: str
    #: None when the page does not allow a judgement (a field the layout lacks, a capability that is off).
    held: bool | None
    detail: str = ""
    weight: int = 1
    #: Without it the page cannot be LIKELY, whatever else holds.
    essential: bool = False

    def __str__(self) -> str:
        """Return one line: a mark, the name, and what was seen."""
        mark = {True: "+", False: "-", None: "?"}[self.held]
        return f"{mark} {self.name}: {self.detail}" if self.detail else f"{mark} {self.name}"


@dataclass(frozen=True, slots=True)
class ControlStructure:
    """A page that may be a VMCS or a VMCB, decoded under the layout that fits it best.

    Addresses are host-physical in the memory it was found in; for a structure in the memory of a guest that
    is a hypervisor itself, ``root_hpa`` is a guest-physical address of that guest.
    """

    kind: Kind
    hpa: int
    layout: str
    revision_id: int | None
    is_shadow: bool
    #: EPTP or nCR3 as it is held; 0 when the structure does not use nested paging.
    root_raw: int
    root_hpa: int
    #: Levels of the nested page tables; 0 when the structure does not say (VMCB).
    levels: int
    vpid_or_asid: int | None
    fields: Mapping[str, int] = field(hash=False, repr=False)
    evidence: tuple[Criterion, ...] = field(repr=False)
    #: The page itself.
    raw: bytes = field(default=b"", repr=False, compare=False)
    #: The layout by name, for offsets.
    table: Layout | None = field(default=None, repr=False, compare=False)
    #: Id of the machine in whose memory :attr:`hpa` is an address; empty for the capture itself.
    held_in: str = ""

    @property
    def score(self) -> float:
        """Share of the weight that held among the criteria that could be judged, 0 to 1."""
        judged = sum(item.weight for item in self.evidence if item.held is not None)
        return sum(item.weight for item in self.evidence if item.held) / judged if judged else 0.0

    @property
    def verdict(self) -> Verdict:
        """Turn the evidence into a word: a failed essential, or a low score, each cost one step."""
        broken = any(item.essential and item.held is False for item in self.evidence)
        score = self.score
        if score < _POSSIBLE_SCORE:
            return Verdict.REJECTED
        return Verdict.LIKELY if score >= _LIKELY_SCORE and not broken else Verdict.POSSIBLE

    @property
    def has_root(self) -> bool:
        """Tell whether the structure names nested page tables."""
        return self.root_hpa != 0

    @property
    def holds_registers(self) -> bool:
        """Tell whether the guest's registers are here: those of an SEV-ES guest are in a VMSA that is encrypted."""
        control = self.fields.get("NP_SEV_CONTROL", 0) if self.kind == "VMCB" else 0
        return control & vmcb.ENCRYPTED_STATE != vmcb.ENCRYPTED_STATE

    @property
    def guest_cr3(self) -> int | None:
        """CR3 of the guest, a guest-physical address with its PCID and flag bits; None where it is not to be read."""
        if not self.holds_registers:
            return None
        return self.fields.get("GUEST_CR3" if self.kind == "VMCS" else "CR3")

    @property
    def host_cr3(self) -> int | None:
        """CR3 of the hypervisor; a VMCB does not hold it."""
        return self.fields.get("HOST_CR3")

    @property
    def host_rip(self) -> int | None:
        """Where the hypervisor goes on after an exit, constant per hypervisor; a VMCB does not hold it."""
        return self.fields.get("HOST_RIP")

    @property
    def failed(self) -> tuple[Criterion, ...]:
        """The criteria that do not hold."""
        return tuple(item for item in self.evidence if item.held is False)

    def explain(self) -> str:
        """Say in lines of text what was judged and how."""
        head = f"{self.kind} at {self.hpa:#x}, layout {self.layout}: {self.verdict}, score {self.score:.2f}"
        return "\n".join([head, *(f"  {item}" for item in self.evidence)])
