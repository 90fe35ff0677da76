"""What a sweep will run: every point composed and held against the gate before the first one starts. No torch here."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from src.config.axes import REPLICATED, SWEEP_FILE, Axis, axes_of, points, probes, size
from src.config.command_line import CommandLine
from src.config.compose import warn_of_broken_options
from src.config.conditions import with_conditions
from src.config.files import unusable
from src.config.frozen import code_problems
from src.config.gate import check_composed, located_problems, sweep_of
from src.config.hydra_keys import SWEEPER_PARAMS, is_own_sweeper, sweeper_params
from src.config.job import Job
from src.config.kept import check_kept, differing, kept_roots
from src.config.keys import all_keys
from src.config.points import Assignment, Points
from src.config.problems import COMMAND_LINE, Problem, refuse
from src.config.quoting import label
from src.config.rules.sweep import axis_problems, count_problems, sweep_problems
from src.config.schema import Replicate, RunConfig, Sampler, SweepConfig
from src.config.trust import signature
from src.trials.folder import SweepFolder
from src.trials.trial import Trial, setting_of, trial_of, with_typed_numbers
from src.util import value_at

MOST_PROBES = 200  # how many points are checked where there are too many to check all
NO_REPLICATE = ("++seed=0", "++data.fold=null")  # overrides that make all replicates of a setting compose alike


@dataclass
class Plan:
    """A sweep that was admitted. Built by `plan_sweep`."""

    line: CommandLine
    config: SweepConfig
    folder: Path
    force: bool
    axes: list[Axis]  # what is varied from setting to setting
    replicates: list[Axis]  # what is varied within a setting, and averaged
    composer: Points
    is_own_sweeper: bool = True  # whether Towline runs it; another sweeper of Hydra's varies the command line only
    trials: list[Trial] = field(default_factory=list)  # all there will be; empty where a sampler has to propose them
    changed_conf: list[str] = field(default_factory=list)
    """Files of conf/ that changed since the sweep began; it is still composed of the old ones."""
    admitted: RunConfig | None = None  # the first configuration that was admitted
    is_repeated: bool = False  # whether it is composed of the options that a folder kept, which may be somebody else's
    signatures: list[str] = field(default_factory=list)
    """This user's, of admitted configurations that let a checkpoint run code; see src.config.trust."""
    _settings: dict[tuple[str, ...], str] = field(default_factory=dict)

    @property
    def sample(self) -> RunConfig:
        """A configuration with what all trials have in common: where they write, what they run on, their tracking."""
        assert self.admitted is not None
        return self.admitted

    @property
    def name(self) -> str:
        """The sweep's name: its folder's, where the command names none."""
        return self.config.name if self.line.value_of("sweep.name") else self.folder.resolve().name

    @property
    def settings(self) -> dict[str, Any]:
        """The sweep's own keys as plain values."""
        given = dataclasses.asdict(self.config)
        return {key: value.name if isinstance(value, Enum) else value for key, value in given.items()}

    def compose_from(self, roots: list[Path]) -> None:
        """Compose what is proposed from now on of other options."""
        self.line = dataclasses.replace(self.line, roots=roots)
        self.composer = self.composer.moved(self.line)

    @property
    def is_listed(self) -> bool:
        """Whether it is known beforehand which trials there will be."""
        return bool(self.trials)

    @property
    def num_replicates(self) -> int:
        """How many trials a setting has, where they are averaged."""
        return size(self.replicates) or 1

    @property
    def by_key(self) -> dict[str, Axis]:
        """What is varied, replicates included, by its key."""
        return {axis.key: axis for axis in [*self.axes, *self.replicates]}

    @property
    def space(self) -> dict[str, str]:
        """What is varied, as it was written."""
        return {key: axis.text for key, axis in self.by_key.items()}

    def unit(self, own: Sequence[str], unit: int, first: int) -> tuple[list[Trial], list[Problem]]:
        """Compose the trials of a setting, given as KEY=VALUE, numbered from `first`, or return why it is refused."""
        trials, problems = [], []
        for number, replicate in enumerate(points(self.replicates), start=first):
            texts = (*own, *replicate)
            admitted, found = self._admit(texts)
            problems += found
            if admitted is not None:
                trials.append(trial_of(number, unit, texts, admitted.frozen, self._setting(texts, admitted.config)))
        return trials, problems

    def _setting(self, overrides: Sequence[str], typed: RunConfig) -> str:
        """Return the hash that all replicates of a setting share, also where their paths have the seed in them."""
        own = tuple(text for text in overrides if text.partition("=")[0] not in REPLICATED)
        if own not in self._settings:
            composed = self.composer.compose([*self._forced(own), *NO_REPLICATE])
            sections = {key: value for key, value in composed.sections.items() if key != "sweep"}
            self._settings[own] = setting_of(with_typed_numbers(sections, typed, self.by_key))
        return self._settings[own]

    def _forced(self, overrides: Sequence[str]) -> list[str | Assignment]:
        return [one for text in overrides for one in self.by_key[text.partition("=")[0]].forced(text)]

    def _admit(self, overrides: Sequence[str]) -> tuple[Job | None, list[Problem]]:
        composed = self.composer.compose(self._forced(overrides))
        if self.is_repeated:  # before a plugin that these options name is imported
            composed.problems += code_problems(self.folder, composed.sections, self.line, self.signatures)
        admitted, problems = check_composed(composed, self.line)
        if admitted is not None and admitted.sweep is not None:
            problems = [*sweep_problems(admitted.sweep, admitted.config), *self.code_problems(admitted.frozen)]
            self.admitted = self.admitted or admitted.config
            admitted.frozen = with_typed_numbers(admitted.frozen, admitted.config, self.by_key)
        located = []
        for problem in problems:
            key = next((one for one in all_keys() if problem.key.startswith(f"{one}.")), problem.key)  # of a mapping's
            axis = self.by_key.get(key)
            where = (axis.where if axis else "") or problem.where
            located.append(dataclasses.replace(problem, where=where, point=" ".join(overrides)))
        return (None if problems else admitted), located

    def code_problems(self, frozen: Mapping[str, Any], *, is_kept: bool = False) -> list[Problem]:
        """Return why a configuration may not let a checkpoint run code; one that may is signed for this folder.

        `is_kept`: the folder holds the configuration, rather than the options that it was composed of.
        """
        if (self.is_repeated or is_kept) and (found := code_problems(self.folder, frozen, self.line, self.signatures)):
            return found
        if (signed := signature(self.folder, frozen)) is not None and signed not in self.signatures:
            self.signatures.append(signed)
        return []


