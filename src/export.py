"""Write the weights of a run in another form: `python -m src.export run=DIR KEY=VALUE …`.

The result is a folder that plain transformers loads, with a model card that says how to load and serve it, and for
causal models an Ollama Modelfile. The run itself stays as it is: model/ is only read.

- export.merge: true, as by default, writes whole weights; an adapter is merged into its base, which is made float32
  first where it was quantised. false writes the adapter alone.
- export.dtype is the type of the weights; export.padding=false leaves out the rows of no token, which
  tokens.pad_to_multiple_of adds.
- export.checkpoint=best, last or step-N takes a checkpoint's weights in place of those in model/. The run need not be
  finished, and may be running.
- export.output is the folder; where none is given it is in export/ of the run's folder and says what it holds.

The folder is written under another name, read back, compared, and renamed when it is whole. What a killed command has
left is removed, and the next one begins anew. A folder that holds this export is left as it is; force=true replaces
another export there, but never files that are not of an export.

Exit code 0, 1 where it went wrong, 2 where the user can fix it, 75 where a signal stopped it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from src.cli.entry import answer, as_command
from src.cli.exits import guarded
from src.config.gate import admit_finished
from src.config.job import Job
from src.config.problems import Problem, refuse
from src.config.schema import Dtype
from src.errors import Interrupted
from src.runtime.collector import collect_from_here
from src.runtime.signals import stop_on_signals

if TYPE_CHECKING:
    from pathlib import Path

    from src.tracking.console import Console


def export(job: Job) -> int:
    """Write what is asked for, unless it is there; return the exit code. TowlineError says what the user can fix."""
    from src.exporting.folder import is_exported, output_of, remove_unfinished, source_of
    from src.exporting.place import place_of_weights
    from src.tracking.console import Console
    from src.tracking.lock import held_beside

    check_request(job)
    output, console = output_of(job), Console()
    console.label("export", f"{job.run_dir} → {output}")
    place = place_of_weights(job)
    source = source_of(job, place)
    with held_beside(output):
        if is_exported(output, source, force=job.config.force):
            console.label("", "there already, and left as it is")
            return 0
        if remove_unfinished(output):
            console.label("", "an earlier command left an unfinished export: it is removed, and this one begins anew")
        try:
            write(job, place, source, console)
        except Interrupted:
            remove_unfinished(output)
            raise
    return 0


def check_request(job: Job) -> None:
    """Raise ConfigError where the form that is asked for is none of what the run has trained."""
    own, problems = job.entry_section, []
    if not own.merge and not job.config.adapter.is_on:
        reason = "writes the adapter alone, and this run has none: it trained whole weights"
        problems.append(Problem.on_command_line("export.merge", reason, False))
    elif not own.merge:
        reason = "is of whole weights, and export.merge=false writes the adapter, which stays as it was trained"
        given = {"export.dtype": own.dtype is not Dtype.auto and own.dtype.value, "export.padding": not own.padding}
        problems += [Problem.on_command_line(key, reason, value) for key, value in given.items() if value]
    if problems:
        raise refuse(problems)


def write(job: Job, place: Path, source: dict[str, object], console: Console) -> None:
    """Load the weights at `place`, write them in the form that is asked for, check and rename the folder."""
    from src.exporting.result import write_result  # torch takes seconds, and what can be refused is refused by now
    from src.exporting.weights import load_weights
    from src.runtime.session import start_runtime

    collect_from_here()
    config = job.config
    with (
        stop_on_signals() as stop,
        start_runtime(config.runtime, config.training.mixed_precision, config.seed, stop) as runtime,
    ):
        with console.work("loading", str(place)):
            weights = load_weights(job, place, runtime)
        console.label("weights", str(place))
        stop.check()
        write_result(job, weights, source, console)
        console.label("", "written, and compared with what was trained")


def main(argv: Sequence[str] | None = None) -> int:
    """Check the command line as a whole, then export; return the exit code."""

    def run(arguments: list[str]) -> int:
        job = admit_finished(arguments, "export")
        again = "The run is as it was; the same command begins the export anew."
        return guarded(lambda: export(job), when_stopped=again, when_full="The run is as it was: make room.")

    return answer("export", __doc__, argv, run)


if __name__ == "__main__":
    as_command(main)
