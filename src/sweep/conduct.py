"""Conducts a sweep: which trial is next, what came of it, and what the study, MLflow and the terminal are told.

The folder is the truth: what a trial's own folder says counts, so that a sweep whose process was killed at any moment
goes on with the trials that are missing. No torch here.
"""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from src import errors
from src.config.schema import Direction, Pruner, Sampler
from src.errors import Interrupted, Pruned, RunFolderError, TowlineError, TrainingError
from src.runtime.launch import ORPHAN_SECONDS
from src.runtime.signals import StopRequest
from src.sweep.board import Board, Entry, counted
from src.sweep.launched import Launched
from src.sweep.plan import Plan
from src.sweep.record import STATES, Record, Standing
from src.sweep.study import Study, storage_url
from src.sweep.trial import Trial
from src.sweep.workers import Job, Workers
from src.tracking.journal import note_end, now

POLL_SECONDS = 0.1
POKE_SECONDS = 2.0
LAST_SECONDS = 2.0
"""How long it may take to hear of trials that were ended at once."""
EXIT_CODES = {"PRUNED": Pruned.exit_code, "PREEMPTED": Interrupted.exit_code}
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
    is_settled: bool = False
    """Whether this start of the sweep is done with it."""
    cause: str = ""


class Conductor:
    """Runs the trials of one sweep whose folder is held."""

    def __init__(
        self,
        plan: Plan,
        record: Record,
        trials: list[Trial],
        todo: Sequence[int],
        study: Study,
        workers: Workers | Launched,
        stop: StopRequest,
    ) -> None:
        self.plan, self.record, self.study, self.workers, self.stop = plan, record, study, workers, stop
        self.trials = {trial.number: trial for trial in trials}
        self.standings = {number: record.standing(number, plan.config.metric) for number in self.trials}
        self._progress = {number: _Progress() for number in self.trials}
        self.todo = set(todo)
        """The numbers of the trials that the command asks for."""
        self._queue = self._ordered(todo)
        self._units = study.numbers()
        self._open = study.running()
        self._metric, self._is_min = plan.config.metric, plan.config.direction is Direction.minimize
        self._has_given_up = False
        self.refusal = ""
        """Why the last proposal that can't be run is none."""
        rests = plan.config.pruner is Pruner.asha
        self._resting = {
            number
            for number, standing in self.standings.items()
            if rests and standing.state == "PRUNED" and self._units.get(self.trials[number].unit) in self._open
        }
        """Trials that ended at a rung, and go on once they are among its best."""
        self.poke: Callable[[], None] = lambda: None
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
        by_study = {self._units[self.trials[number].unit]: number for number in self._resting}
        factor = self.plan.config.reduction_factor
        number = self.study.promotable(list(by_study), factor, at_least_one=at_least_one)
        if number is None:
            return None
        self._resting.discard(by_study[number])
        self._progress[by_study[number]].passed = self.study.last_evaluation(number)
        return self.trials[by_study[number]]

    def _may_start(self, trial: Trial) -> bool:
        """Where trials of a setting are averaged and may end early, the first of them asks for all."""
        pilot = self._pilot(trial)
        if pilot is None or pilot.number == trial.number:
            return True
        return self._progress[pilot.number].is_settled or self.standings[pilot.number].state == "FINISHED"

    def _pilot(self, trial: Trial) -> Trial | None:
        if self.plan.config.pruner is Pruner.none or self.plan.num_replicates == 1:
            return None
        return min((one for one in self.trials.values() if one.unit == trial.unit), key=lambda one: one.number)

    def _propose(self) -> bool:
        """Have the sampler propose another setting; whether there is one to run."""
        if self.plan.is_listed or self._has_given_up:
            return False
        for _ in range(MOST_REPEATS):
            units = {trial.unit for trial in self.trials.values()}
            if len(units) >= (self.plan.config.n_trials or 0):
                return False
            proposal = self.study.propose()
            unit = max(units, default=-1) + 1
            first = max(self.trials, default=-1) + 1
            found, problems = self.plan.unit(proposal.overrides, unit, first)
            known = {trial.identity: trial for trial in self.trials.values()}
            if problems:
                self.refusal = f"{problems[0].given}: {problems[0].reason}"
            if problems or all(trial.identity in known for trial in found):
                same = [known[trial.identity].unit for trial in found if trial.identity in known]
                self._repeat(proposal.number, same[0] if same else None)
                continue
            fresh = [trial for trial in found if trial.identity not in known]
            unit = next((known[trial.identity].unit for trial in found if trial.identity in known), unit)
            self.refusal = ""
            self.study.belongs(proposal.number, unit)
            self._units[unit] = proposal.number
            self._open.add(proposal.number)
            self._add([replace(trial, number=first + i, unit=unit) for i, trial in enumerate(fresh)])
            return True
        self._has_given_up = True
        return False

    def _repeat(self, number: int, unit: int | None) -> None:
        """Answer a proposal that was tried already with what came of it, one that can't be run with a failure."""
        value = None if unit is None else self._mean(unit)
        self.study.end(number, "FAILED" if value is None else "FINISHED", value)

    def _add(self, trials: Sequence[Trial]) -> None:
        for trial in trials:
            self.trials[trial.number] = trial
            self.todo.add(trial.number)
            self.standings[trial.number] = Standing("WAITING")
            self._progress[trial.number] = _Progress()
            self._queue.append(trial.number)
        self.record.write_trials(list(self.trials.values()))

    # ---- running them

    def run(self, board: Board) -> str:
        """Run what is left; gives why it ended before all was done, or ''.

        Raises:
            KeyboardInterrupt: where it was asked twice to stop; every trial has been ended then.
        """
        self._reconcile()
        if (self._queue or not self.plan.is_listed) and not self.workers.is_ready(POLL_SECONDS):
            board.say("importing what the trials need")
            while not self.workers.is_ready(POLL_SECONDS) and not self._why_stop():
                pass
        why = ""
        try:
            while True:
                why = why or self._why_stop()
                if why and self.workers.running:
                    self.workers.ask_to_stop()
                    board.say(f"stopping: {why}; {len(self.workers.running)} running trials save and end")
                while not self._why_stop() and self.workers.room and (trial := self._next()) is not None:
                    self._start(trial, board)
                    self.write("RUNNING")
                self.workers.go()
                if not self.workers.running:
                    return why or self._leave_resting()
                self._follow(board, stopping=bool(why))
        except KeyboardInterrupt:
            self.workers.stop_at_once()
            deadline = time.monotonic() + LAST_SECONDS
            while self.workers.running and time.monotonic() < deadline:
                self._take_in(self.workers.wait(POLL_SECONDS), board)
            raise

    def _leave_resting(self) -> str:
        """Take the trials that rest at a rung as ended: nothing is left that could make them better than others."""
        for number in sorted(self._resting):
            self._progress[number].is_settled = True
        resting, self._resting = self._resting, set()
        for number in sorted(resting):
            self._end_unit(self.trials[number].unit)
        return ""

    def _follow(self, board: Board, *, stopping: bool) -> None:
        """Wait until a trial ends or something else is to be done."""
        while self.workers.running:
            if ended := self.workers.wait(POLL_SECONDS):
                self._take_in(ended, board)
                self.write("RUNNING")
                if not stopping:
                    return
            if not stopping and self._why_stop():
                return
            if time.monotonic() - self._poked > POKE_SECONDS:  # trials have come to be known there
                self._poked = time.monotonic()
                self.poke()
            if board.is_due():
                self._look()
                board.show(self._entries(), self.summary())

    def _why_stop(self) -> str:
        if self.plan.config.fail_fast and any(one.state == "FAILED" for one in self._settled()):
            return "sweep.fail_fast, and a trial failed"
        return self.stop.asked()

    def _settled(self) -> Iterator[Standing]:
        return (self.standings[number] for number, one in self._progress.items() if one.is_settled)

    def _start(self, trial: Trial, board: Board) -> None:
        number = self._study_number(trial)
        progress = self._progress[trial.number]
        progress.attempts += 1
        progress.started = time.monotonic()
        step = self.standings[trial.number].step
        board.say(f"trial {trial.number}  {trial.label or self.plan.name}  {'goes on' if step else 'starts'}")
        self.standings[trial.number] = Standing("RUNNING", step=step)
        link = self._link(number, progress.passed) if self._asks(trial) else None
        self.workers.start([Job(trial.number, dict(trial.config), self.record.run_dir(trial.number), link)])

    def _asks(self, trial: Trial) -> bool:
        """Whether a trial asks if it is worth going on."""
        pilot = self._pilot(trial)
        return self.plan.config.pruner is not Pruner.none and (pilot is None or pilot.number == trial.number)

    def _link(self, number: int, passed: int) -> dict[str, Any]:
        """Say where a trial asks whether to go on, and behind which evaluation: it has passed the rungs before."""
        config = self.plan.config
        return {
            "study": self.study.name,
            "storage": storage_url(config, self.plan.folder),
            "trial_id": self.study.trial_id(number),
            "metric": config.metric,
            "pruner": config.pruner.name,
            "min_resource": config.min_resource,
            "reduction_factor": config.reduction_factor,
            "passed": passed,
        }

    def _take_in(self, ended: Sequence[tuple[Job, int]], board: Board) -> None:
        """Note how trials ended, and have those tried again that are worth it."""
        for job, code in ended:
            trial, progress = self.trials[job.number], self._progress[job.number]
            standing = self._ended(job, code)
            self.standings[job.number] = standing
            is_again = not self._why_stop() and self._is_worth_trying(standing, progress)
            told = f"{_told(standing, self._metric)}{', tried again' if is_again else ''}"
            board.say(f"trial {trial.number}  {trial.label or self.plan.name}  {told}")
            if is_again:
                self._queue.append(job.number)
                continue
            if standing.state == "PRUNED" and self.plan.config.pruner is Pruner.asha:
                self._resting.add(job.number)
                progress.attempts = 0  # what comes when it goes on is another attempt
                continue
            progress.is_settled = True
            if standing.state == "FINISHED":
                self._note(trial.number, standing)
            self._durations.append(time.monotonic() - progress.started)
            self._end_unit(trial.unit)

    def _ended(self, job: Job, code: int) -> Standing:
        """Tell how a trial stands whose process has ended, and have its own folder say so."""
        how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        standing = self.record.standing(job.number, self._metric)
        if standing.state == "WAITING" and self.stop.asked() and code in (Interrupted.exit_code, -signal.SIGTERM):
            return standing
        if standing.state == "WAITING":
            return Standing("FAILED", None, f"{how} before it began{_last_words(standing.log)}", standing.log)
        if standing.cause.startswith("killed"):
            note_end(job.run_dir, TrainingError(how))
            return replace(standing, cause=how)
        if (
            standing.state in EXIT_CODES and code != EXIT_CODES[standing.state]
        ):  # it says how it ended before this start
            return Standing("FAILED", None, f"{how}{_last_words(standing.log)}", standing.log, standing.step)
        return standing

    def _is_worth_trying(self, standing: Standing, progress: _Progress) -> bool:
        if standing.is_over or progress.attempts > self.plan.config.max_retries:
            return False
        return standing.state == "PREEMPTED" or not _is_certain(standing.cause)

    # ---- what the study is told

    def _study_number(self, trial: Trial) -> int:
        """Give the study's number for a trial's unit, which is begun there where it is not."""
        number = self._units.get(trial.unit)
        if number is None or number not in self._open:
            number = self.study.begin(trial.unit, trial.overrides)
            self._units[trial.unit] = number
            self._open.add(number)
        return number

    def _of_unit(self, unit: int) -> list[Trial]:
        return [trial for trial in self.trials.values() if trial.unit == unit]

    def _mean(self, unit: int) -> float | None:
        """Give the mean of a unit's values; None where one is missing."""
        values = [self.standings[trial.number].value for trial in self._of_unit(unit)]
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known and len(known) == len(values) else None

    def _end_unit(self, unit: int) -> None:
        """Tell the study what came of a unit all of whose trials are done with."""
        trials = self._of_unit(unit)
        states = {self.standings[trial.number].state for trial in trials}
        if "PRUNED" in states:
            self._prune_rest(trials)
        elif not all(self._progress[t.number].is_settled or self.standings[t.number].is_over for t in trials):
            return
        if "PREEMPTED" in states or (number := self._units.get(unit)) is None or number not in self._open:
            return
        state = next(one for one in ("PRUNED", "FAILED", "FINISHED") if one in states)
        self.study.end(number, state, self._mean(unit) if state == "FINISHED" else None)
        self._open.discard(number)

    def _prune_rest(self, trials: Sequence[Trial]) -> None:
        """Take those out that wait: the first of their setting asked for all, and is not worth going on with."""
        for trial in trials:
            if trial.number in self._queue:
                self._queue.remove(trial.number)
                self.standings[trial.number] = Standing("PRUNED", cause="the first trial of its setting was")

    def _reconcile(self) -> None:
        """Tell the study what it missed: a sweep that was killed, or a study that is gone."""
        noted = {point["trial"] for point in self.history}
        for unit in sorted({trial.unit for trial in self.trials.values()}):
            trials = self._of_unit(unit)
            states = {self.standings[trial.number].state for trial in trials}
            if self._resting & {trial.number for trial in trials}:
                continue
            for trial in trials:
                if self.standings[trial.number].state == "FINISHED" and trial.number not in noted:
                    self._note(trial.number, self.standings[trial.number])
            if states == {"FINISHED"} or "PRUNED" in states:
                if unit not in self._units:
                    self._study_number(trials[0])
                self._end_unit(unit)
        known = {unit: number for unit, number in self._units.items() if unit in {t.unit for t in self.trials.values()}}
        self._units = known
        for number in self._open - set(known.values()):  # a proposal that was not written down
            self.study.end(number, "FAILED")

    # ---- what is shown and written

    def _note(self, number: int, standing: Standing) -> None:
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
        return self._has_given_up and bool(self.refusal)

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
        if not left or not self._durations:
            return counted(counts, self.total, None)
        mean, now_at = sum(self._durations) / len(self._durations), time.monotonic()
        spent = sum(min(mean, now_at - self._progress[number].started) for number in self.workers.running)
        return counted(counts, self.total, (mean * left - spent) / self.plan.config.n_jobs)

    def _look(self) -> None:
        for number in self.workers.running:
            self.standings[number] = self.record.standing(number, self._metric, is_running=True)

    def _entries(self) -> list[Entry]:
        best = self.best
        return [Entry(trial, self.standings[number], trial is best) for number, trial in sorted(self.trials.items())]

    def write(self, state: str) -> None:
        best = self.best
        self.record.write(
            {
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
            }
        )
        self.poke()


def _told(standing: Standing, metric: str) -> str:
    if standing.state == "WAITING":
        return "stopped before it began"
    if standing.state == "FINISHED":
        return f"finished, {metric} {standing.value:.6g}"
    return f"{standing.state.lower()}{f': {standing.cause}' if standing.cause else ''}"


def _last_words(log: Path | None) -> str:
    """Give the last line that a trial printed."""
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log else []
    return next((f": {line.strip()}" for line in reversed(lines) if line.strip()), "")


def _is_certain(cause: str) -> bool:
    """Whether a run that failed for this cause would fail again: a mistake in what it was given, or in its numbers."""
    kind = getattr(errors, cause.partition(":")[0], None)
    if not (isinstance(kind, type) and issubclass(kind, TowlineError)):
        return cause.startswith("no ") or "finite number" in cause
    return not issubclass(kind, TrainingError) or kind is errors.NonFiniteLossError


def reclaim(
    record: Record, numbers: Sequence[int], workers: Workers | Launched, board: Board, stop: StopRequest
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
