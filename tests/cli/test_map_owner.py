"""``ept.map`` and ``ept.owner`` as a user runs them."""

from __future__ import annotations

import captures
import pytest
from builders.paging import PAGE
from cli import containers
from cli.test_errors import assert_refused

MAP = ["Machine", "Fate", "GPA", "Size", "Share %", "HPA", "Detail"]
OWNER = ["Asked", "HPA", "Length", "Machine", "GPA", "Through", "How", "Access", "Detail"]
#: How each fate that is memory of the guest is printed; the others have no share.
NO_MEMORY = ("MMIO", "not mapped")


@pytest.fixture(scope="module", autouse=True)
def _all_at_once(vol, small, real):
    vol.prepare(
        ("-f", small, "ept.map"),
        ("-f", small, "-r", "json", "ept.map"),
        ("-f", small, "-r", "json", "ept.map", "--guest", "1", "--totals"),
        ("-f", real.path, "-r", "json", "ept.map"),
        ("-f", small, "-r", "csv", "ept.map"),
        ("-f", small, "-r", "pretty", "ept.map"),
    )


def test_columns(vol, small):
    head, *rows = vol("-f", small, "ept.map").check().rows
    assert head == MAP
    assert {len(row) for row in rows} == {len(MAP)}
    head, *rows = vol("-f", small, "-r", "csv", "ept.map").check().csv
    assert head == ["TreeDepth", *MAP]
    vol("-f", small, "-r", "pretty", "ept.map").check()


def test_ranges_add_up_to_totals_and_totals_to_the_top(vol, real):
    (top,) = vol("-f", real.path, "-r", "json", "ept.map").check().json
    fates = top["__children"]
    assert sum(fate["Size"] for fate in fates) == top["Size"] > 0
    for fate in fates:
        assert sum(part["Size"] for part in fate["__children"]) == fate["Size"]
        assert {part["Fate"] for part in fate["__children"]} == {fate["Fate"]}
    shares = [fate["Share %"] for fate in fates if fate["Fate"] not in NO_MEMORY]
    assert sum(shares) == pytest.approx(100, abs=0.01)
    assert {fate["Share %"] for fate in fates if fate["Fate"] in NO_MEMORY} == {None}
    parts = sorted((part["GPA"], part["Size"]) for fate in fates for part in fate["__children"])
    at = 0
    for gpa, size in parts:
        assert gpa == at
        at += size
    assert at == top["Size"]


def test_the_totals_of_a_real_guest_are_the_truth(vol, real):
    (top,) = vol("-f", real.path, "-r", "json", "ept.map").check().json
    (guest,) = [entry for entry in real.entry["guests"] if entry["level"] == 2]
    totals = {fate["Fate"]: fate["Size"] for fate in top["__children"]}
    assert totals["mapped"] == guest["pages_mapped"] * PAGE
    assert totals["recovered"] == guest["pages_absent"] * PAGE


def test_a_range_that_is_one_run_has_its_address_in_the_host(vol, real):
    (truth,) = real.guests
    (top,) = vol("-f", real.path, "-r", "json", "ept.map").check().json
    parts = [part for fate in top["__children"] for part in fate["__children"] if part["HPA"] is not None]
    assert len(parts) > 3
    for part in parts:
        assert part["HPA"] == truth.pages[part["GPA"]][0] << 12


def test_one_guest_and_totals_only(vol, small):
    (top,) = vol("-f", small, "-r", "json", "ept.map", "--guest", "1", "--totals").check().json
    assert top["Machine"] == "1"
    assert [fate["__children"] for fate in top["__children"]] == [[] for _ in top["__children"]]


def test_a_root_that_was_given(vol, small, host):
    (top,) = vol("-f", small, "-r", "json", "ept.map", "--guest", f"eptp={host[1][0].root:#x}").check().json
    assert {fate["Fate"]: fate["Size"] for fate in top["__children"]} == {"mapped": 32 * PAGE}


def test_the_page_is_written_once(vol, small, tmp_path):
    done = vol("-o", tmp_path, "-f", small, "ept.map", "--html", "map.html").check()
    assert [path.name for path in tmp_path.iterdir()] == ["map.html"]
    text = (tmp_path / "map.html").read_text()
    assert text.startswith("<!doctype html>")
    assert "host.elf" in text
    assert done.rows[0] == MAP
    (tmp_path / "map.html").write_text("mine")
    refused = vol("-o", tmp_path, "-f", small, "ept.map", "--totals", "--html", "map.html")
    assert_refused(refused, "exists already")
    assert refused.status == 1
    assert (tmp_path / "map.html").read_text() == "mine"
    vol("-o", tmp_path, "-f", small, "ept.map", "--html", "map.html", "--overwrite").check()
    assert (tmp_path / "map.html").read_text() == text


