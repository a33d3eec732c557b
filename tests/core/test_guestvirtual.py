"""A guest's virtual address space, from its vCPUs' registers alone: right bytes at right addresses, or a reason."""

from __future__ import annotations

import struct

import pytest
from builders import pairs, spaces
from builders.paging import EPT_4, LONG_4, LONG_5, NPT_4, PAGE, Tables
from readers import memory_of

from volatility3_ept.core import guestcpu, guesthalves, guestvirtual, leaves, nested, search
from volatility3_ept.core.guestcpu import Registers
from volatility3_ept.core.guestvirtual import AddressSpace
from volatility3_ept.core.memory import HostMemory
from volatility3_ept.spec import ia32e
from volatility3_ept.spec.paging import Access, Outcome

both = pytest.mark.parametrize("shape", spaces.SHAPES, ids=lambda shape: shape.name[:3])


def only_machine(space: spaces.Space):
    (found,) = search.discover(memory_of(space.ram)).machines
    return found


def space_of(space: spaces.Space):
    """What the search and the decision say of a guest: the machine, its address space, the evidence."""
    found = only_machine(space)
    decision = guestvirtual.of_machine(found)
    return found, decision.space, str(decision)


def read(memory: HostMemory, space: AddressSpace, gva: int) -> bytes | None:
    gpa = gva if space.mode is None else guestvirtual.walk(memory, space, gva).target
    return None if gpa is None else memory.read(gpa, PAGE)


@both
@pytest.mark.parametrize("name", spaces.GUESTS)
def test_every_page_is_at_its_virtual_address_and_nothing_is_elsewhere(name, shape):
    built = spaces.GUESTS[name](shape)
    found, space, _ = space_of(built)
    assert {gva: read(found.memory, space, gva) for gva in built.pages} == built.pages
    assert [gva for gva in built.absent if read(found.memory, space, gva) is not None] == []


@pytest.mark.parametrize(("name", "mode", "levels"), [
    ("protected", None, 0), ("real mode", None, 0), ("32-bit", "32-bit", 2), ("32-bit without PSE", "32-bit", 2),
    ("PAE", "PAE", 3), ("4-level", "4-level", 4), ("5-level", "5-level", 5),
])  # fmt: skip
def test_the_mode_is_that_of_the_registers(name, mode, levels):
    _, space, _ = space_of(spaces.GUESTS[name](EPT_4))
    assert (space.mode.name, len(space.mode.levels)) == (mode, levels) if mode else space.mode is None


def test_low_bits_of_cr3_are_no_address():
    built = spaces.four_level()
    _, space, _ = space_of(built)
    assert built.registers["cr3"] & 0xFFF == 0x7A5
    assert space.root == built.registers["cr3"] & ~0xFFF
    assert AddressSpace(ia32e.four_level(), 1 << 63 | 3 << 61 | 0x1234_5FFF).root == 0x1234_5000


def test_real_mode_names_the_segment():
    assert "CS base 0x7000" in space_of(spaces.real_mode())[2]


# PAE: whose PDPTEs


def test_pdptes_of_the_vmcs_count_and_not_what_memory_holds_by_now():
    built = spaces.pae(EPT_4)
    found, space, why = space_of(built)
    assert space.mode.pdptes == built.pdptes
    assert space.pdptes(found.memory) == built.pdptes
    assert "PDPTEs of the VMCS" in why
    assert "memory at CR3 holds others now" in why


def test_and_not_even_where_those_in_memory_parse_too():
    built = spaces.pae(EPT_4)
    other = Tables(built.guest, spaces.PAE)
    other.map(0xC010_0000, built.guest.allocate())
    root = built.registers["cr3"]
    for number in range(4):
        built.guest.write_entry(root + 8 * number, built.guest.read_entry(other.root + 8 * number))
    found, space, why = space_of(built)
    assert read(found.memory, space, 0xC010_0000) == built.pages[0xC010_0000]
    assert "memory at CR3 holds others now" in why


