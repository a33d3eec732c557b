"""The pictures of the page: bars, strips and the plane of guest against host memory, as inline SVG."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np

from volatility3_ept.core.coverage import Coverage, Fate
from volatility3_ept.core.lineage import HostRuns
from volatility3_ept.core.memory import Bools
from volatility3_ept.export import page
from volatility3_ept.export.axis import WIDTH, Axis, Floats, Range, bytes_in, grid

_BINS, _BAR = 500, 44
#: Cells of the plane.
COLUMNS, ROWS = 250, 100
#: What is there at all is drawn this tall, and this dark, so that a single page in a terabyte is seen.
_LEAST = 5.0
_STEPS = (0.02, 0.2, 0.6)
_FATES = tuple(Fate)


def share(size: int, total: int) -> str:
    """Return a percentage that calls nothing all, and something not nothing."""
    if not total or size in (0, total):
        return "100 %" if size and total else "0 %"
    percent = 100 * size / total
    return "< 0.1 %" if percent < 0.1 else "> 99.9 %" if percent > 99.9 else f"{percent:.1f} %"


def swatch(css: str) -> str:
    """Return a small square in the colour and pattern of a fate."""
    return (
        f'<svg class=swatch viewBox="0 0 15 15" aria-hidden="true"><rect width="15" height="15" class="{css}"/></svg>'
    )


def axis(scale: Axis) -> str:
    """Return the labels below a picture."""
    spans = ""
    for where, text in scale.labels():
        edge = " class=first" if where < 20 else " class=last" if where > WIDTH - 20 else ""
        spans += f'<span{edge} style="left:{where / 10:.2f}%">{text}</span>'
    return f'<div class=axis aria-hidden="true">{spans}</div>'


def total_bar(totals: dict[Fate, int], memory: int) -> str:
    """Return how the guest's memory divides, every fate that occurs wide enough to be seen."""
    sizes = {fate: size for fate, size in totals.items() if size and fate not in (Fate.MMIO, Fate.NOT_MAPPED)}
    if not sizes:
        return ""
    widths = np.array([max(size * WIDTH / memory, _LEAST) for size in sizes.values()])
    edges = np.concatenate(([0.0], np.cumsum(widths * WIDTH / widths.sum())))
    rects = "".join(
        f'<rect x="{edges[n]:.2f}" width="{edges[n + 1] - edges[n]:.2f}" height="26" class="{page.FATES[fate][0]}">'
        f"<title>{fate}: {share(sizes[fate], memory)}</title></rect>"
        for n, fate in enumerate(sizes)
    )
    label = ", ".join(f"{fate} {share(size, memory)}" for fate, size in sizes.items())
    return (
        f'<svg class="bar total" viewBox="0 0 1000 26" preserveAspectRatio="none" role="img" '
        f'aria-label="Guest memory: {label}">{rects}</svg>'
    )


def strip(scale: Axis, ranges: Range, css: str) -> str:
    """Return which parts of an axis some ranges cover, darker where they cover more."""
    edges = scale.edges(_BINS)
    filled = bytes_in(ranges, edges) / np.maximum(np.diff(edges), 1)
    drawn = ""
    for level, chosen in _levels(filled):
        full = np.where(chosen, 20.0, 0.0)
        drawn += f'<path class="{css}{level}" d="{_columns(np.zeros(_BINS), full)}"/>'
    return drawn + _gaps(scale, 20)


def fate_bar(name: str, scale: Axis, coverage: Coverage) -> str:
    """Return the guest-physical address space, each column divided by what became of its pages."""
    edges = scale.edges(_BINS)
    heights = np.zeros((len(_FATES), _BINS))
    sizes = np.zeros((len(_FATES), _BINS))
    for code in np.unique(coverage.fates).tolist():
        if _FATES[code] is not Fate.NOT_MAPPED:
            own = coverage.fates == code
            sizes[code] = bytes_in((coverage.gpas[own], (coverage.gpas + coverage.lengths)[own]), edges)
    some = sizes > 0
    heights[some] = np.maximum((sizes / np.maximum(np.diff(edges), 1))[some] * _BAR, _LEAST)
    heights *= np.minimum(_BAR / np.maximum(heights.sum(axis=0), 1e-9), 1)
    below = np.cumsum(heights, axis=0)
    paths = "".join(
        f'<path class="{page.FATES[fate][0]}" d="{_columns(_BAR - below[code], heights[code])}"/>'
        for code, fate in enumerate(_FATES)
        if some[code].any()
    )
    bins = [
        {"name": str(fate), "bytes": sizes[code].astype(np.int64).tolist()}
        for code, fate in enumerate(_FATES)
        if some[code].any()
    ]
    data = {"picture": f"{name}-bar", "x": _named("GPA", scale), "columns": _BINS, "bins": bins}
    label = "Guest-physical address space by fate; the table above holds the numbers"
    return (
        f'<svg id="{name}-bar" class=bar viewBox="0 0 1000 {_BAR}" preserveAspectRatio="none" role="img" '
        f'aria-label="{label}">'
        f"{paths}{_gaps(scale, _BAR)}</svg>{axis(scale)}"
        f'<p class=read id="{name}-bar-read">Point at an address to read it. '
        "A dashed column is a hole, drawn short.</p>"
        f"{_script(data)}"
    )


