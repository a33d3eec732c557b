"""A real browser, where there is one, and a server that counts what a page asks for."""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

_OPTIONS = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-background-networking",
            "--no-first-run", "--disable-component-update", "--enable-logging=stderr"]  # fmt: skip


def command() -> str:
    """Return the browser; skip the test, with the way to one, where there is none."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if shutil.which(name):
            return name
    pytest.skip("no browser (Debian: apt-get install chromium)")


class _Quiet(SimpleHTTPRequestHandler):
    def __init__(self, *args, asked: list[str], **kwargs) -> None:
        self._asked = asked
        super().__init__(*args, **kwargs)

    def do_GET(self) -> None:
        self._asked.append(self.path)
        super().do_GET()

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve a folder; yields its address and the list of the paths that were asked for."""
    asked: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, asked=asked, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        server.server_close()


def run(home: Path, address: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Open an address with a profile of its own; returns what the browser printed."""
    return subprocess.run(
        [command(), *_OPTIONS, f"--user-data-dir={home / 'profile'}", *options, address],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def complaints(done: subprocess.CompletedProcess[str]) -> list[str]:
    """Return what pages wrote to the console, errors and refused loads too."""
    return [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
