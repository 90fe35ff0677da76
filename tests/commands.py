"""Commands of entries other than src.run, in processes that are forked with all imported."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.conftest import FORKS, ROOT


def start_entry(main: Callable[[list[str]], int], arguments: Sequence[str], folder: Path) -> BaseProcess:
    """Start the main of an entry; what it prints goes into the files `printed` and `err` of a folder."""
    process = FORKS.Process(target=_run, args=(main, list(arguments), folder))
    process.start()
    return process


def _run(main: Callable[[list[str]], int], arguments: list[str], folder: Path) -> None:
    for number, name in ((1, "printed"), (2, "err")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(ROOT)
    sys.exit(main(arguments))