@pytest.mark.parametrize("name", ["../map.html", "/tmp/map.html", "a/b.html", "..", ".", ""])
def test_the_page_stays_in_the_folder(vol, small, tmp_path, name):
    assert_refused(vol("-o", tmp_path, "-f", small, "ept.map", f"--html={name}"), "plain file name")
    assert list(tmp_path.iterdir()) == []


def ask(vol, path, *options):
    return vol("-f", path, "-r", "json", "ept.owner", *options).check().json


def test_columns_of_owner(vol, small):
    head, row = vol("-f", small, "ept.owner", "--hpa", "0x2000").check().rows
    assert head == OWNER
    assert row == ["0x2000", "0x2000", "1B", "N/A", "N/A", "N/A", "not in any guest", "N/A", ""]


def test_addresses_offsets_and_files(vol, small, host, tmp_path):
    first, second = host[1]
    gpa, hpa = next(iter(first.placed.items()))
    other_gpa, other = next(iter(second.placed.items()))
    named = ask(vol, small, "--hpa", f"{hpa + 3:#x}", str(other))
    assert [(row["Machine"], row["GPA"], row["How"]) for row in named] == [
        ("0", gpa + 3, "mapped"), ("1", other_gpa, "mapped"),
    ]  # fmt: skip
    listed = tmp_path / "hits.txt"
    listed.write_text(f"# hits\n{hpa + 3:#x}:$a: 4d 5a\n\n{other}\n")
    assert ask(vol, small, "--from-file", listed) == named
    data = small.read_bytes()
    offsets = [data.index(bytes(host[0].page(at))) for at in (first.tables.root, second.tables.root)]
    tables = ask(vol, small, "--offset", *map(hex, offsets))
    assert [(row["Machine"], row["How"], row["HPA"]) for row in tables] == [
        ("0", "table", first.tables.root), ("1", "table", second.tables.root),
    ]  # fmt: skip
    listed.write_text("".join(f"{offset:#x}:$a\n" for offset in offsets))
    assert ask(vol, small, "--offsets-from-file", listed) == tables


def test_a_range_and_one_guest(vol, small, host):
    start = min(host[1][0].placed.values())
    rows = ask(vol, small, "--hpa", hex(start), "--length", "0x100000", "--guest", "1")
    assert sum(row["Length"] for row in rows) == 0x10_0000
    assert {row["Machine"] for row in rows} == {"1", None}
    assert "not in any guest" not in {row["How"] for row in rows}


WRONG = {
    "nothing": ([], "give one of --hpa"),
    "twice": (["--hpa", "0x1000", "--hpa", "0x2000"], "--hpa was given more than once"),
    "two": (["--hpa", "0x1000", "--offset", "0"], "give one of --hpa"),
    "word": (["--hpa", "banana"], "--hpa banana: not a number"),
    "wide": (["--hpa", "0x10000000000000"], "at most 52 bits"),
    "length": (["--hpa", "0x1000", "--length", "0"], "--length 0"),
    "no-file": (["--from-file", "nothing.txt"], "--from-file nothing.txt: No such file"),
    "no-guest": (["--hpa", "0x1000", "--guest", "9"], "no such machine"),
}


@pytest.mark.parametrize("case", WRONG)
def test_questions_that_are_none(vol, small, case):
    options, message = WRONG[case]
    assert_refused(vol("-f", small, "ept.owner", *options), message)


def test_a_line_that_is_no_address(vol, small, tmp_path):
    listed = tmp_path / "hits.txt"
    listed.write_text("0x1000\nzebra\n")
    assert_refused(vol("-f", small, "ept.owner", "--from-file", listed), "line 2: 'zebra'")


def test_offsets_of_a_compressed_file_name_nothing(vol, host, tmp_path):
    path = containers.gz(host[0], tmp_path)
    assert_refused(vol("-f", path, "ept.owner", "--offset", "0x1000"), "use --hpa")


def test_the_examples_of_the_page(vol, real):
    """docs/coverage.md shows what these print."""
    page = (captures.TESTDATA.parent / "docs" / "coverage.md").read_text()
    for command in (["ept.map", "--totals"], ["ept.owner", "--hpa", "0xfc01234", "0xfadf000", "0x1000"]):
        table = vol("-f", real.path, *command).check().table
        assert "\n".join(line.rstrip() for line in table.splitlines()) in "\n".join(
            line.rstrip() for line in page.splitlines()
        )
