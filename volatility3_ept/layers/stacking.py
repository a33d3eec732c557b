"""From a machine to a layer on a Volatility context, and from a layer to the kernel that Volatility finds on it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from volatility3 import framework
from volatility3.framework import constants, contexts, interfaces
from volatility3.framework.automagic import stacker as vol_stacker

from volatility3_ept.layers import discovery, guest, virtual

if TYPE_CHECKING:
    from volatility3_ept.core.machines import Discovery, Machine
    from volatility3_ept.core.memory import HostMemory

vollog = logging.getLogger(__name__)

#: Operating-system stackers have higher orders than every file format's and than ours.
FIRST_OS_ORDER = 31


def machine_layer(
    context: interfaces.context.ContextInterface, layer_name: str, found: Discovery, wanted: str, memory: HostMemory
) -> guest.GuestPhysicalLayer:
    """Return the layer of a machine, with the layers of the machines that hold its tables below it."""
    machine = discovery.select(found, wanted)
    if machine.tables_in:
        below = machine_layer(context, layer_name, found, machine.tables_in, memory)
        context.add_layer(below)
        layer_name, memory = below.name, below.memory
    slots = [str(slot) for slot in machine.recovery.slots] if machine.recovery else []
    state = virtual.described(machine)
    return guest_layer(
        context, layer_name, str(machine.root), machine.id, memory, slots, state, _beside(found, machine)
    )


def _beside(found: Discovery, machine: Machine) -> list[str]:
    """Return the roots of the other guests in the same memory: no page of theirs is recovered as this one's."""
    parent = machine.id.rpartition(".")[0]
    return [
        str(other.root)
        for other in found.all()
        if other is not machine and other.id.rpartition(".")[0] == parent and other.tables_in == machine.tables_in
    ]


def guest_layer(
    context: interfaces.context.ContextInterface,
    base: str,
    root: str,
    machine_id: str,
    memory: HostMemory,
    slots: Sequence[str] = (),
    state: Mapping[str, Any] | None = None,
    others: Sequence[str] = (),
) -> guest.GuestPhysicalLayer:
    """Return the layer of a root, given as text, over a layer; ``memory`` is that layer's.

    ``state`` is what is known of the guest's virtual memory, as :func:`.virtual.described` gives it. ``others`` are the
    roots of the other guests in that memory.
    """
    from volatility3_ept.core.root import Root

    name = context.layers.free_layer_name("GuestPhysicalLayer")
    values: dict[str, Any] = {"base_layer": base, "root": root, "guest": machine_id}
    table = Root.parse(root).fingerprint(memory)
    if table:
        values["table"] = table
    if slots:
        values["slots"] = list(slots)
        if others:
            values["others"] = list(others)
    values |= state or {}
    path = _configure(context, name, values)
    vollog.info("Guest %s: %s over %s", machine_id, root, base)
    return guest.GuestPhysicalLayer(context, path, name)


def host_layer(
    context: interfaces.context.ContextInterface, base: str, found: Discovery, memory: HostMemory
) -> guest.HostWithoutGuestsLayer:
    """Return the host without its guests' memory: what their tables in the host map, and what their VMMs still hold."""
    from volatility3_ept.core.root import Root

    masked: dict[str, str] = {}
    for machine in found.all():
        views = [view.root for view in machine.views if not view.tables_in]
        slots = machine.recovery.slots if machine.recovery else ()
        if not machine.tables_in:
            masked[str(machine.root)] = ",".join(map(str, slots))
        masked |= {str(root): "" for root in views if str(root) not in masked}
    if not masked:
        vollog.warning("--guest host: no guest was found in this capture, so nothing is masked")
    name = context.layers.free_layer_name("HostWithoutGuestsLayer")
    values = {
        "base_layer": base,
        "roots": list(masked),
        "tables": [Root.parse(root).fingerprint(memory) for root in masked],
        "slots": list(masked.values()),
    }
    return guest.HostWithoutGuestsLayer(context, _configure(context, name, values), name)


def _configure(context: interfaces.context.ContextInterface, name: str, values: dict[str, Any]) -> str:
    path: str = interfaces.configuration.path_join("GuestStacker", name)
    for key, value in values.items():
        context.config[interfaces.configuration.path_join(path, key)] = value
    return path


def copied(context: interfaces.context.ContextInterface) -> contexts.Context:
    """Return a context that shares the layers of another. Not a clone: QEMU's layers cannot be copied."""
    copy = contexts.Context()
    for name in context.layers:
        copy.add_layer(context.layers[name])
    return copy


def with_system(
    context: interfaces.context.ContextInterface, layer_name: str, progress: constants.ProgressCallback = None
) -> interfaces.layers.DataLayerInterface:
    """Let Volatility's operating-system stackers look at a physical layer; returns the top layer, that one if none."""
    stackers = framework.class_subclasses(interfaces.automagic.StackerLayerInterface)
    chosen = sorted((s for s in stackers if s.stack_order >= FIRST_OS_ORDER), key=lambda s: s.stack_order)
    top = vol_stacker.LayerStacker.stack_layer(context, layer_name, chosen, progress)[0]
    return context.layers[top]
