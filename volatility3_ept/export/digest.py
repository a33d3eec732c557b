"""SHA-256 beside the writing: hashing releases Python's lock, so a thread of its own costs the writer nothing."""

from __future__ import annotations

import hashlib
import queue
import threading
from typing import Final

from volatility3_ept.export.chunks import Bytes

_WAITING: Final = 4
_ZEROS_AT_ONCE: Final = 1 << 26
ZEROS: Final = bytes(1 << 20)


class Digest:
    """The SHA-256 of everything it is given, in order. At most a few pieces wait; then the giver waits."""

    def __init__(self) -> None:
        """Start the thread."""
        self._hash = hashlib.sha256()
        self._queue: queue.Queue[Bytes | bytes | int | None] = queue.Queue(_WAITING)
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def update(self, data: Bytes | bytes) -> None:
        """Take bytes, which nobody may change afterwards."""
        self._queue.put(data)

    def zeros(self, count: int) -> None:
        """Take so many zero bytes, in pieces: whoever gives up does not wait for the whole."""
        for left in range(count, 0, -_ZEROS_AT_ONCE):
            self._queue.put(min(left, _ZEROS_AT_ONCE))

    def hexdigest(self) -> str:
        """Wait for the thread and return the result. Nothing can be added afterwards."""
        self.close()
        return self._hash.hexdigest()

    def close(self) -> None:
        """End the thread."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()

    def _work(self) -> None:
        while (data := self._queue.get()) is not None:
            if not isinstance(data, int):
                self._hash.update(data if isinstance(data, bytes) else data.data)
                continue
            for left in range(data, 0, -len(ZEROS)):
                self._hash.update(ZEROS[:left])
