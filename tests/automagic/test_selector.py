"""``--guest`` inside Volatility: inert without it, exact with it, and never the host by accident."""

from __future__ import annotations

import pytest
import volatility
from builders import machine, paging
from volatility3.framework import automagic, exceptions, interfaces, plugins
from volatility3.framework.automagic import stacker as vol_stacker
from volatility3.framework.configuration import requirements
from volatility3.plugins import banners

from volatility3_ept.automagic import GuestGuard, GuestSelector, GuestStacker, selector
from volatility3_ept.layers import errors, guest, host, options, runs

GUEST = f"{options.CONFIG_PATH}.guest"


@pytest.fixture
def host_file(tmp_path):
    """A host with an EPT and an NPT guest, as a LiME file."""
    ram, guests = machine.host(paging.EPT_4, paging.NPT_4)
    path = tmp_path / "host.lime"
    path.write_bytes(ram.lime())
    return path, guests


def construct(path, wanted=None, plugin=banners.Banners, **config):
    """Do what ``vol`` does between the command line and the plugin."""
    context = volatility.contexts.Context()
    magics = automagic.choose_automagic(automagic.available(context), plugin)
    context.config["automagic.LayerStacker.single_location"] = path.as_uri()
    context.config["automagic.LayerStacker.stackers"] = vol_stacker.choose_os_stackers(plugin)
    if wanted is not None:
        context.config[GUEST] = wanted
    for key, value in config.items():
        context.config[key.replace("__", ".")] = value
    return plugins.construct_plugin(context, magics, plugin, "plugins", lambda *_: None, None)


def primary(plugin) -> interfaces.layers.DataLayerInterface:
    """The physical layer of a plugin: below the virtual one, where its guest has one."""
    return plugin.context.layers[host.physical_layer(plugin.context, plugin.config["primary"])]


def test_without_the_option_no_layer_of_ours_is_stacked(host_file):
    plugin = construct(host_file[0])
    assert not any(isinstance(plugin.context.layers[name], runs.RunsLayer) for name in plugin.context.layers)


@pytest.mark.parametrize(("wanted", "number"), [("0", 0), ("1", 1)])
def test_an_id_selects_that_machine(host_file, wanted, number):
    path, guests = host_file
    layer = primary(construct(path, wanted))
    assert isinstance(layer, guest.GuestPhysicalLayer)
    assert layer.root.raw == guests[number].root


def test_a_root_selects_without_any_search(host_file, monkeypatch):
    path, guests = host_file
    monkeypatch.setattr("volatility3_ept.core.search.discover", lambda *_: pytest.fail("searched"))
    layer = primary(construct(path, f"eptp={guests[0].root:#x}"))
    assert layer.read(guests[0].kernel_gpa, 13) == b"Linux version"


def test_a_root_that_was_typed_without_its_c_bit_is_read_all_the_same(tmp_path):
    ram, (own,) = machine.host(paging.NPT_4)
    for table in own.tables.table_pages:
        for at in range(table, table + paging.PAGE, 8):
            entry = ram.read_entry(at)
            ram.write_entry(at, entry | 1 << 51 if entry else 0)
    path = tmp_path / "host.lime"
    path.write_bytes(ram.lime())
    layer = primary(construct(path, f"ncr3={own.root:#x}"))
    assert layer.root.key_bit == 51
    assert layer.read(own.kernel_gpa, 13) == b"Linux version"


def test_host_is_the_host_without_its_guests(host_file):
    path, guests = host_file
    layer = primary(construct(path, "host"))
    assert isinstance(layer, guest.HostWithoutGuestsLayer)
    assert not any(layer.is_valid(hpa) for g in guests for hpa in g.placed.values())


@pytest.mark.parametrize(
    "wanted", ["2", "0.0", "99", "banana", "-1", "", "eptp=0x7f00000000", "eptp=", "ncr3=zz", "0,1"]
)
def test_a_wrong_guest_ends_the_program(host_file, wanted):
    with pytest.raises(errors.GuestError):
        construct(host_file[0], wanted)


def test_the_error_lists_the_machines_there_are(host_file):
    with pytest.raises(errors.GuestError) as error:
        construct(host_file[0], "7")
    assert "--guest 0" in error.value.message
    assert "--guest 1" in error.value.message


