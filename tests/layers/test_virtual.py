"""Guest-virtual layers: Volatility reads through them what the processor would, and configurations give them again."""

from __future__ import annotations

import copy
import struct

import pytest
import volatility
from builders import spaces
from builders.paging import EPT_4, NPT_4, PAGE
from volatility3.framework import exceptions, interfaces
from volatility3.framework.configuration import requirements
from volatility3.framework.layers import intel, scanners

from volatility3_ept.automagic import GuestVirtualStacker
from volatility3_ept.core import search
from volatility3_ept.layers import errors, host, stacking, virtual

both = pytest.mark.parametrize("shape", spaces.SHAPES, ids=lambda shape: shape.name[:3])
CLASSES = {
    "protected": virtual.GuestUnpaged,
    "real mode": virtual.GuestUnpaged,
    "32-bit": virtual.GuestIntelPSE,
    "32-bit without PSE": virtual.GuestIntel,
    "PAE": virtual.GuestIntelPAE,
    "4-level": virtual.GuestIntel32e,
    "5-level": virtual.GuestIntelLA57,
    "KPTI": virtual.GuestIntel32e,
    "KPTI in 5 levels": virtual.GuestIntelLA57,
    "KVA shadow": virtual.GuestIntel32e,
}


def stacked(built: spaces.Space, folder, change=None):
    """Stack the guest's physical layer and, as Volatility would, what the stacker gives on it."""
    context = volatility.lime_context(built.ram, folder / "host.lime")
    memory = host.host_memory(context, "base")
    physical = stacking.machine_layer(context, "base", search.discover(memory), "0", memory)
    context.add_layer(physical)
    if change:
        change(physical)
    layer = GuestVirtualStacker.stack(context, physical.name)
    if layer is not None:
        context.add_layer(layer)
    return layer


@both
@pytest.mark.parametrize("name", spaces.GUESTS)
def test_every_page_is_at_its_virtual_address_and_nothing_is_elsewhere(name, shape, tmp_path):
    built = spaces.GUESTS[name](shape)
    layer = stacked(built, tmp_path)
    assert type(layer) is CLASSES[name]
    for gva, data in built.pages.items():
        assert layer.read(gva, PAGE) == data
        assert layer.is_valid(gva, PAGE)
    for gva in built.absent:
        assert not layer.is_valid(gva)
        with pytest.raises(exceptions.InvalidAddressException):
            layer.read(gva, 1)


@pytest.mark.parametrize("name", spaces.GUESTS)
def test_a_scan_finds_each_page_once_for_each_address(name, tmp_path):
    built = spaces.GUESTS[name](EPT_4)
    layer = stacked(built, tmp_path)
    found = sorted(layer.scan(layer.context, scanners.BytesScanner(b"<page at ")))
    width = 57 if isinstance(layer, virtual.GuestIntelLA57) else 48 if isinstance(layer, intel.Intel32e) else 32
    assert found == sorted(gva & (1 << width) - 1 for gva in built.pages)


@pytest.mark.parametrize("name", spaces.GUESTS)
def test_its_configuration_gives_it_again_without_the_search(name, tmp_path, monkeypatch):
    built = spaces.GUESTS[name](EPT_4)
    saved = dict(stacked(built, tmp_path).build_configuration())
    monkeypatch.setattr("volatility3_ept.core.search.discover", lambda *_: pytest.fail("searched"))
    monkeypatch.setattr("volatility3_ept.core.guestvirtual.decide", lambda *_: pytest.fail("decided anew"))
    context = volatility.contexts.Context()
    context.config.splice("again", interfaces.configuration.HierarchicalDict(saved))
    layer = construct(context, "again")
    assert {gva: layer.read(gva, PAGE) for gva in built.pages} == built.pages


def construct(context, name):
    """Build the layers that a configuration describes, as Volatility's first automagic does."""
    from volatility3.framework.automagic import construct_layers

    wanted = requirements.TranslationLayerRequirement(name=name)
    construct_layers.ConstructionMagic(context, "magic")(context, "", wanted)
    return context.layers[context.config[name]]


@pytest.mark.parametrize("name", spaces.GUESTS)
def test_plugins_take_it_for_a_virtual_layer_of_a_system_that_is_not_known(name, tmp_path):
    layer = stacked(spaces.GUESTS[name](EPT_4), tmp_path)
    facts = dict(layer.metadata)
    assert facts.pop("architecture") == ("Intel64" if isinstance(layer, intel.Intel32e) else "Intel32")
    assert facts.pop("pae", False) is (name == "PAE")
    assert facts == {"mapped": True, "os": "Unknown"}
    assert isinstance(layer, intel.Intel), "no system's stacker may look at it again"


@both
def test_a_copy_of_the_context_reads_the_same(shape, tmp_path):
    """Volatility stacks in a clone of the context."""
    built = spaces.pae(shape)
    layer = stacked(built, tmp_path)
    twin = copy.deepcopy(layer.context).layers[layer.name]
    assert twin.read(0xC010_0000, PAGE) == built.pages[0xC010_0000]
    with pytest.raises(exceptions.PagedInvalidAddressException) as caught:
        twin.read(0x4000_0000, 1)
    assert caught.value.invalid_bits == 30, "a whole gigabyte may be skipped"


