"""Everything about a run that can be known without training it: `python -m src.preflight KEY=VALUE …`.

Takes the same choices as src.run, and keys of its own. Loads no weights unless it measures. Exit code 0, 1 where a
finding is an error, 2 where the user can fix it.
"""

from collections.abc import Sequence
from pathlib import Path

from src.cli.entry import answer, as_command
from src.cli.exits import guarded
from src.config.gate import admit
from src.config.job import Job
from src.errors import TowlineError


def preflight(job: Job) -> int:
    """Show what a run of an admitted job would be, and return the exit code; TowlineError says what to fix."""
    from src.tracking.console import Console

    config, own = job.config, job.entry_section
    if own.dump is not None and not Path(own.dump).absolute().parent.is_dir():
        raise TowlineError(f"preflight.dump = {own.dump} can't be written: No such file or directory")
    console = Console()
    console.label("preflight", f"{config.name}: nothing is trained")

    from src.inspection.libraries import import_as_run
    from src.sweep.engines.local import PRELOAD_MODULE, modules_of_run

    libraries_bytes = import_as_run([PRELOAD_MODULE, *modules_of_run(config)])

    from src.inspection.preview import inspect_run  # imports what was counted above

    return inspect_run(job, console, libraries_bytes)


def main(argv: Sequence[str] | None = None) -> int:
    """Check the command line as a whole, then look at what it asks for; return the exit code."""

    def look(arguments: list[str]) -> int:
        job = admit(arguments, "preflight").run
        assert job is not None
        return guarded(lambda: preflight(job), when_stopped="Nothing was trained.")

    return answer("preflight", __doc__, argv, look)


if __name__ == "__main__":
    as_command(main)
