"""The loop of a sweep: starts trials, records how they ended, and updates the study, MLflow and the terminal.

The folder is the truth: what a trial's own folder says counts, so that a sweep whose process was killed at any moment
resumes with the trials that are missing. No torch here.
"""

import signal
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from src import secrets
from src.config.schema import Pruner
from src.errors import NonFiniteLossError, StudyError, TowlineError, TrainingError, is_disk_full
from src.runtime.signals import StopRequest
from src.sweep.folder import TrialStatus, last_words, status_written_ns
from src.sweep.launched import TrialRunner
from src.sweep.progress import ProgressTable
from src.sweep.state import SweepState, early_replicates
from src.sweep.study import Proposal, Study
from src.sweep.trial import Trial, short
from src.sweep.workers import TrialJob
from src.tracking.run_folder import note_end

POLL_SECONDS = 0.1
NOTIFY_SECONDS = 2.0
LAST_SECONDS = 2.0  # how long to wait for the exit codes of trials that were ended at once
UNENDED = {"PREEMPTED", "RUNNING", "WAITING"}  # states of trials that the same command resumes
MOST_REPEATS = 25  # how often in a row a sampler may repeat what was tried, before it counts as exhausted
LINKED = ("metric", "pruner", "min_resource", "reduction_factor")  # settings that a trial's pruning needs
T = TypeVar("T")


@dataclass
class _Progress:
    """What this process knows of a trial that its folder does not say."""

    attempts: int = 0
    passed: int = 0  # the evaluation of the last rung that it was let through
    started: float = 0.0  # when it was last started, by the monotonic clock
    written_ns: int | None = None  # when its status.json had been written last before that
    is_settled: bool = False  # whether this start of the sweep is done with it


