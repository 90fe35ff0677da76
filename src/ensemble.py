"""Make one of several finished runs: `python -m src.ensemble runs=[DIR,…] KEY=VALUE …`, or `dir=SWEEP` for the finished
trials of a sweep (ensemble.top=N: those of its N best settings).

ensemble.method says how:
- soup: the mean of the weights. The runs must have one architecture, one base and one vocabulary; adapters are merged.
- greedy_soup: the same of those that make validation better, tried from the best on.
- logits: each token by the mean of the probabilities, with one vocabulary; all models are in memory at once.
- consensus: of the texts that the runs predict the one most like the others, by ensemble.similarity. Models and
  tokenizers may differ.

All are scored on the test sets of the runs (data.test_files=[FILE] names others), each beside its members, and only on
rows that no member was trained on; others are left out, and counted. greedy_soup needs such rows of validation too:
over folds, name some with data.validation_files=[FILE].

A soup is a finished run's folder, with model/ and its card, which run=DIR of the other commands takes. The others write
predictions/<set>.jsonl, .csv and metrics.json as src.predict does. ensemble.json has the scores; those in a sweep's
folder have a row in its leaderboard. A finished ensemble is left as it is (force=true makes it anew). One that was
stopped: predictions are continued, a soup is begun anew.

Exit code 0, 1 where it went wrong, 2 where the user can fix it, 75 where a signal stopped it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from src.cli.entry import answer, as_command
from src.cli.exits import guarded
from src.config.gate import admit_members
from src.config.job import Job
from src.config.problems import Problem, refuse
from src.config.schema import EnsembleMethod
from src.errors import RunFolderError
from src.runtime.signals import StopRequest, stop_on_signals
from src.trials.standings import FinishedTrials, refresh_leaderboard
from src.util import plural

SOUPS = (EnsembleMethod.soup, EnsembleMethod.greedy_soup)

if TYPE_CHECKING:
    from src.combining.members import Member
    from src.combining.record import Outcome
    from src.tracking.console import Console

    Combine = Callable[[Path, StopRequest], Outcome]


def ensemble(jobs: Sequence[Job], sweep: Path | None) -> int:
    """Make the ensemble and score it beside its members; return the exit code.

    TowlineError says what the user can fix; Interrupted, that a signal asked it to stop.
    """
    from src.combining import record
    from src.combining.members import members_of
    from src.tracking.console import Console
    from src.tracking.lock import hold

    console, method, force = Console(), jobs[0].entry_section.method, jobs[0].config.force
    members = members_of(jobs, in_sweep=sweep is not None)
    output, decided = record.folder_of(members, sweep), record.decided_by(members)
    console.label("ensemble", f"{method.value} of {plural(len(members), 'run')} → {output}")
    with stop_on_signals() as stop, hold(output):
        if found := record.read_finished(output, decided, force=force):
            console.label("", "finished and left as it is (ensemble.output=DIR makes one elsewhere, force=true anew)")
        else:
            combine = prepare(method, members, console)
            if record.begin(output, decided, force=force) and method in SOUPS:
                console.label("", "an earlier command was stopped here; a soup is begun anew")
            found = record.finish(output, decided, combine(output, stop))
        record.show(found, console)
    if sweep is not None:
        try:
            refresh_leaderboard(sweep)
            console.label("leaderboard", str(sweep / "leaderboard.md"))
        except RunFolderError as busy:
            console.say(f"The sweep adds the ensemble to its leaderboard when it ends: {busy}")
    return 0


def prepare(method: EnsembleMethod, members: Sequence[Member], console: Console) -> Combine:
    """Check that members go together, and on which rows; return what combines them in a folder that is held."""
    # imported here: torch takes seconds, and a folder that is in use or holds another ensemble is refused at once
    from src.combining.members import check_one_model, check_one_vocabulary, differing_seeds, named_twice
    from src.combining.texts import combine_consensus, combine_probabilities, unseen_tests
    from src.combining.weights import combine_weights
    from src.data.trained import RowHashes

    for run in named_twice(members):
        console.warn(f"{run} is named more than once, and counts as often")
    if method in SOUPS:
        check_one_model(members)
        if seeds := differing_seeds(members):
            console.warn(f"the members began with other random weights (seeds {seeds}): their mean is rarely any good")
    elif method is EnsembleMethod.logits:
        check_one_vocabulary(members)
    hashes = RowHashes(console.working)
    if method in SOUPS:
        return lambda output, stop: combine_weights(members, hashes, output, stop, console)
    rows = unseen_tests(members, hashes, console)
    combine = combine_probabilities if method is EnsembleMethod.logits else combine_consensus
    return lambda output, stop: combine(members, rows, output, stop, console)


def admit(argv: Sequence[str]) -> tuple[list[Job], Path | None]:
    """Return the members that a command line asks for, and the sweep that they are of; raises as `admit_members`."""
    trials = FinishedTrials()
    jobs = admit_members(argv, trials)
    top = jobs[0].entry_section.top
    if (sweep := trials.standings) is not None:
        return [job for job in jobs if job.run_dir in sweep.finished(top)], sweep.folder
    if top is not None:
        reason = "chooses among the settings of a sweep: dir=SWEEP"
        raise refuse([Problem.on_command_line("ensemble.top", reason, top)])
    return jobs, None


def main(argv: Sequence[str] | None = None) -> int:
    """Check the command line as a whole, then make the ensemble; return the exit code."""

    def make(arguments: list[str]) -> int:
        jobs, sweep = admit(arguments)
        again = "The same command without force=true" if jobs[0].config.force else "The same command"
        return guarded(
            lambda: ensemble(jobs, sweep),
            when_stopped=f"{again} continues what it predicts; a soup is begun anew.",
            when_full=f"Make room. {again} continues.",
        )

    return answer("ensemble", __doc__, argv, make)


if __name__ == "__main__":
    as_command(main)
