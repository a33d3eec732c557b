"""Where ``--guest`` may stand, what each renderer makes of our plugins, and their columns."""

from __future__ import annotations

import pytest

SCAN = ["Machine", "Kind", "Root", "Levels", "vCPUs", "Mapped", "OS", "Found by", "Evidence"]
RANGES = ["Machine", "GPA", "Size", "HPA", "Access", "Type", "Page", "What"]
WALK = ["Ref", "Entry", "Input", "Entry HPA", "Raw", "Decoded", "Result"]
VMCS = ["Machine", "vCPU", "Structure", "Address", "Held in", "Field", "Offset", "Raw", "Decoded"]

KERNEL = "0xffffffff81000000"
COMMANDS = {
    "scan": (["ept.scan"], SCAN),
    "ranges": (["ept.walk"], RANGES),
    "gpa": (["ept.walk", "--guest", "0", "--gpa", "0x1000"], WALK),
    "gva": (["ept.walk", "--guest", "1", "--gva", KERNEL], WALK),
    "vmcs": (["ept.vmcs"], VMCS),
}
OURS = ["ept.scan", "ept.walk", "ept.vmcs"]
RENDERERS = ["json", "csv", "pretty"]


@pytest.fixture(scope="module", autouse=True)
def _all_at_once(vol, small):
    commands = [args for args, _ in COMMANDS.values()]
    vol.prepare(
        *[("-f", small, *args) for args in commands],
        *[("-f", small, "-r", name, *args) for args in commands for name in RENDERERS],
        *[("-f", small, "--guest", guest, plugin) for guest in "01" for plugin in OURS],
        *[("-f", small, plugin, "--guest", guest) for guest in "01" for plugin in OURS],
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_quick_columns(vol, small, name):
    args, columns = COMMANDS[name]
    head, *rows = vol("-f", small, *args).check().rows
    assert head == columns
    assert rows


@pytest.mark.parametrize("name", COMMANDS)
def test_json(vol, small, name):
    args, columns = COMMANDS[name]
    result = vol("-f", small, "-r", "json", *args).check()
    assert result.json
    for row in result.json:
        assert row.keys() == {*columns, "__children"}


@pytest.mark.parametrize("name", COMMANDS)
def test_csv(vol, small, name):
    args, columns = COMMANDS[name]
    head, *rows = vol("-f", small, "-r", "csv", *args).check().csv
    assert head == ["TreeDepth", *columns]
    assert {len(row) for row in rows} == {len(head)}


@pytest.mark.parametrize("name", COMMANDS)
def test_pretty(vol, small, name):
    args, columns = COMMANDS[name]
    lines = vol("-f", small, "-r", "pretty", *args).check().table.splitlines()
    assert [cell.strip() for cell in lines[0].split("|")][1:] == columns
    assert len(lines) > 1


def test_json_holds_numbers_where_a_person_reads_sizes(vol, small, host):
    first, second = vol("-f", small, "-r", "json", "ept.scan").check().json
    assert [first["Root"], second["Root"]] == [guest.root for guest in host[1]]
    assert [first["Kind"], second["Kind"]] == ["EPT", "NPT"]
    assert first["Mapped"] == second["Mapped"] == 32 * 4096
    titles, row, _ = vol("-f", small, "ept.scan").check().rows
    assert row[titles.index("Mapped")] == "128K"


def test_a_walk_of_one_address_ends_at_the_frame_that_the_tables_name(vol, small, host):
    guest = host[1][0]
    *_, last = vol("-f", small, "-r", "json", "ept.walk", "--guest", "0", "--gpa", "0x1008").check().json
    assert last["Entry HPA"] == guest.placed[0x1000] + 8
    assert last["Result"].startswith("mapped: ")


def test_a_two_dimensional_walk_makes_the_references_that_the_processor_makes(vol, small, host):
    guest = host[1][1]
    rows = vol("-f", small, "-r", "json", "ept.walk", "--guest", "1", "--gva", KERNEL).check().json
    flat = [row for top in rows for row in (top, *top["__children"])]
    entries = sorted(row["Ref"] for row in flat if row["Ref"] is not None and row["Entry"] != "page")
    assert entries == list(range(1, 25))
    assert rows[-1]["Entry HPA"] == guest.placed[guest.kernel_gpa]


@pytest.mark.parametrize("plugin", OURS)
@pytest.mark.parametrize("guest", ["0", "1"])
def test_guest_before_and_after_our_plugins_name_is_the_same(vol, small, plugin, guest):
    before = vol("-f", small, "--guest", guest, plugin).check()
    after = vol("-f", small, plugin, "--guest", guest).check()
    assert before.out == after.out
    assert {row[0] for row in before.rows[1:]} == {guest}


def test_what_stands_after_the_plugins_name_wins(vol, small):
    rows = vol("-f", small, "--guest", "0", "ept.walk", "--guest", "1").check().rows
    assert {row[0] for row in rows[1:]} == {"1"}


def test_the_other_shared_options_may_stand_on_either_side(vol, small):
    before = vol("-f", small, "--maxphyaddr", "40", "ept.scan").check()
    after = vol("-f", small, "ept.scan", "--maxphyaddr", "40").check()
    assert before.out == after.out


def test_a_root_can_be_given_by_hand(vol, small, host):
    by_id = vol("-f", small, "-r", "json", "ept.walk", "--guest", "0").check().json
    root = f"{host[1][0].root:#x}"
    for options in (["--eptp", root], ["--guest", f"eptp={root}"]):
        by_root = vol("-f", small, "-r", "json", "ept.walk", *options).check().json
        assert [row | {"Machine": ""} for row in by_root] == [row | {"Machine": ""} for row in by_id]


def test_vmcs_shows_the_fields_asked_for(vol, small, host):
    ept, npt = host[1]
    rows = vol("-f", small, "-r", "json", "ept.vmcs", "--field", "EPTP", "N_CR3").check().json
    assert {(row["Machine"], row["Address"], row["Raw"]) for row in rows if row["Field"] in ("EPTP", "N_CR3")} == {
        ("0", ept.structures[0], ept.root),
        ("1", npt.structures[0], npt.root),
    }
    assert all("EPTP" in row["Field"] or "N_CR3" in row["Field"] for row in rows)
