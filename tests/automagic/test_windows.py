"""The stacker for Windows guests: on the guest's layer only, from the registers, and against a wrong table."""

from __future__ import annotations

import logging
import struct

import pytest
import volatility
from builders import hyperv, machine, paging, windows
from builders.paging import PAGE, GuestRam, HostRam, Tables
from builders.windows_pe import GUID, GUID_TEXT, Pe
from readers import READERS, memory_of
from volatility3.framework import automagic, interfaces
from volatility3.framework.automagic import pdbscan
from volatility3.framework.automagic import windows as vol_windows
from volatility3.framework.layers import intel
from volatility3.framework.symbols.windows import WindowsKernelIntermedSymbols

from volatility3_ept.automagic import GuestStacker, GuestWindowsKernel, GuestWindowsStacker, missing
from volatility3_ept.automagic import windows as automagic_windows
from volatility3_ept.core import search
from volatility3_ept.core.gva import Space
from volatility3_ept.core.pe import Image
from volatility3_ept.core.windows import Kernel
from volatility3_ept.layers import stacking
from volatility3_ept.layers import windows as layers

DECOY = 0x1A_0000


def decoy(guest: windows.Windows) -> int:
    """Write the top table of another Windows where Volatility looks first, as a guest in this guest leaves one."""
    placed = {DECOY + number * PAGE: guest.below.allocate() for number in range(12)}
    for gpa, at in placed.items():
        guest.slat.map(gpa, at)
    ram = GuestRam(guest.below, placed)
    tables = Tables(ram, paging.LONG_4)
    shared = ram.allocate()
    tables.map(windows.KUSER, shared)
    ram.write(shared + 0x26C, struct.pack("<II", 10, 0))
    ram.write_entry(tables.root + 8 * 0x1C0, tables.root | 0x63)
    image = ram.allocate()
    tables.map(guest.base, image)
    ram.write(image, b"MZ")
    return tables.root


def stacked(ram: HostRam, path, guest: str = "0"):
    """Return a context with the layer of a guest, and that layer."""
    context = volatility.lime_context(ram, path)
    memory = volatility_memory(context)
    layer = stacking.machine_layer(context, "base", search.discover(memory), guest, memory)
    context.add_layer(layer)
    return context, layer


def volatility_memory(context):
    from volatility3_ept.layers import host

    return host.host_memory(context, "base")


@pytest.mark.parametrize("shape", [paging.EPT_4, paging.NPT_4], ids=lambda shape: shape.name)
def test_the_layer_is_that_of_the_vcpus_cr3(shape, tmp_path):
    ram, guest = windows.host(shape)
    context, layer = stacked(ram, tmp_path / "host.lime")
    found = GuestWindowsStacker.stack(context, layer.name)
    assert type(found) is intel.WindowsIntel32e
    assert found.config["page_map_offset"] == guest.cr3 & ~0xFFF
    assert found.config["kernel_virtual_offset"] == guest.base & (1 << 48) - 1
    assert found.read(guest.base & (1 << 48) - 1, 2) == b"MZ"


@pytest.mark.parametrize(("shape", "kind"), [
    (paging.LEGACY, intel.WindowsIntel), (paging.PAE, intel.WindowsIntelPAE), (paging.LONG_4, intel.WindowsIntel32e),
    (paging.LONG_5, layers.WindowsIntelLA57),
], ids=lambda value: value.name if isinstance(value, paging.Shape) else "")  # fmt: skip
def test_the_layer_of_each_paging_mode(shape, kind):
    ram = HostRam(0x1000)
    tables = Tables(ram, shape)
    base = 0xFFFF_F803_5A60_0000 if shape.width == 8 and shape is not paging.PAE else 0x8260_0000
    page = ram.allocate()
    tables.map(base, page)
    ram.write(page, b"MZ and more")
    context = volatility.buffer_context(ram.image())
    space = Space(memory_of(ram), READERS[shape], tables.register)
    found = layers.virtual_layer(context, context.layers["base"], Kernel(Image(0x8664, PAGE), "", page, base, space))
    assert type(found) is kind
    context.add_layer(found)
    assert found.read(found.config["kernel_virtual_offset"], 11) == b"MZ and more"


def test_volatilitys_own_search_misses_that_table(tmp_path):
    """Issue 1282 of Volatility: the table lies outside the ranges that are searched."""
    ram, guest = windows.host()
    context, layer = stacked(ram, tmp_path / "host.lime")
    assert vol_windows.WindowsIntelStacker.stack(context, layer.name) is None
    assert guest.first > max(start + size for _, _, sections in vol_windows.WindowsIntelStacker.test_sets
                             for start, size in sections)  # fmt: skip


