"""From a Volatility layer to the machines in it, and from what a user typed to one of them."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from volatility3.framework import interfaces

from volatility3_ept.layers import errors, host, indexing
from volatility3_ept.spec import bits

if TYPE_CHECKING:
    from volatility3_ept.core.machines import Discovery, Machine
    from volatility3_ept.core.memory import HostMemory

vollog = logging.getLogger(__name__)

HOST = "host"


def physical_bits(config: Mapping[str, Any]) -> int:
    """Return ``--maxphyaddr``, or 52 (no address bit is called reserved); GuestError when it is out of range."""
    given = config.get("maxphyaddr", None)
    if given is None:
        return bits.MAX_PHYSICAL_BITS
    if not 32 <= int(given) <= bits.MAX_PHYSICAL_BITS:
        raise errors.GuestError(f"--maxphyaddr {given}: a physical-address width is 32 to {bits.MAX_PHYSICAL_BITS}")
    return int(given)


@dataclasses.dataclass(frozen=True)
class Opened:
    """A capture: its physical memory, and the key under which a search of it is kept (None: not kept)."""

    memory: HostMemory
    key: str | None

    def discover(self, config: Mapping[str, Any], progress: Callable[[float, str], Any] | None = None) -> Discovery:
        """Return the machines in it, from an earlier search where there is one. Notes and near misses go to the log."""
        from volatility3_ept.core import scan, search

        known = indexing.load(self.key) if self.key else None
        recover = not config.get("no_recovery", False)
        found = search.discover(self.memory, physical_bits(config), progress or scan.silent, known, recover)
        if self.key and found.index != known:
            indexing.save(self.key, found.index)
        for note in found.notes:
            vollog.warning("%s", note)
        for machine in found.all():
            for note in machine.recovery.notes if machine.recovery else ():
                vollog.info("Guest %s: %s", machine.id, note)
        for structure in found.near_misses:
            vollog.debug("Not believed: %s", structure.explain())
        for candidate in found.rejected:
            lines = "\n".join(f"  {item}" for item in candidate.evidence)
            vollog.debug("Root %s is no machine:\n%s", candidate.root, lines)
        return found


def open_capture(context: interfaces.context.ContextInterface, layer_name: str, config: Mapping[str, Any]) -> Opened:
    """Return the physical memory below a layer."""
    name = host.physical_layer(context, layer_name)
    memory = host.host_memory(context, name, bool(config.get("allow_truncated", False)))
    options: dict[str, object] = {
        "maxphyaddr": physical_bits(config),
        "recovery": not config.get("no_recovery", False),
    }
    return Opened(memory, indexing.key(context, name, memory, options))


def check_syntax(wanted: str) -> None:
    """Raise GuestError when ``--guest`` cannot name anything, before the capture is searched."""
    if wanted.strip().lower() == HOST or all(part.isdigit() for part in wanted.split(".")):
        return
    if "=" in wanted:
        explicit(wanted)
        return
    raise errors.GuestError(
        f"--guest {wanted}: give an id that ept.scan prints (0, 0.1), a root (eptp=0x..., ncr3=0x...), or host"
    )


def explicit(wanted: str, config: Mapping[str, Any] | None = None, memory: HostMemory | None = None) -> str:
    """Return a root that was given as text in its normal form, with ``--maxphyaddr``; GuestError when it is none.

    With ``memory``, which holds its tables, it also says where a key is in their entries (the C-bit, a KeyID).
    """
    from volatility3_ept.core import keybits
    from volatility3_ept.core.root import Root, RootError

    width = physical_bits(config or {})
    try:
        root = Root.parse(wanted)
        if width < bits.MAX_PHYSICAL_BITS and not root.physical_bits:
            root = dataclasses.replace(root, physical_bits=width)
        return str(keybits.resolved(memory, root) if memory else root)
    except RootError as error:
        raise errors.GuestError(f"--guest {wanted}: {error}") from None


def select(found: Discovery, wanted: str) -> Machine:
    """Return the machine with an id; GuestError that lists what there is when there is none."""
    machine = found.find(wanted)
    if machine is None:
        raise errors.GuestError(f"--guest {wanted}: no such machine in this capture. {listing(found)}")
    return machine


def listing(found: Discovery) -> str:
    """Return the machines of a capture as text for an error message."""
    rows = [
        f"\n  --guest {m.id:<6} {m.root.kind} root {m.root.raw:#x}, {bits.size_name(m.guest_map.mapped_bytes)} mapped, "
        f"{m.system}"
        for m in found.all()
    ]
    return "Machines found:" + "".join(rows) if rows else "No machine was found in it."
