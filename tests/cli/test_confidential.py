"""A guest that the host cannot read: every plugin that shows it says so."""

from __future__ import annotations

import json
import random

import pytest
from builders import control, machine, paging
from builders.paging import PAGE
from cli import containers


@pytest.fixture(scope="module")
def encrypted(tmp_path_factory):
    """A host with one SEV-SNP guest, all of whose pages but two are ciphertext."""
    ram, (guest,) = machine.host(paging.NPT_4, pages=64)
    noise = random.Random(3)
    for gpa in sorted(guest.placed.keys() - {0, 2 * PAGE}):
        ram.write(guest.placed[gpa], noise.randbytes(PAGE))
    page = bytearray(control.sev_es_vmcb(ncr3=guest.root))
    page[0x140] = 0x81  # GUEST_SEV_FEATURES
    page[0x550:0x558] = (0x1234_5000).to_bytes(8, "little")  # CR3 of a save area that nobody uses
    ram.write(guest.structures[0], bytes(page))
    return containers.elf(ram, tmp_path_factory.mktemp("encrypted"))


def test_ept_scan_names_it_and_gives_the_statistics(vol, encrypted):
    (row,) = vol("-r", "json", "-f", encrypted, "ept.scan").check().json
    assert row["OS"] == "unknown (SEV-SNP)"
    assert "+ confidential: SEV-SNP (VMCB at" in row["Evidence"]
    assert "62 of 64 written pages in a sample of 64 look like ciphertext" in row["Evidence"]


def test_ept_vmcs_shows_no_register_that_is_not_the_guests(vol, encrypted):
    rows = vol("-r", "json", "-f", encrypted, "ept.vmcs").check().json
    said = {row["Field"]: row["Decoded"] for row in rows}
    assert said["NP_SEV_CONTROL"] == "NP_ENABLE SEV SEV_ES"
    assert said["GUEST_SEV_FEATURES"].startswith("SNP_ACTIVE")
    assert said["CR3"] == "not the guest's: its registers are in the encrypted VMSA"


@pytest.mark.slow
def test_ept_map_and_ept_carve_say_that_it_is_ciphertext(vol, encrypted, tmp_path):
    (whole, *_) = vol("-f", encrypted, "ept.map", "--totals").check().rows[1:]
    assert "SEV-SNP" in whole[-1]
    vol("-o", tmp_path, "-f", encrypted, "ept.carve", "--format", "elf").check()
    about = json.loads((tmp_path / "guest-0.elf.json").read_text())
    assert about["machine"]["confidential"][0].startswith("SEV-SNP")
    assert about["vcpus"] == []


@pytest.mark.slow
def test_a_plugin_that_needs_a_kernel_says_why_there_is_none(vol, encrypted):
    result = vol("-f", encrypted, "--guest", "0", "linux.pslist")
    assert (result.status, result.table) == (1, "")
    assert "no kernel that Volatility has symbols for was found" in result.err
    assert "private memory is ciphertext" in result.err
