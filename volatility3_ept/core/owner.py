"""Whose page is this: from addresses of the host to the guests that hold them.

Every question is a range of host-physical addresses, and every byte of it is answered: it is in guests (in several,
where they share it or one runs in the other), it is a machine's table or control structure, it is in no guest, or it is
not in the capture. Thousands of questions cost little more than one.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from enum import Enum
from typing import NamedTuple

import numpy as np

from volatility3_ept.core import gpamap, mask
from volatility3_ept.core.lineage import Line
from volatility3_ept.core.memory import Bools, HostMemory, Int64
from volatility3_ept.core.places import Place, Use, places
from volatility3_ept.core.slots import overlaps
from volatility3_ept.spec.paging import Access

_EVERYTHING = 1 << 62
#: Rights by number: making one of an enumeration is slow.
_RIGHTS = tuple(Access(number) for number in range(int(Access.ALL) + 1))


class How(str, Enum):
    """What an address is to a machine, or to none."""

    MAPPED = "mapped"
    RECOVERED = "recovered"
    TABLE = Use.TABLE.value
    CONTROL = Use.CONTROL.value
    VMM_TABLE = Use.VMM_TABLE.value
    NOBODY = "not in any guest"
    #: Some machines were asked for, and none of them holds it; another one may.
    NOT_CHOSEN = "not in this guest"
    OUTSIDE = "outside the capture"
    #: An offset of the capture file at which no memory lies.
    NO_MEMORY = "not memory: a header of the file, or beyond its end"

    def __str__(self) -> str:
        """Return the answer in the words that the plugins print."""
        return self.value


class Answer(NamedTuple):
    """One stretch of the host's memory. ``asked`` numbers the question; ``gpa`` is None where no guest holds it.

    ``through``: for a nested machine, the address in each machine around it. ``present``: the capture holds the bytes.
    """

    asked: int
    hpa: int
    length: int
    machine: str
    gpa: int | None
    through: tuple[tuple[str, int], ...]
    how: How
    access: Access
    detail: str
    present: bool


class _Hits(NamedTuple):
    """Stretches that one machine, or one use of its pages, answers. ``source`` counts in the order of the machines."""

    asked: Int64
    low: Int64
    high: Int64
    at: Int64
    source: Line | Place | None
    present: bool = True


class Owners:
    """The machines of a capture, ready to be asked."""

    def __init__(self, memory: HostMemory, lines: Sequence[Line], chosen: Collection[str] | None = None) -> None:
        """Bring all machines' memory into the host's addresses. ``memory`` is the capture's.

        ``lines`` are all machines, with those around them; answers are about those whose ids are ``chosen`` (all).
        """
        wanted = {line.id for line in lines} if chosen is None else set(chosen)
        self._memory = memory
        self._nobody = How.NOBODY if chosen is None else How.NOT_CHOSEN
        self._lines = tuple(line for line in lines if line.id in wanted)
        self._runs = {line.id: line.host_runs() for line in lines}
        self._places = tuple(place for place in places(lines, self._runs, memory) if place.machine in wanted)
        self._present = gpamap.union(memory.starts, memory.starts + memory.lengths)

    def ask(self, hpas: Int64 | Sequence[int], length: int | Int64 = 1) -> Iterator[Answer]:
        """Yield the answers for host-physical ranges, in the order of the questions, then by address."""
        starts = np.asarray(hpas, dtype=np.int64)
        ends = starts + length
        questions = Questions(starts, ends)
        found = [*self._in_guests(questions), *self._in_places(questions)]
        covered = gpamap.union(
            np.concatenate([np.empty(0, np.int64), *(hits.low for hits in found)]),
            np.concatenate([np.empty(0, np.int64), *(hits.high for hits in found)]),
        )
        asked, index, low, high = overlaps(starts, ends, *_complement(covered))
        yield from self._in_order([*found, _Hits(asked, low, high, index, None)])

    def at_offsets(self, offsets: Int64 | Sequence[int], length: int = 1) -> Iterator[Answer]:
        """Yield the answers for offsets in the capture's file, such as a scanner of files reports them."""
        starts = np.asarray(offsets, dtype=np.int64)
        memory = self._memory
        questions = Questions(starts, starts + length)
        asked, segment, low, high = questions.meet(memory.offsets, memory.offsets + memory.lengths)
        answers = self.ask(memory.starts[segment] + low - memory.offsets[segment], high - low)
        lost = np.setdiff1d(np.arange(starts.size), asked).tolist()
        for answer in answers:
            number = int(asked[answer.asked])
            while lost and lost[0] < number:
                yield _no_memory(lost.pop(0))
            yield answer._replace(asked=number)
        yield from map(_no_memory, lost)

    def _in_guests(self, questions: Questions) -> Iterator[_Hits]:
        for line in self._lines:
            runs = self._runs[line.id]
            asked, index, low, high = questions.meet(runs.hpas, runs.hpas + runs.lengths)
            yield _Hits(asked, low, high, index, line)

    def _in_places(self, questions: Questions) -> Iterator[_Hits]:
        for place in self._places:
            asked, index, low, high = questions.meet(place.hpas, place.hpas + 4096)
            if asked.size:
                yield _Hits(asked, low, high, index, place)

    def _in_order(self, found: list[_Hits]) -> Iterator[Answer]:
        """Cut the stretches where the capture begins or ends, and yield them by question, address and machine."""
        parts: list[_Hits] = []
        for hits in found:
            for present, ranges in ((True, self._present), (False, _complement(self._present))):
                row, _, low, high = overlaps(hits.low, hits.high, *ranges)
                parts.append(_Hits(hits.asked[row], low, high, hits.at[row], hits.source, present))
        sizes = [part.asked.size for part in parts]
        number = np.repeat(np.arange(len(parts)), sizes)
        asked, low = (
            np.concatenate([np.empty(0, np.int64), *(getattr(p, name) for p in parts)]) for name in ("asked", "low")
        )
        answers = [answer for part in parts for answer in self._answers(part)]
        for index in np.lexsort((number, low, asked)).tolist():
            yield answers[index]

    def _answers(self, hits: _Hits) -> Iterator[Answer]:
        """Yield the answers that one machine, or one use of its pages, gives."""
        columns = [hits.asked.tolist(), hits.low.tolist(), (hits.high - hits.low).tolist()]
        source, present = hits.source, hits.present
        if isinstance(source, Line):
            yield from self._of_guest(source, hits, columns)
        elif source is None:
            how = self._nobody if present else How.OUTSIDE
            for asked, hpa, length in zip(*columns, strict=True):
                yield Answer(asked, hpa, length, "", None, (), how, Access.NONE, "", present)
        else:
            how = How(source.use.value)
            for asked, hpa, length, at in zip(*columns, hits.at.tolist(), strict=True):
                text = source.text(at)
                yield Answer(asked, hpa, length, source.machine, None, (), how, Access.NONE, text, present)

    def _of_guest(self, line: Line, hits: _Hits, columns: list[list[int]]) -> Iterator[Answer]:
        runs = self._runs[line.id]
        gpas = runs.gpas[hits.at] + hits.low - runs.hpas[hits.at]
        around = line.through(gpas)
        names = [name for name, _ in around]
        outer = zip(*(column.tolist() for _, column in around), strict=True) if around else itertools.repeat(())
        rights, again = runs.accesses[hits.at].tolist(), runs.recovered[hits.at].tolist()
        detail = "" if hits.present else str(How.OUTSIDE)
        rows = zip(*columns, gpas.tolist(), rights, again, strict=True)
        for (asked, hpa, length, gpa, right, recovered), steps in zip(rows, outer, strict=False):
            how = How.RECOVERED if recovered else How.MAPPED
            through = tuple(zip(names, steps, strict=True))
            yield Answer(asked, hpa, length, line.id, gpa, through, how, _RIGHTS[right], detail, hits.present)


