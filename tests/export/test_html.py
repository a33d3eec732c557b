"""The page stands alone, escapes what guests say, stays small, and works in a real browser at any width."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import captures
import discovered
import hypothesis
import numpy as np
import pytest
from builders.paging import PAGE
from export import browser
from hypothesis import strategies as st

from volatility3_ept.core import coverage, lineage, portrait
from volatility3_ept.core.backing import Recovery
from volatility3_ept.core.gpamap import Findings, GuestMap
from volatility3_ept.core.lineage import Line
from volatility3_ept.core.machines import Machine
from volatility3_ept.core.memory import HostMemory
from volatility3_ept.core.portrait import Portrait
from volatility3_ept.core.root import Root
from volatility3_ept.core.source import FileSource
from volatility3_ept.export import axis, html, pictures
from volatility3_ept.export.axis import Axis
from volatility3_ept.spec.dialect import State

EVIL = '<script>window.pwned=1</script><img src=x onerror="window.pwned=2"> & "Linux"'


def rows(gpas, columns):
    out = np.zeros((len(gpas), columns), dtype=np.int64)
    out[:, 0], out[:, 1] = gpas, PAGE
    return out


def sketch(pages: int, system: str = "Linux 6.6.6", name: str = "0") -> tuple[HostMemory, Portrait]:
    """A machine with a fate of each kind, a hole, and every page in a frame far from its neighbours."""
    numbers = np.arange(pages)
    gpas = numbers * PAGE + np.where(numbers >= pages // 2, 1 << 32, 0)
    lost = numbers % 10 == 9
    frames = np.random.default_rng(1).permutation(2 * pages)[: int((~lost).sum())] * PAGE
    state = np.where(numbers[~lost] % 50 == 7, int(State.RECOVERED) << 7, 0)
    gone = gpas[lost]
    findings = Findings(np.array([[3 << 30, 1 << 20, 0]]), rows(gone[0::6], 3), rows(gone[1::6], 3))
    guest_map = GuestMap(gpas[~lost], np.full(frames.size, PAGE), frames | 7 | state, findings)
    recovery = Recovery(
        guest_map, swapped=rows(gone[2::6], 3), migrating=rows(gone[3::6], 4), elsewhere=rows(gone[4::6], 3),
        never_backed=rows(gone[5::6], 2),
    )  # fmt: skip
    below = HostMemory.from_segments(FileSource(bytes(0)), [(0, pages * PAGE, 0)])
    machine = Machine(name, Root("EPT", 0x105E), guest_map, below, (), (), "", system, None, recovery=recovery)
    line = Line(name, (guest_map,), (name,), below, machine)
    return below, Portrait(line, coverage.account(guest_map, below, recovery), line.host_runs())


class _Tags(HTMLParser):
    """Counts elements and attributes, and sees that what is opened is closed."""

    VOID = frozenset({"meta", "link", "rect", "path", "circle", "img"})

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        if tag not in self.VOID and tag != "p":
            while self.open and self.open[-1] == "p":
                self.open.pop()
            assert self.open.pop() == tag


def parsed(text: str) -> _Tags:
    tags = _Tags()
    tags.feed(text)
    return tags


@pytest.fixture(scope="module")
def evil() -> str:
    below, item = sketch(2000, EVIL)
    return html.render(EVIL, below, [item])


def test_what_a_guest_says_stays_text(evil):
    tags = parsed(evil)
    assert "img" not in tags.tags
    escaped = evil.count("&lt;script&gt;window.pwned") + evil.count("onerror=&quot;window.pwned")
    assert evil.count("window.pwned") == escaped > 0
    assert not [name for name, _ in tags.attributes if name.startswith("on")]
    assert tags.tags.count("script") == 3


def test_the_page_asks_for_nothing(evil):
    tags = parsed(evil)
    assert [value for name, value in tags.attributes if name in ("src", "href", "action", "srcset")] == ["data:,"]
    assert not re.search(r"@import|url\((?!#)", evil)
    assert "default-src 'none'" in evil


def test_every_fate_is_in_the_table_with_its_size(evil):
    _, item = sketch(2000)
    for fate, size in item.coverage.totals().items():
        assert size
        assert re.search(rf"</svg>{fate}</td><td class=n>{html.size_name(size)}<", evil), fate


def test_a_million_runs_stay_a_small_page():
    below, item = sketch(1_000_000)
    text = html.render("big.raw", below, [item])
    assert len(item.runs) > 800_000
    assert len(text) < 250_000


def test_no_machine_and_a_machine_without_memory():
    below = HostMemory.from_bytes(bytes(PAGE))
    assert "no virtual machine" in html.render("none.raw", below, [])
    none = GuestMap(*[np.empty(0, dtype=np.int64)] * 3)
    line = lineage.alone("eptp=0x1000", none, below)
    empty = Portrait(line, coverage.account(none, below), line.host_runs())
    assert "No memory of this machine is known" in html.render("none.raw", below, [empty])


def test_the_summary_says_what_cannot_be_read():
    _, item = sketch(2000)
    assert re.search(r"\d+ out of reach|out of reach", item.summary())
    totals = item.coverage.totals()
    lost = item.memory - totals[coverage.Fate.MAPPED] - totals[coverage.Fate.RECOVERED]
    assert html.size_name(lost - totals[coverage.Fate.NEVER_BACKED]) in item.summary()


@hypothesis.settings(max_examples=100, derandomize=True, deadline=None, database=None)
@hypothesis.given(
    ranges=st.lists(st.tuples(st.integers(0, 1 << 40), st.integers(1, 1 << 30)), max_size=10),
    top=st.integers(1, 1 << 41),
)
def test_no_byte_is_lost_between_bins(ranges, top):
    starts = np.array([start >> 12 << 12 for start, _ in ranges], dtype=np.int64)
    ends = starts + np.array([-(-length // 4096) * 4096 for _, length in ranges], dtype=np.int64)
    used = axis.merged((starts, ends))
    scale = Axis.of(used, max(top, int(ends.max(initial=0))))
    edges = scale.edges(500)
    assert (np.diff(edges) >= 0).all()
    assert axis.bytes_in(used, edges).sum() == (used[1] - used[0]).sum()
    assert (np.diff(scale.addresses) > 0).all()
    assert (np.diff(scale.units) > 0).all()
    assert scale.units[-1] == pytest.approx(axis.WIDTH)


def test_a_long_hole_is_drawn_short():
    used = (np.array([0, 1 << 40]), np.array([1 << 20, (1 << 40) + (1 << 20)]))
    scale = Axis.of(used, int(used[1][-1]))
    assert scale.gaps == ((1 << 20, 1 << 40),)
    assert scale.at(1 << 20) == pytest.approx((axis.WIDTH - axis.GAP_WIDTH) / 2)
    assert "1T" in [text for _, text in scale.labels()]


@pytest.mark.parametrize(
    ("size", "total", "text"),
    [
        (0, 0, "0 %"),
        (0, 9, "0 %"),
        (9, 9, "100 %"),
        (1, 10**6, "< 0.1 %"),
        (10**6 - 1, 10**6, "> 99.9 %"),
        (1, 3, "33.3 %"),
    ],
)
def test_a_share_never_rounds_to_all_or_nothing(size, total, text):
    assert pictures.share(size, total) == text


PROBE = """<!doctype html><title>probe</title>
<iframe id=f src="map.html" style="width:400px;height:3000px"></iframe><pre id=r></pre>
<script>document.getElementById("f").addEventListener("load", event => {
  const page = event.target.contentDocument, found = {};
  const point = (id, x, y) => { const svg = page.getElementById(id), box = svg.getBoundingClientRect();
    const where = {clientX: box.left + box.width * x, clientY: box.top + box.height * y};
    svg.dispatchEvent(new PointerEvent("pointermove", where));
    return page.getElementById(id + "-read").textContent; };
  found.wide = page.documentElement.scrollWidth;
  found.pwned = String(event.target.contentWindow.pwned);
  found.bar = point("m0-bar", 0.3, 0.5);
  found.plane = point("m0-plane", 0.3, 0.5);
  const svg = page.getElementById("m0-bar"); svg.dispatchEvent(new PointerEvent("pointerleave"));
  found.idle = page.getElementById("m0-bar-read").textContent;
  document.getElementById("r").textContent = JSON.stringify(found);
});</script>"""


def test_in_a_real_browser(evil, tmp_path):
    """No complaint in the console (the page's own policy would complain of any load), one request, no overflow."""
    browser.command()
    (tmp_path / "map.html").write_text(evil, encoding="utf-8")
    (tmp_path / "probe.html").write_text(PROBE, encoding="utf-8")
    with browser.served(tmp_path) as (address, asked):
        done = browser.run(tmp_path, f"{address}/probe.html", "--virtual-time-budget=4000", "--dump-dom")
    found = json.loads(re.search(r"<pre id=\"r\">(\{.*?\})</pre>", done.stdout)[1].replace("&amp;", "&"))
    assert browser.complaints(done) == []
    assert [path for path in asked if path not in ("/probe.html", "/favicon.ico")] == ["/map.html"]
    assert found["pwned"] == "undefined"
    assert found["wide"] <= 400
    assert re.match(r"GPA 0x[0-9a-f]+000: (mapped|outside the capture) \d", found["bar"])
    assert re.match(r"GPA 0x[0-9a-f]+000, HPA 0x[0-9a-f]+000$", found["plane"])
    assert found["idle"].startswith("Point at an address")


def test_the_browser_would_complain(evil, tmp_path):
    """The test above means nothing if a refused load is not seen."""
    browser.command()
    (tmp_path / "map.html").write_text(evil.replace("<main>", "<main><img src='x.png'>"), encoding="utf-8")
    with browser.served(tmp_path) as (address, asked):
        done = browser.run(tmp_path, f"{address}/map.html", "--virtual-time-budget=2000", "--dump-dom")
    assert any("Content Security Policy" in line for line in browser.complaints(done))
    assert "/x.png" not in asked


@pytest.mark.parametrize("name", captures.committed(guests=1))
def test_a_picture_of_a_real_capture(name, tmp_path):
    below, discovery = discovered.capture(name)
    shown = portrait.portraits(lineage.lines(discovery, below), below)
    text = html.render("host.elf", below, shown)
    parsed(text)
    assert "All of it can be read" in text
    browser.command()
    (tmp_path / "map.html").write_text(text, encoding="utf-8")
    picture = tmp_path / "map.png"
    done = browser.run(tmp_path, f"file://{tmp_path}/map.html", "--window-size=1400,1700", f"--screenshot={picture}")
    assert browser.complaints(done) == []
    assert picture.stat().st_size > 30_000
