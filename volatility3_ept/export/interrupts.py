"""An orderly end when the process is told to stop, so that files which are not whole are removed.

Python turns SIGINT into an exception. SIGTERM and SIGHUP end it at once, and nothing is tidied up; within
:func:`orderly_end` they raise SystemExit instead. Nothing helps against SIGKILL.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

_SIGNALS: Final = [number for number in (getattr(signal, name, None) for name in ("SIGTERM", "SIGHUP")) if number]


@contextmanager
def orderly_end() -> Iterator[None]:
    """Raise SystemExit, with the status that a shell expects, where a signal would end the process.

    A handler that a program has set is left alone, and so are signals that it ignores (nohup). Only the main thread may
    set one: in others nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    taken = [number for number in _SIGNALS if signal.getsignal(number) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, _end)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def _end(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
