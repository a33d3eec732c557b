"""Fuzz the parsers that read image bytes.

    python tests/fuzz/run.py                       # every target, 60 seconds each
    python tests/fuzz/run.py walk vmcs --seconds 600 --jobs 2
    python tests/fuzz/run.py --replay FILE ...     # run inputs that were kept, with the traceback of what fails
    python tests/fuzz/run.py --coverage            # what the corpus reaches, lines and branches (needs "coverage")

Guided by coverage where atheris is installed (``pip install '.[fuzz]'``); otherwise it says so and mutates blindly.
The exit status is 1 when anything failed. See docs/fuzzing.md.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib.util
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
sys.path[:0] = [str(TESTS), str(ROOT)]

HAS_ATHERIS = importlib.util.find_spec("atheris") is not None
_RUNS = re.compile(r"^(?:RUNS \S+|stat::number_of_executed_units:|#)\s?(\d+)", re.MULTILINE)
_FOUND = re.compile(r"^FOUND .*$", re.MULTILINE)
_EDGES = re.compile(r"^#\d+\s.*\bcov: (\d+) ft: (\d+)", re.MULTILINE)
_WROTE = re.compile(r"Test unit written to (\S+)")


@dataclass(frozen=True)
class Outcome:
    """What came of one target."""

    name: str
    runs: int
    seconds: float
    edges: str
    failures: tuple[str, ...]
    log: str


def fuzz(name: str, options: argparse.Namespace) -> Outcome:
    """Fuzz one target in a process of its own."""
    corpus, crashes = options.corpus / name, options.corpus / "crashes"
    crashes.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, name, "--inside", "--corpus", str(options.corpus), "--seconds",
               str(options.seconds)]  # fmt: skip
    start = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(TESTS), str(ROOT)))}
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment, check=False)
    text = done.stdout + "\n" + done.stderr
    (options.corpus / f"{name}.log").write_text(text)
    runs = [int(number) for number in _RUNS.findall(text)]
    failures = list(dict.fromkeys(_FOUND.findall(text))) + [f"libFuzzer: {path}" for path in _WROTE.findall(text)]
    if not runs and not failures:
        failures.append(f"ended with status {done.returncode}: {text[-400:]!r}")
    edges = _EDGES.findall(text)
    corpus.mkdir(exist_ok=True)
    return Outcome(name, max(runs, default=0), time.monotonic() - start, edges[-1][0] if edges else "-",
                   tuple(failures), text)  # fmt: skip


def replay(paths: list[Path]) -> int:
    """Run kept inputs; the target is the first word of the file's name, or of its folder's."""
    from fuzz.catalogue import TARGETS

    failed = 0
    for path in paths:
        name = next((part for part in (path.name.split("-")[0], path.parent.name) if part in TARGETS), None)
        if name is None:
            print(f"{path}: begins with no target's name")
            return 2
        from fuzz.engine import Watch

        watch = Watch(name, None)
        watch(path.read_bytes())
        print(f"{path}: {'; '.join(watch.failures) or 'nothing fails'}")
        failed += bool(watch.failures)
    return int(failed > 0)


def coverage(names: list[str], corpus: Path) -> None:
    """Print which share of each target's modules its corpus reaches."""
    for name in names:
        command = [sys.executable, __file__, name, "--inside", "--coverage", "--corpus", str(corpus)]
        subprocess.run(command, check=False)


def _covered(name: str, corpus: Path) -> None:
    """Replay one corpus under ``coverage``, and print the share of lines and branches of the target's modules."""
    import contextlib
    import io

    import coverage as tool

    measured = tool.Coverage(branch=True, data_file=None, source=["volatility3_ept"])
    measured.start()
    from fuzz.catalogue import TARGETS
    from fuzz.engine import Watch

    watch = Watch(name, None)
    with contextlib.redirect_stderr(io.StringIO()):
        for path in sorted((corpus / name).glob("*")):
            watch(path.read_bytes())
    measured.stop()
    files = [str(ROOT / "volatility3_ept" / f"{module.replace('.', '/')}.py") for module in TARGETS[name].modules]
    text = io.StringIO()
    total = measured.report(morfs=files, file=text)
    if not watch.runs:
        print(f"{name}: no corpus")
        return
    print(f"{name}: {watch.runs} inputs reach {total:.0f} % of the lines and branches of its modules", flush=True)
    for line in text.getvalue().splitlines()[2:-2]:
        print(f"    {line}")


def _inside(options: argparse.Namespace) -> None:
    from fuzz import engine

    (name,) = options.targets
    corpus, crashes = options.corpus / name, options.corpus / "crashes"
    if options.coverage:
        _covered(name, options.corpus)
    elif HAS_ATHERIS:
        engine.with_atheris(name, corpus, crashes, options.seconds)
    else:
        engine.without(name, corpus, crashes, options.seconds)


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="names of targets; all of them by default")
    parser.add_argument("--seconds", type=int, default=60, help="time for each target")
    parser.add_argument("--jobs", type=int, default=1, help="targets that run at the same time")
    parser.add_argument("--corpus", type=Path, default=ROOT / ".fuzz", help="folder of corpora, logs and crashes")
    parser.add_argument("--replay", type=Path, nargs="+", metavar="FILE", help="run kept inputs")
    parser.add_argument("--coverage", action="store_true", help="what the corpora reach")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.corpus = options.corpus.resolve()
    if options.inside:
        _inside(options)
        return 0
    if options.replay:
        return replay(options.replay)
    from fuzz.catalogue import TARGETS

    unknown = [name for name in options.targets if name not in TARGETS]
    if unknown:
        parser.error(f"no such target: {', '.join(unknown)}; there are {', '.join(TARGETS)}")
    names = options.targets or list(TARGETS)
    if options.coverage:
        coverage(names, options.corpus)
        return 0
    options.corpus.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    print("guided by coverage (atheris)" if HAS_ATHERIS else "atheris is not installed: blind mutation, no coverage")
    print(f"{'target':10} {'executions':>10} {'seconds':>8} {'edges':>6}  failures", flush=True)
    failed = runs = 0
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        for done in pool.map(lambda name: fuzz(name, options), names):
            print(f"{done.name:10} {done.runs:10} {done.seconds:8.0f} {done.edges:>6}  {len(done.failures) or 'none'}")
            for line in done.failures:
                print(f"    {line}", flush=True)
            sys.stdout.flush()
            failed += len(done.failures)
            runs += done.runs
    print(f"{len(names)} targets, {runs} executions in {time.monotonic() - start:.0f} s, {failed or 'no'} failures")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
