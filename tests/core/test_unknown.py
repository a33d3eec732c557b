"""A processor that no table describes: the search infers how its VMCS is laid out, and reads it."""

from __future__ import annotations

import infer_table
import pytest
from builders import layouts
from builders.kernels import Hypervisor
from builders.machine import KERNEL
from builders.paging import PAGE, HostRam
from readers import memory_of

from volatility3_ept.core import search
from volatility3_ept.core.index import Index


def host(layout: layouts.Layout) -> tuple[HostRam, object, list[int]]:
    """A host with one guest of two vCPUs, whose VMCSs have this layout under an identifier that nobody knows."""
    ram = HostRam()
    below = Hypervisor(ram)
    guest = below.guest()
    for page in range(64):
        guest.own.map(KERNEL + (page + 1) * PAGE, sorted(guest.placed)[page % len(guest.placed)])
    places = []
    for number in range(2):
        address = ram.allocate()
        changed = {"MSR_BITMAP": 0x50_0000 + number * PAGE} if "MSR_BITMAP" in layout.fields else {}
        ram.write(address, layout.write(infer_table.UNKNOWN_ID, below.vmcs(guest, **changed)))
        places.append(address)
    return ram, guest, places


@pytest.mark.parametrize("seed", range(3))
def test_a_vmcs_of_an_unknown_processor_is_read(seed):
    ram, guest, places = host(layouts.processor(seed))
    (found,) = search.discover(memory_of(ram)).machines
    assert found.root.address == guest.tables.root
    assert {vcpu.hpa for vcpu in found.vcpus} <= set(places)
    assert found.vcpus
    for vcpu in found.vcpus:
        assert vcpu.layout == f"inferred_{infer_table.UNKNOWN_ID:#x}"
        assert vcpu.fields["EPTP"] & ~0xFFF == guest.tables.root
        assert vcpu.guest_cr3 & ~0xFFF == guest.own.root


def test_an_index_keeps_the_inferred_layout():
    ram, _, _ = host(layouts.processor(1))
    memory = memory_of(ram)
    first = search.discover(memory)
    kept = Index.from_json(first.index.to_json("key"), "key")
    again = search.discover(memory, known=kept)
    assert [(m.id, m.vcpus, m.evidence) for m in again.all()] == [(m.id, m.vcpus, m.evidence) for m in first.all()]


@pytest.mark.parametrize("damage", [
    lambda text: text[:-1], lambda text: text.replace('"format": ', '"format": 9'), lambda text: "[]", lambda text: "",
    lambda text: text.replace('"pages": ', '"pages": "x", "p": '),
    lambda text: text.replace('"slots": {', '"slots": {"0": 5, '),
], ids=["cut", "format", "list", "empty", "type", "slots"])  # fmt: skip
def test_a_damaged_index_is_not_used(damage):
    text = Index((0x1000,), 5, {"/eptp=0x105e": "Linux"}, {"/": ("0x0:0x1",)}).to_json("key")
    assert Index.from_json(text, "key") is not None
    assert Index.from_json(damage(text), "key") is None
    assert Index.from_json(text, "another key") is None