def plan_sweep(line: CommandLine, begin: Callable[[Plan], None] = lambda plan: None) -> Plan:
    """Compose and check everything that a sweep's command line asks for; ConfigError has all problems together.

    Where a sampler proposes the settings, every value is checked together with the first ones of the others. `begin` is
    called once, when the first point has been found good, while others may still be found bad.
    """
    plan, problems = _open(line)
    if kept := _kept(plan):
        changed, signatures = [] if line.problems else differing(kept, line.roots), plan.signatures
        plan, problems = _open(dataclasses.replace(line, roots=kept))
        plan.changed_conf, plan.is_repeated, plan.signatures = changed, True, signatures
    if line.value_of("hydra.run.dir") is not None:
        reason = "of a single run; a sweep's folder is multirun/<sweep.name>, or hydra.sweep.dir=DIR"
        problems.append(Problem("hydra.run.dir", reason, has_value=False, where=COMMAND_LINE))
    if too_many := list(
        count_problems(plan.config, [*plan.axes, *plan.replicates], is_own_sweeper=plan.is_own_sweeper)
    ):
        raise refuse([*problems, *too_many])  # before any of them is written out
    problems += (of_axes := list(axis_problems(plan.config, plan.axes, plan.replicates)))
    of_points: list[Problem] = []
    num_points = 0
    config, num_settings = plan.config, size(plan.axes)
    wanted = config.n_trials
    is_proposed = config.sampler is not Sampler.grid and wanted is not None and wanted < (num_settings or math.inf)
    is_listed = not (of_axes or num_settings is None or is_proposed)
    most = wanted if is_listed else (10 if of_axes else MOST_PROBES)
    for unit, own in enumerate(itertools.islice((points if is_listed else probes)(plan.axes), most)):
        trials, found = plan.unit(own, unit, len(plan.trials))
        plan.trials += trials if is_listed else []
        of_points += found
        if unit == 0 and not [*problems, *of_points]:
            begin(plan)
        num_points += plan.num_replicates
    if problems := [*problems, *_at_points(of_points, num_points, plan.space)]:
        raise refuse(problems)
    plan.trials = _distinct(plan.trials)
    warn_of_broken_options(plan.line)
    return plan


