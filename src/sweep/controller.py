"""Conducts a sweep: which trial is next, what came of it, and what the study, MLflow and the terminal are told.

The folder is the truth: what a trial's own folder says counts, so that a sweep whose process was killed at any moment
goes on with the trials that are missing. No torch here.
"""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from src import secrets
from src.config.frozen import STATUS
from src.config.schema import Direction, Pruner, Sampler
from src.errors import (
    Interrupted,
    NonFiniteLossError,
    RunFolderError,
    StudyError,
    TowlineError,
    TrainingError,
    is_disk_full,
)
from src.records import read_bytes
from src.runtime.launch import ORPHAN_SECONDS
from src.runtime.signals import StopRequest
from src.sweep.folder import STATES, SweepFolder, TrialStatus
from src.sweep.launched import Launched
from src.sweep.plan import Plan
from src.sweep.progress import Entry, ProgressTable, counted
from src.sweep.study import Proposal, Study
from src.sweep.trial import Trial, short
from src.sweep.workers import Job, Workers
from src.tracking.run_folder import note_end, now

POLL_SECONDS = 0.1
POKE_SECONDS = 2.0
LAST_SECONDS = 2.0
"""How long it may take to hear of trials that were ended at once."""
UNENDED = {"PREEMPTED", "RUNNING", "WAITING"}
"""States of trials that the same command goes on with."""
T = TypeVar("T")
MOST_REPEATS = 25
"""How often in a row a sampler may propose what was tried before it is taken to have nothing new."""


@dataclass
class _Progress:
    """What is known of a trial besides its folder."""

    attempts: int = 0
    passed: int = 0
    """The evaluation of the last rung that it was let through."""
    started: float = 0.0
    """When it was last started, by the monotonic clock."""
    status: int | None = None
    """When its status.json was last written before that, in nanoseconds."""
    is_settled: bool = False
    """Whether this start of the sweep is done with it."""


