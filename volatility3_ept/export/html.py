"""One self-contained page that shows where the memory of each machine lies in the host, and what is missing.

It needs nothing but itself: style, pictures and script are in it, and a policy in its head forbids the rest. However
large a guest is, its pictures are counted in bins and stay small. Text that comes from a guest is escaped.
"""

from __future__ import annotations

import html
from collections.abc import Sequence

import numpy as np

from volatility3_ept.core.coverage import Coverage, Fate
from volatility3_ept.core.memory import HostMemory
from volatility3_ept.core.portrait import AT_HAND, NO_MEMORY, Portrait, memory_bytes, shared_text
from volatility3_ept.export import page, pictures
from volatility3_ept.export.axis import Axis, Range, merged
from volatility3_ept.spec.bits import size_name

#: Ranges that are listed for one machine; the rest is counted.
MAX_RANGES = 60
#: A list that is longer is folded.
_FOLDED = 12
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def render(name: str, memory: HostMemory, portraits: Sequence[Portrait]) -> str:
    """Return the page as text. ``name`` is the capture's, ``memory`` what it holds."""
    present = merged((memory.starts, memory.starts + memory.lengths))
    frames = [portrait.runs.frames() for portrait in portraits]
    used = merged(
        (np.concatenate([present[0], *(f[0] for f in frames)]), np.concatenate([present[1], *(f[1] for f in frames)]))
    )
    host = Axis.of(used, int(used[1][-1]) if used[1].size else 0)
    body = [_overview(name, memory, host, present, portraits)]
    body += [_machine(number, portrait) for number, portrait in enumerate(portraits)]
    title = f"Guest memory map: {html.escape(name)}"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{title}</title><style>{page.style()}</style></head>\n<body>{page.PATTERNS}<main>\n"
        + "\n".join(body)
        + f"\n</main><script>{page.script()}</script></body></html>\n"
    )


def _overview(
    name: str,
    memory: HostMemory,
    host: Axis,
    present: Range,
    portraits: Sequence[Portrait],
) -> str:
    count = len(portraits)
    plural = "no virtual machine" if not count else "1 virtual machine" if count == 1 else f"{count} virtual machines"
    rows = [
        _strip("In the capture", pictures.strip(host, present, "held"), size_name(int((present[1] - present[0]).sum())))
    ]
    for portrait in portraits:
        frames = portrait.runs.frames()
        size = size_name(int((frames[1] - frames[0]).sum()))
        rows.append(_strip(f"Machine {portrait.id}", pictures.strip(host, frames, "mapped"), size, _system(portrait)))
    intro = (
        "A machine that runs in another one lies in that one's memory." if any("." in p.id for p in portraits) else ""
    )
    return (
        f"<header><h1>Guest memory map</h1><p class=soft><code>{html.escape(name)}</code>: "
        f"{size_name(memory.size)} of host memory, {plural}</p></header>"
        f"<section><h2>Where the machines lie in the host</h2>"
        f"<p class=soft>Host-physical memory from left to right. {intro}</p>"
        f"<div class=strips>{''.join(rows)}<span class=name></span>{pictures.axis(host)}</div></section>"
    )


def _strip(name: str, picture: str, size: str, system: str = "") -> str:
    extra = f" <span class=soft>{html.escape(system)}</span>" if system else ""
    label = html.escape(f"{name}: {size} of host memory. {system}", quote=True)
    svg = f'<svg class=strip viewBox="0 0 1000 20" preserveAspectRatio="none" role="img" aria-label="{label}">'
    return f'<span class=name title="{label}">{html.escape(name)} <b>{size}</b>{extra}</span>{svg}{picture}</svg>'


def _machine(number: int, portrait: Portrait) -> str:
    totals = portrait.coverage.totals()
    memory = memory_bytes(totals)
    known = [part for part in portrait.coverage.parts() if part.fate is not Fate.NOT_MAPPED]
    spans = np.array([(part.gpa, part.gpa + part.length) for part in known], dtype=np.int64).reshape(-1, 2)
    guest = Axis.of(merged((spans[:, 0], spans[:, 1])), portrait.coverage.top)
    name = f"m{number}"
    parts = [
        f"<article><div class=head><h2>Machine {html.escape(portrait.id)}</h2>"
        f"<span>{html.escape(_system(portrait))}</span></div>"
        f'<p class="soft mono">{html.escape(portrait.facts)}</p>',
        f"<p class=lead>{_summary(totals, memory)}</p>",
        pictures.total_bar(totals, memory),
    ]
    if not len(portrait.coverage):
        return "\n".join((*parts, _remarks(portrait), "</article>"))
    parts += [
        _table(portrait.coverage, totals, memory),
        "<h3>What became of each guest-physical address</h3>",
        pictures.fate_bar(name, guest, portrait.coverage),
        "<h3>Where it lies in the host</h3>",
        pictures.plane(name, guest, portrait.runs),
        _missing(portrait.coverage, totals),
        _remarks(portrait),
        "</article>",
    ]
    return "\n".join(part for part in parts if part)


