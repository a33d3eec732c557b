"""Errors that must end the program.

Volatility swallows every :class:`Exception` that an automagic or a stacker raises and goes on without it: with the
host's layer, where a guest was asked for. Analysing the wrong machine without a word is the worst thing that this
suite could do, so these errors derive from SystemExit: ``vol`` prints the message and ends with a status that is not
zero. A script that embeds Volatility catches :class:`EptError` explicitly.
"""

from __future__ import annotations


class EptError(SystemExit):
    """An error that ends the program with one clear line (:attr:`message`) and exit status 1."""

    def __init__(self, message: str) -> None:
        """Take the message; the process prints it on stderr, behind a newline that ends Volatility's progress line."""
        super().__init__(f"\nvolatility3_ept: {message}")
        self.message = message


class CaptureError(EptError):
    """The file is no capture, or not a whole one."""


class GuestError(EptError):
    """``--guest`` names no machine, or more than one."""
