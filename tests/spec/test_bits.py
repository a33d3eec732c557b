from __future__ import annotations

import pytest

from volatility3_ept.spec import bits


@pytest.mark.parametrize(
    ("high", "low", "mask"),
    [
        (0, 0, 0x1),
        (5, 3, 0x38),
        (51, 12, 0x000F_FFFF_FFFF_F000),
        (63, 52, 0xFFF0_0000_0000_0000),
        (63, 0, 0xFFFF_FFFF_FFFF_FFFF),
        (11, 12, 0),
        (51, 52, 0),
    ],
)
def test_a_field_includes_both_ends_and_is_empty_when_they_cross(high, low, mask):
    assert bits.field(high, low) == mask


@pytest.mark.parametrize(("number", "mask"), [(0, 1), (11, 0x800), (63, 0x8000_0000_0000_0000)])
def test_bit(number, mask):
    assert bits.bit(number) == mask


@pytest.mark.parametrize(
    ("address", "width", "expected"),
    [
        (0, 48, True),
        (0x0000_7FFF_FFFF_FFFF, 48, True),
        (0x0000_8000_0000_0000, 48, False),
        (0xFFFF_7FFF_FFFF_FFFF, 48, False),
        (0xFFFF_8000_0000_0000, 48, True),
        (0xFFFF_FFFF_FFFF_FFFF, 48, True),
        (0x00FF_FFFF_FFFF_FFFF, 57, True),
        (0x0100_0000_0000_0000, 57, False),
        (0xFF00_0000_0000_0000, 57, True),
        (0xFE00_0000_0000_0000, 57, False),
    ],
)
def test_canonical_addresses(address, width, expected):
    assert bits.is_canonical(address, width) is expected


@pytest.mark.parametrize(
    ("size", "name"),
    [
        (0, "0B"),
        (0xFFF, "4.0K"),
        (512, "512B"),
        (1 << 12, "4K"),
        (2 << 20, "2M"),
        (1 << 30, "1G"),
        (161 << 19, "80.5M"),
        (3 << 40, "3T"),
    ],
)
def test_size_names(size, name):
    assert bits.size_name(size) == name
