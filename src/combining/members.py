"""The members of an ensemble: finished runs, what they have in common, and which rows none of them has seen."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from src.checkpoint.exported import ADAPTER, MODEL, check_exported, exported_digests, with_base_model
from src.config.files import expand
from src.config.frozen import CONFIG, STARTS, STATUS, config_hash, read_config, read_status
from src.config.gate import parse_stored
from src.config.job import Job
from src.config.schema import RunConfig, Weights
from src.data.dataset import file_hashes
from src.data.sources import file_hash, hash_of
from src.data.trained import RowHashes, SeenRows
from src.errors import DamagedFileError, DataError, ModelError
from src.metrics import greater_is_better
from src.records import read_json
from src.tracking.ensemble_files import members_in
from src.tracking.run_folder import PROVENANCE, SUMMARY
from src.util import listed

UNLIKE = ("_name_or_path", "transformers_version", "architectures", "dtype", "vocab_size")
"""What config.json says of a model besides its form; the number of rows grows where an adapter brings new tokens."""


@dataclass(frozen=True)
class Member:
    """A finished run. `name` is its trial's number in a sweep, or its folder; `model` a hash of what it exported."""

    job: Job
    name: str
    model: str

    @property
    def run_dir(self) -> Path:
        return self.job.run_dir

    @property
    def has_adapter(self) -> bool:
        """Whether it exported an adapter alone."""
        return (self.run_dir / MODEL / ADAPTER).exists()

    def summary(self) -> dict[str, Any]:
        """Return the run's last metrics; empty where there are none."""
        try:
            return read_json(self.run_dir / SUMMARY)
        except FileNotFoundError:
            return {}

    def decided_by(self) -> list[str]:
        """Return hashes of the configuration and of the model."""
        return [config_hash(self.job.frozen), self.model]


def members_of(jobs: Sequence[Job], *, in_sweep: bool) -> list[Member]:
    """Return the members, in the order in which they were named; DamagedFileError where a model is not as exported.

    DataError says that their test sets differ, where the command names none.
    """
    members = []
    for job in jobs:
        job = replace(job, config=with_base_model(job.run_dir, job.config))
        check_exported(job.run_dir, job.config.model.checkpoint)
        digests = read_status(job.run_dir).get(MODEL) or exported_digests(job.run_dir / MODEL)
        members.append(Member(job, job.run_dir.name if in_sweep else str(job.run_dir), hash_of(digests)))
    expected = _test_rows(members[0])
    for member in members:
        if (found := _test_rows(member)) != expected:
            raise DataError(
                f"{members[0].run_dir} and {member.run_dir} have other rows to test on ({_named(expected)}; "
                f"{_named(found)}): data.test_files=[FILE] names those on which all are compared"
            )
    return members


def named_twice(members: Sequence[Member]) -> list[Path]:
    """Return the runs that are members more than once."""
    counts = Counter(member.run_dir.resolve() for member in members)
    return [run for run, count in counts.items() if count > 1]


def _test_rows(member: Member) -> dict[str, list[str]]:
    sets = member.job.config.data.test_sets()
    return {name: [file_hash(file) for file in expand(files)] for name, files in sets.items()}


def _named(sets: Iterable[str]) -> str:
    return ", ".join(sets) or "none"


def rows_seen(members: Sequence[Member], hashes: RowHashes, warn: Callable[[str], None]) -> SeenRows:
    """Return all rows that a member may have been trained on, or the runs that it began with.

    DataError where these can't be read any more, or are others than they were. A base of which that is not known is
    warned of.
    """
    seen, folders, known = SeenRows(hashes), [member.run_dir for member in members], set[Path]()
    unknown: dict[str, None] = {}
    while folders:
        folder = folders.pop().resolve()
        if folder in known:
            continue
        known.add(folder)
        if made_of := members_in(folder):  # its own configuration is that of one of them
            folders += made_of
            continue
        config = parse_stored(read_config(folder))
        _check_unchanged(folder, config)
        seen.add(config)
        for place in _begun_with(config):
            around = {one for path in (place.absolute(), place.resolve()) for one in (path, *path.parents[:3])}
            found = [one for one in around if _is_run(one)]
            folders += found
            if not found:
                unknown[str(place)] = None
    for base in unknown:
        warn(f"{base} is in no run's folder: which rows that base was trained on is not known, and none is left out")
    return seen


def _begun_with(config: RunConfig) -> list[Path]:
    """Return the places of the weights that a run began with; a model on a hub has none."""
    places = [] if config.init_from is None else [Path(config.init_from)]
    base = Path(config.model.checkpoint)
    if config.model.weights is not Weights.random and base.exists():
        places.append(base)
    return places


def _is_run(folder: Path) -> bool:
    """Return whether a folder is that of a run, finished or not: something else may have a config.yaml too."""
    return (folder / CONFIG).is_file() and any((folder / name).exists() for name in (STARTS, STATUS, MODEL))


