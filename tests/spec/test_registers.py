from __future__ import annotations

import pytest

from volatility3_ept.spec import registers


@pytest.mark.parametrize("bit", [12, 13, 17, 18, 20, 21, 22, 23, 24, 25, 27, 28, 32])
def test_a_cr4_with_any_defined_bit_is_possible(bit: int) -> None:
    """Stock vmscan's mask loses guests with LA57 (12), CET (23) and everything above."""
    assert registers.cr4_faults(0x20 | 1 << bit) == ()


@pytest.mark.parametrize("bit", [15, 26, 29, 30, 31, 33, 63])
def test_a_cr4_with_an_undefined_bit_is_not(bit: int) -> None:
    assert registers.cr4_faults(0x20 | 1 << bit) == ("reserved bits",)


@pytest.mark.parametrize(
    ("value", "faults"),
    [
        (0x8005_0033, ()),
        (0x6000_0010, ()),  # after reset
        (0x8000_0030, ("PG without PE",)),
        (0x2000_0010, ("NW without CD",)),
        (0x1_8005_0033, ("reserved bits",)),
    ],
)
def test_cr0(value: int, faults: tuple[str, ...]) -> None:
    assert registers.cr0_faults(value) == faults


@pytest.mark.parametrize(
    ("value", "faults"),
    [(0, ()), (0xD01, ()), (0x1D01, ()), (0x500, ()), (0x400, ("LMA without LME",)), (0x200, ("reserved bits",))],
)
def test_efer(value: int, faults: tuple[str, ...]) -> None:
    assert registers.efer_faults(value) == faults


@pytest.mark.parametrize(
    ("value", "faults"),
    [(2, ()), (0x246, ()), (0, ("bit 1 clear",)), (0x8002, ("reserved bits",)), (1 << 40 | 2, ("reserved bits",))],
)
def test_rflags(value: int, faults: tuple[str, ...]) -> None:
    assert registers.rflags_faults(value) == faults
