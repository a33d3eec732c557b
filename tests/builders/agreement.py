"""One value at a time and a whole array must give the same answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


def assert_array_equals_scalars(predicate: Callable[[Any], Any], values: Sequence[int]) -> None:
    """Call ``predicate`` with a ``uint64`` array and with each Python int, and compare; tuples member by member."""
    array = predicate(np.array(values, dtype=np.uint64))
    scalars = [predicate(value) for value in values]
    if not isinstance(array, tuple):
        array, scalars = (array,), [(scalar,) for scalar in scalars]
    for member, column in enumerate(array):
        column = np.asarray(column)
        assert column.shape == (len(values),)
        assert column.dtype.kind in "biu", f"{column.dtype} loses bits of a 64-bit entry"
        wrong = [
            f"{value:#x}: {int(got):#x}, not {int(scalar[member]):#x}"
            for value, got, scalar in zip(values, column.tolist(), scalars, strict=True)
            if int(got) != int(scalar[member])
        ]
        assert not wrong


def every_bit(*bases: int, width: int = 64) -> list[int]:
    """Return each base with every single bit flipped, and the bases themselves."""
    return sorted({base ^ (1 << number) for base in bases for number in range(width)} | set(bases))
