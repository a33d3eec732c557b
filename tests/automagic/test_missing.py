"""A guest whose kernel's symbols are missing: one message that names them, no host row, and nothing of it otherwise."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from builders import machine, paging
from builders.machine import BANNER, KERNEL
from readers import memory_of
from volatility3.framework import automagic, contexts, exceptions, interfaces, plugins
from volatility3.framework.automagic import stacker as vol_stacker
from volatility3.framework.automagic import symbol_cache
from volatility3.framework.configuration import requirements
from volatility3.plugins.linux import pslist
from volatility3.plugins.windows import info

from volatility3_ept.automagic import linux, missing
from volatility3_ept.core import search
from volatility3_ept.layers import errors, options

TEXT = BANNER.decode().strip("\n\0")
READ_ONLY = 1 << 63 | 0x61


@pytest.fixture
def host(tmp_path):
    """A host with an EPT guest, whose kernel cannot write the page with its banner."""
    ram, (guest,) = machine.host(paging.EPT_4)
    guest.own.map(KERNEL, guest.kernel_gpa, bits=READ_ONLY)
    path = tmp_path / "host.lime"
    return ram, guest, path


@pytest.fixture
def tables(monkeypatch):
    """Say which banners Volatility has a symbol table for."""

    def known(*texts: str) -> None:
        class Cache:
            def get_identifier_dictionary(self, operating_system=None, **_):
                banners = {text.encode() + b"\n\0": "file:///nowhere.json" for text in texts}
                return banners if operating_system == "linux" else {}

        monkeypatch.setattr(symbol_cache, "load_cache_manager", lambda *_: Cache())

    known()
    return known


def construct(path, wanted, plugin, base="plugins"):
    """Do what ``vol --guest`` does between the command line and the plugin."""
    context = contexts.Context()
    magics = automagic.choose_automagic(automagic.available(context), plugin)
    context.config["automagic.LayerStacker.single_location"] = path.as_uri()
    context.config["automagic.LayerStacker.stackers"] = vol_stacker.choose_os_stackers(plugin)
    if wanted is not None:
        context.config[f"{options.CONFIG_PATH}.guest"] = wanted
    return plugins.construct_plugin(context, magics, plugin, base, lambda *_: None, None)


def message(host, plugin=pslist.PsList, wanted="0", base="plugins") -> str:
    ram, _, path = host
    path.write_bytes(ram.lime())
    with pytest.raises(errors.GuestError) as error:
        construct(path, wanted, plugin, base)
    assert error.value.code
    return error.value.message


def test_the_message_names_the_build_the_place_and_the_page_that_tells_how(host, tables):
    text = message(host)
    assert text.startswith("--guest 0: no symbol table (ISF) for the guest's kernel. It must be of exactly this build:")
    assert f"\n  {TEXT}\n" in text
    assert "read-only" in text
    assert "DIR/linux/" in text and "-s DIR" in text and "docs/isf-from-btf.md" in text


def test_a_table_of_another_build_of_the_release_is_not_good_enough(host, tables):
    tables(TEXT.replace("#1", "#2"))
    assert "another build of this release does not fit" in message(host)


def test_a_table_that_is_there_is_not_asked_for(host, tables):
    """The banner is known and the kernel still not found: another sentence."""
    ram, _, _ = host
    (found,) = search.discover(memory_of(ram)).machines
    tables(TEXT)
    chosen = missing.Guest("0", found.memory, found)
    assert linux.explain(chosen, chosen.identity()).startswith(f"there is a symbol table (ISF) for {TEXT}\nbut")


def test_a_root_that_nobody_searched_for_gets_the_message_too(host, tables):
    _, guest, _ = host
    text = message(host, wanted=f"eptp={guest.root:#x}")
    assert TEXT in text
    assert "no page tables say that it is the kernel's" in text


def test_without_page_tables_every_kernel_in_memory_is_listed(host, tables):
    _, guest, _ = host
    other = sorted(guest.placed)[-1]
    guest.ram.write(other, BANNER.replace(b"6.6.6-test", b"5.5.5-file"))
    text = message(host, wanted=f"eptp={guest.root:#x}")
    assert "names several; it is one of" in text
    assert "6.6.6-test" in text and "5.5.5-file" in text


def test_a_plugin_for_another_system_says_so(host, tables):
    text = message(host, info.Info)
    assert text.startswith("--guest 0: this plugin is for Windows, and the guest runs Linux 6.6.6-test (")


def test_an_unknown_system_gets_what_was_seen(host, tables):
    _, guest, _ = host
    guest.ram.write(guest.kernel_gpa, bytes(0x1000))
    assert "no kernel that Volatility has symbols for was found: unknown" in message(host)


def test_escape_sequences_of_a_guest_do_not_reach_the_terminal(host, tables):
    _, guest, _ = host
    guest.ram.write(guest.kernel_gpa, BANNER.replace(b"nowhere", b"\x1b[2J\x07here"))
    text = message(host)
    assert all(line.isprintable() for line in text.split("\n"))
    assert "\x1b" not in text


@pytest.mark.parametrize("wanted", [None, "0"])
def test_volatility_speaks_for_itself_where_it_is_not_ours_to_say(host, tables, wanted):
    """Without the option, and for a plugin that another plugin runs: it must be able to go on with the next one."""
    ram, _, path = host
    path.write_bytes(ram.lime())
    base = "plugins" if wanted is None else "plugins.Timeliner"
    with pytest.raises(exceptions.UnsatisfiedException):
        construct(path, wanted, pslist.PsList, base)


def with_layer(chosen: str) -> SimpleNamespace:
    """Return a context as Volatility leaves it when it took this banner's symbol table."""
    return SimpleNamespace(layers={"primary": SimpleNamespace(config={"kernel_banner": f"{chosen}\n\0"})})


