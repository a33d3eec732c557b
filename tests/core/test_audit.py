"""Nothing is found where nothing was done: in the guests of the builders, and in every real capture."""

from __future__ import annotations

import captures
import discovered
import pytest
from audited import audited, grave, results
from builders import paging
from builders.hooks import Victim
from builders.paging import HostRam

from volatility3_ept.core import audit, audit_kernel
from volatility3_ept.core.audit_finding import BENIGN, Kind


@pytest.mark.parametrize("shape", [paging.EPT_4, paging.NPT_4], ids=lambda shape: shape.name)
def test_a_guest_that_nobody_touched_gives_no_finding(shape):
    assert results(Victim(HostRam(), shape).ram) == []


def test_what_was_not_checked_is_said():
    """Without the host's symbols nobody can tell a module of its from another's code."""
    assert any("no symbols" in note for note in audited(Victim(HostRam()).ram).notes)


def test_every_kind_names_what_benign_software_causes_it():
    assert set(BENIGN) == set(Kind)
    assert all(BENIGN.values())


@pytest.mark.parametrize("name", captures.every())
def test_a_clean_capture_gives_nothing_above_info(name, record_property):
    """The rate over all captures is printed when the run is over (``tests/conftest.py``)."""
    below, found = discovered.capture(name)
    result = audit.audit(found, below)
    alarms = grave(list(result.findings))
    machines = found.all()
    assert all(audit_kernel.find(machine).code.starts.size for machine in machines), "it looked at a kernel's code"
    record_property("clean", (len(alarms), len(machines)))
    assert alarms == []
