"""The Optuna study of a sweep: what it has tried, and what a sampler proposes next. The door to Optuna.

A study's trial is a *unit*: one run of a grid, or one setting whose runs are averaged. The sweep's folder is the truth
about its runs; the study is what samplers, pruners and Optuna's own tools read. A run that may end early asks it at
every evaluation. No torch here.
"""

import json
import logging
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from src.config.quoting import in_url
from src.config.schema import Pruner, Sampler, SweepConfig
from src.errors import Pruned, StudyError, SweepError, one_line
from src.secrets import reveal
from src.sweep.plan import Plan
from src.sweep.space import Axis

UNIT, FOLDER, SPACE, METRIC = "towline.unit", "towline.folder", "towline.space", "towline.metric"
FILE = "study.db"  # the SQLite file in the sweep's folder, unless `sweep.storage` names another place
LOCK_SECONDS = 60  # how long a process waits for another one's write to a SQLite file
OPTUNA_STATES = {"FINISHED": "COMPLETE", "PRUNED": "PRUNED", "FAILED": "FAIL"}


@dataclass(frozen=True)
class Proposal:
    """A setting that the sampler wants tried: the study's number for it, and its overrides, each as KEY=VALUE."""

    number: int
    overrides: tuple[str, ...]


def optuna() -> Any:
    """Import Optuna, which says less than it would by itself."""
    import optuna as library

    library.logging.set_verbosity(logging.WARNING)
    return library


def open_storage(url: str) -> Any:
    """Open a storage by its URL; StudyError where it can't be opened."""
    settings = {"connect_args": {"timeout": LOCK_SECONDS}} if url.startswith("sqlite:") else {"pool_pre_ping": True}
    try:
        return optuna().storages.RDBStorage(url, engine_kwargs=settings)
    except Exception as error:  # of the database's own driver, or that there is none
        raise _refused(url, f"can't be opened: {one_line(error)}") from error


@contextmanager
def answering(url: str) -> Iterator[None]:
    """Raise StudyError where the storage that is asked in the block does not answer, or lost what it had."""
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (optuna().exceptions.OptunaError, SQLAlchemyError, LookupError, ValueError, OSError) as error:
        cause = getattr(error.__cause__, "orig", None) or error  # what the driver says; Optuna only guesses
        raise _refused(url, f"does not answer as it should: {one_line(cause)}") from error


def _refused(url: str, reason: str) -> StudyError:
    """Return the error that says what is wrong with a storage, and what to do."""
    from sqlalchemy.engine import make_url

    if url.startswith("sqlite:") and (file := make_url(url).database):
        remedy = f"Move {file} away: the same command makes the study anew, of what the sweep's folder has"
    else:
        remedy = "Fix it, or choose another sweep.storage: there the study is made anew, of what the sweep's folder has"
    return StudyError(f"the study's storage {url} {reason}. {remedy}")


def pruner_of(kind: Pruner, min_resource: int, reduction_factor: int) -> Any:
    """Build a pruner that counts in evaluations."""
    pruners = optuna().pruners
    if kind is Pruner.median:
        return pruners.MedianPruner(n_warmup_steps=min_resource)
    if kind is Pruner.asha:
        return _halving(min_resource, reduction_factor)
    return pruners.NopPruner()


def _halving(min_resource: int, reduction_factor: int) -> Any:
    """Build the pruner of asynchronous successive halving (Li et al. 2020, arXiv 1810.05934).

    Optuna's own can't resume what it ended, so the first trials of a rung all pass it. Here a trial is paused at a rung
    unless it is among the best there, and resumes once it is: see Study.promotable.
    """

    class Halving(optuna().pruners.BasePruner):  # type: ignore[misc]
        def prune(self, study: Any, trial: Any) -> bool:
            step = trial.last_step
            if step is None or not _is_rung(step, min_resource, reduction_factor):
                return False
            value, trials = trial.intermediate_values[step], study.get_trials(deepcopy=False)
            return not _is_among_best(trials, _sign(study), value, step, reduction_factor)

    return Halving()


