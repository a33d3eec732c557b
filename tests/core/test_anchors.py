from __future__ import annotations

import numpy as np
import pytest

from volatility3_ept.core.anchors import anchor, count, survivors


def block(**words: int) -> np.ndarray:
    pages = np.zeros((2, 512), dtype="<u8")
    for column, value in words.items():
        pages[1, int(column.removeprefix("w"))] = value
    return pages


ROWS = np.arange(2)


@pytest.mark.parametrize(
    ("offset", "value"),
    [(0x10, 0x0000_0016), (0x14, 0x16 << 32), (0x16, 0x16 << 48), (0x10, 0xFFFF_FFFF_FFFF_FF16)],
)
def test_a_field_is_read_from_its_place_in_the_word(offset: int, value: int) -> None:
    item = anchor("field", offset, (0xFF, 0x16))
    assert item.test(block(w2=value), ROWS).tolist() == [False, True]


def test_any_of_the_accepted_values_will_do() -> None:
    item = anchor("field", 0, (0xF, 1), (0xF, 3))
    assert [item.test(block(w0=value), ROWS).tolist()[1] for value in (1, 2, 3, 0x13)] == [True, False, True, True]


def test_a_field_that_may_not_be_zero() -> None:
    item = anchor("field", 8, (0, 0), nonzero=0xF0)
    assert item.test(block(w1=0x0F), ROWS).tolist() == [False, False]
    assert item.test(block(w1=0x10), ROWS).tolist() == [False, True]


def test_votes_and_survivors() -> None:
    items = [anchor("a", 0, (0xFF, 1)), anchor("b", 8, (0xFF, 2))]
    assert count(items, block(w0=1, w1=2), ROWS).tolist() == [0, 2]
    assert survivors(items, block(w0=1, w1=2), ROWS).tolist() == [1]
    assert survivors(items, block(w0=1, w1=3), ROWS).tolist() == []
    assert survivors(items, block(w0=1, w1=2), ROWS[:1]).tolist() == []