class Questions:
    """Ranges ``[start, end)`` that may overlap and come in any order, cut into disjoint pieces."""

    def __init__(self, starts: Int64, ends: Int64) -> None:
        """Cut the questions at each other's borders."""
        self.starts, self.ends = starts, ends
        points = mask.distinct(np.concatenate((starts, ends)))
        first, last = np.searchsorted(points, starts), np.searchsorted(points, ends)
        steps = np.bincount(first, minlength=points.size) - np.bincount(last, minlength=points.size)
        asked: Bools = np.cumsum(steps)[:-1] > 0
        self._low, self._high = points[:-1][asked], points[1:][asked]
        # Each question is a stretch of consecutive pieces; turned round: of each piece, the questions.
        number: Int64 = np.cumsum(asked) - asked
        count = last - first
        question = np.repeat(np.arange(starts.size), count)
        before = np.cumsum(count) - count
        piece = np.repeat((number[first] if number.size else first) - before, count) + np.arange(question.size)
        order = np.argsort(piece, kind="stable")
        self._question, self._piece = question[order], piece[order]

    def meet(self, starts: Int64, ends: Int64) -> tuple[Int64, Int64, Int64, Int64]:
        """Return every overlap of the questions with ranges as ``(question, range, low, high)``, each once.

        The ranges, too, may overlap and come in any order.
        """
        span, piece, _, _ = overlaps(starts, ends, self._low, self._high)
        low, high = np.searchsorted(self._piece, piece), np.searchsorted(self._piece, piece, side="right")
        count = high - low
        at = np.repeat(low - (np.cumsum(count) - count), count) + np.arange(int(count.sum()))
        pairs = mask.distinct(self._question[at] * np.int64(max(starts.size, 1)) + np.repeat(span, count))
        question, span = pairs // max(starts.size, 1), pairs % max(starts.size, 1)
        low = np.maximum(starts[span], self.starts[question])
        return question, span, low, np.minimum(ends[span], self.ends[question])


_ADDRESS = re.compile(r"\s*(0[xX][0-9a-fA-F]+|[0-9]+)(?=$|[\s:,;#])")


def addresses(lines: Iterable[str]) -> Int64:
    """Return the addresses of a list, one at the beginning of each line, decimal or with 0x.

    What follows a blank, a colon, a comma or ``#`` is not read (``yara -s`` prints ``0x1f2e3000:$name: ...``); empty
    lines and comments are passed over.

    Raises:
        ValueError: the message names the first line that holds no address.
    """
    found = []
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        match = _ADDRESS.match(line)
        value = int(match[1], 16 if match[1][:2] in ("0x", "0X") else 10) if match else -1
        if value < 0 or value >> 52:
            raise ValueError(f"line {number}: {text[:40]!r} begins with no address of at most 52 bits")
        found.append(value)
    return np.array(found, dtype=np.int64)


def _complement(ranges: tuple[Int64, Int64]) -> tuple[Int64, Int64]:
    """Return what is between disjoint ascending ranges, and around them."""
    starts = np.concatenate(([0], ranges[1])).astype(np.int64)
    ends = np.concatenate((ranges[0], [_EVERYTHING])).astype(np.int64)
    return starts[starts < ends], ends[starts < ends]


def _no_memory(asked: int) -> Answer:
    return Answer(asked, -1, 0, "", None, (), How.NO_MEMORY, Access.NONE, "", present=False)
