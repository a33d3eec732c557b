"""The same tables read by code that is not ours: Volatility's Intel layers, and Intel's chipsec for EPT."""

from __future__ import annotations

import random

import pytest
from builders import paging
from builders.paging import EPT_4, LEAF_SIZES, LEGACY, LONG_4, NPT_4, PAE, HostRam, Shape, Tables
from readers import READERS, memory_of
from volatility3.framework import contexts, exceptions
from volatility3.framework.layers import intel, physical

from volatility3_ept.core import leaves
from volatility3_ept.core.walk import walk
from volatility3_ept.spec import dialect
from volatility3_ept.spec.paging import Outcome

LAYERS = {NPT_4: intel.Intel32e, LONG_4: intel.Intel32e, PAE: intel.IntelPAE, LEGACY: intel.Intel}
TOP = 0x40_0000
VARIANTS = {NPT_4: (0x67, 0x65, 0x167), EPT_4: (0x37, 0x33, 0x35, 0x34, 0x31, 0x0600_0000_0000_0B77)}


def populated(shape: Shape, seed: int) -> Tables:
    """Return tables with pages of every size at random, aliases among them."""
    rng = random.Random(seed)
    tables = Tables(HostRam(), shape)
    width = shape.rungs[0][1] + shape.rungs[0][2]
    high = (1 << width - 30) - 1
    # A gigabyte for each size, so that no page lies where a larger one is: 4K, 4K, 2M (or 4M), 2M at the top, 1G.
    small, large, *huge = LEAF_SIZES[shape.name]
    regions = [(0, small, 6), (1, small, 6), (2, large, 6), (high, large, 6)] + [(5, size, 1) for size in huge]
    for region, size, count in regions:
        for _ in range(count):
            address = region << 30 | rng.randrange(0, 1 << 30, size)
            target = rng.randrange(0, 1 << 31 if size > small else TOP, size)
            bits = rng.choice(VARIANTS.get(shape, (shape.page,)))
            tables.map(address, target, size, bits | 0x80 if size > small else bits)
    tables.ram.page(TOP - 0x1000)
    return tables


def layer_over(tables: Tables):
    """Return Volatility's own layer for these tables; the capture is its raw image."""
    context = contexts.Context()
    context.add_layer(physical.BufferDataLayer(context, "test.base", "base", tables.ram.image()))
    context.config["test.layer.memory_layer"] = "base"
    context.config["test.layer.page_map_offset"] = tables.root
    layer = LAYERS[tables.shape](context, "test.layer", "layer")
    context.add_layer(layer)
    return layer