def test_a_plugin_with_a_stacker_list_of_the_users_gets_the_guest_all_the_same(host_file):
    """--stackers LimeStacker leaves our stacker out: without care the host would be shown."""
    layer = primary(construct(host_file[0], "0", automagic__LayerStacker__stackers=["LimeStacker"]))
    assert isinstance(layer, guest.GuestPhysicalLayer)


def test_the_guard_refuses_a_layer_that_is_not_the_guests(host_file):
    """Whatever goes wrong in between: no data of another machine."""
    context = volatility.file_context(host_file[0])
    context.config[GUEST] = "0"
    guard = GuestGuard(context, "automagic.GuestGuard")
    requirement = volatility.contexts.Context  # never looked at
    with pytest.raises(errors.GuestError, match="refusing"):
        guard(context, "plugins", requirement)


def test_the_guard_accepts_layers_that_stand_on_the_guest(host_file):
    plugin = construct(host_file[0], "1")
    nothing = requirements.MultiRequirement(name="Banners")
    GuestGuard(plugin.context, "automagic.GuestGuard")(plugin.context, "plugins", nothing)


def test_the_selector_runs_before_every_other_automagic_and_the_guard_after():
    others = [
        item.priority
        for item in automagic.available(volatility.contexts.Context())
        if not isinstance(item, (GuestSelector, GuestGuard))
    ]
    assert GuestSelector.priority < min(others)
    assert GuestGuard.priority > max(others)


def test_the_stacker_stands_between_file_formats_and_operating_systems():
    orders = {
        item.__name__: item.stack_order
        for item in volatility_stackers()
        if item is not GuestStacker and item.__module__.startswith("volatility3.framework")
    }
    below = [order for name, order in orders.items() if order < GuestStacker.stack_order]
    above = {name for name, order in orders.items() if order > GuestStacker.stack_order}
    assert max(below) <= 20
    assert {"LinuxIntelStacker", "LinuxIntelVMCOREINFOStacker", "WindowsIntelStacker", "MacIntelStacker"} <= above


def volatility_stackers():
    from volatility3 import framework

    return list(framework.class_subclasses(interfaces.automagic.StackerLayerInterface))


def test_a_configuration_round_trips_without_a_search(host_file, monkeypatch):
    path, guests = host_file
    saved = dict(construct(path, "1").build_configuration())
    monkeypatch.setattr("volatility3_ept.core.search.discover", lambda *_: pytest.fail("searched"))
    context = volatility.contexts.Context()
    context.config.splice("plugins.Banners", interfaces.configuration.HierarchicalDict(saved))
    magics = automagic.choose_automagic(automagic.available(context), banners.Banners)
    plugin = plugins.construct_plugin(context, magics, banners.Banners, "plugins", lambda *_: None, None)
    assert primary(plugin).read(guests[1].kernel_gpa, 13) == b"Linux version"


def test_a_file_that_is_no_capture_is_refused_before_anything_is_shown(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("not a capture\n" * 2000)
    with pytest.raises(errors.CaptureError, match="text"):
        construct(path, "0")


def test_a_missing_layer_is_volatilitys_own_error(tmp_path):
    with pytest.raises(exceptions.UnsatisfiedException):
        construct(tmp_path / "absent.raw", "0")


@pytest.mark.parametrize(("wanted", "right"), [("0.0", True), ("0", False), ("1", False)])
def test_a_configuration_of_a_nested_guest_is_that_guests_and_not_its_parents(wanted, right):
    """The parent's layer stands below the nested guest's, and is named in the same configuration."""
    layer = f"{guest.__name__}.{guest.GuestPhysicalLayer.__name__}"
    config = {"primary.class": layer, "primary.guest": "0.0", "primary.base_layer.class": layer,
              "primary.base_layer.guest": "0"}  # fmt: skip
    held = interfaces.configuration.HierarchicalDict(config)
    if right:
        selector._refuse_other_layers(held, wanted)
        return
    with pytest.raises(errors.GuestError, match=r"describes guest 0\.0"):
        selector._refuse_other_layers(held, wanted)


def test_a_configuration_without_an_id_is_named_by_its_root():
    layer = f"{guest.__name__}.{guest.GuestPhysicalLayer.__name__}"
    config = {"primary.class": layer, "primary.root": "eptp=0x105e"}
    with pytest.raises(errors.GuestError, match="describes the guest at eptp=0x105e, without an id") as error:
        selector._refuse_other_layers(interfaces.configuration.HierarchicalDict(config), "0")
    assert "None" not in error.value.message
