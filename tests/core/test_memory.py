from __future__ import annotations

import copy
import itertools
from pathlib import Path

import numpy as np
import pytest
from builders.paging import PAGE, HostRam, stamp

from volatility3_ept.core.memory import HostMemory, join_runs
from volatility3_ept.core.source import FileSource, ReaderSource

HOLE = 0x3000


def stamped(*addresses: int) -> HostRam:
    ram = HostRam()
    for address in addresses:
        ram.write(address, stamp(address))
    return ram


def sources(data: bytes, tmp_path: Path):
    """The same bytes as each kind of source."""
    path = tmp_path / "capture"
    path.write_bytes(data)

    def reader(offset: int, length: int) -> bytes | None:
        return data[offset : offset + length] if 0 <= offset <= len(data) - length else None

    return {"bytes": FileSource(data), "file": FileSource(path), "reader": ReaderSource(reader)}


@pytest.fixture(params=["bytes", "file", "reader"])
def source_kind(request):
    return request.param


@pytest.fixture(params=[b"", bytes(32), b"x" * 13], ids=["aligned", "LiME header", "13 bytes"])
def holed(request, source_kind, tmp_path):
    """Stamped pages at 0x1000, 0x2000, 0x4000, 0x5000: a hole at 0x3000; a prefix before each run of the file."""
    data, segments = stamped(0x1000, 0x2000, 0x4000, 0x5000).segments(request.param)
    return HostMemory.from_segments(sources(data, tmp_path)[source_kind], segments)


def test_bytes_are_where_the_segments_say(holed):
    assert holed.read(0x1000, 16) == stamp(0x1000)[:16]
    assert holed.read(0x1FF8, 16) == stamp(0x1000)[-8:] + stamp(0x2000)[:8]
    assert holed.read(0x5FFF, 1) == stamp(0x5000)[-1:]
    assert holed.read(0x4000, 0) == b""
    assert (holed.top, holed.size) == (0x6000, 4 * PAGE)


@pytest.mark.parametrize(
    ("address", "length"), [(0, 1), (0xFFF, 2), (HOLE, 1), (0x2FF8, 16), (0x2000, 3 * PAGE), (0x5FFF, 2), (0x6000, 1)]
)
def test_unreadable_is_none_and_never_zeros(holed, address, length):
    assert holed.read(address, length) is None


def test_contains_tells_present_bytes_from_holes(holed):
    present = [address for address in range(0, 0x7000, 0x800) if address in holed]
    assert present == [0x1000, 0x1800, 0x2000, 0x2800, 0x4000, 0x4800, 0x5000, 0x5800]


def test_words_returns_pages_as_rows_and_marks_those_that_are_missing(holed):
    """File offsets that are not multiples of 4096 are the rule in LiME and ELF files."""
    rows, good = holed.words(np.array([0x5000, HOLE, 0x1000, 0x1000, 0x10_0000_0000]))
    assert good.tolist() == [True, False, True, True, False]
    assert rows.shape == (5, 512)
    assert rows[0].tobytes() == stamp(0x5000)
    assert rows[2].tobytes() == rows[3].tobytes() == stamp(0x1000)
    assert not rows[1].any()


def test_blocks_yield_every_whole_page_once_in_ascending_order(holed):
    seen = [
        (address + row * PAGE, page.tobytes())
        for address, block in holed.blocks(max_pages=1)
        for row, page in enumerate(block)
    ]
    assert seen == [(address, stamp(address)) for address in (0x1000, 0x2000, 0x4000, 0x5000)]
    assert [(address, len(block)) for address, block in holed.blocks()] == [(0x1000, 2), (0x4000, 2)]


def split_at(cuts: list[int], data: bytes, start: int, source: str, tmp_path: Path) -> HostMemory:
    """The same memory cut into segments that lie in the file in reverse order, with a gap of 5 bytes between them."""
    edges = [0, *cuts, len(data)]
    file, segments = b"", []
    for low, high in reversed(list(itertools.pairwise(edges))):
        file += bytes(5)
        segments.append((start + low, high - low, len(file)))
        file += data[low:high]
    return HostMemory.from_segments(sources(file, tmp_path)[source], segments)


def test_a_page_that_straddles_segments_is_whole(source_kind, tmp_path):
    """It belongs to no segment, but to the memory."""
    data = b"".join(stamp(address) for address in (0, 0x1000, 0x2000))
    memory = split_at([0x1003, 0x1F00], data, 0, source_kind, tmp_path)
    rows, good = memory.words(np.array([0, 0x1000, 0x2000]))
    assert good.all()
    assert rows.tobytes() == data
    assert memory.read(0, len(data)) == data


def test_a_page_that_is_present_in_part_is_not_a_row_and_not_in_a_block():
    memory = HostMemory.from_segments(FileSource(bytes(0x3000)), [(0x1800, 0x2000, 0)])
    assert memory.words(np.array([0x1000, 0x2000, 0x3000]))[1].tolist() == [False, True, False]
    assert [(address, len(rows)) for address, rows in memory.blocks()] == [(0x2000, 1)]
    assert memory.read(0x1800, 8) == bytes(8)


def test_a_truncated_file_loses_its_last_pages_only():
    memory = HostMemory.from_segments(FileSource(stamp(0) + stamp(0x1000)), [(0, 0x4000, 0)])
    assert [(address, rows.tobytes()) for address, rows in memory.blocks()] == [(0, stamp(0)), (0x1000, stamp(0x1000))]
    assert memory.read(0x1FFF, 2) is None
    assert memory.words(np.array([0x1000, 0x2000]))[1].tolist() == [True, False]


