"""makedumpfile's flattened format: a file as the list of its writes, so that a dump can go through a pipe.

After one block with the signature, each write stands behind its offset and its length, big-endian; a negative offset
ends the list. ``makedumpfile -R`` plays it back into a file. Here the writes become the segments of a
:class:`~volatility3_ept.core.memory.HostMemory`, whose addresses are the offsets of that file: nothing is copied.

Source: makedumpfile, ``makedumpfile.h`` (``makedumpfile_header``, ``makedumpfile_data_header``) and
``makedumpfile.c`` (``write_buffer``, ``rearrange_dumpdata``). QEMU writes the same (``dump/dump.c``).
"""

from __future__ import annotations

import array
import struct
from pathlib import Path
from typing import Final

import numpy as np

from volatility3_ept.core.memory import HostMemory, join_runs
from volatility3_ept.core.source import FileSource

SIGNATURE: Final = b"makedumpfile\0\0\0\0"
#: The signature, a type and a version, in one block.
_FIRST: Final = 4096
_RECORD: Final = struct.Struct(">qq")
#: makedumpfile and QEMU write 16 KiB and more at a time: this many are half a terabyte.
_MOST: Final = 1 << 25


class FlattenedError(ValueError):
    """The list of writes is damaged."""


def view(path: Path) -> tuple[HostMemory, bool]:
    """Return a file that may be flattened as it is after ``makedumpfile -R``, and whether it is whole.

    Addresses are offsets of the rearranged file. A file that is not flattened is itself, and whole.

    Raises:
        OSError: the file cannot be read.
        FlattenedError: a length is negative, or writes overlap in part.
    """
    with path.open("rb") as file:
        if file.read(len(SIGNATURE)) != SIGNATURE:
            return HostMemory.from_file(path), True
        size = path.stat().st_size
        found = array.array("q")
        position, whole = _FIRST, False
        while position + _RECORD.size <= size and not whole:
            file.seek(position)
            offset, length = _RECORD.unpack(file.read(_RECORD.size))
            whole = offset < 0
            if not whole and length < 0:
                raise FlattenedError(f"the write at byte {position} of the flattened file has a negative length")
            position += _RECORD.size
            if not whole and length:
                found.extend((offset, min(length, size - position), position))
                position += length
            if len(found) > 3 * _MOST:
                raise FlattenedError(f"the flattened file has more than {_MOST:,} writes")
    rows = np.array(found, dtype=np.int64).reshape(-1, 3)
    rows = rows[np.lexsort((rows[:, 2], rows[:, 1], rows[:, 0]))]
    # The header is written twice when the dump did not fit: the later write counts.
    same = np.append((np.diff(rows[:, :2], axis=0) == 0).all(axis=1), False)
    rows = rows[~same & (rows[:, 1] > 0)]
    try:
        return HostMemory(FileSource(path), *np.ascontiguousarray(rows.T)), whole
    except ValueError:
        raise FlattenedError("writes of the flattened file overlap; rearrange it with makedumpfile -R") from None


def coverage(file: HostMemory) -> HostMemory:
    """Return the same bytes in as few stretches as possible, for questions of what is there. Not for reading."""
    return HostMemory(file.source, *join_runs(file.starts, file.lengths, file.starts))