class SweepController:
    """Runs the trials of one sweep whose folder is held."""

    def __init__(
        self,
        plan: Plan,
        record: SweepFolder,
        trials: list[Trial],
        todo: Sequence[int],
        study: Study | None,
        workers: Workers | Launched,
        stop: StopRequest,
        board: ProgressTable,
    ) -> None:
        self.plan, self.record, self.workers = plan, record, workers
        self._study = study
        self.stop, self.board = stop, board
        self.trials = {trial.number: trial for trial in trials}
        self.standings = {number: record.standing(number, plan.config.metric) for number in self.trials}
        self._progress = {number: _Progress() for number in self.trials}
        self.todo = set(todo)
        """The numbers of the trials that the command asks for."""
        self._queue = self._ordered(todo)
        self._metric, self._is_min = plan.config.metric, plan.config.direction is Direction.minimize
        self._has_given_up = False
        self.refusal = ""
        """Why the last proposal can't be run."""
        self._has_only_refusals = False
        self.fault = ""
        """What keeps every trial from being run or judged, and stops the sweep."""
        self._has_study = study is not None
        """Whether it has answered so far."""
        rests = plan.config.pruner is Pruner.asha
        self._resting = {
            number
            for number, standing in self.standings.items()
            if rests and standing.state == "PRUNED" and number in todo and self.study.is_open(self.trials[number].unit)
        }
        """Trials that ended at a rung, and go on once they are among its best."""
        self.notify: Callable[[], None] = lambda: None
        """Called when sweep.json says something new."""
        before = record.read()
        judged = [before.get("sweep", {}).get(key) for key in ("metric", "direction")]
        is_same = judged == [plan.config.metric, plan.config.direction.value]
        self.history: list[dict[str, Any]] = list(before.get("history", [])) if is_same else []
        self._started, self._started_at = before.get("started") or now(), time.time()
        self._seconds_before = float(before.get("elapsed_seconds", 0.0))
        self._durations: list[float] = []
        self._poked = 0.0

    # ---- what comes next

    def _ordered(self, todo: Sequence[int]) -> list[int]:
        """Put those first that have been begun, then those that wait, then those that failed."""
        order = {"PREEMPTED": 0, "RUNNING": 0, "WAITING": 1, "FAILED": 2}
        left = [number for number in todo if not self.standings[number].is_over]
        if self.plan.is_listed and self.plan.config.sampler is not Sampler.grid:
            left = self._shuffled(left)
        return sorted(left, key=lambda number: order[self.standings[number].state])

    def _shuffled(self, numbers: list[int]) -> list[int]:
        """Draw the order of settings by the sampler's seed: in the order of their values each might beat the last."""
        import random

        units = sorted({self.trials[number].unit for number in numbers})
        random.Random(self.plan.config.seed).shuffle(units)
        place = {unit: i for i, unit in enumerate(units)}
        return sorted(numbers, key=lambda number: (place[self.trials[number].unit], number))

    def _next(self) -> Trial | None:
        """Take the next trial that may start now."""
        if self._resting and (promoted := self._promoted()) is not None:
            return promoted
        for number in self._queue:
            if self._may_start(trial := self.trials[number]):
                self._queue.remove(number)
                return trial
        if self._propose():
            return self._next()
        if (
            self._resting
            and not self.workers.running
            and not any(s.state == "FINISHED" for s in self.standings.values())
        ):
            return self._promoted(at_least_one=True)
        return None

    def _promoted(self, *, at_least_one: bool = False) -> Trial | None:
        """Take a resting trial that is worth going on with by now."""
        by_unit = {self.trials[number].unit: number for number in self._resting}
        factor = self.plan.config.reduction_factor
        promoted = self._asked(lambda: self.study.promotable(by_unit, factor, at_least_one=at_least_one))
        if promoted is None:
            return None
        number = by_unit[promoted.unit]
        self._progress[number].passed = promoted.evaluation
        self._resting.discard(number)
        return self.trials[number]

    def _may_start(self, trial: Trial) -> bool:
        """Where trials of a setting are averaged and may end early, the first of them asks for all."""
        pilot = self._pilot(trial)
        if pilot is None or pilot.number == trial.number:
            return True
        return self._progress[pilot.number].is_settled or self.standings[pilot.number].state == "FINISHED"

    def _pilot(self, trial: Trial) -> Trial | None:
        if self.plan.config.pruner is Pruner.none or self.plan.num_replicates == 1:
            return None
        return min((one for one in self._of_unit(trial.unit) if one.number in self.todo), key=lambda one: one.number)

    def _propose(self) -> bool:
        """Have the sampler propose another setting; whether there is one to run."""
        if self.plan.is_listed or self._has_given_up:
            return False
        self._has_only_refusals = True
        for _ in range(MOST_REPEATS):
            units = {trial.unit for trial in self.trials.values()}
            if len(units) >= (self.plan.config.n_trials or 0):
                return False
            proposal = self._asked(self.study.propose)
            if proposal is None:
                return False
            self.refusal = ""
            if self._take(proposal, max(units, default=-1) + 1):
                return True
            self._has_only_refusals &= bool(self.refusal)
        self._has_given_up = True
        return False

    def _take(self, proposal: Proposal, unit: int) -> bool:
        """Make a proposal trials of a unit; where it can't be run, or was tried, it is answered at once."""
        first = max(self.trials, default=-1) + 1
        found, problems = self.plan.unit(proposal.overrides, unit, first)
        known = {trial.identity: trial.unit for trial in self.trials.values()}
        same = next((known[trial.identity] for trial in found if trial.identity in known), None)
        fresh = [trial for trial in found if trial.identity not in known]
        if problems:
            self.refusal = f"{problems[0].given}: {problems[0].reason}"
        if problems or not fresh:
            value = None if same is None else self._mean(same)
            self._asked(lambda: self.study.answer(proposal, value))
            return False
        unit = unit if same is None else same  # another seed of a setting that was tried
        self._asked(lambda: self.study.accept(proposal, unit))
        self._add([replace(trial, number=first + i, unit=unit) for i, trial in enumerate(fresh)])
        return True

    def _add(self, trials: Sequence[Trial]) -> None:
        for trial in trials:
            self.trials[trial.number] = trial
            self.todo.add(trial.number)
            self.standings[trial.number] = TrialStatus("WAITING")
            self._progress[trial.number] = _Progress()
            self._queue.append(trial.number)
        self.record.write_trials(list(self.trials.values()))

    # ---- running them

    def run(self) -> str:
        """Run what is left; gives why it ended before all was done, or ''.

        Raises:
            KeyboardInterrupt: where it was asked twice to stop; every trial has been ended then.
        """
        noted = {point["trial"] for point in self.history}
        for number, standing in sorted(self.standings.items()):
            if standing.state == "FINISHED" and number not in noted:
                self._note(number, standing)
        self._asked(self._reconcile)
        if (self._queue or not self.plan.is_listed) and not self.workers.is_ready(POLL_SECONDS):
            self.board.say("importing what the trials need")
            while not self.workers.is_ready(POLL_SECONDS) and not self._why_stop():
                pass
        why = ""
        try:
            while True:
                why = why or self._why_stop()
                if why and self.workers.running:
                    self.workers.ask_to_stop()
                    self.board.say(f"stopping: {why}; {len(self.workers.running)} running trials save and end")
                while not self._why_stop() and self.workers.room and (trial := self._next()) is not None:
                    self._start(trial)
                    self.write("RUNNING")
                self.workers.go()
                if not self.workers.running:
                    return why or self._leave_resting()
                self._follow(stopping=bool(why))
        except KeyboardInterrupt:
            self.workers.stop_at_once()
            deadline = time.monotonic() + LAST_SECONDS
            while self.workers.running and time.monotonic() < deadline:
                self._take_in(self.workers.wait(POLL_SECONDS))
            raise

    def _leave_resting(self) -> str:
        """Take the trials that rest at a rung as ended: nothing is left that could make them better than others."""
        for number in sorted(self._resting):
            self._progress[number].is_settled = True
        resting, self._resting = self._resting, set()
        for number in sorted(resting):
            self._end_unit(self.trials[number].unit)
        return ""

    def _follow(self, *, stopping: bool) -> None:
        """Wait until a trial ends or something else is to be done."""
        while self.workers.running:
            if ended := self.workers.wait(POLL_SECONDS):
                self._take_in(ended)
                self.write("RUNNING")
                if not stopping:
                    return
            if not stopping and self._why_stop():
                return
            if time.monotonic() - self._poked > POKE_SECONDS:  # trials have come to be known there
                self._poked = time.monotonic()
                self.notify()
            if self.board.is_due():
                self._look()
                self.board.show(self._entries(), self.summary())

    def _why_stop(self) -> str:
        if self.fault:
            return self.fault
        if self.plan.config.fail_fast and any(one.state == "FAILED" for one in self._settled()):
            return "sweep.fail_fast, and a trial failed"
        return self.stop.asked()

    def _settled(self) -> Iterator[TrialStatus]:
        return (self.standings[number] for number, one in self._progress.items() if one.is_settled)

    def _start(self, trial: Trial) -> None:
        self._asked(lambda: self.study.begin(trial.unit, trial.overrides))
        link = self._asked(lambda: self._link(trial)) if self._asks(trial) else None
        if self.fault:
            self._queue.insert(0, trial.number)
            return
        progress = self._progress[trial.number]
        progress.attempts += 1
        progress.started = time.monotonic()
        if reason := self.record.make_room(trial.number):
            self._settle(trial, TrialStatus("FAILED", None, reason), TowlineError.exit_code)
            return
        progress.status = _written(self.record.run_dir(trial.number))
        step = self.standings[trial.number].step
        self.board.say(
            f"trial {trial.number}  {short(trial.label) or self.plan.name}  {'goes on' if step else 'starts'}"
        )
        self.standings[trial.number] = TrialStatus("RUNNING", step=step)
        self.workers.start([Job(trial.number, dict(trial.config), self.record.run_dir(trial.number), link)])

    def _asks(self, trial: Trial) -> bool:
        """Whether a trial asks if it is worth going on."""
        pilot = self._pilot(trial)
        return self.plan.config.pruner is not Pruner.none and (pilot is None or pilot.number == trial.number)

    def _link(self, trial: Trial) -> dict[str, Any]:
        """Say where a trial asks whether to go on, and behind which evaluation: it has passed the rungs before."""
        config = self.plan.config
        return {
            **secrets.masked(self.study.link(trial.unit), "sweep"),
            "metric": config.metric,
            "pruner": config.pruner.name,
            "min_resource": config.min_resource,
            "reduction_factor": config.reduction_factor,
            "passed": self._progress[trial.number].passed,
        }

    def _take_in(self, ended: Sequence[tuple[Job, int]]) -> None:
        """Note how trials ended, and have those tried again that are worth it."""
        for job, code in ended:
            self._settle(self.trials[job.number], self._ended(job, code), code)

    def _settle(self, trial: Trial, standing: TrialStatus, code: int) -> None:
        progress = self._progress[trial.number]
        self.standings[trial.number] = standing
        if is_disk_full(standing.cause):
            self.fault = f"the disk is full: {self.record.folder}"
        is_again = not self._why_stop() and self._is_worth_trying(standing, code, progress)
        told = f"{_told(standing, self._metric)}{', tried again' if is_again else ''}"
        self.board.say(f"trial {trial.number}  {short(trial.label) or self.plan.name}  {told}")
        if standing.state == "WAITING":
            return
        if is_again:
            self._queue.append(trial.number)
            return
        if standing.state == "PRUNED" and self.plan.config.pruner is Pruner.asha:
            self._resting.add(trial.number)
            progress.attempts = 0  # what comes when it goes on is another attempt
            return
        progress.is_settled = True
        if standing.state == "FINISHED":
            self._note(trial.number, standing)
        self._durations.append(time.monotonic() - progress.started)
        self._end_unit(trial.unit)

    def _ended(self, job: Job, code: int) -> TrialStatus:
        """Tell how a trial stands whose process has ended, and have its own folder say so."""
        how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        standing = self.record.standing(job.number, self._metric)
        if self._progress[job.number].status == _written(job.run_dir):  # this start ended before it wrote anything
            is_left = code == 0 and standing.state != "WAITING"  # its run is finished, whatever its value is
            if self._why_stop() or is_left or standing.state == "FINISHED" or standing.is_damaged:
                return standing
            return TrialStatus("FAILED", None, f"{how} before it began{_last_words(standing.log)}", standing.log)
        if standing.cause.startswith("killed"):
            if held := list(self.record.held([job.number])):
                return replace(standing, cause=held[0][1])
            note_end(job.run_dir, TrainingError(how))
            return replace(standing, cause=how)
        return standing

    def _is_worth_trying(self, standing: TrialStatus, code: int, progress: _Progress) -> bool:
        """Whether a trial may end otherwise when it is run again: not after a mistake in what it is given."""
        if standing.is_over or standing.is_damaged or progress.attempts > self.plan.config.max_retries:
            return False
        is_certain = code in (0, TowlineError.exit_code) or standing.cause.startswith(NonFiniteLossError.__name__)
        return standing.state == "PREEMPTED" or not is_certain

    # ---- what the study is told

    @property
    def study(self) -> Study:
        assert self._study is not None  # see _has_study
        return self._study

    def _asked(self, ask: Callable[[], T]) -> T | None:
        """Ask or tell the study; None where it does not answer: that stops a sweep which can't do without it.

        One that can is made up for by the next start, from the folder.
        """
        if not self._has_study:
            return None
        try:
            return ask()
        except StudyError as error:
            self._has_study = False
            if self.plan.needs_study:
                self.fault = str(error)
            else:
                self.board.say(f"WARNING: {error}. The sweep goes on without; the same command makes up for it")
            return None

    def _of_unit(self, unit: int) -> list[Trial]:
        """Give the trials of a unit that count: those that are done, and those that the command asks for."""
        return [
            trial
            for number, trial in self.trials.items()
            if trial.unit == unit and (number in self.todo or self.standings[number].is_over)
        ]

    def _mean(self, unit: int) -> float | None:
        """Give the mean of a unit's values; None where one is missing."""
        values = [self.standings[trial.number].value for trial in self._of_unit(unit)]
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known and len(known) == len(values) else None

    def _end_unit(self, unit: int) -> None:
        """Tell the study what came of a unit all of whose trials are done with."""
        trials = self._of_unit(unit)
        if any(self.standings[trial.number].state == "PRUNED" for trial in trials):
            self._prune_rest(trials)
        elif not all(self._progress[t.number].is_settled or self.standings[t.number].is_over for t in trials):
            return
        states = {self.standings[trial.number].state for trial in trials}
        if states & UNENDED:
            return
        state = next(one for one in ("PRUNED", "FAILED", "FINISHED") if one in states)
        value = self._mean(unit) if state == "FINISHED" else None
        self._asked(lambda: self.study.end(unit, state, value))

    def _prune_rest(self, trials: Sequence[Trial]) -> None:
        """Take those out that wait: the first of their setting asked for all, and is not worth going on with."""
        for trial in trials:
            if trial.number in self._queue:
                self._queue.remove(trial.number)
        self.standings |= early_replicates(trials, self.standings)

    def _reconcile(self) -> None:
        """Tell the study what it missed: a sweep that was killed, or a study that is gone."""
        for unit in sorted({trial.unit for trial in self.trials.values()}):
            trials = self._of_unit(unit)
            states = {self.standings[trial.number].state for trial in trials}
            if self._resting & {trial.number for trial in trials}:
                continue
            if states == {"FINISHED"} or "PRUNED" in states:
                if not self.study.knows(unit):
                    self.study.begin(unit, trials[0].overrides)
                self._end_unit(unit)
        self.study.keep_only({trial.unit for trial in self.trials.values()})

    # ---- what is shown and written

    def _note(self, number: int, standing: TrialStatus) -> None:
        value = standing.value
        assert value is not None
        best = self.history[-1]["best"] if self.history else value
        best = min(best, value) if self._is_min else max(best, value)
        elapsed = self._elapsed()
        self.history.append({"trial": number, "value": value, "best": best, "elapsed_seconds": round(elapsed, 3)})

    def _elapsed(self) -> float:
        return self._seconds_before + time.time() - self._started_at

    @property
    def best(self) -> Trial | None:
        """The trial with the best value so far."""
        valued = [(standing.value, number) for number, standing in self.standings.items() if standing.value is not None]
        if not valued:
            return None
        return self.trials[(min if self._is_min else max)(valued, key=lambda one: one[0])[1]]

    @property
    def has_given_up_on_refusals(self) -> bool:
        """Whether the sampler came to propose nothing but what can't be run."""
        return self._has_given_up and self._has_only_refusals

    @property
    def is_complete(self) -> bool:
        """Whether all that the command asks for is done, and nothing rests."""
        if any(not self.standings[number].is_over for number in self.todo) or self._resting:
            return False
        num_units = len({trial.unit for trial in self.trials.values()})
        return self.plan.is_listed or self._has_given_up or num_units >= (self.plan.config.n_trials or 0)

    def counts(self) -> dict[str, int]:
        counted_states = Counter(standing.state for standing in self.standings.values())
        return {state: counted_states[state] for state in STATES}

    @property
    def total(self) -> int:
        """How many trials there will be."""
        if self.plan.is_listed:
            return len(self.trials)
        return max(len(self.trials), (self.plan.config.n_trials or 0) * self.plan.num_replicates)

    def summary(self) -> str:
        """Say in a line how far the sweep is."""
        counts = self.counts()
        left = self.total - sum(counts[state] for state in ("FINISHED", "PRUNED", "FAILED"))
        if not left or not self._durations or not self.workers.running:
            return counted(counts, self.total, None)
        mean, now_at = sum(self._durations) / len(self._durations), time.monotonic()
        spent = sum(min(mean, now_at - self._progress[number].started) for number in self.workers.running)
        return counted(counts, self.total, max(0.0, mean * left - spent) / self.plan.config.n_jobs)

    def _look(self) -> None:
        for number in self.workers.running:
            self.standings[number] = self.record.standing(number, self._metric, is_running=True)

    def _entries(self) -> list[Entry]:
        best = self.best
        return [Entry(trial, self.standings[number], trial is best) for number, trial in sorted(self.trials.items())]

    def write(self, state: str) -> None:
        """Write sweep.json; a full disk stops the sweep."""
        try:
            self.record.write(self._content(state))
        except OSError as error:
            self.fault = f"{'the disk is full' if is_disk_full(error) else error}: {self.record.folder}"
        self.notify()

    def _content(self, state: str) -> dict[str, Any]:
        best = self.best
        return {
            "name": self.plan.name,
            "id": self.plan.line.sweep_id,
            "state": state,
            "started": self._started,
            "updated": now(),
            "elapsed_seconds": round(self._elapsed(), 3),
            "command": self.plan.command,
            "space": self.plan.space,
            "sweep": self.plan.settings,
            "num_trials": self.total,
            "counts": self.counts(),
            "best": best
            and {"trial": best.number, "value": self.standings[best.number].value, "overrides": best.label},
            "history": self.history,
            **({"signatures": self.plan.signatures} if self.plan.signatures else {}),
        }


