"""Runs Volatility's own ``linux.*`` plugins on a guest's memory twice.

Once on an image of the guest made from its ground truth, which no EPT or NPT has touched, and once on the image of its
host with ``--guest``. ``sweep_page.py`` writes the comparison down.
"""

from __future__ import annotations

import collections
import contextlib
import datetime
import functools
import hashlib
import io
import multiprocessing
import os
import pickle
import signal
import struct
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import captures
import volatility3.plugins
import volatility3.symbols
from captures import PAGE, Capture
from volatility3 import framework
from volatility3.framework import automagic, constants, contexts, interfaces, plugins, renderers
from volatility3.framework.automagic import stacker
from volatility3.framework.configuration import requirements

#: The plugin that finds the kernel, through every automagic, before the others use what it found.
FIRST = "linux.pslist.PsList"
#: Seconds that one plugin may take on one image.
TIMEOUT = 180

#: What a plugin that does nothing useful by itself is asked. ``dump`` compares the files that a plugin writes, too.
ARGUMENTS: dict[str, Mapping[str, Any]] = {
    "linux.elfs.Elfs": {"dump": True},
    "linux.kallsyms.Kallsyms": {"core": True, "modules": True, "ftrace": True, "bpf": True},
    "linux.lsmod.Lsmod": {"dump": True},
    "linux.pagecache.InodePages": {"find": "/tmp/secret.txt", "dump": True},
    "linux.pagecache.RecoverFs": {"compression_format": "xz"},  # unlike gz it holds no time of writing
    "linux.proc.Maps": {"dump": True},
    "linux.pslist.PsList": {"threads": True, "decorate_comm": True, "dump": True},
    "linux.tracing.ftrace.CheckFtrace": {"show_ftrace_flags": True},
    "linux.vmaregexscan.VmaRegExScan": {"pattern": "L2-GUEST-MARKER-1-[A-Z]+"},
    "linux.vmayarascan.VmaYaraScan": {"yara_string": "L2-GUEST-MARKER"},
}
#: These want the address of a module: the first that ``linux.lsmod`` shows.
NEED_MODULE = {"linux.module_extract.ModuleExtract": "base"}


@dataclass(frozen=True)
class Outcome:
    """What a plugin gave: rows and files, and the type of the exception that ended it, if one did."""

    columns: tuple[str, ...] = ()
    rows: tuple[tuple[Any, ...], ...] = ()
    files: tuple[tuple[str, int, str], ...] = ()
    error: str = ""
    message: str = ""
    seconds: float = 0.0

    @property
    def facts(self) -> tuple[Any, ...]:
        """Return what must be the same on both images, order included: all but an error's wording and the time."""
        return self.columns, self.rows, self.files, self.error

    def differences(self, other: Outcome) -> list[str]:
        """Return, one a line, what is here and not there (``-``) and the other way round (``+``)."""
        lines = [] if self.error == other.error else [f"- ends with {self.error}", f"+ ends with {other.error}"]
        for name in ("columns", "rows", "files"):
            mine, its = (collections.Counter(getattr(outcome, name)) for outcome in (self, other))
            lines += [f"- {item}" for item in (mine - its).elements()]
            lines += [f"+ {item}" for item in (its - mine).elements()]
        return lines or ([] if self.facts == other.facts else ["the same rows or files in another order"])


class NotRunError(Exception):
    """There is nothing in the guest that the plugin could be asked about; the message says what is missing."""


@functools.cache
def load() -> tuple[str, ...]:
    """Load Volatility's plugins; return the modules of ``linux.*`` plugins that lack a library they need."""
    failures = framework.import_files(volatility3.plugins, True)
    return tuple(sorted(name for name in failures if name.startswith("volatility3.plugins.linux.")))


def plugin_names() -> list[str]:
    """Return every ``linux.*`` plugin that this Volatility can load, by its full name."""
    load()
    return sorted(name for name in framework.list_plugins() if name.startswith("linux."))


