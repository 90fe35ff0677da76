"""The Optuna study of a sweep: what it has tried, and what a sampler proposes next. The door to Optuna.

A study's trial is a *unit*: one run of a grid, or one setting whose runs are averaged. The sweep's folder is the truth
about its runs; the study is what samplers, pruners and Optuna's own tools read.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.config.schema import Pruner, Sampler, SweepConfig
from src.errors import SweepError, one_line
from src.sweep.plan import Plan
from src.sweep.space import Axis

UNIT, FOLDER, SPACE, METRIC = "towline.unit", "towline.folder", "towline.space", "towline.metric"
LOCK_SECONDS = 60
"""How long a process waits for another one's write to a SQLite file."""
STATES = {"FINISHED": "COMPLETE", "PRUNED": "PRUNED", "FAILED": "FAIL"}


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
    """Open a storage by its URL.

    Raises:
        SweepError: where it can't be opened.
    """
    settings = {"connect_args": {"timeout": LOCK_SECONDS}} if url.startswith("sqlite:") else {"pool_pre_ping": True}
    try:
        return optuna().storages.RDBStorage(url, engine_kwargs=settings)
    except Exception as error:  # of the database's own driver, or that there is none
        raise SweepError(f"the study's storage {url} can't be opened: {one_line(error)}") from error


def storage_url(config: SweepConfig, folder: Path) -> str:
    return config.storage or f"sqlite:///{(folder / 'study.db').resolve()}"


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

    Optuna's own can't go on with what it ended, so the first trials of a rung all pass it. Here a trial rests at a rung
    unless it is among the best there, and goes on once it is: see Study.promotable.
    """

    class Halving(optuna().pruners.BasePruner):  # type: ignore[misc]
        def prune(self, study: Any, trial: Any) -> bool:
            step = trial.last_step
            if step is None or not _is_rung(step, min_resource, reduction_factor):
                return False
            return not _is_among_best(study, trial.intermediate_values[step], step, reduction_factor)

    return Halving()


def _is_rung(step: int, min_resource: int, reduction_factor: int) -> bool:
    while step > min_resource and step % reduction_factor == 0:
        step //= reduction_factor
    return step == min_resource


def _is_among_best(study: Any, value: float, step: int, reduction_factor: int) -> bool:
    """Whether a value is among the best of those that came to a rung: one of so many of them goes on."""
    trials = study.get_trials(deepcopy=False)
    sign = -1 if study.direction == optuna().study.StudyDirection.MAXIMIZE else 1
    values = sorted(sign * trial.intermediate_values[step] for trial in trials if step in trial.intermediate_values)
    num_kept = len(values) // reduction_factor
    return num_kept > 0 and sign * value <= values[num_kept - 1]


class Study:
    """The study of one sweep. Built by `open_study`."""

    def __init__(self, study: Any, axes: Sequence[Axis]) -> None:
        self._study = study
        self._axes = {axis.key: axis for axis in axes}
        self._distributions = {axis.key: _distribution(axis) for axis in axes}

    @property
    def name(self) -> str:
        return self._study.study_name

    def numbers(self) -> dict[int, int]:
        """Give the study's newest trial of every unit: unit -> its number there."""
        return {t.user_attrs[UNIT]: t.number for t in self._study.get_trials(deepcopy=False) if UNIT in t.user_attrs}

    def running(self) -> set[int]:
        """Give the numbers of the trials that have not been ended."""
        trials = self._study.get_trials(deepcopy=False)
        return {trial.number for trial in trials if not trial.state.is_finished()}

    def trial_id(self, number: int) -> int:
        """Give what the storage calls a trial."""
        return self._study.get_trials(deepcopy=False)[number]._trial_id

    def promotable(self, resting: Sequence[int], reduction_factor: int, *, at_least_one: bool = False) -> int | None:
        """Give the number of a resting trial that is among the best of its rung by now, of the highest rung first.

        Args:
            at_least_one: give the best one, where none is.
        """
        trials = [self._study.get_trials(deepcopy=False)[number] for number in resting]
        sign = -1 if self._study.direction == optuna().study.StudyDirection.MAXIMIZE else 1
        trials = [trial for trial in trials if trial.last_step is not None]
        trials.sort(key=lambda trial: (-trial.last_step, sign * trial.intermediate_values[trial.last_step]))
        for trial in trials:
            value = trial.intermediate_values[trial.last_step]
            if at_least_one or _is_among_best(self._study, value, trial.last_step, reduction_factor):
                return trial.number
        return None

    def last_evaluation(self, number: int) -> int:
        """Give the number of the last evaluation that a trial reported."""
        return self._study.get_trials(deepcopy=False)[number].last_step or 0

    def begin(self, unit: int, overrides: Sequence[str]) -> int:
        """Note that a unit which was not proposed is being tried; gives its number."""
        given = dict(text.split("=", 1) for text in overrides)
        params = {key: self._param(key, given[key]) for key in self._distributions if key in given}
        params = {key: value for key, value in params.items() if self._has(key, value)}  # others are of another command
        library = optuna()
        self._study.add_trial(
            library.trial.create_trial(
                state=library.trial.TrialState.RUNNING,
                params=params,
                distributions={key: self._distributions[key] for key in params},
                user_attrs={UNIT: unit},
            )
        )
        return self._study.get_trials(deepcopy=False)[-1].number

    def propose(self) -> Proposal:
        """Ask the sampler for a setting."""
        trial = self._study.ask(self._distributions)
        texts = [f"{key}={trial.params[key]}" for key in self._distributions]
        return Proposal(
            trial.number,
            tuple(
                axis.at(trial.params[key]) if axis.interval else text
                for (key, axis), text in zip(self._axes.items(), texts, strict=True)
            ),
        )

    def belongs(self, number: int, unit: int) -> None:
        """Note which unit a proposal became."""
        self._study._storage.set_trial_user_attr(self.trial_id(number), UNIT, unit)

    def end(self, number: int, state: str, value: float | None = None) -> None:
        """Note how a unit ended: FINISHED with its value, PRUNED or FAILED."""
        states = optuna().trial.TrialState
        self._study.tell(number, value, state=states[STATES[state]], skip_if_finished=True)

    def take_over(self, trials: Sequence[Any]) -> None:
        """Add trials of a study whose choices were others: those that either knew are choices now."""
        categorical = optuna().distributions.CategoricalDistribution
        for trial in trials:
            for key, one in trial.distributions.items():
                known = self._distributions.get(key)
                if isinstance(one, categorical) and isinstance(known, categorical):
                    self._distributions[key] = categorical(list(dict.fromkeys([*known.choices, *one.choices])))
        for trial in trials:
            kept = {k: d for k, d in self._distributions.items() if type(trial.distributions.get(k)) is type(d)}
            trial.params = {key: trial.params[key] for key in kept}
            trial.distributions = kept
            self._study.add_trial(trial)

    def _has(self, key: str, value: Any) -> bool:
        """Whether the study knows a value of a key."""
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