def plane(name: str, guest: Axis, runs: HostRuns) -> str:
    """Return guest-physical addresses against host-physical ones. A line that climbs is memory in one piece."""
    frames = runs.frames()
    host = Axis.of(frames, int(frames[1][-1]) if frames[1].size else 0)
    columns, rows = guest.edges(COLUMNS), host.edges(ROWS)
    space = np.maximum(np.minimum.outer(np.diff(rows), np.diff(columns)), 1)
    mapped, recovered = (
        grid(runs.gpas[own], runs.lengths[own], runs.hpas[own], columns, rows)
        for own in (~runs.recovered, runs.recovered)
    )
    drawn = ""
    for css, own, other in (("q-mapped", mapped, recovered), ("q-recovered", recovered, mapped)):
        for level, cells in _levels(np.where(own > other, own + other, 0) / space):
            drawn += f'<path class="{css}{level}" d="{_cells(cells)}"/>'
    labels = "".join(f'<span style="bottom:{where / 10:.2f}%">{text}</span>' for where, text in host.labels(100))
    data = {"picture": f"{name}-plane", "x": _named("GPA", guest), "y": _named("HPA", host)}
    label = f"Guest-physical against host-physical addresses, {len(runs)} runs"
    second = "<li><svg class=swatch aria-hidden=true><rect width=15 height=15 class=q-recovered /></svg>recovered</li>"
    return (
        f'<div class=plot><div class=yaxis aria-hidden="true">{labels}</div><div>'
        f'<svg id="{name}-plane" class=grid viewBox="0 0 {COLUMNS} {ROWS}" preserveAspectRatio="none" role="img" '
        f'shape-rendering="crispEdges" aria-label="{label}">{_holes(guest, host)}{drawn}</svg>{axis(guest)}</div></div>'
        "<ul class=legend><li>Guest-physical from left to right, host-physical upwards</li>"
        "<li><svg class=swatch aria-hidden=true><rect width=15 height=15 class=q-mapped /></svg>mapped</li>"
        f"{second if runs.recovered.any() else ''}</ul>"
        f'<p class=read id="{name}-plane-read">{len(runs):,} runs. A line that climbs is memory in one piece. '
        f"Blank bands are holes, drawn short.</p>{_script(data)}"
    )


def _levels(filled: Floats) -> Iterator[tuple[str, Bools]]:
    """Yield the class suffix of each shade, and where it is due: faint where little is there."""
    bounds = (0.0, *_STEPS, np.inf)
    for number, suffix in enumerate((" o1", " o2", " o3", "")):
        chosen = (filled > bounds[number]) & (filled <= bounds[number + 1])
        if chosen.any():
            yield suffix, chosen


def _columns(tops: Floats, heights: Floats) -> str:
    """Return columns of equal width as one path, neighbours of equal height joined."""
    width = WIDTH // tops.size
    new = np.ones(tops.size, dtype=np.bool_)
    new[1:] = (np.abs(np.diff(tops)) > 0.05) | (np.abs(np.diff(heights)) > 0.05)
    first = np.flatnonzero(new)
    last = np.append(first[1:], tops.size)
    return "".join(
        f"M{start * width} {top:.1f}h{(end - start) * width}v{height:.1f}h-{(end - start) * width}z"
        for start, end, top, height in zip(
            first.tolist(), last.tolist(), tops[first].tolist(), heights[first].tolist(), strict=True
        )
        if height
    )


def _cells(chosen: Bools) -> str:
    """Return cells as one path, neighbours of a row joined; row 0 is at the bottom."""
    padded = np.zeros((chosen.shape[0], chosen.shape[1] + 2), dtype=np.int8)
    padded[:, 1:-1] = chosen
    steps = np.diff(padded, axis=1)
    rows, starts = np.nonzero(steps == 1)
    ends = np.nonzero(steps == -1)[1]
    return "".join(
        f"M{start} {ROWS - 1 - row}h{end - start}v1h-{end - start}z"
        for row, start, end in zip(rows.tolist(), starts.tolist(), ends.tolist(), strict=True)
    )


def _gaps(scale: Axis, height: int) -> str:
    """Return the holes that are drawn short: blank, between two dashed lines."""
    drawn = ""
    for start, end in scale.gaps:
        left, right = scale.at(start), scale.at(end)
        drawn += (
            f'<rect class=gap x="{left:.1f}" width="{right - left:.1f}" height="{height}"/>'
            f'<path class=gapline d="M{left:.1f} 0V{height}M{right:.1f} 0V{height}"/>'
        )
    return drawn


def _holes(guest: Axis, host: Axis) -> str:
    """Return the holes of both axes of the plane."""
    drawn = ""
    for start, end in guest.gaps:
        left, right = (guest.at(point) * COLUMNS / WIDTH for point in (start, end))
        drawn += f'<rect class=gap x="{left:.2f}" width="{right - left:.2f}" height="{ROWS}"/>'
    for start, end in host.gaps:
        low, high = (ROWS - host.at(point) * ROWS / WIDTH for point in (start, end))
        drawn += f'<rect class=gap y="{high:.2f}" width="{COLUMNS}" height="{low - high:.2f}"/>'
    return drawn


def _named(name: str, scale: Axis) -> dict[str, object]:
    return {"name": name, "axis": [scale.addresses.tolist(), scale.units.tolist()]}


def _script(data: object) -> str:
    """Return data as JSON that cannot end the element it stands in."""
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json">{text}</script>'