def test_a_read_across_pages_and_across_a_hole(tmp_path):
    built = spaces.pse()
    layer = stacked(built, tmp_path)
    at = 0xC010_0000
    assert layer.read(at + PAGE - 5, 10) == built.pages[at][-5:] + built.pages[at + PAGE][:5]
    assert next(iter(layer.mapping(at - 0x800, 0x1000, ignore_errors=True)))[:2] == (at, 0x800)
    whole = layer.read(0x8000_0000, 3 * PAGE, pad=True)
    assert whole == built.pages[0x8000_0000] + built.pages[0x8000_0000 + PAGE] + bytes(PAGE)


def test_a_4m_page_with_reserved_bits_is_refused(tmp_path):
    built = spaces.pse()
    root = built.registers["cr3"] & ~0xFFF
    built.guest.write_entry(root + 4 * (0x9000_0000 >> 22), 0x0040_00E3 | 1 << 21, 4)
    layer = stacked(built, tmp_path)
    assert not layer.is_valid(0x9000_0000)
    assert layer.is_valid(0x8000_0000)


def test_the_pat_bit_of_a_2m_page_is_no_address(tmp_path):
    built = spaces.pae(NPT_4)
    root = built.registers["cr3"]
    directory = built.guest.read_entry(root + 8 * 2) & ~0xFFF
    built.guest.write_entry(directory, built.guest.read_entry(directory) | 1 << 12)
    assert stacked(built, tmp_path).read(0x8000_0000, PAGE) == built.pages[0x8000_0000]


@pytest.mark.parametrize("name", ["4-level", "5-level"])
def test_the_key_of_an_encrypted_guest_is_no_address(name, tmp_path):
    """A guest of SEV sets the C-bit in CR3 and in each entry of its own; a page that it shares goes without."""
    built = spaces.GUESTS[name](NPT_4)
    root, key = built.registers["cr3"] & ~0xFFF, 1 << 47
    entries = entries_below(built, root, 4 if name == "4-level" else 5)
    for at in entries[:-1]:
        built.guest.write_entry(at, built.guest.read_entry(at) | key)
    built.ram.write(built.structures[0] + 0x550, (root | key).to_bytes(8, "little"))
    layer = stacked(built, tmp_path)
    assert (layer.config["page_map_offset"], layer.config["key_bits"]) == (root, key)
    assert {gva: layer.read(gva, PAGE) for gva in built.pages} == built.pages


def entries_below(built, root: int, levels: int) -> list[int]:
    """Return where the entries of a guest's tables lie, level by level."""
    found, tables = [], [root]
    for _ in range(levels):
        used = [at for table in tables for at in range(table, table + PAGE, 8) if built.guest.read_entry(at)]
        tables = [built.guest.read_entry(at) & 0x000F_FFFF_FFFF_F000 for at in used]
        found += used
    return found


def test_57_bits(tmp_path):
    layer = stacked(spaces.la57(), tmp_path)
    assert (layer.maximum_address, layer.bits_per_register) == ((1 << 57) - 1, 64)
    assert layer.canonicalize(0x1FF_1100_0000_7000 & (1 << 57) - 1) >> 57 == 0x7F


def test_unpaged_memory_ends_where_32_bits_end(tmp_path):
    built = spaces.Space(extra=(1 << 32,), registers=spaces.protected().registers)
    for _ in range(8):
        gpa = built.guest.allocate()
        built.fill(gpa, gpa)
    built.vcpu()
    layer = stacked(built, tmp_path)
    assert layer.maximum_address == (1 << 32) - 1
    assert max(start + size for start, size, *_ in layer.mapping(0, 1 << 32, ignore_errors=True)) == 96 * PAGE
    assert not layer.is_dirty(0x1000)


def test_no_vcpu_no_layer(tmp_path, caplog):
    """A root that was given: nothing is known of its vCPUs."""
    built = spaces.four_level()
    context = volatility.lime_context(built.ram, tmp_path / "host.lime")
    physical = volatility.guest_layer(context, built.root)
    assert GuestVirtualStacker.stack(context, physical.name) is None
    assert "no control structure of this machine is known" in caplog.text


def test_only_a_guests_physical_layer_is_stacked_on(tmp_path):
    built = spaces.four_level()
    layer = stacked(built, tmp_path)
    assert GuestVirtualStacker.stack(layer.context, "base") is None
    assert GuestVirtualStacker.stack(layer.context, layer.name) is None
    masked = volatility.masked_layer(layer.context, [built.root])
    assert GuestVirtualStacker.stack(layer.context, masked.name) is None


def test_tables_that_the_search_found_serve_too(tmp_path):
    built = spaces.four_level()

    def only_tables(layer):
        layer.config["vcpus"] = []
        layer.config["top_table"] = f"4-level:{built.registers['cr3'] & ~0xFFF:#x}"

    assert stacked(built, tmp_path, only_tables).read(spaces.KERNEL, PAGE) == built.pages[spaces.KERNEL]


@pytest.mark.parametrize(("name", "value"), [
    ("vcpus", ["cr3=banana"]), ("vcpus", ["cr9=0x1"]), ("top_table", "6-level:0x1000"), ("top_table", "4-level:x"),
])  # fmt: skip
def test_a_damaged_configuration_ends_the_program(name, value, tmp_path):
    with pytest.raises(errors.GuestError, match="guest 0"):
        stacked(spaces.four_level(), tmp_path, lambda layer: layer.config.__setitem__(name, value))


def test_pdptes_are_in_the_configuration_and_memory_is_not_asked(tmp_path):
    built = spaces.pae(NPT_4)
    layer = stacked(built, tmp_path)
    held = struct.unpack("<4Q", bytes(layer.context.layers[layer.config["memory_layer"]].read(0x17E0, 32)))
    assert tuple(layer.config["pdptes"]) == held