def _at_points(problems: Sequence[Problem], num_points: int, varied: Mapping[str, str]) -> Iterator[Problem]:
    """Name the first point that has a problem, where others have not, and its key does not say which."""
    found: dict[tuple[str, str, str], list[Problem]] = {}
    points_of_key: dict[str, set[str]] = {}
    for problem in problems:
        found.setdefault((problem.given, problem.reason, problem.where), []).append(problem)
        points_of_key.setdefault(problem.key, set()).add(problem.point)
    for same in found.values():
        points_of = list(dict.fromkeys(problem.point for problem in same))
        first, group = same[0], same[0].key.partition(".")[0]
        where, reason = first.where, first.reason
        if len(points_of) < num_points and first.key not in varied:
            more = f" and {len(points_of) - 1} more" if len(points_of) > 1 else ""
            where = "; ".join(filter(None, [where, f"at {points_of[0]}{more}"]))
        if {group, first.key} <= varied.keys() and len(points_of_key[first.key]) < num_points:
            reason += f"; to vary it with some only: sweep.when={{{first.key}: {{{group}: …}}}}"
        yield dataclasses.replace(first, where=where, reason=reason)


def _kept(plan: Plan) -> list[Path]:
    """Return the options that the same command was composed of before; empty where it begins anew."""
    if plan.force or unusable(str(plan.folder)):
        return []
    record = SweepFolder(plan.folder)
    content = record.read()
    plan.signatures = content.get("signatures", [])
    if content.get("id") != plan.line.sweep_id:
        return []
    check_kept(record.conf)
    return kept_roots(record.conf)


def _open(line: CommandLine) -> tuple[Plan, list[Problem]]:
    """Read the sweep's own settings and what it varies; ConfigError where that can't be made out."""
    problems = list(line.problems)
    _, fixed = axes_of(line, {}, [])
    first = Points(fixed, line).compose([])
    sweep, found = sweep_of(first)
    if sweep is None or not first.sections or not first.has_run_dir:
        of_sweep = [problem for problem in found if first.sections and problem.key not in first.unresolved]
        raise refuse([*problems, *located_problems(first, line), *of_sweep])
    is_own = is_own_sweeper(first)
    params = {SWEEP_FILE: sweep.params, SWEEPER_PARAMS: sweeper_params(first)} if is_own else {}
    axes, fixed = axes_of(line, params, problems)
    if more := _replicates(sweep, first.sections, {axis.key for axis in axes}, problems):
        fixed = [one for one in fixed if _pair(one)[0] not in more]
        alone = dataclasses.replace(line, overrides=[], problems=[])
        axes += axes_of(alone, {SWEEP_FILE: more}, problems)[0]
    of_conditions, is_typed = list[Problem](), line.value_of("sweep.when") is not None
    axes = with_conditions(
        axes, dict(map(_pair, fixed)), (is_own and sweep.when) or {}, of_conditions, is_typed=is_typed
    )
    if of_conditions:  # without them, values are refused where they were not to be
        raise refuse([*problems, *of_conditions])
    is_averaged = sweep.sampler is not Sampler.grid or sweep.replicate is not Replicate.none
    replicates = [axis for axis in axes if is_averaged and axis.key in REPLICATED]
    of_setting = [axis for axis in axes if axis not in replicates]
    force = bool(first.sections.get("force"))
    plan = Plan(line, sweep, first.run_dir, force, of_setting, replicates, Points(fixed, line), is_own_sweeper=is_own)
    return plan, problems


def _replicates(
    sweep: SweepConfig, sections: Mapping[str, Any], varied: Collection[str], problems: list[Problem]
) -> dict[str, str]:
    """Return the seeds or folds that sweep.replicate asks for, by their key, where the command does not say which."""
    if sweep.replicate is Replicate.seeds and "seed" not in varied and isinstance(seed := sections.get("seed"), int):
        return {"seed": f"range({seed},{seed + sweep.num_seeds})"}
    if sweep.replicate is not Replicate.folds or "data.fold" in varied:
        return {}
    num_folds, fold = (value_at(sections, f"data.{name}") for name in ("num_folds", "fold"))
    if fold is None and isinstance(num_folds, int):
        return {"data.fold": f"range(0,{num_folds})"}
    if fold is None:
        problems.append(Problem("data.num_folds", "sweep.replicate=folds needs it: how many folds", num_folds))
    else:
        reason = "sweep.replicate=folds trains every fold: leave it out, or name those you want: data.fold=0,1"
        problems.append(Problem("data.fold", reason, fold))
    return {}


def _pair(fixed: str | Assignment) -> tuple[str, str]:
    """Return the key of what all points have, and KEY=VALUE."""
    text = label(fixed.key, fixed.value) if isinstance(fixed, Assignment) else fixed.lstrip("+")
    return text.partition("=")[0], text


def _distinct(trials: Sequence[Trial]) -> list[Trial]:
    """Leave out a trial that computes the same as one before it; numbers stay without gaps."""
    first = {trial.identity: trial for trial in reversed(trials)}
    kept = [trial for trial in trials if first[trial.identity] is trial]
    return [dataclasses.replace(trial, number=number) for number, trial in enumerate(kept)]
