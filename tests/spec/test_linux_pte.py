"""Entries written out by hand from Linux's headers, as an int and as an array."""

from __future__ import annotations

import numpy as np
import pytest

from volatility3_ept.spec import linux_pte
from volatility3_ept.spec.linux_pte import HostEntry

N, P, H, S, M, E = HostEntry
#: v6.1: type 25 is SWP_MIGRATION_WRITE; v5.10: 29. Frame 0x12345, and with the young and dirty bits.
MIGRATION = 25 << 59 | (0x3_FFFF_FFFF_FFFF ^ 0x12345) << 9
MIGRATION_AD = 25 << 59 | (0x3_FFFF_FFFF_FFFF ^ (0x12345 | 3 << 40)) << 9


@pytest.mark.parametrize(
    ("entry", "shift", "kind", "frame"),
    [
        (0, 12, N, 0),
        (0x8000_0000_1234_5067, 12, P, 0x1234_5000),
        (0x0000_0000_1234_51E7, 12, P, 0x1234_5000),
        # PAGE_NONE is PROTNONE | ACCESSED; since v4.18 the frame is inverted, to 51:12.
        (0x000F_FFFF_EDCB_A120, 12, H, 0x1234_5000),
        (0x000F_FFFF_EDCB_A960, 12, H, 0x1234_5000),
        (0x0000_0000_1234_5120, 12, H, 0x1234_5000),
        # G without P, but with rights: not PROT_NONE.
        (0x0000_0000_1234_5106, 12, S, None),
        (0x000F_FFFF_EDC0_01A0, 21, H, 0x1220_0000),
        (0x000F_FFFF_C000_01A0, 30, H, 0),
        # pmd_mkinvalid: neither P nor PROTNONE, PSE, rights kept.
        (0x000F_FFFF_EDC0_00E6, 21, H, 0x1220_0000),
        # Swap type 0, offset 0x1234: (~0x1234) << 9 in 58:9. With the exclusive, soft-dirty and uffd flags too.
        (0x07FF_FFFF_FFDB_9600, 12, S, None),
        (0x07FF_FFFF_FFDB_960E, 12, S, None),
        (0x0FFF_FFFF_FFDB_9600, 12, S, None),
        # Before v4.18: type 1 in 13:9, the offset above, not inverted.
        (0x0000_0000_048D_0200, 12, S, None),
        (MIGRATION, 12, M, 0x1234_5000),
        (MIGRATION_AD, 12, M, 0x1234_5000),
        (MIGRATION_AD | 0xE, 21, M, 0x1234_5000),
        # A marker: type 31 (v6.2), PTE_MARKER_UFFD_WP.
        (31 << 59 | (0x3_FFFF_FFFF_FFFF ^ 1) << 9, 12, E, None),
    ],
)
def test_an_entry_says_what_became_of_its_page(entry, shift, kind, frame):
    array = np.array([entry], dtype=np.uint64)
    assert HostEntry(int(linux_pte.kind(entry, shift))) == HostEntry(int(linux_pte.kind(array, shift)[0])) == kind
    if frame is not None:
        read = (lambda e: linux_pte.migration_frame(e)) if kind == M else (lambda e: linux_pte.frame(e, shift))
        assert int(read(entry)) == int(read(array)[0]) == frame


def test_the_type_and_offset_of_a_swap_entry():
    assert (linux_pte.swap_type(MIGRATION), linux_pte.swap_offset(MIGRATION)) == (25, 0x12345)


def test_the_encryption_bit_is_no_address():
    assert linux_pte.frame(0x8000_8000_1234_5067, 12, 1 << 47) == 0x1234_5000


def test_kinds_read_as_words():
    assert [kind.text for kind in HostEntry] == [
        "no page", "present", "PROT_NONE", "swapped out", "migrating", "device page or marker",
    ]  # fmt: skip
