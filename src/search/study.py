"""The Optuna study of a sweep, in memory: what samplers and pruners know. The door to Optuna.

A study's trial is a *unit*: one run of a grid, or one setting whose runs are averaged. The sweep's folder is the truth:
the study is made of it at each start, so that what it proposes depends on nothing else. No torch here.
"""

import logging
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from src.config.axes import Axis
from src.config.schema import Pruner, Sampler, SweepConfig

UNIT = "towline.unit"
OPTUNA_STATES = {"FINISHED": "COMPLETE", "FAILED": "FAIL"}  # others have the same names


@dataclass(frozen=True)
class Unit:
    """What the sweep's folder says of a unit.

    `reports` are its values at evaluations 1, 2, …, `values` its result, one of each metric; `attrs` what the sampler
    noted with it.
    """

    number: int
    overrides: tuple[str, ...]
    state: str = "RUNNING"  # or WAITING, FINISHED, PRUNED, FAILED
    values: tuple[float, ...] = ()
    reports: tuple[float, ...] = ()
    attrs: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Proposal:
    """A setting that the sampler wants tried: its overrides, each as KEY=VALUE, and what the sampler notes with it."""

    overrides: tuple[str, ...]
    attrs: Mapping[str, Any]


def optuna() -> Any:
    """Import Optuna, which says less than it would by itself."""
    import optuna as library

    library.logging.set_verbosity(logging.WARNING)
    warnings.filterwarnings("ignore", category=library.exceptions.ExperimentalWarning)
    return library


class TrialWriter:
    """Keeps the trials of one of Optuna's studies as the units are that they stand for."""

    def __init__(self, study: Any, distributions: Mapping[str, Any]) -> None:
        self._study, self._storage, self._distributions = study, study._storage, distributions
        self._written: dict[int, tuple[int, Unit]] = {}  # unit -> its trial's id, and what is written of it

    def write(self, unit: Unit) -> None:
        """Bring a unit's trial up to date; of one that had ended, and is tried again, it is another trial."""
        trial_id, before = self._written.get(unit.number, (None, None))
        if before is None or before.state not in ("RUNNING", "WAITING"):
            given = trial_of(unit, self._distributions)
            trial_id = self._storage.create_new_trial(self._study._study_id, template_trial=given)
        else:
            for evaluation, value in enumerate(unit.reports[len(before.reports) :], len(before.reports) + 1):
                self._storage.set_trial_intermediate_value(trial_id, evaluation, value)
            if unit.state != before.state:
                state = optuna().trial.TrialState[OPTUNA_STATES.get(unit.state, unit.state)]
                self._storage.set_trial_state_values(trial_id, state, unit.values or None)
        assert trial_id is not None
        self._written[unit.number] = trial_id, unit

    def adopt(self, unit: Unit, trial_id: int) -> None:
        """Take a trial of the study as a unit's."""
        self._storage.set_trial_user_attr(trial_id, UNIT, unit.number)
        self._written[unit.number] = trial_id, unit

    def trial(self, unit: int) -> Any:
        return self._storage.get_trial(self._written[unit][0])


class Study:
    """The units of a sweep, and what a sampler and a pruner make of them.

    `changed` takes each that has changed; `earlier` are those of another sweep, which this one learns from.
    """

    def __init__(
        self,
        config: SweepConfig,
        axes: Sequence[Axis],
        units: Sequence[Unit],
        changed: Callable[[Unit], None],
        earlier: Sequence[Unit] = (),
    ) -> None:
        self._config, self._axes, self._changed = config, {axis.key: axis for axis in axes}, changed
        self._earlier = earlier
        self.units = {unit.number: unit for unit in units}
        self._built: tuple[Any, TrialWriter] | None = None
        self._asked = 0  # the id of the trial that was proposed last

    def _optuna(self) -> tuple[Any, TrialWriter]:
        """Return Optuna's study, made when it is first needed: a grid needs none."""
        if self._built is None:
            directions, pruner = list(self._config.directions), _pruner(self._config)
            study = optuna().create_study(study_name="sweep", directions=directions, pruner=pruner)
            writer = TrialWriter(study, {key: distribution(axis) for key, axis in self._axes.items()})
            self._built = study, writer
            for unit in [*self._earlier, *self.units.values()]:
                writer.write(unit)
        return self._built

    def _set(self, unit: Unit) -> None:
        self.units[unit.number] = unit
        if self._built is not None:
            self._built[1].write(unit)
        self._changed(unit)

    def begin(self, unit: Unit) -> None:
        """Note that a unit is being tried; one that failed is tried anew."""
        if (known := self.units.get(unit.number)) is None or known.state in ("WAITING", "FAILED"):
            self._set(unit)

    def report(self, number: int, reports: Sequence[float]) -> None:
        """Note all that a unit that is being tried has reported so far."""
        unit = self.units[number]
        if unit.state == "RUNNING" and len(reports) > len(unit.reports):
            self._set(replace(unit, reports=tuple(reports)))

    def end(self, number: int, state: str, values: tuple[float, ...] = ()) -> None:
        """Note how a unit ended: FINISHED with its values, PRUNED or FAILED."""
        if self.units[number].state == "RUNNING":
            self._set(replace(self.units[number], state=state, values=values))

    def should_prune(self, number: int) -> bool:
        """Return whether a unit that is being tried looks worse than others did at its last evaluation."""
        study, writer = self._optuna()
        return bool(study.pruner.prune(study, writer.trial(number)))

    def propose(self, number: int, attempt: int) -> Proposal:
        """Return what the sampler wants tried as a unit; to be answered by `accept` or `refuse`.

        `attempt` counts what was refused as this unit, from 0. The same units, number and attempt have one proposal.
        """
        study, _ = self._optuna()
        study.sampler = _sampler(self._config, number, attempt, study.get_trials(deepcopy=False)[: len(self._earlier)])
        trial, chosen = study.ask(), list[str]()
        self._asked = trial._trial_id
        for axis in self._axes.values():
            if axis.is_varied(chosen):
                value = trial._suggest(axis.key, distribution(axis))
                chosen.append(axis.at(value) if axis.interval else f"{axis.key}={value}")
        return Proposal(tuple(chosen), study._storage.get_trial(self._asked).system_attrs)

    def accept(self, unit: Unit) -> None:
        """Note that the last proposal became a unit."""
        self.units[unit.number] = unit
        self._optuna()[1].adopt(unit, self._asked)
        self._changed(unit)

    def refuse(self) -> None:
        """Forget the last proposal, which can't be run or was tried before."""
        self._built = None