def _is_rung(step: int, min_resource: int, reduction_factor: int) -> bool:
    while step > min_resource and step % reduction_factor == 0:
        step //= reduction_factor
    return step == min_resource


def _sign(study: Any) -> int:
    """Return what makes the study's better values the lower ones."""
    return -1 if study.direction == optuna().study.StudyDirection.MAXIMIZE else 1


def _is_among_best(trials: Sequence[Any], sign: int, value: float, step: int, reduction_factor: int) -> bool:
    """Return whether a value is in the best 1 / reduction_factor of those that reached a rung."""
    values = sorted(sign * trial.intermediate_values[step] for trial in trials if step in trial.intermediate_values)
    num_kept = len(values) // reduction_factor
    return num_kept > 0 and sign * value <= values[num_kept - 1]


class Study:
    """The study of one sweep, addressed by unit. Built by `open_study`.

    Every method that reaches the storage raises StudyError where it does not answer, or lost what it had.
    """

    def __init__(self, study: Any, axes: Sequence[Axis], storage: Any, url: str) -> None:
        self._study, self._storage, self._url = study, storage, url
        self._axes = {axis.key: axis for axis in axes}
        self._distributions = {axis.key: _distribution(axis) for axis in axes}
        self._numbers: dict[int, int] = {}
        self._open: set[int] = set()

    def read(self) -> None:
        """Read which units the study has, the newest trial of each, and which of them have not ended."""
        trials = self._trials()
        self._numbers = {trial.user_attrs[UNIT]: trial.number for trial in trials if UNIT in trial.user_attrs}
        self._open = {trial.number for trial in trials if not trial.state.is_finished()}

    def knows(self, unit: int) -> bool:
        """Return whether a unit was ever tried, as far as the study knows."""
        return unit in self._numbers

    def close(self) -> None:
        """Close the storage."""
        self._storage.remove_session()
        self._storage.engine.dispose()

    def is_open(self, unit: int) -> bool:
        """Return whether a unit is being tried, as far as the study knows."""
        return self._numbers.get(unit) in self._open

    def link(self, unit: int) -> dict[str, Any]:
        """Return where a unit's run asks whether to continue."""
        with answering(self._url):
            trial_id = self._trials()[self._numbers[unit]]._trial_id
        return {"study": self._study.study_name, "storage": self._url, "trial_id": trial_id}

    def promotable(
        self, paused: Iterable[int], reduction_factor: int, *, at_least_one: bool = False
    ) -> tuple[int, int] | None:
        """Return a paused unit that is among the best of its rung (at_least_one: or the best of all), and its rung."""
        sign = _sign(self._study)
        with answering(self._url):
            trials = self._trials()
            known = [(unit, trials[self._numbers[unit]]) for unit in paused]
        rungs = [(*max(one.intermediate_values.items()), unit) for unit, one in known if one.intermediate_values]
        for step, value, unit in sorted(rungs, key=lambda rung: (-rung[0], sign * rung[1])):
            if at_least_one or _is_among_best(trials, sign, value, step, reduction_factor):
                return unit, step
        return None

    def begin(self, unit: int, overrides: Sequence[str]) -> None:
        """Note that a unit is being tried, where the study does not know that: one of a grid, or one tried again."""
        if self.is_open(unit):
            return
        given = dict(text.split("=", 1) for text in overrides)
        params = {key: self._param(key, given[key]) for key in self._distributions if key in given}
        params = {key: value for key, value in params.items() if self._has(key, value)}  # others are of another command
        library = optuna()
        trial = library.trial.create_trial(
            state=library.trial.TrialState.RUNNING,
            params=params,
            distributions={key: self._distributions[key] for key in params},
            user_attrs={UNIT: unit},
        )
        with answering(self._url):
            self._study.add_trial(trial)
            number = self._trials()[-1].number
        self._numbers[unit] = number
        self._open.add(number)

    def propose(self) -> Proposal:
        """Ask the sampler for a setting; it is answered by `accept` or `answer`."""
        with answering(self._url):
            trial = self._study.ask(self._distributions)
        values = [(axis, trial.params[key]) for key, axis in self._axes.items()]
        texts = (axis.at(value) if axis.interval else f"{axis.key}={value}" for axis, value in values)
        return Proposal(trial.number, tuple(texts))

    def accept(self, proposal: Proposal, unit: int) -> None:
        """Note which unit a proposal becomes."""
        with answering(self._url):
            self._study._storage.set_trial_user_attr(self._trials()[proposal.number]._trial_id, UNIT, unit)
        self._numbers[unit] = proposal.number
        self._open.add(proposal.number)

    def answer(self, proposal: Proposal, value: float | None) -> None:
        """Answer a proposal that becomes no unit: with what is known of it, or that it can't be run."""
        self._end(proposal.number, "FAILED" if value is None else "FINISHED", value)

    def end(self, unit: int, state: str, value: float | None = None) -> None:
        """Note how a unit that is being tried ended: FINISHED with its value, PRUNED or FAILED."""
        if self.is_open(unit):
            self._end(self._numbers[unit], state, value)
            self._open.discard(self._numbers[unit])

    def keep_only(self, units: Collection[int]) -> None:
        """Forget units that the sweep does not have, and end proposals that became none: nobody wrote them down."""
        self._numbers = {unit: number for unit, number in self._numbers.items() if unit in units}
        for number in self._open - set(self._numbers.values()):
            self._end(number, "FAILED", None)
        self._open &= set(self._numbers.values())

    def _end(self, number: int, state: str, value: float | None) -> None:
        states = optuna().trial.TrialState
        with answering(self._url):
            self._study.tell(number, value, state=states[OPTUNA_STATES[state]], skip_if_finished=True)

    def _trials(self) -> list[Any]:
        return self._study.get_trials(deepcopy=False)

    def widen(self, trials: Sequence[Any]) -> None:
        """Take what other trials chose among the choices: a study's can't change while it has trials."""
        categorical = optuna().distributions.CategoricalDistribution
        for trial in trials:
            for key, one in trial.distributions.items():
                known = self._distributions.get(key)
                if isinstance(one, categorical) and isinstance(known, categorical):
                    new = [choice for choice in one.choices if choice not in known.choices]
                    self._distributions[key] = categorical([*known.choices, *new])

    def take_over(self, trials: Sequence[Any]) -> None:
        """Add trials of a study whose choices were others, with those of their values that are choices now."""
        for trial in trials:
            kept = {
                key: one
                for key, one in self._distributions.items()
                if type(trial.distributions.get(key)) is type(one) and self._has(key, trial.params[key])
            }
            trial.params = {key: trial.params[key] for key in kept}
            trial.distributions = kept
            self._study.add_trial(trial)

    def _has(self, key: str, value: Any) -> bool:
        """Return whether the study knows a value of a key."""
        known = self._distributions[key]
        if (interval := self._axes[key].interval) is None:
            return value in known.choices
        return value is not None and interval.low <= value <= interval.high

    def _param(self, key: str, text: str) -> Any:
        if (interval := self._axes[key].interval) is None:
            return text
        try:
            return int(text) if interval.is_int else float(text)
        except ValueError:  # of another command, when it was no interval
            return None


