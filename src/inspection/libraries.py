"""What a run's process holds before there is any data or model, measured in a process that imports the same."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

MEASURE = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
import psutil
print(psutil.Process().memory_info().rss)
"""


class LibraryMemory:
    """A measurement that goes on while other things are done, and ends with its block."""

    def __init__(self, modules: Sequence[str]) -> None:
        """Begin to import modules in a process of their own."""
        command = [sys.executable, "-c", MEASURE, *modules]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    def __enter__(self) -> LibraryMemory:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()  # no harm where it has ended
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def bytes(self) -> int | None:
        """Return the bytes that a process with these modules holds; None where one of them can't be imported."""
        assert self._process.stdout is not None
        printed = self._process.stdout.read()
        return int(printed) if self._process.wait() == 0 else None
