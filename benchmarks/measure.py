"""Runs a command and says on standard error what it took: exit status, wall time, CPU time, peak memory in KiB.

A process of its own, because what a process is told of a child's peak memory is never less than its own size.
"""

from __future__ import annotations

import os
import sys
import time


def main() -> None:
    began = time.perf_counter()
    process = os.fork()
    if not process:
        os.dup2(1, 2)
        try:
            os.execvp(sys.argv[1], sys.argv[1:])
        finally:
            os._exit(127)
    _, status, usage = os.wait4(process, 0)
    wall = time.perf_counter() - began
    code = os.waitstatus_to_exitcode(status)
    sys.stderr.write(f"{code} {wall} {usage.ru_utime + usage.ru_stime} {usage.ru_maxrss}")


if __name__ == "__main__":
    main()
