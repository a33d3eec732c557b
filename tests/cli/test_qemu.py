"""A snapshot of a machine that is itself a hypervisor is a host capture: in each form in which QEMU writes one."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli import qemu

FORMS = ("elf", "kdump", "migrate")


@pytest.fixture(scope="module", params=["pc", pytest.param("q35", marks=pytest.mark.slow)])
def snapshots(request, host, tmp_path_factory) -> dict[str, Path]:
    """The small host as the RAM of a machine, in every form."""
    folder = tmp_path_factory.mktemp(request.param)
    memory = folder / "ram"
    memory.write_bytes(host[0].image().ljust(16 * qemu.MIB, b"\0"))
    paths = {form: folder / form for form in FORMS}
    with qemu.Qemu(memory, request.param) as machine:
        for form, path in paths.items():
            getattr(machine, form)(path)
    return paths


@pytest.mark.parametrize("form", FORMS)
def test_scan_finds_the_machines_in_what_qemu_wrote(vol, small, snapshots, form):
    expected = vol("-f", small, "-r", "json", "ept.scan").check().json
    found = vol("-f", snapshots[form], "-r", "json", "ept.scan").check()
    # A machine's RAM has no holes: the evidence counts more addresses as memory.
    assert [{**row, "Evidence": ""} for row in found.json] == [{**row, "Evidence": ""} for row in expected]
    assert len(expected) == 2
    assert "makedumpfile" not in found.err


def test_a_guest_in_a_qemu_dump_reads_the_same_bytes(vol, host, snapshots):
    ram, (guest, _) = host
    folder = snapshots["kdump"].parent
    vol("-f", snapshots["kdump"], "-o", folder, "--guest", "0", "layerwriter").check()
    expected = b"".join(bytes(ram.page(guest.placed[gpa])) for gpa in sorted(guest.placed))
    assert (folder / "memory_layer.raw").read_bytes() == expected