def _system(portrait: Portrait) -> str:
    return "system not recognised" if portrait.system == "unknown" else portrait.system


def _summary(totals: dict[Fate, int], memory: int) -> str:
    if not memory:
        return "No memory of this machine is known."
    held = sum(totals[fate] for fate in AT_HAND)
    unused = totals[Fate.NEVER_BACKED]
    lost = memory - held - unused
    text = f"<b>{size_name(memory)}</b> of guest memory. "
    if size_name(memory) != size_name(memory - unused):
        text += f"The guest uses {size_name(memory - unused)} of it. "
    if lost:
        worst = [
            f"{size_name(totals[f])} {f}"
            for f in totals
            if totals[f] and f not in (*AT_HAND, *NO_MEMORY, Fate.NEVER_BACKED)
        ]
        text += f"<b>{size_name(lost)} ({pictures.share(lost, memory)}) cannot be read</b>: {', '.join(worst)}."
    else:
        text += "<b>All of it can be read.</b>" if not unused else "<b>All of that can be read.</b>"
    if totals[Fate.RECOVERED]:
        text += f" {size_name(totals[Fate.RECOVERED])} had been lost by EPT or NPT and were recovered."
    return text


def _table(coverage: Coverage, totals: dict[Fate, int], memory: int) -> str:
    counts = np.bincount(coverage.fates, minlength=len(Fate))
    rows = ""
    for number, (fate, size) in enumerate(totals.items()):
        if size:
            css, meaning = page.FATES[fate]
            part = pictures.share(size, memory) if fate not in NO_MEMORY else ""
            rows += (
                f"<tr><td class=w>{pictures.swatch(css)}{fate}</td><td class=n>{size_name(size)}</td>"
                f"<td class=n>{part}</td><td class='n m'>{int(counts[number]):,}</td>"
                f"<td class='soft m'>{meaning}</td></tr>"
            )
    return (
        "<div class=scroll><table><thead><tr><th>Fate</th><th class=n>Size</th><th class=n>Of memory</th>"
        f'<th class="n m">Ranges</th><th class=m>What it means</th></tr></thead><tbody>{rows}'
        f"<tr><td class=w><b>below the top</b></td><td class=n><b>{size_name(coverage.top)}</b></td><td></td>"
        f"<td class='n m'>{len(coverage):,}</td><td class='soft m'>All guest-physical addresses, holes too.</td></tr>"
        "</tbody></table></div>"
    )


def _missing(coverage: Coverage, totals: dict[Fate, int]) -> str:
    """List what cannot be read, the largest ranges first."""
    fates = [fate for fate in totals if fate not in (*AT_HAND, *NO_MEMORY, Fate.NEVER_BACKED) and totals[fate]]
    codes = [list(Fate).index(fate) for fate in fates]
    chosen = np.flatnonzero(np.isin(coverage.fates, codes))
    if not chosen.size:
        return ""
    largest = np.sort(chosen[np.argsort(-coverage.lengths[chosen], kind="stable")[:MAX_RANGES]])
    rows = ""
    for index in largest.tolist():
        fate = list(Fate)[int(coverage.fates[index])]
        gpa, length = int(coverage.gpas[index]), int(coverage.lengths[index])
        rows += (
            f"<tr><td class='w mono'>{gpa:#x}</td><td class=n>{size_name(length)}</td>"
            f"<td class=w>{pictures.swatch(page.FATES[fate][0])}{fate}</td></tr>"
        )
    what = f"The {largest.size} largest of {chosen.size:,}" if chosen.size > largest.size else f"All {chosen.size}"
    return (
        f"<details{' open' if largest.size <= _FOLDED else ''}><summary>{what} ranges that cannot be read</summary>"
        "<div class=scroll><table><thead><tr><th>GPA</th>"
        f"<th class=n>Size</th><th>Fate</th></tr></thead><tbody>{rows}</tbody></table></div></details>"
    )


def _remarks(portrait: Portrait) -> str:
    notes = [*shared_text(portrait.shared), *portrait.notes]
    items = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
    return f"<details open><summary>Notes</summary><ul class=notes>{items}</ul></details>" if items else ""