@pytest.mark.parametrize("segments", [[(0, 0x2000, 0), (0x1000, 0x1000, 0)], [(0, 0x1000, 0), (0, 0x1000, 0x1000)]])
def test_overlapping_segments_are_an_error(segments):
    with pytest.raises(ValueError, match="overlap"):
        HostMemory.from_segments(FileSource(bytes(0x2000)), segments)


def test_segments_out_of_order_are_sorted_and_empty_ones_left_out():
    memory = HostMemory.from_segments(FileSource(bytes(0x3000)), [(0x5000, 0x1000, 0), (0x2000, 0, 0), (0, 0x1000, 0)])
    assert memory.starts.tolist() == [0, 0x5000]


def test_memory_without_bytes_reads_nothing(tmp_path):
    (tmp_path / "empty").write_bytes(b"")
    for memory in (HostMemory.from_bytes(b""), HostMemory.from_file(tmp_path / "empty")):
        assert (memory.top, memory.size, memory.read(0, 1), 0 in memory) == (0, 0, None, False)
        assert memory.words(np.array([0]))[1].tolist() == [False]
        assert list(memory.blocks()) == []
        assert memory.remap(*(np.array([0x1000]),) * 3).size == 0


@pytest.mark.parametrize("start", [0, 0x10_0000, (1 << 52) - PAGE])
def test_a_raw_image_may_start_anywhere(start):
    memory = HostMemory.from_bytes(stamp(start), start)
    assert memory.read(start, PAGE) == stamp(start)
    assert memory.words(np.array([start]))[0].tobytes() == stamp(start)


def test_a_file_is_never_opened_for_writing(tmp_path):
    path = tmp_path / "evidence"
    path.write_bytes(stamp(0))
    path.chmod(0o400)
    _, rows = next(HostMemory.from_file(path).blocks())
    with pytest.raises(ValueError, match="read-only"):
        rows[0, 0] = 1


@pytest.mark.parametrize("phases", [[0, 0], [8, 8], [0, 8], [3, 0x800]])
def test_reader_source_equals_file_source(phases, tmp_path):
    data = b"".join(stamp(address) for address in range(0, 0x4000, PAGE))
    offsets = np.array([phases[0], 0x2000 + phases[1], 0x3000, 0x3001, -1, 1 << 40])
    answers = []
    for source in sources(data, tmp_path).values():
        rows, good = source.pages(offsets)
        blocks = [source.block(offset, count) for offset, count in ((0, 4), (phases[1], 3), (1, 4), (-1, 1))]
        reads = [source.read(offset, 8) for offset in (0, phases[0], 0x3FF8, 0x3FF9, -1)]
        answers.append((rows.tolist(), good.tolist(), [None if b is None else b.tolist() for b in blocks], reads))
    assert answers[0] == answers[1] == answers[2]
    assert answers[0][1] == [True, True, True, False, False, False]


def test_a_remapped_memory_is_the_guest(holed):
    """Runs out of order below, one that crosses the hole, one that is missing altogether."""
    runs = np.array([(0, 0x1000, 0x5000), (0x1000, 0x3000, 0x2000), (0x8000, 0x1000, 0x9000)])
    guest = holed.remap(*runs.T)
    assert guest.read(0, PAGE) == stamp(0x5000)
    assert guest.read(0x1000, PAGE) == stamp(0x2000)
    assert guest.read(0x2000, 1) is None
    assert guest.read(0x3000, PAGE) == stamp(0x4000)
    assert guest.read(0x8000, 1) is None
    assert guest.size == 3 * PAGE


def random_runs(rng, pages: int, below: int):
    """Runs of a guest: ascending guest addresses, targets anywhere, some beyond the memory below."""
    lengths = rng.integers(1, 4, pages) * PAGE
    gpas = np.cumsum(lengths + rng.integers(0, 3, pages) * PAGE) - lengths
    return gpas, lengths, rng.integers(0, below + 4, pages) * PAGE


@pytest.mark.parametrize("seed", range(5))
def test_a_guest_in_a_guest_equals_translating_step_by_step(seed):
    rng = np.random.default_rng(seed)
    ram = stamped(*(int(page) * PAGE for page in np.flatnonzero(rng.random(64) < 0.8)))
    data, segments = ram.segments(bytes(32))
    host = HostMemory.from_segments(FileSource(data), segments)
    outer, inner = random_runs(rng, 24, 64), random_runs(rng, 24, 48)
    nested = host.remap(*outer).remap(*inner)

    def step(runs, address: int) -> int | None:
        for start, length, target in zip(*(column.tolist() for column in runs), strict=True):
            if start <= address < start + length:
                return target + address - start
        return None

    for gpa in range(0, int(inner[0][-1] + inner[1][-1]) + PAGE, PAGE):
        middle = step(inner, gpa)
        hpa = None if middle is None else step(outer, middle)
        expected = None if hpa is None or hpa not in ram.pages else stamp(hpa)
        assert nested.read(gpa, PAGE) == expected


def test_copying_a_context_does_not_copy_the_memory():
    memory = HostMemory.from_bytes(bytes(PAGE))
    assert copy.deepcopy([memory])[0] is memory


@pytest.mark.parametrize(
    ("runs", "joined"),
    [
        ([(0, 1, 10), (1, 1, 11), (2, 2, 12)], [(0, 4, 10)]),
        ([(0, 1, 10), (2, 1, 11)], [(0, 1, 10), (2, 1, 11)]),
        ([(0, 1, 10), (1, 1, 12)], [(0, 1, 10), (1, 1, 12)]),
        ([(0, 1, 10)], [(0, 1, 10)]),
        ([], []),
    ],
)
def test_runs_join_only_when_they_continue_on_both_sides(runs, joined):
    columns = np.array(runs, dtype=np.int64).reshape(-1, 3).T
    assert list(zip(*(column.tolist() for column in join_runs(*columns)), strict=True)) == joined
