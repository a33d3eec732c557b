"""Guests whose memory the host cannot read: recognised, and said so, and nothing made of what is ciphertext."""

from __future__ import annotations

import random
import zlib

import numpy as np
import pytest
from builders import control, machine, paging
from builders.paging import PAGE, HostRam, Tables
from readers import memory_of

from volatility3_ept.core import confidential, guestcpu, search
from volatility3_ept.core.machines import Machine
from volatility3_ept.core.memory import HostMemory
from volatility3_ept.core.root import Root

NOISE = random.Random(7)


def guest_with(page: bytes, cipher: int = 0, **more: int) -> tuple[HostRam, Machine]:
    """Find the one machine of a host with this VMCB, of whose pages ``cipher`` are noise."""
    ram, (guest,) = machine.host(paging.NPT_4, pages=64)
    for gpa in sorted(guest.placed)[-cipher:] if cipher else ():
        ram.write(guest.placed[gpa], NOISE.randbytes(PAGE))
    data = bytearray(page)
    data[0xB0:0xB8] = guest.root.to_bytes(8, "little")
    for offset, value in more.items():
        data[int(offset[1:], 16) :][:8] = value.to_bytes(8, "little")
    for offset, value in more.items():
        at = int(offset[1:], 16)
        data[at : at + 8] = value.to_bytes(8, "little")
    ram.write(guest.structures[0], bytes(data))
    (found,) = search.discover(memory_of(ram)).machines
    return ram, found


@pytest.mark.parametrize(("page", "more", "name"), [
    (control.vmcb(nested=0b011), {}, "SEV"),
    (control.sev_es_vmcb(), {}, "SEV-ES"),
    (control.sev_es_vmcb(), {"x140": 0x81}, "SEV-SNP"),
    (control.sev_es_vmcb(), {"x140": 0x20}, "SEV-ES"),
], ids=["SEV", "SEV-ES", "SEV-SNP", "SEV-ES with debug swap"])  # fmt: skip
def test_the_vmcb_names_the_technology(page, more, name):
    _, found = guest_with(page, cipher=62, **more)
    assert found.confidential[0].startswith(f"{name} (VMCB at")
    assert "look like ciphertext" in found.confidential[1]
    assert found.system.startswith(("unknown", "Linux"))


def test_an_ordinary_machine_says_nothing():
    _, found = guest_with(control.vmcb())
    assert found.confidential == ()


@pytest.mark.parametrize(("features", "name"), [(0x1, "SEV-SNP"), (0x20, "SEV-ES")])
def test_a_vmsa_that_can_be_read_decides(features, name):
    ram, (guest,) = machine.host(paging.NPT_4, pages=64)
    vmsa = bytearray(PAGE)
    for offset, value in {0xD0: 0x1D01, 0x158: 0x8005_0033, 0x148: 0x6B0, 0x170: 0x202, 0x3B0: features}.items():
        vmsa[offset : offset + 8] = value.to_bytes(8, "little")
    at = ram.allocate()
    ram.write(at, bytes(vmsa))
    ram.write(guest.structures[0], control.sev_es_vmcb(ncr3=guest.root, vmsa=at))
    (found,) = search.discover(memory_of(ram)).machines
    assert found.confidential[0].startswith(f"{name} (")


def test_an_encrypted_vmsa_decides_nothing_even_if_its_noise_has_the_bit():
    ram, (guest,) = machine.host(paging.NPT_4, pages=64)
    at = ram.allocate()
    noise = bytearray(NOISE.randbytes(PAGE))
    noise[0x3B0] |= 1
    ram.write(at, bytes(noise))
    ram.write(guest.structures[0], control.sev_es_vmcb(ncr3=guest.root, vmsa=at))
    (found,) = search.discover(memory_of(ram)).machines
    assert "nothing that can be read says SEV-SNP" in found.confidential[0]


def test_the_save_area_of_an_sev_es_guest_gives_no_registers():
    """KVM leaves what it prepared there before the guest was encrypted: a CR3 that no vCPU has."""
    page = control.vmcb(nested=0b111, vmsa=0x0345_6000, cr3=0x1234_5000)
    _, found = guest_with(page)
    (vcpu,) = found.vcpus
    assert (vcpu.holds_registers, vcpu.guest_cr3) == (False, None)
    assert guestcpu.registers(vcpu).cr3 == 0
    assert guestcpu.registers(vcpu).is_empty
    assert found.spaces == ()


def test_shared_memory_of_a_trust_domain_is_recognised_by_its_addresses():
    ram = HostRam()
    tables = Tables(ram, paging.EPT_4)
    tables.back([1 << 47 | page * PAGE for page in range(20)])
    root = Root("EPT", tables.register)
    found = confidential.shared_half(root, root.traverse(memory_of(ram)))
    assert found is not None
    assert found.held is None
    assert "TDX, possibly" in found.detail


@pytest.mark.parametrize("addresses", [[0, 1 << 47], [1 << 46], []])
def test_other_maps_are_not_a_trust_domains(addresses):
    ram = HostRam()
    tables = Tables(ram, paging.EPT_4)
    tables.back(addresses)
    root = Root("EPT", tables.register)
    assert confidential.shared_half(root, root.traverse(memory_of(ram))) is None


def pages(*contents: bytes) -> np.ndarray:
    return np.frombuffer(b"".join(content.ljust(PAGE, b"\0")[:PAGE] for content in contents), np.uint8).reshape(
        -1, PAGE
    )


def test_ciphertext_is_even_and_what_systems_keep_in_memory_is_not():
    text = ("The quick brown fox jumps over the lazy dog. " * 200).encode()
    tables = b"".join((page << 12 | 0x63).to_bytes(8, "little") for page in range(512))
    code = bytes(NOISE.choices(range(256), weights=range(1, 257), k=PAGE))
    assert confidential.is_even(pages(bytes(PAGE), text, tables, code)).tolist() == [False] * 4
    assert confidential.is_even(pages(*(NOISE.randbytes(PAGE) for _ in range(500)))).all()


def test_a_guest_full_of_compressed_files_is_not_called_encrypted():
    """Its own page tables parse, so that they are no ciphertext."""
    body = zlib.compress(b"".join(bytes([NOISE.randrange(64)]) for _ in range(400_000)), 9)
    ram, (guest,) = machine.host(paging.NPT_4, pages=64)
    for number, gpa in enumerate(sorted(guest.placed)[-50:]):
        ram.write(guest.placed[gpa], body[200 + number * PAGE :][:PAGE])
    (found,) = search.discover(memory_of(ram)).machines
    assert confidential.sample(found.memory).is_ciphertext
    assert found.confidential == ()


def test_the_sample_is_the_same_in_every_run_and_bounded():
    data = b"".join(NOISE.randbytes(PAGE) if page % 2 else bytes(PAGE) for page in range(2000))
    first, again = (confidential.sample(HostMemory.from_bytes(data)) for _ in range(2))
    assert first == again
    assert first.pages == confidential.SAMPLE_PAGES
    assert first.share == 1.0
    assert 0.4 < first.zero / first.pages < 0.6
    assert confidential.sample(HostMemory.from_bytes(b"")) == confidential.Sample()
