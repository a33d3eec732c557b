"""The host without its guests, in the real captures: exactly the guests' pages are gone, recovered ones too."""

from __future__ import annotations

import captures
import discovered
import numpy as np
import pytest
import volatility
from volatility3.framework import contexts, interfaces
from volatility3.framework.layers import elf

from volatility3_ept.layers import guest, stacking

PAGE = 4096


def host_context(capture: captures.Capture) -> contexts.Context:
    context = volatility.file_context(capture.path)
    context.config["core.base_layer"] = "base"
    context.add_layer(elf.Elf64Layer(context, "core", "core"))
    return context


@pytest.fixture(scope="module", params=captures.every())
def masked(request):
    """A capture, the machines in it, and the host without them."""
    capture = captures.get(request.param)
    below, found = discovered.capture(request.param)
    return capture, found, stacking.host_layer(host_context(capture), "core", found, below)


def frames_of(capture: captures.Capture) -> set[int]:
    """Every host frame of a guest of the host, as the monitors' own records say."""
    own = [item for item in capture.guests if item.facts["parent"] == "host"]
    return {frame for item in own for frame, _ in item.pages.values()}


def test_every_page_of_every_guest_is_gone_and_no_other(masked):
    capture, _, layer = masked
    memory = np.zeros(capture.truth["host"]["memory_bytes"] // PAGE, dtype=np.bool_)
    for start, size, *_ in layer.mapping(0, memory.size * PAGE, ignore_errors=True):
        memory[start // PAGE : (start + size) // PAGE] = True
    gone = set(np.flatnonzero(~memory).tolist())
    wanted = frames_of(capture)
    assert gone <= wanted
    # What remains is read-only and holds zeros: the host's zero page, and what reads like it.
    for frame in wanted - gone:
        assert not any(capture.page(frame * PAGE)), f"{frame:#x} is a guest's"
    assert len(wanted - gone) <= 1


def test_pages_that_only_the_monitor_still_holds_are_gone_too(masked):
    _, found, layer = masked
    lost = [machine.recovery.recovered for machine in found.machines if machine.recovery]
    pages = [hpa + at for rows in lost for _, size, hpa, _ in rows.tolist() for at in range(0, size, PAGE)]
    assert pages or not lost, "every guest here has pages that EPT or NPT lacks"
    assert sum(layer.is_valid(page) for page in pages) <= 1


def test_a_configuration_masks_the_same_pages_without_a_search(masked, monkeypatch):
    capture, _, layer = masked
    monkeypatch.setattr("volatility3_ept.core.backing.recover", lambda *_: pytest.fail("searched"))
    context = host_context(capture)
    for key, value in dict(layer.build_configuration()).items():
        context.config[interfaces.configuration.path_join("again", key)] = value
    context.config["again.base_layer"] = "core"
    again = guest.HostWithoutGuestsLayer(context, "again", "again")
    for one, other in zip(layer.memory._table, again.memory._table, strict=True):
        assert one == other


def test_the_layer_of_each_machine_holds_what_the_search_said(masked):
    capture, found, _ = masked
    below = discovered.capture(capture.name)[0]
    for machine in found.all():
        layer = stacking.machine_layer(host_context(capture), "core", found, machine.id, below)
        for one, other in zip(layer.memory._table, machine.memory._table, strict=True):
            assert one == other
