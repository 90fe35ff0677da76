"""The loop of a sweep: starts trials, decides which of them end early, and records how they ended.

The folder is the truth: what a trial's own folder says counts, so that a sweep whose process was killed at any moment
resumes with the trials that are missing, and decides as it would have. No torch here.
"""

import math
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from src.config.schema import Direction, Pruner
from src.errors import NonFiniteLossError, Pruned, TowlineError, TrainingError, is_disk_full
from src.runtime.signals import StopRequest
from src.search.study import Proposal, Study, Unit
from src.sweep import pruning
from src.sweep.engines.engine import Engine, TrialJob
from src.sweep.progress import ProgressTable, ending
from src.sweep.state import SweepState, early_replicates
from src.terminal import short_numbers
from src.tracking.run_folder import STATUS, note_end
from src.tracking.step_logs import METRICS
from src.trials.folder import TrialStatus, last_words, written_ns
from src.trials.trial import Trial

POLL_SECONDS = 0.1
NOTIFY_SECONDS = 2.0
WRITE_SECONDS = 1.0  # between two versions of sweep.json, whose size grows with the number of trials
LAST_SECONDS = 2.0  # how long to wait for the exit codes of trials that were ended at once
UNENDED = {"PREEMPTED", "RUNNING", "WAITING"}  # states of trials that the same command resumes
MOST_REPEATS = 25  # how often in a row a sampler may repeat what was tried, before it counts as exhausted


@dataclass
class _Progress:
    """What this process knows of a trial that its folder does not say."""

    attempts: int = 0
    rung: int | None = None  # the evaluation at which it pauses, or is paused
    metrics_ns: int | None = None  # when the metrics were written that it has a verdict on
    started: float = 0.0  # when it was last started, by the monotonic clock
    step: int = 0  # how far it was then
    written_ns: int | None = None  # when its status.json had been written last before that
    is_settled: bool = False  # whether this start of the sweep is done with it