def _distribution(axis: Axis) -> Any:
    distributions = optuna().distributions
    if axis.interval is None:
        return distributions.CategoricalDistribution([text.partition("=")[2] for text in axis.values])
    low, high = axis.interval.low, axis.interval.high
    if axis.interval.is_int:
        return distributions.IntDistribution(int(low), int(high), log=axis.interval.is_log)
    return distributions.FloatDistribution(float(low), float(high), log=axis.interval.is_log)


def open_study(plan: Plan, num_tried: int) -> Study:
    """Open a sweep's study, or begin it; anew with force=true.

    StudyError says why the storage, or what it has, can't be read, and what to do; SweepError: it has this name for
    another folder's study. A study that is gone is made of the `num_tried` trials that the sweep's folder has.
    """
    file = plan.folder / FILE
    url = plan.config.storage or f"sqlite:///{in_url(file.resolve())}"
    if plan.config.storage is None and os.path.lexists(file) and not os.path.isfile(file):
        raise _refused(url, "is no plain file")
    storage = open_storage(url)
    with answering(url):
        return _opened(plan, storage, url, num_tried)


def _opened(plan: Plan, storage: Any, url: str, num_before: int) -> Study:
    library, config, name = optuna(), plan.config, plan.name
    known = {study.study_name: study for study in storage.get_all_studies()}
    here, written = str(plan.folder.resolve()), json.dumps(plan.space, sort_keys=True)
    judged = f"{config.metric} {config.direction.value}"
    before: list[Any] = []
    if (old := known.get(name)) is not None:
        of_another = old.user_attrs.get(FOLDER, here if not storage.get_n_trials(old._study_id) else None) != here
        if of_another and config.storage is not None:  # its own file moves with the folder
            owner = old.user_attrs.get(FOLDER)
            raise SweepError(f"{config.storage} has a study {name} already, of {owner}; choose another sweep.name")
        num_before = 0 if plan.force else max(num_before, storage.get_n_trials(old._study_id))
        is_kept = not plan.force and old.user_attrs.get(METRIC) == judged  # else its values come from the folder
        if not is_kept or old.user_attrs.get(SPACE) != written:  # a study's choices can't change
            before = storage.get_all_trials(old._study_id) if is_kept else []
            library.delete_study(study_name=name, storage=storage)
    study = library.create_study(
        study_name=name,
        storage=storage,
        direction=config.direction.value,
        sampler=_sampler(config, num_before),
        pruner=pruner_of(config.pruner, config.min_resource, config.reduction_factor),
        load_if_exists=True,
    )
    study.set_user_attr(FOLDER, here)
    study.set_user_attr(METRIC, judged)
    opened = Study(study, plan.axes, storage, url)
    opened.widen(before or study.get_trials(deepcopy=False))
    opened.take_over(before)
    study.set_user_attr(SPACE, written)  # it is whole only now
    opened.read()
    return opened