class SweepController:
    """Runs the trials of one sweep whose folder is held."""

    def __init__(
        self, state: SweepState, study: Study | None, workers: TrialRunner, stop: StopRequest, display: ProgressTable
    ) -> None:
        self.state, self._study, self.workers, self._stop, self._display = state, study, workers, stop, display
        self.plan, self.folder = state.plan, state.folder
        self._progress: defaultdict[int, _Progress] = defaultdict(_Progress)
        self._metric = self.plan.config.metric
        self._is_exhausted = False
        self.refusal = ""  # why the last proposal can't be run
        self.has_only_refusals = False  # the sampler proposed none that can be run, until the sweep stopped asking
        self.fault = ""  # the error that stops the sweep, as no trial could run or be ranked; '' where there is none
        self._paused: set[int] = set()
        """Trials that are paused at a rung, and resume once they are among its best."""
        if self.plan.config.pruner is Pruner.asha and study is not None:
            pruned = (state.trials[number] for number in state.todo if state.statuses[number].state == "PRUNED")
            self._paused = {trial.number for trial in pruned if study.is_open(trial.unit)}
        self.notify: Callable[[], None] = lambda: None  # called when sweep.json says something new
        self._notified = 0.0

    # ---- what comes next

    def _next(self) -> Trial | None:
        """Take the next trial that may start now."""
        if (promoted := self._promoted()) is not None:
            return promoted
        for number in self.state.queue:
            if self._may_start(trial := self.state.trials[number]):
                self.state.queue.remove(number)
                return trial
        if self._propose():
            return self._next()
        is_stuck = not self.workers.running and not any(s.state == "FINISHED" for s in self.state.statuses.values())
        return self._promoted(at_least_one=True) if is_stuck else None

    def _promoted(self, *, at_least_one: bool = False) -> Trial | None:
        """Take a paused trial that is worth resuming by now."""
        by_unit = {self.state.trials[number].unit: number for number in self._paused}
        if not by_unit:
            return None
        factor = self.plan.config.reduction_factor
        promoted = self._ask_study(lambda study: study.promotable(by_unit, factor, at_least_one=at_least_one))
        if promoted is None:
            return None
        unit, evaluation = promoted
        number = by_unit[unit]
        self._progress[number].passed = evaluation
        self._paused.discard(number)
        return self.state.trials[number]

    def _may_start(self, trial: Trial) -> bool:
        """Return whether a trial may start now: of replicates that may be pruned, the first runs alone."""
        first = self._first(trial)
        is_over = self._progress[first.number].is_settled or self.state.statuses[first.number].state == "FINISHED"
        return first is trial or is_over

    def _first(self, trial: Trial) -> Trial:
        """Return the trial that decides whether a setting is pruned: its first, where there are replicates."""
        if self.plan.config.pruner is Pruner.none or self.plan.num_replicates == 1:
            return trial
        asked_for = [one for one in self.state.of_unit(trial.unit) if one.number in self.state.todo]
        return min(asked_for, key=lambda one: one.number)

    def _propose(self) -> bool:
        """Have the sampler propose another setting; return whether there is one to run."""
        if self.plan.is_listed or self._is_exhausted:
            return False
        refusals = []
        for _ in range(MOST_REPEATS):
            units = self.state.units
            if len(units) >= (self.plan.config.n_trials or 0):
                return False
            proposal = self._ask_study(Study.propose)
            if proposal is None:
                return False
            if self._accept(proposal, max(units, default=-1) + 1):
                return True
            refusals.append(self.refusal)
        self._is_exhausted, self.has_only_refusals = True, all(refusals)
        return False

    def _accept(self, proposal: Proposal, unit: int) -> bool:
        """Make a proposal trials of a unit; where it can't be run, or was tried, it is answered at once."""
        first = max(self.state.trials, default=-1) + 1
        found, problems = self.plan.unit(proposal.overrides, unit, first)
        known = {trial.identity: trial.unit for trial in self.state.trials.values()}
        same = next((known[trial.identity] for trial in found if trial.identity in known), None)
        fresh = [trial for trial in found if trial.identity not in known]
        self.refusal = f"{problems[0].given}: {problems[0].reason}" if problems else ""
        if problems or not fresh:
            value = None if same is None else self.state.mean(same)
            self._ask_study(lambda study: study.answer(proposal, value))
            return False
        unit = unit if same is None else same  # another seed of a setting that was tried
        self._ask_study(lambda study: study.accept(proposal, unit))
        for number, trial in enumerate(fresh, first):
            self.state.trials[number] = replace(trial, number=number, unit=unit)
            self.state.statuses[number] = TrialStatus("WAITING")
            self.state.todo.add(number)
            self.state.queue.append(number)
        self.folder.write_trials(list(self.state.trials.values()))
        return True

    # ---- running them

    def run(self) -> str:
        """Run what is left; return why it ended before all was done, or ''.

        Asked twice to stop, it ends every trial and raises KeyboardInterrupt.
        """
        noted = {point["trial"] for point in self.state.history}
        for number, status in sorted(self.state.statuses.items()):
            if status.state == "FINISHED" and number not in noted:
                self.state.note(number, status)
        self._ask_study(self._reconcile)
        if (self.state.queue or not self.plan.is_listed) and not self.workers.is_ready(POLL_SECONDS):
            self._display.say("importing what the trials need")
            while not self.workers.is_ready(POLL_SECONDS) and not self._stop_reason():
                pass
        why = ""
        try:
            while True:
                why = why or self._stop_reason()
                if why and self.workers.running:
                    self.workers.ask_to_stop()
                    self._display.say(f"stopping: {why}; {len(self.workers.running)} running trials save and end")
                while not self._stop_reason() and self.workers.room and (trial := self._next()) is not None:
                    self._start(trial)
                    self.write("RUNNING")
                self.workers.go()
                if not self.workers.running:
                    if not why:
                        self._end_paused()
                    return why
                self._follow(stopping=bool(why))
        except KeyboardInterrupt:
            self.workers.stop_at_once()
            deadline = time.monotonic() + LAST_SECONDS
            while self.workers.running and time.monotonic() < deadline:
                self._collect(self.workers.wait(POLL_SECONDS))
            raise

    def _end_paused(self) -> None:
        """End the trials that are paused at a rung: nothing is left that could make them better than others."""
        paused, self._paused = sorted(self._paused), set()
        for number in paused:
            self._progress[number].is_settled = True
        for number in paused:
            self._end_unit(self.state.trials[number].unit)

    def _follow(self, *, stopping: bool) -> None:
        """Wait until a trial ends or something else is to be done."""
        while self.workers.running:
            if ended := self.workers.wait(POLL_SECONDS):
                self._collect(ended)
                self.write("RUNNING")
                if not stopping:
                    return
            if not stopping and self._stop_reason():
                return
            if time.monotonic() - self._notified > NOTIFY_SECONDS:  # trials have appeared in the store since
                self._notified = time.monotonic()
                self.notify()
            if self._display.is_due():
                for number in self.workers.running:
                    self.state.statuses[number] = self.folder.status(number, self._metric, is_running=True)
                self._display.show(self.state.entries(), self.summary())

    def _stop_reason(self) -> str:
        if self.fault:
            return self.fault
        settled = (number for number, progress in self._progress.items() if progress.is_settled)
        if self.plan.config.fail_fast and any(self.state.statuses[number].state == "FAILED" for number in settled):
            return "sweep.fail_fast, and a trial failed"
        return self._stop.asked()

    def _start(self, trial: Trial) -> None:
        self._ask_study(lambda study: study.begin(trial.unit, trial.overrides))
        may_be_pruned = self.plan.config.pruner is not Pruner.none and self._first(trial) is trial
        link = self._ask_study(lambda study: self._link(study, trial)) if may_be_pruned else None
        if self.fault:
            self.state.queue.insert(0, trial.number)
            return
        progress = self._progress[trial.number]
        progress.attempts += 1
        progress.started = time.monotonic()
        if reason := self.folder.make_room(trial.number):
            self._settle(trial, TrialStatus("FAILED", None, reason), TowlineError.exit_code)
            return
        run_dir = self.folder.run_dir(trial.number)
        progress.written_ns = status_written_ns(run_dir)
        step = self.state.statuses[trial.number].step
        self._say(trial, "resumes" if step else "starts")
        self.state.statuses[trial.number] = TrialStatus("RUNNING", step=step)
        self.workers.start(TrialJob(trial.number, dict(trial.config), run_dir, link))

    def _say(self, trial: Trial, text: str) -> None:
        self._display.say(f"trial {trial.number}  {short(trial.label) or self.plan.name}  {text}")

    def _link(self, study: Study, trial: Trial) -> dict[str, Any]:
        """Return where a trial asks whether to continue, and after which evaluation: it has passed the rungs before."""
        settings = {key: self.plan.settings[key] for key in LINKED}
        passed = self._progress[trial.number].passed
        return secrets.masked(study.link(trial.unit), "sweep") | settings | {"passed": passed}

    def _collect(self, ended: Sequence[tuple[TrialJob, int]]) -> None:
        """Record how trials ended; those that may succeed on a retry are queued again."""
        for job, code in ended:
            self._settle(self.state.trials[job.number], self._status_after_exit(job, code), code)

    def _settle(self, trial: Trial, status: TrialStatus, code: int) -> None:
        progress = self._progress[trial.number]
        self.state.statuses[trial.number] = status
        if is_disk_full(status.cause):
            self.fault = f"the disk is full: {self.folder.folder}"
        is_again = not self._stop_reason() and self._may_retry(status, code, progress)
        self._say(trial, f"{_ending(status, self._metric)}{', tried again' if is_again else ''}")
        if status.state == "WAITING":
            return
        if is_again:
            self.state.queue.append(trial.number)
            return
        if status.state == "PRUNED" and self.plan.config.pruner is Pruner.asha:
            self._paused.add(trial.number)
            progress.attempts = 0  # resuming it is another attempt
            return
        progress.is_settled = True
        if status.state == "FINISHED":
            self.state.note(trial.number, status)
        self.state.durations.append(time.monotonic() - progress.started)
        self._end_unit(trial.unit)

    def _status_after_exit(self, job: TrialJob, code: int) -> TrialStatus:
        """Return the status of a trial whose process has ended, and write it into the trial's folder."""
        how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        status = self.folder.status(job.number, self._metric)
        if self._progress[job.number].written_ns == status_written_ns(job.run_dir):  # this start wrote nothing
            is_left = code == 0 and status.state != "WAITING"  # its run is finished, whatever its value is
            if self._stop_reason() or is_left or status.state == "FINISHED" or status.is_damaged:
                return status
            return TrialStatus("FAILED", None, f"{how} before it began{last_words(status.log)}", status.log)
        if status.cause.startswith("killed"):
            if held := list(self.folder.held([job.number])):
                return replace(status, cause=held[0][1])
            note_end(job.run_dir, TrainingError(how))
            return replace(status, cause=how)
        return status

    def _may_retry(self, status: TrialStatus, code: int, progress: _Progress) -> bool:
        """Return whether a trial may end otherwise when it is run again: not after a mistake in its configuration."""
        if status.is_over or status.is_damaged or progress.attempts > self.plan.config.max_retries:
            return False
        is_certain = code in (0, TowlineError.exit_code) or status.cause.startswith(NonFiniteLossError.__name__)
        return status.state == "PREEMPTED" or not is_certain

    # ---- the study

    def _ask_study(self, ask: Callable[[Study], T]) -> T | None:
        """Call the study; None where it does not answer, which stops a sweep that can't do without it."""
        if self._study is None:
            return None
        try:
            return ask(self._study)
        except StudyError as error:
            self._study = None
            if self.plan.needs_study:
                self.fault = str(error)
            else:
                self._display.say(f"WARNING: {error}. The sweep continues without it; the same command makes up for it")
            return None

    def _end_unit(self, unit: int) -> None:
        """Record in the study how a unit ended, once all of its trials have."""
        trials = self.state.of_unit(unit)
        if "PRUNED" in self.state.states_of(trials):  # the first of the setting asked for all of them
            dropped = {trial.number for trial in trials}
            self.state.queue = [number for number in self.state.queue if number not in dropped]
            self.state.statuses |= early_replicates(trials, self.state.statuses)
        elif not all(self._progress[t.number].is_settled or self.state.statuses[t.number].is_over for t in trials):
            return
        states = self.state.states_of(trials)
        if states & UNENDED:
            return
        state = next(one for one in ("PRUNED", "FAILED", "FINISHED") if one in states)
        value = self.state.mean(unit) if state == "FINISHED" else None
        self._ask_study(lambda study: study.end(unit, state, value))

    def _reconcile(self, study: Study) -> None:
        """Bring the study up to date: after a sweep that was killed, or with a study that is gone."""
        for unit in sorted(self.state.units):
            trials = self.state.of_unit(unit)
            states = self.state.states_of(trials)
            is_paused = any(trial.number in self._paused for trial in trials)
            if not is_paused and (states == {"FINISHED"} or "PRUNED" in states):
                if not study.knows(unit):
                    study.begin(unit, trials[0].overrides)
                self._end_unit(unit)
        study.keep_only(self.state.units)

    # ---- what is shown and written

    @property
    def is_complete(self) -> bool:
        """Whether all that the command asks for is done, and nothing is paused."""
        if any(not self.state.statuses[number].is_over for number in self.state.todo) or self._paused:
            return False
        has_all = len(self.state.units) >= (self.plan.config.n_trials or 0)
        return self.plan.is_listed or self._is_exhausted or has_all

    def summary(self) -> str:
        """Return in a line how far the sweep is."""
        return self.state.summary([self._progress[number].started for number in self.workers.running])

    def write(self, state: str) -> None:
        """Write sweep.json; a full disk stops the sweep."""
        try:
            self.folder.write(self.state.content(state))
        except OSError as error:
            self.fault = f"{'the disk is full' if is_disk_full(error) else error}: {self.folder.folder}"
        self.notify()


def _ending(status: TrialStatus, metric: str) -> str:
    if status.state == "WAITING":
        return "stopped before it began"
    if status.state == "FINISHED":
        return f"finished, {metric} {status.value:.6g}"
    return f"{status.state.lower()}{f': {status.cause}' if status.cause else ''}"
