"""Make the scripts in ``testdata/generate`` importable: they are no part of the installed package."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "testdata" / "generate"))