def _check_unchanged(folder: Path, config: RunConfig) -> None:
    """Raise DataError where a file that a run was trained on is gone or has another content, or one was added."""
    advice = "which rows the run has seen is not known"
    try:
        before = read_json(folder / PROVENANCE).get("data", {})
    except (FileNotFoundError, DamagedFileError):
        before = {}
    named = replace(config.data, validation_files=None, test_files=None)
    patterns = [pattern for patterns in named.files().values() for pattern in patterns]
    now = file_hashes(named)
    for file, content in now.items():
        if before.get(file, content) != content:
            raise DataError(f"{file} is not what {folder} was trained on: restore it, {advice} without it")
    others = {file for files in config.data.files().values() for file in expand(files)}
    for file in before.keys() - others:
        if any(_may_name(pattern, file) for pattern in patterns):
            raise DataError(f"{file}, which {folder} was trained on, is gone: restore it, {advice} without it")
    added = sorted(now.keys() - before.keys())
    if added and before.keys() & now.keys():
        raise DataError(f"{added[0]} was not there when {folder} was trained: move it away, {advice} with it")


def _may_name(pattern: str, file: str) -> bool:
    """Return whether a file, a glob or a folder meant a file that may be gone by now."""
    pattern, file = os.path.normpath(pattern), os.path.normpath(file)
    globs = (pattern, pattern.replace("**/", ""), os.path.join(pattern, "*"))
    return file == pattern or any(fnmatchcase(file, one) for one in globs)


def check_one_model(members: Sequence[Member]) -> None:
    """Check that members have one form of weights, one base and one vocabulary; ModelError says what differs."""
    check_one_vocabulary(members)
    first = members[0]
    form = _form(first)
    for member in members[1:]:
        other = _form(member)
        names = sorted(name for name in form.keys() | other.keys() if form.get(name) != other.get(name))
        if names:
            lines = [f"{name}: {form.get(name)} and {other.get(name)}" for name in names]
            raise ModelError(
                f"the weights of {first.run_dir} and {member.run_dir} have no mean, they differ in\n{listed(lines)}\n"
                "ensemble.method=consensus compares their texts"
            )


def differing_seeds(members: Sequence[Member]) -> str:
    """Return the seeds by which members began with different random weights; '' where they began alike."""
    drawn = [parse_stored(read_config(member.run_dir)) for member in members]
    seeds = {one.seed for one in drawn if one.model.weights is Weights.random and one.init_from is None}
    return ", ".join(map(str, sorted(seeds))) if len(seeds) > 1 else ""


def _form(member: Member) -> dict[str, Any]:
    """Return what decides whether weights have a mean: the architecture, and what they began with."""
    from src.model.build import load_architecture

    model = member.job.config.model
    architecture = load_architecture(model if member.has_adapter else model.pretrained_at(member.run_dir / MODEL))
    form = {name: value for name, value in architecture.to_dict().items() if name not in UNLIKE}
    begun = member.job.config.init_from or model.checkpoint
    there = Path(begun)
    base = {"base": str(there.resolve()) if there.exists() else begun, "model.revision": model.revision}
    return form | base | {"type of the weights": str(architecture.dtype)}


def check_one_vocabulary(members: Sequence[Member]) -> None:
    """Check that members are of one kind, and give each token one id; ModelError says what differs."""
    from src.data.tokenizer import load_tokenizer

    first, expected = members[0], dict[str, int]()
    for member in members:
        config = member.job.config
        if config.model.type is not first.job.config.model.type:
            types = f"{first.job.config.model.type.value} and {config.model.type.value}"
            raise ModelError(
                f"{first.run_dir} and {member.run_dir} are {types}: ensemble.method=consensus compares their texts"
            )
        tokenizer, _ = load_tokenizer(config.model.pretrained_at(member.run_dir / MODEL), config.tokens)
        vocabulary = tokenizer.get_vocab()
        expected = expected or vocabulary
        tokens = sorted(t for t in vocabulary.keys() | expected.keys() if vocabulary.get(t) != expected.get(t))
        if tokens:
            lines = [f"{token!r}: {expected.get(token)} and {vocabulary.get(token)}" for token in tokens]
            raise ModelError(
                f"{first.run_dir} and {member.run_dir} have other ids for tokens:\n{listed(lines)}\n"
                "ensemble.method=consensus compares their texts"
            )


def best_first(members: Sequence[Member]) -> list[int]:
    """Return the places of members by their own score on validation, the best first; as they are where some have none.

    A loss is compared only where all have one checkpoint: it counts tokens.
    """
    config, order = members[0].job.config, list(range(len(members)))
    names = [f"eval/validation/{metric}" for metric in config.metrics]
    if len({member.job.config.model.checkpoint for member in members}) == 1:
        names.append(config.checkpoint.metric_for_best_model)
    for name in names:
        values = [value for member in members if isinstance(value := member.summary().get(name), int | float)]
        if len(values) == len(members):
            sign = -1 if greater_is_better(name) else 1
            return sorted(order, key=lambda i: sign * values[i])
    return order
