"""A file that appears under its name when it is whole, or not at all."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType

import numpy as np

from volatility3_ept.export.chunks import Bytes
from volatility3_ept.export.interrupts import orderly_end

#: What a file system answers that knows no second name for a file.
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EACCES)


class OutputError(Exception):
    """A file could not be written: the message is one line, and nothing of the file is left."""


class Output:
    """One file in a folder, written under a temporary name in it and then renamed.

    Leaving the context without :meth:`publish` removes it: after an error, after an interrupt, and when the process is
    told to end (SIGTERM, SIGHUP). Only SIGKILL leaves it behind, as ``.NAME.*.part``.
    """

    def __init__(self, folder: Path, name: str, overwrite: bool = False) -> None:
        """Take the names; OutputError when the file exists already and is not to be replaced."""
        self.path = folder / name
        self.position = 0
        self._overwrite = overwrite
        self._temporary: Path | None = None
        self._descriptor = -1
        self._stack = ExitStack()
        if not overwrite and os.path.lexists(self.path):
            raise OutputError(f"{self.path} exists already; it was not touched (--overwrite replaces it)")

    def __enter__(self) -> Output:
        """Create the temporary file, which only its owner can read."""
        with ExitStack() as stack:
            stack.enter_context(orderly_end())
            with self._errors():
                self._descriptor, name = tempfile.mkstemp(
                    dir=self.path.parent, prefix=f".{self.path.name}.", suffix=".part"
                )  # fmt: skip
                self._temporary = Path(name)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file, and remove it unless it was published."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        if self._temporary is not None:
            self._temporary.unlink(missing_ok=True)
            self._temporary = None
        self._stack.close()

    def reserve(self, size: int) -> None:
        """Give the file its size, so that one which the file system cannot hold is refused at once."""
        with self._errors():
            os.ftruncate(self._descriptor, size)

    def write(self, data: Bytes | bytes) -> None:
        """Append bytes."""
        view = memoryview(data.data if isinstance(data, np.ndarray) else data).cast("B")
        try:
            while view:
                written = os.pwrite(self._descriptor, view, self.position)
                self.position += written
                view = view[written:]
        except OSError as error:
            raise self._failed(error) from error

    def skip(self, count: int) -> None:
        """Leave a hole: zeros to a reader, nothing on the disk."""
        self.position += count

    def publish(self) -> None:
        """Give the file its name, and the size that was reached."""
        with self._errors():
            os.ftruncate(self._descriptor, self.position)
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)
            if self._temporary is not None:
                self._rename(self._temporary)
                self._temporary = None

    def _rename(self, temporary: Path) -> None:
        """Move the file to its name; one that somebody else created there meanwhile is not replaced."""
        if not self._overwrite:
            try:
                os.link(temporary, self.path)
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                if os.path.lexists(self.path):
                    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from None
            else:
                temporary.unlink()
                return
        temporary.replace(self.path)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> OutputError:
        return OutputError(f"{self.path}: {error.strerror or error}; nothing of it is left")


def write_texts(folder: Path, texts: Mapping[str, str], overwrite: bool = False) -> None:
    """Write text files, by name, into a folder, made where it is missing; OutputError with one line on failure."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: {error.strerror or error}") from error
    for name, text in texts.items():
        with Output(folder, name, overwrite) as output:
            output.write(text.encode())
            output.publish()
