"""What an audit says of a host that the builders wrote."""

from __future__ import annotations

from builders.hooks import Victim
from builders.paging import HostRam
from readers import memory_of

from volatility3_ept.core import audit, search
from volatility3_ept.core.audit_finding import Audit, Finding, Kind, Severity

#: An address above the memory of every guest that the builders write.
FREE = 0x80_0000


def pair() -> tuple[HostRam, Victim, Victim]:
    """Return a host with two guests."""
    ram = HostRam()
    return ram, Victim(ram), Victim(ram)


def audited(ram: HostRam, disassemble=None, hosts=None) -> Audit:
    """Return the audit of a host."""
    memory = memory_of(ram)
    return audit.audit(search.discover(memory), memory, disassemble=disassemble, hosts=hosts)


def results(ram: HostRam, disassemble=None, hosts=None) -> list[Finding]:
    """Return the findings on a host."""
    return list(audited(ram, disassemble, hosts).findings)


def grave(found: list[Finding]) -> list[tuple[Kind, Severity, int | None]]:
    """Return what is above info, without text."""
    return [(f.kind, f.severity, f.gpa) for f in found if f.severity > Severity.INFO]
