"""Every fuzz target, on inputs that are the same in each run: the engine's blind half, and properties by hypothesis."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest
from fuzz import engine
from fuzz.catalogue import TARGETS
from fuzz.draw import Draw
from hypothesis import strategies as st

RUN = Path(__file__).with_name("run.py")
#: Targets that take tens of milliseconds and more for one input.
HEAVY = ("infer", "hostile", "damaged", "recover")


def deterministic(examples: int) -> hypothesis.settings:
    """The same draws on every run, and no clock that could fail it."""
    return hypothesis.settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        phases=(hypothesis.Phase.generate,),
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )


@pytest.mark.parametrize("name", [name for name in TARGETS if name not in HEAVY])
def test_a_property_holds_for_what_hypothesis_draws(name):
    @deterministic(examples=40)
    @hypothesis.given(st.binary(max_size=300))
    def holds(data):
        TARGETS[name].function(data)

    holds()


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_nothing_fails_in_a_fixed_number_of_tries(name):
    watch = engine.Watch(name, None)
    inputs = engine.mutations(name, None, random.Random(name))
    for _ in range(TARGETS[name].tries):
        watch(next(inputs))
    assert not watch.failures
    assert watch.runs == TARGETS[name].tries


def test_an_empty_input_is_a_case_of_every_target():
    for name in TARGETS:
        if name not in HEAVY:
            TARGETS[name].function(b"")


def test_decisions_are_taken_in_order_and_are_the_first_choice_when_nothing_is_left():
    draw = Draw(bytes([2, 1, 0x34, 0x12, 7]))
    assert draw.choice("abc") == "c"
    assert draw.flag()
    assert draw.number(2) == 0x1234
    assert draw.left == 1
    assert (draw.below(5), draw.left) == (2, 0)
    assert (draw.number(), draw.choice("abc"), draw.flag(), draw.take(2)) == (0, "a", False, b"\0\0")


@pytest.fixture
def failing(monkeypatch):
    """A target that fails for some inputs, in two places."""

    def target(data: bytes) -> None:
        if data[:1] == b"a":
            raise ValueError("first")
        assert data[:1] != b"b", "second"

    monkeypatch.setitem(TARGETS, "failing", TARGETS["walk"].__class__(target, (), 1))


def test_what_fails_is_kept_once_for_each_place_and_the_run_goes_on(failing, tmp_path, capsys):
    watch = engine.Watch("failing", tmp_path)
    for data in (b"a1", b"a2", b"c", b"b1", b"b2"):
        watch(data)
    assert watch.runs == 5
    assert sorted(watch.failures.values()) == [2, 2]
    assert {path.read_bytes() for path in tmp_path.iterdir()} == {b"a1", b"b1"}
    assert all(path.name.startswith("failing-") for path in tmp_path.iterdir())
    assert capsys.readouterr().out.count("FOUND failing") == 2


def test_a_case_without_an_end_is_a_finding():
    with pytest.raises(engine.TooLongError), engine.limited(0.05):
        while True:
            pass


@pytest.mark.slow
def test_the_command_prints_a_row_for_a_target_and_replays_an_input(tmp_path):
    done = subprocess.run(
        [sys.executable, RUN, "slot", "--seconds", "1", "--corpus", tmp_path],
        capture_output=True,
        text=True,
        check=True,
    )
    row = next(line for line in done.stdout.splitlines() if line.startswith("slot"))
    assert int(row.split()[1]) > 0
    assert row.endswith("none")
    kept = tmp_path / "slot-0"
    kept.write_bytes(b"\0\1\2")
    again = subprocess.run([sys.executable, RUN, "--replay", kept], capture_output=True, text=True, check=True)
    assert again.stdout == f"{kept}: nothing fails\n"


@pytest.mark.slow
def test_a_target_that_is_not_there_is_named(tmp_path):
    done = subprocess.run([sys.executable, RUN, "nothing"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no such target: nothing" in done.stderr