def _sampler(config: SweepConfig, num_before: int) -> Any:
    """Build the sampler; one that resumes must not propose again what it began with."""
    samplers = optuna().samplers
    kind = samplers.TPESampler if config.sampler is Sampler.tpe else samplers.RandomSampler
    return kind(seed=(config.seed + num_before) % 2**32)


class Pruning:
    """Asks the study in `link`, made by `SweepController`, whether a run is worth continuing; None: nobody is asked.

    `done` are the lines of metrics up to the step that the run resumes from. Where the study can't be asked, the run
    continues, and warns.
    """

    def __init__(
        self, link: Mapping[str, Any] | None, done: Sequence[Mapping[str, Any]], warn: Callable[[str], None]
    ) -> None:
        self._link, self._warn = link, warn
        self._metric = str(link["metric"]).removeprefix("best/") if link else ""
        self._count = sum(self._metric in line for line in done)
        self._trial: Any = None

    def verdict(self, metrics: Mapping[str, float]) -> str:
        """Report an evaluation; return why the run should end here, or ''."""
        value = metrics.get(self._metric)
        if self._link is None or value is None:
            return ""
        self._count += 1
        if not math.isfinite(value):
            return ""  # a failure, which the end of the run reports
        try:
            trial = self._trial or self._open(self._link)
            trial.report(value, self._count)
            is_worse = self._count > self._link["passed"] and trial.should_prune()
        except Exception as error:  # whatever the storage raises: a run does not end because nobody answers
            self._warn(f"the sweep's study can't be asked whether to prune the run, so it continues: {one_line(error)}")
            return ""
        others = f"{self._metric} {value:.4g} at evaluation {self._count}"
        return f"{others}: other trials of the sweep were better ({self._link['pruner']})" if is_worse else ""

    def _open(self, link: Mapping[str, Any]) -> Any:
        pruner = pruner_of(Pruner[link["pruner"]], link["min_resource"], link["reduction_factor"])
        storage = open_storage(reveal(link["storage"], [], "sweep.storage"))
        study = optuna().load_study(study_name=link["study"], storage=storage, pruner=pruner)
        self._trial = optuna().trial.Trial(study, link["trial_id"])
        return self._trial


def end_early(reason: str) -> None:
    """Raise Pruned, unless the reason is empty."""
    if reason:
        raise Pruned(reason)