def write_truth(capture: Capture, path: Path, without: Collection[int] = ()) -> None:
    """Write a guest's true memory as a LiME file: every page that the VMM held, and a hole wherever it held none.

    Each page is found by its host frame, which the VMM looked up in its own page tables, and checked by its SHA-256.
    ``without`` leaves out pages, by guest-physical address.
    """
    pages = capture.guests[0].pages
    with path.open("wb") as file:
        for gpa, size in _runs(sorted(set(pages) - set(without))):
            file.write(struct.pack("<IIQQQ", 0x4C694D45, 1, gpa, gpa + size - 1, 0))
            for address in range(gpa, gpa + size, PAGE):
                frame, digest = pages[address]
                data = capture.page(frame * PAGE)
                if hashlib.sha256(data).hexdigest() != digest:
                    raise ValueError(f"{capture.name}: guest page {address:#x} is not the one that the VMM held")
                file.write(data)


def _runs(addresses: list[int]) -> Iterator[tuple[int, int]]:
    start = end = None
    for address in addresses:
        if address != end:
            if start is not None:
                yield start, end - start
            start = address
        end = address + PAGE
    if start is not None:
        yield start, end - start


class Image:
    """A memory image opened by Volatility in a process of its own, where plugins run one after another.

    The first plugin selects the layers as ``vol`` does: a new context, the options of the command line in the
    configuration, all automagics in their order. The kernel that they find is handed to each further plugin, which
    runs through all automagics again, in a fork: none sees what another left behind, and one that hangs can be ended.
    """

    def __init__(self, path: Path, guest: str | None = None) -> None:
        """Start to open an image; ``guest`` is the value of ``--guest``."""
        fork = multiprocessing.get_context("fork")
        self._pipe, other = fork.Pipe()
        self._process = fork.Process(target=_serve, args=(other, path, guest), daemon=True)
        self._process.start()
        other.close()

    def start(self, plugin: str, arguments: Mapping[str, Any]) -> None:
        """Ask for a plugin's outcome; :meth:`finish` returns it."""
        self._pipe.send((plugin, dict(arguments)))

    def finish(self) -> Outcome:
        """Wait for the plugin that was started."""
        outcome: Outcome = self._pipe.recv()
        return outcome

    def run(self, plugin: str, arguments: Mapping[str, Any] | None = None) -> Outcome:
        """Run a plugin and wait for it."""
        self.start(plugin, arguments or {})
        return self.finish()

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.join()
        self._pipe.close()


class Pair:
    """The same guest twice: its ground truth, and its host with ``--guest 0``."""

    def __init__(self, capture: Capture, folder: Path) -> None:
        """Make the image of the ground truth in ``folder`` and open both."""
        self.capture = capture
        self.folder = folder
        truth = folder / "truth.lime"
        self.guest = Image(capture.path, "0")
        write_truth(capture, truth)
        self.truth = Image(truth)

    def compare(self, plugin: str) -> tuple[Outcome, Outcome]:
        """Run a plugin on the truth and through ``--guest 0``, side by side."""
        arguments = self.arguments(plugin)
        self.truth.start(plugin, arguments)
        self.guest.start(plugin, arguments)
        return self.truth.finish(), self.guest.finish()

    def arguments(self, plugin: str) -> Mapping[str, Any]:
        """Return what a plugin is asked in this capture; NotRunError when there is nothing to ask."""
        if plugin in NEED_MODULE:
            modules = self.truth.run("linux.lsmod.Lsmod").rows
            if not modules:
                raise NotRunError("no module is loaded in the guest")
            return {NEED_MODULE[plugin]: modules[0][1]}
        return ARGUMENTS.get(plugin, {})

    def close(self) -> None:
        """End both processes."""
        self.guest.close()
        self.truth.close()


def _serve(pipe: Any, path: Path, guest: str | None) -> None:
    """Open an image, then run the plugins that come through the pipe until the parent is gone."""
    load()
    constants.OFFLINE = True
    volatility3.symbols.__path__ = [str(captures.SYMBOLS), *constants.SYMBOL_BASEPATHS]
    with tempfile.TemporaryDirectory() as cache, contextlib.suppress(EOFError):
        constants.CACHE_PATH = cache
        context = _context(path, guest)
        _construct(context, FIRST, None)
        while True:
            plugin, arguments = pipe.recv()
            pipe.send(_forked(path, guest, context, plugin, arguments))


