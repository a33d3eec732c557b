"""Starts the ``vol`` command of the running interpreter's environment, as a user does, and keeps what it printed."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: No run of these tests needs a tenth of it; a machine with other work may.
TIMEOUT_SECONDS = 150
BANNER = "Volatility 3 Framework"


def command(name: str = "vol", module: str = "volatility3.cli") -> list[str]:
    """Return the command line of a script that pip put beside this interpreter, or what that script does."""
    folder = Path(sys.executable).parent
    for script in (folder / name, folder / f"{name}.exe"):
        if script.exists():
            return [str(script)]
    return entry_point(module)


def entry_point(module: str = "volatility3.cli") -> list[str]:
    """Return what the script of Volatility does, for an environment whose packages come from elsewhere."""
    return [sys.executable, "-c", f"import sys; sys.argv[0] = 'vol'; from {module} import main; main()"]


@dataclass(frozen=True)
class Result:
    """What one run printed, and its exit status."""

    args: tuple[str, ...]
    status: int
    out: str
    err: str

    @property
    def table(self) -> str:
        """Standard output without Volatility's banner."""
        return "\n".join(line for line in self.out.splitlines() if not line.startswith(BANNER)).strip("\n")

    @property
    def rows(self) -> list[list[str]]:
        """The rows of the ``quick`` renderer, column titles first; nested rows without their asterisks."""
        return [line.lstrip("* ").split("\t") for line in self.table.splitlines() if line]

    @property
    def json(self) -> list[dict[str, Any]]:
        """The rows of ``-r json``, in which the banner goes to standard error."""
        rows: list[dict[str, Any]] = json.loads(self.out)
        return rows

    @property
    def csv(self) -> list[list[str]]:
        """The rows of ``-r csv``, column titles first."""
        return list(csv.reader(io.StringIO(self.table)))

    def check(self) -> Result:
        """Return itself; fail when the run did."""
        assert self.status == 0, f"vol {' '.join(self.args)}\nstatus {self.status}\n{self.out}\n{self.err}"
        assert "Traceback" not in self.err, self.err
        return self


@dataclass
class Volatility:
    """Runs a command in a home and with caches of its own. Equal runs are made once: their results are shared."""

    home: Path
    start: Sequence[str] = field(default_factory=command)
    environment: Mapping[str, str] = field(default_factory=dict)
    _known: dict[tuple[str, ...], Result] = field(default_factory=dict)

    def __call__(self, *args: str | Path, text: str = "") -> Result:
        """Run with these arguments; ``text`` is typed into it."""
        given = tuple(str(arg) for arg in args)
        key = (*given, text)
        if key not in self._known:
            self._known[key] = self._run(given, text)
        return self._known[key]

    def prepare(self, *runs: Sequence[str | Path]) -> None:
        """Make several runs at once, on all processors."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda args: self(*args), runs))

    def _run(self, args: tuple[str, ...], text: str) -> Result:
        # Runs at the same time must not share a cache: Volatility deletes a database that it finds locked. The folder
        # must exist: where it does not, Volatility ends with a traceback.
        cache = self.home / f"cache-{threading.get_ident()}"
        cache.mkdir(exist_ok=True)
        done = subprocess.run(
            [*self.start, "--cache-path", str(cache), "--offline", "-q", *args],
            capture_output=True,
            text=True,
            input=text,
            cwd=self.home,
            env={**os.environ, "HOME": str(self.home), "XDG_CACHE_HOME": str(self.home), **self.environment},
            timeout=TIMEOUT_SECONDS,
            check=False,
        )
        return Result(args, done.returncode, done.stdout, done.stderr)
