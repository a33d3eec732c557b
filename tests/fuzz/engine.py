"""Runs one target in this process: with atheris where it is installed, else with mutations of our own.

The first lines of :mod:`run` say how it is started. A property that fails does not end the run: the input is kept, and
each place of failure is reported once.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
#: Inputs are not longer than this; a case that takes so many seconds of the processor's time is a finding.
MAX_LENGTH, MAX_SECONDS = 16_384, 20
MAX_MEGABYTES = 3072


def place_of(error: BaseException) -> str:
    """Name the place where something failed: the sort of error, and the innermost line of ours."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "volatility3_ept" in f.filename]
    frames = frames or traceback.extract_tb(error.__traceback__)
    return f"{type(error).__name__} at {Path(frames[-1].filename).name}:{frames[-1].lineno}"


class TooLongError(Exception):
    """A case took longer than any should."""


@contextlib.contextmanager
def limited(seconds: float = MAX_SECONDS) -> Iterator[None]:
    """Raise TooLongError in what takes more processor time: a clock on the wall would count a busy machine's load."""

    def stop(number: int, frame: object) -> None:
        raise TooLongError(f"more than {seconds} seconds")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@dataclass
class Watch:
    """Calls a target and keeps what fails. ``folder`` is where inputs go; None: nowhere."""

    name: str
    folder: Path | None
    runs: int = 0
    failures: dict[str, int] = field(default_factory=dict)

    def __call__(self, data: bytes) -> None:
        from fuzz.catalogue import TARGETS

        self.runs += 1
        try:
            with limited():
                TARGETS[self.name].function(data)  # Whatever a target raises is a finding.
        except Exception as error:
            self._keep(data, error)

    def _keep(self, data: bytes, error: Exception) -> None:
        where = place_of(error)
        self.failures[where] = self.failures.get(where, 0) + 1
        if self.failures[where] > 1:
            return
        traceback.print_exception(error, file=sys.stderr)
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"{self.name}-{hashlib.sha256(data).hexdigest()[:16]}"
            path.write_bytes(data)
            print(f"FOUND {self.name}: {where}: {path}", flush=True)

    def report(self) -> None:
        """Print what the run was, in the form that :mod:`run` reads."""
        print(f"\nRUNS {self.name} {self.runs} FAILURES {sum(self.failures.values())}", flush=True)
        for where, count in self.failures.items():
            print(f"FAILED {self.name} {count} times: {where}", flush=True)


def with_atheris(name: str, corpus: Path, crashes: Path, seconds: int) -> None:
    """Fuzz one target, guided by coverage. Does not return: libFuzzer ends the process, and counts the executions."""
    import atheris

    with atheris.instrument_imports(include=["volatility3_ept"]):
        from fuzz.catalogue import TARGETS
    watch = Watch(name, crashes)
    write_seeds(name, corpus)
    for data in sorted(crashes.glob(f"{name}-*")):
        watch(data.read_bytes())
    assert name in TARGETS
    options = [
        f"-max_total_time={seconds}", f"-max_len={MAX_LENGTH}", "-timeout=3600",
        f"-rss_limit_mb={MAX_MEGABYTES}", f"-artifact_prefix={crashes}/{name}-", "-print_final_stats=1",
        "-reload=0", "-len_control=20", "-report_slow_units=3600",
    ]  # fmt: skip
    atheris.Setup([sys.argv[0], *options, str(corpus)], watch, enable_python_coverage=True)
    atheris.Fuzz()


def without(name: str, corpus: Path, crashes: Path, seconds: float) -> None:
    """Fuzz one target by mutation alone. What it reaches is not known, so nothing is added to the corpus."""
    watch = Watch(name, crashes)
    write_seeds(name, corpus)
    end = time.monotonic() + seconds
    for data in mutations(name, corpus, random.Random(time.time_ns())):
        watch(data)
        if time.monotonic() > end:
            break
    watch.report()


def write_seeds(name: str, corpus: Path) -> None:
    """Put the first inputs of a target into its corpus."""
    from fuzz.catalogue import TARGETS

    corpus.mkdir(parents=True, exist_ok=True)
    for data in TARGETS[name].seeds():
        (corpus / hashlib.sha1(data, usedforsecurity=False).hexdigest()).write_bytes(data)


def mutations(name: str, corpus: Path | None, rng: random.Random) -> Iterator[bytes]:
    """Yield inputs without end: the corpus first, then changed ones and new ones."""
    from fuzz.catalogue import TARGETS

    known = [path.read_bytes() for path in sorted(corpus.glob("*"))] if corpus else list(TARGETS[name].seeds())
    yield from known
    while True:
        if known and rng.random() < 0.5:
            data = bytearray(rng.choice(known))
            for _ in range(1 + rng.randrange(8)):
                at = rng.randrange(len(data) + 1)
                data[at : at + rng.randrange(2)] = rng.randbytes(1 + rng.randrange(4))
            yield bytes(data[:MAX_LENGTH])
        else:
            # Not an image: random pages lead nowhere.
            yield bytes([rng.randrange(255)]) + rng.randbytes(rng.randrange(256))