def _forked(path: Path, guest: str | None, context: Any, plugin: str, arguments: Mapping[str, Any]) -> Outcome:
    receive, send = os.pipe()
    child = os.fork()
    if not child:
        status = 1
        try:
            signal.alarm(TIMEOUT)  # no handler: it ends this process whatever the plugin catches
            sys.stdout = sys.stderr = io.StringIO()
            time.time = lambda: 0.0  # RecoverFs dates what it writes
            outcome = _outcome(path, guest, context, plugin, arguments)
            with open(send, "wb") as file:
                pickle.dump(outcome, file)
            status = 0
        finally:
            os._exit(status)
    os.close(send)
    with open(receive, "rb") as file:
        data = file.read()
    _, status = os.waitpid(child, 0)
    if status:
        return Outcome(error=signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else f"exit {status}")
    result: Outcome = pickle.loads(data)
    return result


def _outcome(path: Path, guest: str | None, context: Any, plugin: str, arguments: Mapping[str, Any]) -> Outcome:
    started = time.monotonic()
    columns: tuple[str, ...] = ()
    rows: list[tuple[Any, ...]] = []
    files: list[_File] = []
    error = message = ""

    class File(_File):
        def __init__(self, filename: str) -> None:
            super().__init__(filename)
            files.append(self)

    try:
        if not _needs_only_a_kernel(plugin):
            context = _context(path, guest)
        for key, value in arguments.items():
            context.config[f"plugins.{_class(plugin).__name__}.{key}"] = value
        grid = _construct(context, plugin, File).run()
        columns = tuple(column.name for column in grid.columns)
        grid.populate(lambda node, _: rows.append((node.path_depth, *map(_plain, node.values))), None)
    except (Exception, SystemExit) as problem:
        error, message = type(problem).__name__, str(problem)
    written = tuple((f.preferred_filename, len(f.data), hashlib.sha256(f.data).hexdigest()) for f in files)
    return Outcome(columns, tuple(rows), written, error, message, time.monotonic() - started)


class _File(io.BytesIO, interfaces.plugins.FileHandlerInterface):
    """A file that a plugin writes, kept in memory."""

    def __init__(self, filename: str) -> None:
        io.BytesIO.__init__(self)
        interfaces.plugins.FileHandlerInterface.__init__(self, filename)
        self.data = b""

    def close(self) -> None:
        if not self.closed:
            self.data = self.getvalue()
        super().close()


def _class(plugin: str) -> Any:
    return framework.list_plugins()[plugin]


def _context(path: Path, guest: str | None) -> Any:
    """Return a new context with what ``vol -f PATH --guest GUEST`` puts into it."""
    context = contexts.Context()
    context.config["automagic.LayerStacker.single_location"] = requirements.URIRequirement.location_from_file(str(path))
    if guest is not None:
        context.config["automagic.GuestSelector.guest"] = guest
    return context


def _construct(context: Any, plugin: str, files: Any) -> Any:
    """Return a plugin, after every automagic that ``vol`` would choose for it."""
    chosen = automagic.choose_automagic(automagic.available(context), _class(plugin))
    if context.config.get("automagic.LayerStacker.stackers", None) is None:
        context.config["automagic.LayerStacker.stackers"] = stacker.choose_os_stackers(_class(plugin))
    if len(context.modules):
        context.config[f"plugins.{_class(plugin).__name__}.kernel"] = next(iter(context.modules))
    return plugins.construct_plugin(context, chosen, _class(plugin), "plugins", None, files)


def _needs_only_a_kernel(plugin: str) -> bool:
    layered = (requirements.TranslationLayerRequirement, requirements.SymbolTableRequirement)
    return not any(isinstance(item, layered) for item in _class(plugin).get_requirements())


def _plain(value: Any) -> Any:
    """Return a cell as a value that can be compared in another process."""
    if isinstance(value, interfaces.renderers.BaseAbsentValue):
        return f"<{type(value).__name__}>"
    if isinstance(value, renderers.Disassembly):
        return value.data, value.offset, value.architecture
    if isinstance(value, renderers.LayerData):
        layer = value.context.layers[value.layer_name]
        return value.offset, value.length, layer.read(value.offset, value.length, pad=True)
    for kind in (bool, int, float, bytes, str, datetime.datetime):
        if isinstance(value, kind):
            return value if kind in (bool, datetime.datetime) else kind(value)
    raise TypeError(f"a cell of type {type(value).__name__}")
