"""A guest writes the control structure of a guest of its own (VMCS12, VMCB12) and names what is not its own in it."""

from __future__ import annotations

import pytest
from builders import paging
from builders.machine import Guest
from builders.paging import EPT_4, NPT_4, PAGE, HostRam
from readers import memory_of

from volatility3_ept.core import search

SHAPES = pytest.mark.parametrize("shape", [EPT_4, NPT_4], ids=lambda shape: shape.name)


def pair(shape: paging.Shape) -> tuple[HostRam, Guest, Guest]:
    """An attacker, which builds its nested control structures as KVM's guests do, and its victim."""
    ram = HostRam()
    attacker, victim = Guest(ram, shape, pages=96), Guest(ram, shape, pages=64)
    attacker.vcpu()
    victim.vcpu()
    return ram, attacker, victim


def nested(attacker: Guest, shape: paging.Shape, **values: int) -> Guest:
    """A guest in the attacker's memory; ``values`` are forged into its control structure."""
    inner = Guest(attacker.ram, shape, pages=8, layout="kvm")
    inner.vcpu(**values)
    return inner


def frames(machine) -> set[int]:
    """The machine's frames, by their places in the image."""
    memory = machine.memory
    return {
        int(offset) + at
        for offset, length in zip(memory.offsets, memory.lengths, strict=True)
        for at in range(0, int(length), PAGE)
    }


def check(ram: HostRam, victim: Guest, attacker: Guest) -> dict[str, set[int]]:
    """Both honest machines are whole, and what is in the attacker has only pages of the attacker."""
    found = search.discover(memory_of(ram))
    (held,) = [machine for machine in found.machines if machine.root.raw == victim.root]
    (forger,) = [machine for machine in found.machines if machine.root.raw == attacker.root]
    assert len(found.machines) == 2, "nothing that a guest writes becomes a machine of the host"
    assert held.memory.size == victim.pages * PAGE
    assert held.children == ()
    assert forger.memory.size == attacker.pages * PAGE
    inside = {machine.id: frames(machine) for machine in forger.tree()}
    for mine in inside.values():
        assert mine <= inside[forger.id]
        assert not mine & frames(held)
    return inside


@SHAPES
def test_an_honest_nested_guest_is_found_in_the_same_place(shape):
    """What the forgeries are held against: without one the structure gives a machine."""
    ram, attacker, victim = pair(shape)
    inner = nested(attacker, shape)
    inside = check(ram, victim, attacker)
    assert len(inside) == 2
    assert len(inside[max(inside)]) == inner.pages


@SHAPES
def test_the_root_of_a_neighbour_is_an_address_of_the_attacker(shape):
    """The EPTP of the victim, taken over to the bit: in a VMCS12 it is a guest-physical address."""
    ram, attacker, victim = pair(shape)
    name = "eptp" if shape is EPT_4 else "ncr3"
    own = {"guest_cr3": victim.own.root} if shape is EPT_4 else {"cr3": victim.own.root}
    nested(attacker, shape, **{name: victim.root}, **own)
    check(ram, victim, attacker)


@SHAPES
def test_nested_tables_that_map_a_neighbours_frames_reach_nothing(shape):
    """The leaves hold the frames of the victim, as if they were the attacker's guest-physical addresses."""
    ram, attacker, victim = pair(shape)
    inner = nested(attacker, shape)
    for number, hpa in enumerate(sorted(victim.placed.values())):
        inner.tables.map(0x10_0000 + number * PAGE, hpa)
    inside = check(ram, victim, attacker)
    assert len(inside[max(inside)]) == inner.pages


@SHAPES
def test_a_structure_of_the_victim_that_is_copied_by_the_attacker_changes_nothing(shape):
    """All of the victim's own control structure, in the attacker's memory."""
    ram, attacker, victim = pair(shape)
    attacker.ram.write(attacker.ram.allocate(), bytes(ram.page(victim.structures[0])))
    check(ram, victim, attacker)


@SHAPES
def test_the_attackers_own_root_makes_no_machine_without_end(shape):
    """A nested structure that names the root of the attacker itself, at its own guest-physical address."""
    ram, attacker, victim = pair(shape)
    inner = nested(attacker, shape)
    name = "eptp" if shape is EPT_4 else "ncr3"
    attacker.tables.map(attacker.root & ~0xFFF, inner.placed[0])
    inner.vcpu(**{name: attacker.root})
    found = search.discover(memory_of(ram))
    sizes = {machine.root.raw: machine.memory.size for machine in found.machines}
    assert sizes[victim.root] == victim.pages * PAGE
    assert all(machine.depth <= 2 for machine in found.all())
    assert len(found.all()) <= 4
