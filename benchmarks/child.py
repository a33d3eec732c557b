"""Calls one function of a benchmark in a process of its own, so that its peak memory is its own: prints JSON."""

from __future__ import annotations

import importlib
import json
import resource
import sys


def main() -> None:
    module, function, arguments = sys.argv[1:]
    target = getattr(importlib.import_module(module), function)
    answer = target(*json.loads(arguments))
    print(json.dumps({"answer": answer, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))


if __name__ == "__main__":
    main()
