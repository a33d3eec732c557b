"""The tools that ours is compared with: each in an environment of its own, and run as its users run it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import venv
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

VOLATILITY = "2.28.2"
CHIPSEC = "1.13.16"
#: CHIPSEC wants a platform and a revision identifier; the former has no effect on files.
CHIPSEC_ARGUMENTS = ("-n", "-p", "SKL", "-nl", "-nb", "-m", "tools.vmm.ept_finder", "-a")
_FRAME = 0x000F_FFFF_FFFF_F000


class PeerError(RuntimeError):
    """A tool could not be installed, or ended without an answer."""


@dataclass(frozen=True)
class Answer:
    """What a tool reported: for each root (address of the top table) how it was found, and what else it said."""

    roots: dict[int, str] = field(default_factory=dict)
    note: str = ""


def environment(work: Path, name: str, *requirements: str) -> Path:
    """Return the folder of scripts of an environment that holds these packages; it is made when it is missing."""
    folder = work / "environments" / name
    scripts = folder / ("Scripts" if os.name == "nt" else "bin")
    done = folder / "complete"
    if not done.exists():
        venv.create(folder, with_pip=True, clear=True)
        command = [str(scripts / "python"), "-m", "pip", "install", "-q", *requirements]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise PeerError(f"pip install {' '.join(requirements)}: {result.stderr.strip().splitlines()[-1]}")
        done.touch()
    return scripts


def volatility(work: Path) -> Path:
    """Return the ``vol`` of a Volatility without our plugins."""
    return environment(work, f"volatility3-{VOLATILITY}", f"volatility3=={VOLATILITY}") / "vol"


def chipsec(work: Path) -> Path:
    """Return the script of CHIPSEC."""
    return environment(work, f"chipsec-{CHIPSEC}", f"chipsec=={CHIPSEC}") / "chipsec_main"


def own() -> list[str]:
    """Return the ``vol`` of the running interpreter's environment, in which our plugins are installed."""
    script = Path(sys.executable).parent / ("vol.exe" if os.name == "nt" else "vol")
    if script.exists():
        return [str(script)]
    return [sys.executable, "-c", "import sys; sys.argv[0] = 'vol'; from volatility3.cli import main; main()"]


def clean(cache: Path) -> dict[str, str]:
    """Return an environment in which Volatility keeps its caches in a folder of its own."""
    return {**os.environ, "XDG_CACHE_HOME": str(cache), "PYTHONWARNINGS": "ignore"}


def rows(command: list[str], cache: Path) -> list[dict[str, Any]]:
    """Run a ``vol`` command that ends in ``-r json`` rows; PeerError when it gives none."""
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=clean(cache))
    try:
        parsed: list[dict[str, Any]] = json.loads(result.stdout)
    except ValueError:
        last = (result.stderr.strip() or result.stdout.strip() or "no output").splitlines()[-1]
        raise PeerError(f"exit status {result.returncode}: {last}") from None
    return parsed


def ask_own(image: Path, cache: Path) -> Answer:
    """Run ``ept.scan``; nested machines are keyed by the address of their root in the memory that holds it."""
    found = rows([*own(), "--offline", "-q", "-r", "json", "-f", str(image), "ept.scan", "--no-host-check"], cache)
    answer = Answer()

    def take(row: dict[str, Any]) -> None:
        how = f"{row['Found by']}; {row['vCPUs']} vCPU" if row["vCPUs"] else row["Found by"]
        answer.roots[int(row["Root"]) & _FRAME] = how
        for child in row["__children"]:
            take(child)

    for row in found:
        take(row)
    return answer


def ask_vmscan(image: Path, work: Path) -> Answer:
    """Run Volatility's ``vmscan``."""
    command = [str(volatility(work)), "--offline", "-q", "-r", "json", "-f", str(image), "vmscan"]
    found = rows(command, work / "cache-peer")
    return Answer({int(row["EPT"]) & _FRAME: "VMCS" for row in found})


def ask_chipsec(base: Path, revision: int, work: Path) -> Answer:
    """Run CHIPSEC's ``tools.vmm.ept_finder`` on ``BASE.dram_*``; it prints the roots before it walks them."""
    command = [str(chipsec(work)), *CHIPSEC_ARGUMENTS, f"file,{base},{revision:#x}"]
    folder = work / "chipsec-output"
    folder.mkdir(exist_ok=True)
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    line = re.search(r"-> EPTP:([0-9A-F ]*)", result.stdout)
    if line is None:
        raise PeerError(f"exit status {result.returncode}: {(result.stdout + result.stderr).strip().splitlines()[-1]}")
    structures = re.search(r"Found VMCSs: *(\d+)", result.stdout)
    how = "page tables, VMCS" if structures and int(structures[1]) else "page tables"
    return Answer({int(text, 16): how for text in line[1].split()})