def test_without_them_those_at_cr3_count():
    found, space, _ = space_of(spaces.pae(NPT_4))
    assert space.mode.pdptes == ()
    held = found.memory.read(space.root, 32)
    assert space.pdptes(found.memory) == struct.unpack("<4Q", held)
    assert sum(entry & 1 for entry in space.pdptes(found.memory)) == 3


def test_a_vmcs_whose_pdptes_are_empty_is_read_like_one_without():
    built = spaces.pae(EPT_4)
    built.guest.write(built.registers["cr3"], struct.pack("<4Q", *built.pdptes))
    built.pdptes = (0, 0, 0, 0)
    built.ram.write(built.structures[0] + 0x220, bytes(32))
    found, space, _ = space_of(built)
    assert space.mode.pdptes == ()
    assert read(found.memory, space, 0xC010_0000) == built.pages[0xC010_0000]


def test_the_machines_mode_reads_memory_so_that_it_serves_any_cr3():
    """With a vCPU's PDPTEs in it, every other process of the guest would read as that vCPU's."""
    assert only_machine(spaces.pae(EPT_4)).paging == ia32e.pae()


def test_a_walk_through_held_pdptes_makes_no_reference_for_them():
    built = spaces.pae(EPT_4)
    found, space, _ = space_of(built)
    mode, cr3 = space.at(0xC010_0000)
    walk = nested.walk(memory_of(built.ram), found.root, found.memory, mode, cr3, 0xC010_0123)
    assert walk.outcome is Outcome.MAPPED
    assert [reference.count for reference in walk.references] == [0, 5, 5, 4]
    lost = nested.walk(memory_of(built.ram), found.root, found.memory, mode, cr3, 0x4000_0000)
    assert lost.reason == "guest: the PDPTE that the processor holds"


def test_a_traversal_takes_the_held_pdptes_too():
    built = spaces.pae(EPT_4)
    found, space, _ = space_of(built)
    mapped = leaves.traverse(found.memory, space.mode, space.cr3)
    assert set(built.pages) <= {gva for gva, length in zip(mapped.gpas.tolist(), mapped.lengths.tolist(), strict=True)
                                for gva in range(gva, gva + length, PAGE)}  # fmt: skip
    assert len(leaves.traverse(found.memory, space.mode.from_memory, space.cr3)) == 0


def test_pae_takes_four_pdptes_or_none():
    with pytest.raises(ValueError, match="not 3"):
        ia32e.pae(pdptes=(1, 2, 3))


# Pairs of tables


@both
@pytest.mark.parametrize("levels", [LONG_4, LONG_5], ids=["4 levels", "5 levels"])
def test_a_user_half_is_recognised_and_the_kernel_half_taken(shape, levels):
    pair = spaces.kpti(shape, levels)
    _, space, why = space_of(pair.space)
    assert (space.root, space.user_cr3) == (pair.kernel.root, pair.space.registers["cr3"])
    assert "page table isolation" in why


def test_a_user_address_goes_through_the_half_that_the_processor_used():
    """The kernel's half has the same pages, but none of them may be executed there."""
    pair = spaces.kpti()
    found, space, _ = space_of(pair.space)
    assert Access.EXECUTE in guestvirtual.walk(found.memory, space, 0x40_0000).access
    assert space.at(spaces.KERNEL)[1] == pair.kernel.root


@pytest.mark.parametrize(("pair", "mode", "counts"), [
    (pairs.FOUR_LEVELS, ia32e.four_level(), (68, 3)), (pairs.FIVE_LEVELS, ia32e.five_level(), (53, 2)),
])  # fmt: skip
def test_the_pair_of_a_real_process(pair, mode, counts):
    cr3, kernel, user = pair
    memory = HostMemory.from_bytes(pairs.page(kernel) + pairs.page(user), cr3 ^ 0x1000)
    half, why = guesthalves.linux_kernel_half(memory, mode, cr3)
    assert half == cr3 ^ 0x1000
    assert f"{counts[0]} of the kernel instead of {counts[1]}" in str(why)
    assert guesthalves.linux_kernel_half(memory, mode, half) == (None, None)


