"""``vol`` on damaged captures: one line and a status that is not zero, or a result; never a traceback."""

from __future__ import annotations

import pytest
from cli import running
from hostile import oracle

GARBAGE = {
    "nothing": b"",
    "a word": b"no capture",
    "half a header": slice(0, 40),
    "headers alone": slice(0, 4096),
    "a quarter": slice(0, 20_000_000),
    "a quarter and a bit": slice(0, 20_000_123),
}


@pytest.fixture(scope="module")
def vol(tmp_path_factory) -> running.Volatility:
    return running.Volatility(tmp_path_factory.mktemp("home"))


def lines(result: running.Result) -> list[str]:
    """What the command says beside Volatility's own banner."""
    return [line for line in result.err.splitlines() if line and not line.startswith(running.BANNER)]


@pytest.mark.slow
@pytest.mark.parametrize("content", GARBAGE.values(), ids=GARBAGE)
def test_a_file_that_is_no_whole_capture_ends_in_one_line(vol, content, tmp_path):
    path = tmp_path / "host.elf"
    path.write_bytes(oracle.truth("kvm-ept").data[content] if isinstance(content, slice) else content)
    result = vol("-f", path, "ept.scan")
    assert result.status != 0
    assert "Traceback" not in result.err + result.out
    assert len([line for line in lines(result) if line.startswith("volatility3_ept:")]) <= 1


@pytest.mark.slow
def test_what_is_left_of_a_cut_capture_is_shown_if_that_is_asked_for(vol, tmp_path):
    path = tmp_path / "host.elf"
    path.write_bytes(oracle.truth("kvm-ept").data[:60_000_123])
    result = vol("-f", path, "--allow-truncated", "ept.scan").check()
    assert "Traceback" not in result.err
