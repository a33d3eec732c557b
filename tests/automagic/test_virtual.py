"""The fallback for a guest whose system nobody recognises: when it is stacked, and who gets which layer."""

from __future__ import annotations

import pytest
from automagic.test_selector import construct, volatility_stackers
from builders import machine, paging, spaces
from volatility3.framework import exceptions
from volatility3.framework.layers import intel, physical
from volatility3.plugins import banners, layerwriter, regexscan
from volatility3.plugins.linux import pslist as linux_pslist
from volatility3.plugins.windows import pslist as windows_pslist

from volatility3_ept.automagic import GuestVirtualStacker
from volatility3_ept.layers import errors, guest, virtual


@pytest.fixture
def host(tmp_path):
    """A host with one 4-level guest, as a LiME file, and the guest."""
    built = spaces.four_level()
    path = tmp_path / "host.lime"
    path.write_bytes(built.ram.lime())
    return path, built


def made(path, wanted, plugin=regexscan.RegExScan):
    """Construct a plugin as ``vol`` does; the regular expression is one that it needs."""
    return construct(path, wanted, plugin, plugins__RegExScan__pattern="<page at")


def top(plugin):
    return plugin.context.layers[plugin.config["primary"]]


@pytest.mark.parametrize("plugin", [regexscan.RegExScan, layerwriter.LayerWriter, banners.Banners])
def test_a_plugin_of_no_system_gets_the_virtual_layer_over_the_physical_one(host, plugin):
    path, built = host
    layer = top(made(path, "0", plugin))
    assert isinstance(layer, virtual.GuestIntel32e)
    assert layer.read(spaces.KERNEL, 4096) == built.pages[spaces.KERNEL]
    below = layer.context.layers[layer.dependencies[0]]
    assert isinstance(below, guest.GuestPhysicalLayer)


@pytest.mark.parametrize("plugin", [linux_pslist.PsList, windows_pslist.PsList])
def test_a_plugin_of_a_system_does_not(host, plugin):
    """Its layer needs a kernel's symbols; with another one under it a plugin would read nonsense, or nothing."""
    with pytest.raises((exceptions.UnsatisfiedException, errors.GuestError)) as caught:
        made(host[0], "0", plugin)
    assert "GuestVirtualLayer" not in str(caught.value)


@pytest.mark.parametrize("plugin", [regexscan.RegExScan, banners.Banners])
def test_without_the_option_nothing_is_stacked(host, plugin):
    if plugin is regexscan.RegExScan:
        with pytest.raises(exceptions.UnsatisfiedException):
            made(host[0], None, plugin)
        return
    layers = made(host[0], None, plugin).context.layers
    assert not any(isinstance(layers[name], intel.Intel) for name in layers)


@pytest.mark.parametrize("wanted", ["1", "0.0", "banana"])
def test_a_wrong_guest_still_ends_the_program(host, wanted):
    with pytest.raises(errors.GuestError):
        made(host[0], wanted)


def test_the_host_is_not_given_one(host):
    """--guest host is physical memory of the host: a guest's page tables are none of its business."""
    assert isinstance(top(made(host[0], "host", banners.Banners)), guest.HostWithoutGuestsLayer)
    with pytest.raises(exceptions.UnsatisfiedException):
        made(host[0], "host")


def test_the_machine_in_a_machine_has_its_own(tmp_path):
    ram = paging.HostRam()
    outer = machine.Guest(ram, paging.EPT_4, pages=96)
    outer.vcpu()
    inner = machine.Guest(outer.ram, paging.NPT_4, pages=16)
    inner.vcpu()
    path = tmp_path / "host.lime"
    path.write_bytes(ram.lime())
    layer = top(made(path, "0.0"))
    assert layer.read(machine.KERNEL, len(machine.BANNER)) == machine.BANNER
    below = layer.context.layers[layer.dependencies[0]]
    assert (below.config["guest"], below.root.kind) == ("0.0", "NPT")


def test_it_comes_after_every_stacker_of_a_system():
    others = [
        item.stack_order
        for item in volatility_stackers()
        if item is not GuestVirtualStacker and item.__module__.split(".")[0] in ("volatility3", "volatility3_ept")
    ]
    assert GuestVirtualStacker.stack_order > max(others)


def test_a_systems_own_layer_goes_first(host, monkeypatch):
    """A stacker that recognises the guest keeps it: the fallback never lies above or below another Intel layer."""
    from volatility3.framework.automagic import linux

    def recognise(cls, context, layer_name, progress_callback=None):
        if isinstance(context.layers[layer_name], (intel.Intel, physical.FileLayer)):
            return None
        if not isinstance(context.layers[layer_name], guest.GuestPhysicalLayer):
            return None
        context.config["known.memory_layer"] = layer_name
        context.config["known.page_map_offset"] = host[1].registers["cr3"] & ~0xFFF
        return intel.LinuxIntel32e(context, "known", "known", metadata={"os": "Linux"})

    monkeypatch.setattr(linux.LinuxIntelStacker, "stack", classmethod(recognise))
    layer = top(made(host[0], "0"))
    assert type(layer) is intel.LinuxIntel32e
    assert not any(isinstance(layer.context.layers[name], virtual.GuestMixin) for name in layer.context.layers)