def spoil_user_entry(pair):
    index = 0x7F00_0000_0000 >> 39
    at = pair.kernel.root + 8 * index
    pair.space.guest.write_entry(at, pair.space.guest.read_entry(at) ^ 0x1000)


def spoil_kernel_entry(pair):
    pair.space.guest.write_entry(pair.kernel.root + 8 * (spaces.ENTRY_AREA >> 39 & 511), 0)


def no_more_kernel(pair):
    for index in range(256, 512):
        if index != spaces.ENTRY_AREA >> 39 & 511:
            pair.space.guest.write_entry(pair.kernel.root + 8 * index, 0)


def no_user(pair):
    for root in (pair.kernel.root, pair.user.root):
        for index in range(256):
            pair.space.guest.write_entry(root + 8 * index, 0)


def unreadable(pair):
    pair.space.nested.put(pair.kernel.root, "PTE", 0)


@pytest.mark.parametrize("spoil", [spoil_user_entry, spoil_kernel_entry, no_more_kernel, no_user, unreadable])
def test_a_neighbour_that_is_not_the_other_half_is_not_taken(spoil):
    pair = spaces.kpti()
    spoil(pair)
    _, space, why = space_of(pair.space)
    assert (space.root, space.user_cr3) == (pair.user.root, None)
    assert "page table isolation" not in why


def test_cr3_of_the_kernel_half_is_left_alone():
    pair = spaces.kpti()
    pair.space.structures.clear()
    ram = pair.space.ram
    memory = memory_of(ram)
    state = Registers(cr0=0x8005_0033, cr3=pair.kernel.root | 5, cr4=0x2_26B0, efer=0xD01, rip=spaces.KERNEL)
    (found,) = search.discover(memory).machines
    decision = guestvirtual.decide(found.memory, [state])
    assert (decision.space.cr3, decision.space.user_cr3) == (pair.kernel.root | 5, None)


@both
def test_the_kernel_half_of_a_table_without_neighbour_is_searched(shape):
    pair = spaces.kva_shadow(shape)
    _, space, why = space_of(pair.space)
    assert (space.root, space.user_cr3) == (pair.kernel.root, pair.user.root)
    assert "KVA shadow" in why


def test_two_tables_that_could_be_the_kernel_half_are_none_and_said_so():
    pair = spaces.kva_shadow()
    twin = pair.space.guest.allocate()
    for index in range(512):
        pair.space.guest.write_entry(twin + 8 * index, pair.space.guest.read_entry(pair.kernel.root + 8 * index))
    pair.space.guest.write_entry(twin + 8 * 0x1ED, twin | 0x63)
    _, space, why = space_of(pair.space)
    assert (space.root, space.user_cr3) == (pair.user.root, None)
    assert "2 tables could be the other" in why


def test_a_user_half_whose_kernel_half_is_gone_is_said_to_be_one():
    pair = spaces.kva_shadow()
    pair.space.nested.put(pair.kernel.root, "PTE", 0)
    _, space, why = space_of(pair.space)
    assert space.root == pair.user.root
    assert "may be the user half of a pair; no other table has the same user entries" in why


def test_few_entries_that_lead_to_much_are_a_kernel():
    """Linux before 5.9 has half a dozen entries above, its map of all memory among them: no search is due."""
    pair = spaces.kva_shadow()
    pair.space.nested.put(pair.kernel.root, "PTE", 0)
    tables = Tables(pair.space.guest, spaces.replace(LONG_4, table=0x63, top=0x63), pair.user.root)
    for number in range(40):
        tables.map(spaces.DIRECT_MAP + number * 0x20_0000 & (1 << 48) - 1, number * 0x20_0000, 0x20_0000)
    assert "user half" not in space_of(pair.space)[2]


# Several vCPUs


