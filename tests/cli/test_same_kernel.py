"""Host and guest run the same kernel build: Volatility's stackers may take the guest's kernel for the host's.

In the committed captures they happen to meet the host's first. Without the host's VMCOREINFO, as in a host whose
kernel was built without it, they meet the guest's: the trap, made from real memory.
"""

from __future__ import annotations

import shutil

import captures
import pytest

MARK = b"VMCOREINFO\0"


@pytest.fixture(scope="module", params=captures.committed(guests=1))
def misled(request, tmp_path_factory):
    """A capture in which no page of the host itself holds the word VMCOREINFO."""
    capture = captures.get(request.param)
    path = tmp_path_factory.mktemp("misled") / "host.elf"
    shutil.copy(capture.path, path)
    (guest,) = capture.guests
    guest_frames = {frame for frame, _ in guest.pages.values()}
    blanked = 0
    with path.open("r+b") as file:
        data = file.read()
        at = data.find(MARK)
        while at >= 0:
            if capture.hpa(at) // captures.PAGE not in guest_frames:
                file.seek(at)
                file.write(b"X" * len(MARK))
                blanked += 1
            at = data.find(MARK, at + 1)
    assert blanked
    return capture, path


@pytest.mark.slow
def test_volatility_alone_is_misled_ept_scan_says_so_and_guest_host_is_not(vol, misled):
    capture, path = misled
    symbols = ("-s", captures.SYMBOLS, "-f", path)
    alone = vol(*symbols, "linux.pslist").check()
    assert len(alone.rows) == 1, "if Volatility finds the host's processes here, this trap is no longer one"
    scan = vol(*symbols, "ept.scan").check()
    assert "Use --guest host" in scan.err
    host = vol(*symbols, "--guest", "host", "linux.pslist").check()
    found = {(int(row[1]), row[4]) for row in host.rows[1:]}
    assert {pid for pid, _ in found} >= {
        pid for pid, name in capture.host_processes if name in ("vmm", "host_marker_a")
    }
    assert {name for _, name in found} >= {"vmm", "host_marker_a"}
    assert not {name for _, name in found} & {"guest_marker_a", "guest_db_server"}


def test_an_ordinary_capture_gets_no_warning(vol, real):
    scan = vol("-s", captures.SYMBOLS, "-f", real.path, "ept.scan").check()
    assert "Use --guest host" not in scan.err
