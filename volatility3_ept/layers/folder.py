"""Where files of a plugin go: the folder of ``-o``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

from volatility3.framework import interfaces

from volatility3_ept.layers import errors


def output(plugin: interfaces.plugins.PluginInterface) -> Path:
    """Return the folder of ``-o``; EptError where the program does not say.

    Volatility gives a plugin no folder but a class that writes files, and that one renames instead of refusing where a
    file exists. It knows its folder, and says so when asked where it would put a file.
    """
    where = getattr(plugin.open, "_get_final_filename", None)
    if where is None:
        raise errors.EptError("this program does not say where files go; in Python use volatility3_ept.open")
    return Path(where(SimpleNamespace(preferred_filename="file"))).parent


def plain_name(text: str, option: str) -> str:
    """Return a file name that the user gave; EptError when it would leave the folder."""
    if not text or text in (".", "..") or Path(text).name != text or "\\" in text or "\0" in text:
        raise errors.EptError(f"{option} {text}: give a plain file name; the file goes into the folder of -o")
    return text


def inside(base: Path, name: str, option: str) -> Path:
    """Return a path that the user named, within ``base``; EptError when it leads out of it."""
    path = (base / name).resolve()
    if not path.is_relative_to(base.resolve()):
        raise errors.EptError(f"{option} {name}: that is outside the output folder {base} (-o); nothing was written")
    return path


def fill(
    plugin: interfaces.plugins.PluginInterface,
    name: str,
    option: str,
    write: Callable[[Path], None],
    failure: type[Exception],
) -> None:
    """Let ``write`` put files into a folder that the user named, within that of ``-o``.

    EptError with one line when it leads out of it, and when ``write`` raises ``failure``.
    """
    target = inside(output(plugin), name, option)
    try:
        write(target)
    except failure as error:
        raise errors.EptError(f"{option} {name}: {error}") from None