@pytest.mark.parametrize(("chosen", "words"), [
    (TEXT, None),
    (TEXT.replace("6.6.6-test", "5.5.5-file"), "took the symbol table of another kernel"),
], ids=["the guest's own", "a file's"])  # fmt: skip
def test_a_symbol_table_of_a_kernel_that_is_not_the_guests_is_refused(host, tables, chosen, words):
    """Volatility takes the first banner that it has a table for; the wrong one gives wrong rows with status 0."""
    ram, _, _ = host
    (found,) = search.discover(memory_of(ram)).machines
    said = linux.check(with_layer(chosen), missing.Guest("0", found.memory, found))
    assert (said is None) == (words is None)
    if words:
        assert words in said
        assert chosen in said and TEXT in said


def test_a_right_table_that_was_passed_over_is_pointed_out(host, tables):
    ram, _, _ = host
    tables(TEXT)
    (found,) = search.discover(memory_of(ram)).machines
    said = linux.check(with_layer("Linux version 1.0 (a) #1"), missing.Guest("0", found.memory, found))
    assert "leave it alone in the folder" in said


def test_nothing_is_refused_where_the_guests_kernel_is_not_to_be_seen(host, tables):
    ram, guest, _ = host
    guest.own.map(KERNEL, guest.kernel_gpa)  # writable: no constant
    (found,) = search.discover(memory_of(ram)).machines
    assert linux.check(with_layer("Linux version 1.0 (a) #1"), missing.Guest("0", found.memory, found)) is None


def test_another_option_recalls_no_guest():
    missing.remember(missing.Guest("0", memory_of(paging.HostRam())))
    assert missing.recall("0") is not None
    assert missing.recall("1") is None


@pytest.mark.parametrize(("item", "expected"), [
    (requirements.ModuleRequirement(name="kernel"), True),
    (requirements.ModuleRequirement(name="kernel", optional=True), False),
    (requirements.SymbolTableRequirement(name="vmlinux"), True),
    (requirements.TranslationLayerRequirement(name="primary"), False),
])  # fmt: skip
def test_only_a_kernel_that_the_plugin_cannot_do_without_counts(item, expected):
    whole = requirements.MultiRequirement(name="Plugin")
    whole.add_requirement(item)
    context: interfaces.context.ContextInterface = contexts.Context()
    assert missing.kernels(context, "plugins", whole) is expected
