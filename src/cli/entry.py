"""What entries have in common: help, and an exit code for each way to end."""

import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from src.cli.environment import set_switches
from src.cli.exits import guarded
from src.cli.streams import outlive_readers
from src.config.help import help_of_entry
from src.errors import show_libraries_visibly
from src.runtime.collector import rest_while_importing


def as_command(main: Callable[[], int]) -> NoReturn:
    """Run the main of an entry as this process, and exit with its code."""
    rest_while_importing()
    set_switches()
    outlive_readers()
    sys.exit(main())


def answer(name: str, doc: str | None, argv: Sequence[str] | None, action: Callable[[list[str]], int]) -> int:
    """Answer the command line of an entry other than src.run, `argv` or the process's own; return the exit code.

    --help shows the entry's docstring, `doc`; `action` is called with all other arguments.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    show_libraries_visibly()
    if {"-h", "--help"} & set(arguments):
        return guarded(lambda: help_of_entry(name, doc, arguments))
    return guarded(lambda: action(arguments))