def open_study(plan: Plan, *, force: bool) -> Study:
    """Open a sweep's study, or begin it.

    Args:
        force: begin it anew.
    Raises:
        SweepError: where the storage can't be opened, or has this name for another folder's study.
    """
    library, config, name = optuna(), plan.config, plan.name
    storage = open_storage(storage_url(config, plan.folder))
    known = {study.study_name: study for study in storage.get_all_studies()}
    here, written = str(plan.folder.resolve()), json.dumps(plan.space, sort_keys=True)
    judged = f"{config.metric} {config.direction.value}"
    before: list[Any] = []
    num_before = 0
    if (old := known.get(name)) is not None:
        if config.storage is not None and old.user_attrs.get(FOLDER) != here:  # its own file moves with the folder
            raise SweepError(
                f"{config.storage} has a study {name} already, of {old.user_attrs.get(FOLDER)}; "
                "choose another sweep.name"
            )
        num_before = 0 if force else storage.get_n_trials(old._study_id)
        is_same = old.user_attrs.get(METRIC) == judged  # else its values are others, and come from the folder
        if force or not is_same or old.user_attrs.get(SPACE) != written:  # a study's choices can't change
            before = [] if force or not is_same else storage.get_all_trials(old._study_id)
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
    study.set_user_attr(SPACE, written)
    study.set_user_attr(METRIC, judged)
    opened = Study(study, plan.axes)
    opened.take_over(before)
    return opened


def _sampler(config: SweepConfig, num_before: int) -> Any:
    """Build the sampler; one that goes on must not propose again what it began with."""
    samplers, seed = optuna().samplers, (config.seed + num_before) % 2**32
    if config.sampler is Sampler.tpe:
        return samplers.TPESampler(seed=seed)
    return samplers.RandomSampler(seed=seed)
