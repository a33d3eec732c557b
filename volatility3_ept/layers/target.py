"""Which machine one of our plugins works on: ``--guest``, ``--eptp`` or ``--ncr3``, or the only one there is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from volatility3_ept.layers import discovery, errors

if TYPE_CHECKING:
    from volatility3_ept.core.gpamap import GuestMap
    from volatility3_ept.core.machines import Discovery, Machine
    from volatility3_ept.core.memory import HostMemory
    from volatility3_ept.core.root import Root
    from volatility3_ept.layers.discovery import Opened


@dataclass(frozen=True)
class Target:
    """A machine to work on. ``machine`` is None for a root that the user gave; ``below`` holds its tables.

    ``found`` is the search that gave the machine.
    """

    id: str
    root: Root
    below: HostMemory
    guest_map: GuestMap
    memory: HostMemory
    machine: Machine | None
    found: Discovery | None = None


def given_root(config: Mapping[str, Any]) -> str | None:
    """Return the root that ``--eptp``, ``--ncr3`` or ``--guest eptp=...`` names, as text."""
    given = {name: config.get(name) for name in ("eptp", "ncr3", "guest") if config.get(name, None) is not None}
    if len(given) > 1:
        both = " and ".join(f"--{name} {value}" for name, value in given.items())
        raise errors.GuestError(f"{both}: give one of them")
    for name, value in given.items():
        if name != "guest" or "=" in value:
            return value if name == "guest" else f"{name}={value}"
    return None


def targets(
    capture: Opened, config: Mapping[str, Any], progress: Callable[[float, str], Any] | None = None
) -> list[Target]:
    """Return the machines that the options name, all of them when they name none.

    Raises:
        GuestError: the options name nothing, or something that is not there.
    """
    text = given_root(config)
    if text is not None:
        return [_explicit(capture.memory, text, config)]
    wanted = config.get("guest", None)
    if wanted is not None:
        discovery.check_syntax(wanted)
        if wanted.strip().lower() == discovery.HOST:
            raise errors.GuestError("--guest host: the host itself has no EPT or NPT here; name a machine")
    found = capture.discover(config, progress)
    chosen = found.all() if wanted is None else [discovery.select(found, wanted)]
    return [_target(capture.memory, found, machine) for machine in chosen]


def only(found: list[Target], what: str) -> Target:
    """Return the single target; GuestError that lists the choices when there are several, or none at all."""
    if len(found) == 1:
        return found[0]
    if not found:
        raise errors.GuestError(f"{what}: no machine was found in this capture; give a root with --eptp or --ncr3")
    ids = ", ".join(target.id for target in found)
    raise errors.GuestError(f"{what} needs one machine; add --guest with one of: {ids}")


def _target(memory: HostMemory, found: Discovery, machine: Machine) -> Target:
    parent = found.find(machine.tables_in) if machine.tables_in else None
    below = parent.memory if parent else memory
    return Target(machine.id, machine.root, below, machine.guest_map, machine.memory, machine, found)


def _explicit(memory: HostMemory, text: str, config: Mapping[str, Any]) -> Target:
    from volatility3_ept.core.root import Root

    root = Root.parse(discovery.explicit(text, config, memory))
    if root.address not in memory:
        raise errors.GuestError(f"{text}: the table at {root.address:#x} is not in the capture")
    root = root.resolved(memory)
    guest_map = root.traverse(memory)
    findings = guest_map.findings
    if not len(guest_map) and not len(findings.mmio) and not len(findings.unreadable):
        raise errors.GuestError(f"{text}: the page at {root.address:#x} is no {root.kind} table: it maps nothing")
    return Target(str(root), root, memory, guest_map, guest_map.memory(memory), None)


def number(text: str, option: str, width: int = 64) -> int:
    """Return a number that a user typed; GuestError with one clear line when it is none, or too wide."""
    try:
        value = int(text, 0)
    except ValueError:
        raise errors.GuestError(f"{option} {text}: not a number (0x for hexadecimal)") from None
    if value < 0 or value >> width:
        raise errors.GuestError(f"{option} {text}: such an address has at most {width} bits")
    return value