def test_the_vcpu_that_has_a_kernel_stands_for_the_guest():
    built = spaces.four_level()
    small = Tables(built.guest, LONG_4)
    small.map(0x40_0000, built.guest.allocate(), bits=0x65)
    with_kernel, without = built.structures[0], built.vcpu(cr3=small.root, rip=0x40_0000)
    pages = built.ram.pages  # The first of the two is the one without.
    pages[with_kernel], pages[without] = pages[without], pages[with_kernel]
    found, space, why = space_of(built)
    assert [vcpu.hpa for vcpu in found.vcpus] == [with_kernel, without]
    assert space.held_by == f"VMCS at {without:#x}"
    assert f"of 2 vCPUs, the one of the {space.held_by}" in why
    assert guestvirtual.of_vcpu(found.memory, guestvirtual.states(found)[0]).space.root == small.root


@both
def test_a_vcpu_that_was_never_started_does_not_turn_paging_off(shape):
    built = spaces.four_level(shape)
    built.vcpu(cr0=0x30, cr3=0, cr4=0, efer=0, rip=0xFFF0, rsp=0, cs_base=0xF_0000)
    found, space, _ = space_of(built)
    assert len(found.vcpus) == 2
    assert space.mode.name == "4-level"


def test_nor_does_it_where_the_others_do_not_parse():
    sleeping = Registers(cr0=0x30, rip=0xFFF0)
    stale = Registers(cr0=0x8005_0033, cr3=0x5000, cr4=0x20, efer=0xD01, rip=spaces.KERNEL)
    memory = HostMemory.from_bytes(bytes(16 * PAGE))
    decision = guestvirtual.decide(memory, [sleeping, stale])
    assert decision.space is None
    assert f"RIP {spaces.KERNEL:#x} does not" in str(decision)


@pytest.mark.parametrize("states", [[], [Registers()], [Registers(), Registers(rip=5)]])
def test_registers_that_were_never_saved_say_nothing(states):
    decision = guestvirtual.decide(HostMemory.from_bytes(bytes(PAGE)), states)
    assert decision.space is None
    assert str(decision)


def test_tables_that_a_search_found_count_where_no_vcpu_parses():
    built = spaces.four_level()
    found = only_machine(built)
    root = built.registers["cr3"] & ~0xFFF
    for states in ([], [Registers(cr0=0x30, rip=0xFFF0)]):
        decision = guestvirtual.decide(found.memory, states, (ia32e.four_level(), root))
        assert read(found.memory, decision.space, spaces.KERNEL) == built.pages[spaces.KERNEL]
        assert "which the search of the guest's memory found" in str(decision)


@pytest.mark.parametrize(("name", "efer"), [("4-level", 0), ("PAE", 0x100), ("5-level", 0)])
def test_an_efer_that_was_not_saved_is_settled_by_what_parses(name, efer):
    built = spaces.GUESTS[name](EPT_4)
    found = only_machine(built)
    (state,) = guestvirtual.states(found)
    unsaved = guestcpu.Registers.parse(str(state).replace(f"efer={state.efer:#x},", "") + f",efer={efer:#x}")
    assert unsaved.efer == efer
    assert guestvirtual.of_vcpu(found.memory, unsaved).space.mode.name == name


# Registers as text


@pytest.mark.parametrize("name", spaces.GUESTS)
def test_registers_survive_as_text(name):
    for state in guestvirtual.states(only_machine(spaces.GUESTS[name](EPT_4))):
        assert Registers.parse(str(state)) == state


def test_a_structure_in_a_guest_is_named_with_its_machine():
    state = Registers(held_by="VMCS at 0x1000 in machine 0", cr0=1)
    assert Registers.parse(str(state)) == state


@pytest.mark.parametrize("text", [
    "cr9=0x1", "cr3", "cr3=zz", "cr3=-0x1", "cr3=0x10000000000000000", "pdptes=0x1+0x2", "pdptes=", "held_by=\x1b[",
])  # fmt: skip
def test_other_text_is_refused(text):
    with pytest.raises(ValueError):
        Registers.parse(text)