def test_against_another_kernels_table_the_registers_are_believed_and_a_warning_says_so(tmp_path, caplog):
    ram, guest = windows.host()
    wrong = decoy(guest)
    context, layer = stacked(ram, tmp_path / "host.lime")
    theirs = vol_windows.WindowsIntelStacker.stack(context, layer.name)
    assert theirs.config["page_map_offset"] == wrong
    with caplog.at_level(logging.WARNING):
        ours = GuestWindowsStacker.stack(context, layer.name)
    assert ours.config["page_map_offset"] == guest.cr3 & ~0xFFF
    (message,) = [record.getMessage() for record in caplog.records if "Volatility's own search" in record.getMessage()]
    assert f"{wrong:#x}" in message


def test_where_volatility_finds_a_table_of_the_same_kernel_nothing_is_said(tmp_path, caplog):
    ram, guest = windows.host(first=0x1A_0000)
    context, layer = stacked(ram, tmp_path / "host.lime")
    theirs = vol_windows.WindowsIntelStacker.stack(context, layer.name)
    assert theirs.config["page_map_offset"] in {tables.root for tables in guest.roots.values()}
    with caplog.at_level(logging.WARNING):
        assert GuestWindowsStacker.stack(context, layer.name) is not None
    assert not [record for record in caplog.records if "Volatility's own search" in record.getMessage()]


def test_a_linux_guest_and_a_layer_of_the_hosts_are_left_alone(tmp_path):
    ram, _ = machine.host(paging.EPT_4)
    context, layer = stacked(ram, tmp_path / "host.lime")
    assert GuestWindowsStacker.stack(context, layer.name) is None
    assert GuestWindowsStacker.stack(context, "base") is None


def test_the_order_is_after_the_guests_layer_and_before_every_systems():
    own = (GuestStacker, GuestWindowsStacker)
    systems = [item.stack_order for item in stackers() if item.stack_order > GuestStacker.stack_order
               and item not in own]  # fmt: skip
    assert GuestStacker.stack_order < GuestWindowsStacker.stack_order < min(systems)
    assert GuestWindowsStacker.stack_order >= stacking.FIRST_OS_ORDER


def stackers():
    from volatility3 import framework

    return list(framework.class_subclasses(interfaces.automagic.StackerLayerInterface))


@pytest.mark.parametrize("secure", [False, True])
def test_the_symbols_of_a_secure_kernel_are_not_taken_for_a_kernels(secure, tmp_path):
    ram = HostRam(0x200_0000)
    guest = windows.Windows(ram, first=0x40_0000)
    if secure:
        hyperv.secure_level(guest)
        for rva in (0, 0x6000):
            ram.write(guest.placed[guest.page(guest.base + rva)], bytes(PAGE))
    else:
        guest.vcpu()
    context, layer = stacked(ram, tmp_path / "host.lime")
    found = GuestWindowsStacker.stack(context, layer.name)
    loader = GuestWindowsKernel(context, "automagic.GuestWindowsKernel")
    chosen = loader.method_known_base(context, found)
    base = (hyperv.SECURE if secure else guest.base) & (1 << 48) - 1
    assert found.config["kernel_virtual_offset"] == base
    assert chosen is None if secure else chosen[1] == base


@pytest.mark.parametrize("guid", [GUID, bytes(16)])
def test_a_table_is_checked_by_the_guid_in_it(guid, tmp_path):
    """Volatility may have taken it by its name, which anybody can give it."""
    ram, guest = windows.host()
    context, layer = stacked(ram, tmp_path / "host.lime")
    context.add_layer(GuestWindowsStacker.stack(context, layer.name))
    path = guest.symbols(tmp_path, Pe(guid=guid))
    context.config["symbols.isf_url"] = path.as_uri()
    table = WindowsKernelIntermedSymbols(context, "symbols", "symbols", isf_url=path.as_uri())
    context.symbol_space.append(table)
    wrong = automagic_windows.check(context, missing.Guest("0", layer.memory))
    if guid == GUID:
        assert wrong is None
    else:
        assert wrong.startswith(f"{path.as_uri()} is the symbol table of another build")
        assert f"GUID {GUID_TEXT}" in wrong


def test_the_symbols_are_loaded_before_volatility_searches_for_a_kernel():
    priorities = {type(item): item.priority for item in automagic.available(volatility.contexts.Context())}
    assert priorities[GuestWindowsKernel] < priorities[pdbscan.KernelPDBScanner]


def test_without_the_option_and_without_a_guests_layer_the_symbol_loader_looks_at_nothing(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(pdbscan.KernelPDBScanner, "__call__", lambda *_: asked.append(1))
    ram, _ = windows.host()
    context = volatility.lime_context(ram, tmp_path / "host.lime")
    loader = GuestWindowsKernel(context, "automagic.GuestWindowsKernel")
    loader(context, "plugins", None)
    assert not asked
    volatility.guest_layer(context, "eptp=0x10005e")
    loader(context, "plugins", None)
    assert asked