def trial_of(unit: Unit, distributions: Mapping[str, Any]) -> Any:
    """Return a unit as Optuna's trial, with its values of the keys that have a distribution with them."""
    library, params = optuna(), params_of(unit)
    held = {key: text for key, text in params.items() if key in distributions and _holds(distributions[key], text)}
    known = {key: value_of(distributions[key], text) for key, text in held.items()}
    return library.trial.create_trial(
        state=library.trial.TrialState[OPTUNA_STATES.get(unit.state, unit.state)],
        values=unit.values or None,
        params=known,
        distributions={key: distributions[key] for key in known},
        intermediate_values=dict(enumerate(unit.reports, 1)),
        user_attrs={UNIT: unit.number},
        system_attrs=dict(unit.attrs or {}),
    )


def params_of(unit: Unit) -> dict[str, str]:
    """Return what a unit has of each key, as it was written."""
    return dict(text.split("=", 1) for text in unit.overrides)


def value_of(distribution: Any, text: str) -> Any:
    """Return a value that a distribution holds as it has it."""
    is_choice = isinstance(distribution, optuna().distributions.CategoricalDistribution)
    return text if is_choice else distribution.to_external_repr(float(text))


def distribution(axis: Axis) -> Any:
    """Return the values of an axis as Optuna's distribution."""
    distributions = optuna().distributions
    if axis.interval is None:
        return distributions.CategoricalDistribution([text.partition("=")[2] for text in axis.values])
    low, high = axis.interval.low, axis.interval.high
    if axis.interval.is_int:
        return distributions.IntDistribution(int(low), int(high), log=axis.interval.is_log)
    return distributions.FloatDistribution(float(low), float(high), log=axis.interval.is_log)


def spanning(axes: Sequence[Axis], units: Iterable[Unit]) -> dict[str, Any]:
    """Return the distributions of axes and of all that units have of them, which may be of an earlier command."""
    library, found = optuna().distributions, {axis.key: distribution(axis) for axis in axes}
    for key, text in {pair: None for unit in units for pair in params_of(unit).items()}:
        if key not in found or _holds(one := found[key], text):
            continue
        if isinstance(one, library.CategoricalDistribution):
            found[key] = library.CategoricalDistribution([*one.choices, text])
        elif _is_number(text) and not (one.log and float(text) <= 0):
            value = one.to_external_repr(float(text))
            found[key] = type(one)(min(one.low, value), max(one.high, value), log=one.log)
    return found


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _holds(distribution: Any, text: str) -> bool:
    """Return whether a value, as it was written, is one of a distribution's: others are of another command."""
    if isinstance(distribution, optuna().distributions.CategoricalDistribution):
        return text in distribution.choices
    return _is_number(text) and bool(distribution.low <= float(text) <= distribution.high)


def _pruner(config: SweepConfig) -> Any:
    """Build the pruner; asha is `pruning.Halving`, which can resume what it paused."""
    pruners = optuna().pruners
    if config.pruner is Pruner.median:
        return pruners.MedianPruner(n_warmup_steps=config.min_resource)
    if config.pruner is Pruner.hyperband:
        return pruners.HyperbandPruner(min_resource=config.min_resource, reduction_factor=config.reduction_factor)
    return pruners.NopPruner()


def _sampler(config: SweepConfig, number: int, attempt: int, earlier: Sequence[Any]) -> Any:
    """Build the sampler of one proposal, which nothing but the study and these numbers decides.

    `earlier` are the study's trials of another sweep; cmaes learns of them only as it begins.
    """
    samplers = optuna().samplers
    seed = int(np.random.SeedSequence((config.seed, number, attempt)).generate_state(1)[0])
    if config.sampler is Sampler.qmc:

        class Quasi(samplers.QMCSampler):  # type: ignore[name-defined]
            def _find_sample_id(self, *_: Any) -> int:  # of a sequence that all proposals share
                return number + attempt

        return Quasi(scramble=True, seed=config.seed, warn_independent_sampling=False)
    if config.sampler is Sampler.cmaes:
        source = list(earlier) or None
        return samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False, source_trials=source)
    kinds = {Sampler.tpe: samplers.TPESampler, Sampler.gp: samplers.GPSampler}
    return kinds.get(config.sampler, samplers.RandomSampler)(seed=seed)