def interesting(found) -> list[int]:
    """Return the edges of every run, a byte within it, and the bytes before and after."""
    return sorted(
        {
            address
            for run in found.runs()
            for address in (run.gpa - 1, run.gpa, run.gpa + 0x123, run.gpa + run.length - 1, run.gpa + run.length)
            if address >= 0
        }
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", LAYERS, ids=lambda shape: shape.name)
def test_volatility_translates_every_page_as_we_do(shape, seed):
    """NPT is the host's long mode; a guest's own tables are PAE or 32-bit. No PSE-36 here: Volatility lacks it."""
    tables = populated(shape, seed)
    layer = layer_over(tables)
    memory = memory_of(tables.ram, b"")
    found = leaves.traverse(memory, READERS[shape], tables.register, dialect.GENERIC)
    assert set(found.page_counts()) == set(LEAF_SIZES[shape.name])
    for address in interesting(found):
        if address > layer.maximum_address:
            continue
        result = walk(memory, READERS[shape], tables.register, address)
        try:
            target, size, _ = layer._translate(address)
        except exceptions.InvalidAddressException:
            assert result.outcome is Outcome.NOT_PRESENT, hex(address)
        else:
            assert (result.target, result.page_size) == (target, size), hex(address)


def test_volatility_reads_a_self_describing_guest_as_we_do():
    """The bytes, through both: pages and holes."""
    tables = Tables(HostRam(), NPT_4)
    gpas = [0x1000 * n for n in (0, 1, 5, 512, 513, 0x8_0000)]
    tables.back(gpas)
    layer = layer_over(tables)
    memory = memory_of(tables.ram)
    guest = leaves.traverse(memory, READERS[NPT_4], tables.register).memory(memory)
    for gpa in gpas:
        assert layer.read(gpa, 0x1000) == guest.read(gpa, 0x1000) == paging.stamp(gpa)
    assert not layer.is_valid(0x2000)
    assert 0x2000 not in guest


def test_where_volatility_differs_a_table_of_equal_entries():
    """It drops such a table (Windows fills whole ones with one page): here, and only here, it sees less."""
    tables = Tables(HostRam(), NPT_4)
    for index in range(512):
        tables.map(index << 12, 0x9000)
    with pytest.raises(exceptions.InvalidAddressException):
        layer_over(tables).translate(0x1000)
    assert walk(memory_of(tables.ram), READERS[NPT_4], tables.register, 0x1000).target == 0x9000


@pytest.mark.parametrize(
    ("raw", "outcome", "target"),
    [
        (0x0008_0000_000C_0037, Outcome.MMIO, None),
        (0x0004_0000_0123_4067, Outcome.OUT_OF_RANGE, 0x0004_0000_0123_4000),
    ],
)
def test_where_volatility_differs_the_high_address_bits(raw, outcome, target):
    """Its MAXPHYADDR is 52: KVM's marker for MMIO is a page at 2^51 to it. A plain high frame is one to both."""
    tables = Tables(HostRam(), NPT_4)
    tables.put(0xC_0000, "PTE", raw)
    assert layer_over(tables)._translate(0xC_0000)[0] == raw & 0x000F_FFFF_FFFF_F000
    result = walk(memory_of(tables.ram), READERS[NPT_4], tables.register, 0xC_0000)
    assert (result.outcome, result.target) == (outcome, target)


class Physical:
    """What chipsec asks of a machine: its physical memory."""

    def __init__(self, ram: HostRam) -> None:
        self.mem = self
        self._ram = ram

    def read_physical_mem(self, address: int, length: int) -> bytes:
        return bytes(self._ram.page(address)[address & 0xFFF :][:length])


def chipsec_pages(tables: Tables) -> dict[int, tuple[int, int, str]]:
    """Return ``{gpa: (hpa, size, rights of the leaf)}`` as Intel's chipsec reads the EPT."""
    hal = pytest.importorskip("chipsec.hal.paging", reason="needs chipsec (pip install chipsec)")
    reader = hal.c_extended_page_tables(Physical(tables.ram))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hal.logger(), "log", lambda *_: None)  # it prints every entry
        reader.read_page_tables(tables.register)
    sizes = {"4KB": 0x1000, "2MB": 0x20_0000, "1GB": 0x4000_0000}
    return {
        gpa: (page["addr"], sizes[page["size"]], page["attr"].split()[0][::-1])
        for gpa, page in reader.translation.items()
    }


@pytest.mark.parametrize("seed", range(4))
def test_chipsec_finds_the_same_pages_in_an_ept(seed):
    """Every page, with its size and the rights of its leaf (chipsec does not AND them over the levels)."""
    tables = populated(EPT_4, seed)
    theirs = chipsec_pages(tables)
    found = leaves.traverse(memory_of(tables.ram), READERS[EPT_4], tables.register, dialect.GENERIC)
    ours = {
        run.gpa + offset: (run.hpa + offset, run.page_size, run.access.letters())
        for run in found.runs()
        for offset in range(0, run.length, run.page_size)
    }
    assert theirs == ours
    assert {size for _, size, _ in ours.values()} == {0x1000, 0x20_0000, 0x4000_0000}


def test_where_chipsec_differs_it_reads_one_entry_of_a_table_of_equal_entries():
    tables = Tables(HostRam(), EPT_4)
    for index in range(512):
        tables.map(index << 12, 0x9000)
    assert list(chipsec_pages(tables)) == [0]
    assert leaves.traverse(memory_of(tables.ram), READERS[EPT_4], tables.register).mapped_bytes == 0x20_0000