def _told(standing: TrialStatus, metric: str) -> str:
    if standing.state == "WAITING":
        return "stopped before it began"
    if standing.state == "FINISHED":
        return f"finished, {metric} {standing.value:.6g}"
    return f"{standing.state.lower()}{f': {standing.cause}' if standing.cause else ''}"


def _written(run_dir: Path) -> int | None:
    """Tell when a run's status.json was last written, in nanoseconds; None where there is none."""
    try:
        return (run_dir / STATUS).stat().st_mtime_ns
    except OSError:
        return None


def _last_words(log: Path | None) -> str:
    """Give the last line that a trial printed."""
    said = b""
    if log is not None:
        with suppress(OSError, ValueError):  # it is gone by now, or not a file
            said = read_bytes(log)
    lines = said.decode(errors="replace").split("\n")
    return next((f": {line.strip()}" for line in reversed(lines) if line.strip()), "")


def early_replicates(trials: Sequence[Trial], standings: Mapping[int, TrialStatus]) -> dict[int, TrialStatus]:
    """Give how trials stand that wait behind the first of their setting, which ended early."""
    pruned = {trial.unit for trial in trials if standings[trial.number].state == "PRUNED"}
    waiting = [t.number for t in trials if t.unit in pruned and standings[t.number].state == "WAITING"]
    return {number: TrialStatus("PRUNED", cause="the first trial of its setting was") for number in waiting}


def reclaim(
    record: SweepFolder, numbers: Sequence[int], workers: Workers | Launched, board: ProgressTable, stop: StopRequest
) -> None:
    """Wait for trials that an earlier start left at work: they are asked to stop, and save.

    Raises:
        Interrupted: where something asks to stop meanwhile.
        RunFolderError: where one does not end.
    """
    deadline = time.monotonic() + ORPHAN_SECONDS
    told: set[int] = set()
    while held := list(record.held(numbers)):
        if not told:
            workers.ask_to_stop()  # processes of this machine know by themselves that their sweep has died
        for number, by_whom in held:
            if number not in told:
                board.say(f"trial {number}  waits: {by_whom}")
                told.add(number)
        if stop.asked():
            raise Interrupted(stop.asked())
        if time.monotonic() > deadline:
            raise RunFolderError(f"trial {held[0][0]} is still at work: {held[0][1]}")
        time.sleep(POLL_SECONDS * 5)