class SweepController:
    """Runs the trials of one sweep whose folder is held."""

    def __init__(
        self, state: SweepState, study: Study, engine: Engine, stop: StopRequest, display: ProgressTable
    ) -> None:
        self.state, self._study, self.engine, self._stop, self._display = state, study, engine, stop, display
        self.plan, self.folder = state.plan, state.folder
        self._progress: defaultdict[int, _Progress] = defaultdict(_Progress)
        self._metrics, pruner = self.plan.config.metrics, self.plan.config.pruner
        sign = -1 if self.plan.config.directions[0] is Direction.maximize else 1  # trials end early by one metric
        self._halving = pruning.Halving(self.plan.config.min_resource, self.plan.config.reduction_factor, sign)
        self._is_exhausted = False
        self.refusal = ""  # why the last proposal can't be run
        self.has_only_refusals = False  # the sampler proposed none that can be run, until the sweep stopped asking
        self.fault = ""  # the error that stops the sweep, as no trial could run or be ranked; '' where there is none
        self._pauses, self._waits = pruner is Pruner.asha, pruner in (Pruner.median, Pruner.hyperband)
        self.notify: Callable[[], None] = lambda: None  # called when sweep.json says something new
        self._notified = self._written = -math.inf

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
        is_stuck = not self.engine.running and not any(s.state == "FINISHED" for s in self.state.statuses.values())
        return self._promoted(at_least_one=True) if is_stuck else None

    def _promoted(self, *, at_least_one: bool = False) -> Trial | None:
        """Take a paused trial that is among the best of its rung by now."""
        unit = self._halving.promote(at_least_one=at_least_one)
        if unit is None:
            return None
        trial = self._first(self.state.of_unit(unit)[0])
        self._progress[trial.number].rung = self._halving.rung_from(len(self._study.units[unit].reports) + 1)
        return trial

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
        refusals, units = [], self.state.units
        if len(units) >= (self.plan.config.n_trials or 0):
            return False
        unit = max(units, default=-1) + 1
        for attempt in range(MOST_REPEATS):
            if self._accept(self._study.propose(unit, attempt), unit):
                return True
            self._study.refuse()
            refusals.append(self.refusal)
        self._is_exhausted, self.has_only_refusals = True, all(refusals)
        return False

    def _accept(self, proposal: Proposal, unit: int) -> bool:
        """Make a proposal trials of a unit; return whether it can be run, and was not tried."""
        first, known = len(self.state.trials), self.state.unit_of
        found, problems = self.plan.unit(proposal.overrides, unit, first)
        same = next((known[trial.identity] for trial in found if trial.identity in known), None)
        fresh = [trial for trial in found if trial.identity not in known]
        self.refusal = f"{problems[0].given}: {problems[0].reason}" if problems else ""
        if problems or not fresh:
            return False
        if same is not None:  # another seed of a setting that was tried
            self._study.refuse()
            unit = same
        else:
            self._study.accept(Unit(unit, fresh[0].overrides, attrs=proposal.attrs or None))
        added = [
            replace(trial, number=number, unit=unit, sampler=dict(proposal.attrs))
            for number, trial in enumerate(fresh, first)
        ]
        self.folder.add_trials(added)
        for trial in added:
            self.state.add(trial)
            self.state.statuses[trial.number] = TrialStatus("WAITING")
            self.state.todo.add(trial.number)
            self.state.queue.append(trial.number)
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
        self._find_paused()
        if (self.state.queue or not self.plan.is_listed) and not self.engine.is_ready(POLL_SECONDS):
            self._display.say("importing what the trials need")
            while not self.engine.is_ready(POLL_SECONDS) and not self._stop_reason():
                pass
        why = ""
        try:
            while True:
                why = why or self._stop_reason()
                if why and self.engine.running:
                    self.engine.ask_to_stop()
                    self._display.say(f"stopping: {why}; {len(self.engine.running)} running trials save and end")
                while not self._stop_reason() and self.engine.room and (trial := self._next()) is not None:
                    self._start(trial)
                    self.write("RUNNING")
                if not self.engine.running:
                    if not why:
                        self._end_paused()
                    return why
                self._follow(stopping=bool(why))
        except KeyboardInterrupt:
            self.engine.stop_at_once()
            deadline = time.monotonic() + LAST_SECONDS
            while self.engine.running and time.monotonic() < deadline:
                self._collect(self.engine.wait(POLL_SECONDS))
            raise

    def _end_paused(self) -> None:
        """End the trials that are paused at a rung: nothing is left that could make them better than others."""
        units = self._halving.take_paused()
        for unit in units:
            self._progress[self._first(self.state.of_unit(unit)[0]).number].is_settled = True
        for unit in units:
            self._end_unit(unit)

    def _follow(self, *, stopping: bool) -> None:
        """Wait until a trial ends or something else is to be done."""
        while self.engine.running:
            if ended := self.engine.wait(POLL_SECONDS):
                self._collect(ended)
                self.write("RUNNING")
                if not stopping:
                    return
            if not stopping and self._stop_reason():
                return
            if time.monotonic() - self._notified > NOTIFY_SECONDS:  # trials have appeared in the store since
                self._notified = time.monotonic()
                self.write("RUNNING")
                self.notify()
            self._answer_waiting()
            if self._display.is_due():
                for number in self.engine.running:
                    self.state.statuses[number] = self.folder.status(number, self._metrics, is_running=True)
                self._display.show(self.state.entries(), self.summary())

    def _stop_reason(self) -> str:
        if self.fault:
            return self.fault
        settled = (number for number, progress in self._progress.items() if progress.is_settled)
        if self.plan.config.fail_fast and any(self.state.statuses[number].state == "FAILED" for number in settled):
            return "sweep.fail_fast, and a trial failed"
        return self._stop.asked()

    def _start(self, trial: Trial) -> None:
        self._study.begin(Unit(trial.unit, trial.overrides))
        progress = self._progress[trial.number]
        progress.attempts += 1
        progress.started = time.monotonic()
        if reason := self.folder.make_room(trial.number):
            self._settle(trial, TrialStatus("FAILED", (), reason), TowlineError.exit_code)
            return
        run_dir = self.folder.run_dir(trial.number)
        progress.written_ns = written_ns(run_dir / STATUS)
        progress.step = self.state.statuses[trial.number].step
        self._say(trial, "resumes" if progress.step else "starts")
        self.state.statuses[trial.number] = TrialStatus("RUNNING", step=progress.step)
        self.engine.start(TrialJob(trial.number, dict(trial.config), run_dir, self._link(trial)))

    def _say(self, trial: Trial, text: str) -> None:
        self._display.say(f"trial {trial.number}  {short_numbers(trial.label) or self.plan.name}  {text}")

    def _link(self, trial: Trial) -> dict[str, Any] | None:
        """Return when a trial pauses, or that it waits for verdicts; None where it can't end early."""
        if self._first(trial) is not trial or not (self._pauses or self._waits):
            return None
        progress, num_reports = self._progress[trial.number], len(self._study.units[trial.unit].reports)
        progress.metrics_ns = None
        if self._pauses and progress.rung is None:
            progress.rung = self._halving.rung_from(max(1, num_reports))
        return {"metric": self._metrics[0], "pause_at": progress.rung, "waits": self._waits}

    def _collect(self, ended: Sequence[tuple[TrialJob, int]]) -> None:
        """Record how trials ended; those that may succeed on a retry are queued again."""
        for job, code in ended:
            status = self._status_after_exit(job, code)
            if self._pauses or self._waits:
                self._note_reports(job.number)
            if self._pauses and not status.is_over and self._is_at_rung(job.number, status):
                status = self._pause(job.number)
            self._settle(self.state.trials[job.number], status, code)

    def _settle(self, trial: Trial, status: TrialStatus, code: int) -> None:
        progress = self._progress[trial.number]
        self.state.statuses[trial.number] = status
        if status.state == "PREEMPTED" and status.step > progress.step and "SIG" in status.cause:
            progress.attempts = 0  # a scheduler's time limit, however often: it is getting there
        if is_disk_full(status.cause):
            self.fault = f"the disk is full: {self.folder.folder}"
        is_again = not self._stop_reason() and self._may_retry(status, code, progress)
        self._say(trial, f"{ending(status, self._metrics)}{', tried again' if is_again else ''}")
        if status.state == "WAITING":
            return
        if is_again:
            self.state.queue.append(trial.number)
            return
        if status.state == "PRUNED" and self._pauses:
            self._halving.pause(trial.unit, self._study.units[trial.unit].reports)
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
        status = self.folder.status(job.number, self._metrics)
        if self._progress[job.number].written_ns == written_ns(job.run_dir / STATUS):  # this start wrote nothing
            is_left = code == 0 and status.state != "WAITING"  # its run is finished, whatever its value is
            if self._stop_reason() or is_left or status.state == "FINISHED" or status.is_damaged:
                return status
            return TrialStatus("FAILED", (), f"{how} before it began{last_words(status.log)}", status.log)
        if status.was_killed:
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

    # ---- which end early

    def _note_reports(self, number: int) -> tuple[float, ...]:
        """Note what the trial that decides for its unit has reported, and return it."""
        trial = self.state.trials[number]
        if self._first(trial) is trial:
            self._study.report(trial.unit, self.folder.reports(number, self._metrics[0]))
        reports = self._study.units[trial.unit].reports
        if self._pauses:
            self._halving.note(trial.unit, reports)
        return reports

    def _answer_waiting(self) -> None:
        """Tell each trial that waits after an evaluation whether to continue."""
        for number in self.engine.running if self._waits else ():
            progress, run_dir = self._progress[number], self.folder.run_dir(number)
            written = written_ns(run_dir / METRICS)
            if written == progress.metrics_ns:
                continue
            progress.metrics_ns = written
            reports = self.folder.reports(number, self._metrics[0])
            unit = self.state.trials[number].unit
            is_new = len(reports) > len(self._study.units[unit].reports) and self._note_reports(number)
            is_worse = is_new and self._study.should_prune(unit)
            seen = f"{self._metrics[0]} {reports[-1]:.4g} at evaluation {len(reports)}" if reports else ""
            reason = f"{seen}: others were better ({self.plan.config.pruner.name})" if is_worse else ""
            if reports:
                pruning.answer(run_dir, len(reports), reason)

    def _find_paused(self) -> None:
        """Find the trials that are paused: those that say so, and those killed at an evaluation where they pause."""
        found = set[int]()
        for number in sorted(self.state.todo) if self._pauses else ():
            trial, status = self.state.trials[number], self.state.statuses[number]
            if self._first(trial) is not trial or status.state == "WAITING":
                continue
            reports = self._note_reports(number)
            self._progress[number].rung = self._halving.rung_from(max(1, len(reports)))
            if status.state == "PRUNED" or (not status.is_over and self._is_at_rung(number, status)):
                self.state.statuses[number] = self._pause(number)
                self._halving.pause(trial.unit, reports)
                found.add(number)
        self.state.queue = [number for number in self.state.queue if number not in found]

    def _is_at_rung(self, number: int, status: TrialStatus) -> bool:
        """Return whether a trial that ended otherwise had come to where it pauses."""
        num_reports = len(self._note_reports(number))
        return num_reports == self._progress[number].rung and (status.num_steps or 0) > status.step

    def _pause(self, number: int) -> TrialStatus:
        """Record that a trial is paused at its rung."""
        note_end(self.folder.run_dir(number), Pruned(f"paused at evaluation {self._progress[number].rung}"))
        return self.folder.status(number, self._metrics)

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
        self._study.end(unit, state, self.state.means(unit) if state == "FINISHED" else ())

    # ---- what is shown and written

    @property
    def is_complete(self) -> bool:
        """Whether all that the command asks for is done, and nothing is paused."""
        if any(not self.state.statuses[number].is_over for number in self.state.todo) or self._halving:
            return False
        has_all = len(self.state.units) >= (self.plan.config.n_trials or 0)
        return self.plan.is_listed or self._is_exhausted or has_all

    def summary(self) -> str:
        """Return in a line how far the sweep is."""
        return self.state.summary([self._progress[number].started for number in self.engine.running])

    def write(self, state: str) -> None:
        """Write sweep.json, now and then while trials run; a full disk stops the sweep."""
        if state == "RUNNING" and time.monotonic() - self._written < WRITE_SECONDS:
            return
        try:
            self.folder.write(self.state.content(state))
        except OSError as error:
            self.fault = f"{'the disk is full' if is_disk_full(error) else error}: {self.folder.folder}"
        self._written = time.monotonic()
        self.notify()
