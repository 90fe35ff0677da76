"""Saving: checkpoints of a run, each whole or not there at all; which of them are kept; the best weights.

A save returns when its bytes are with the operating system. A thread then syncs them to the disk, reads them back,
writes their manifest (src.checkpoint.manifest), renames the folder, and only then removes what is not to be kept. So
training waits for a copy in memory, not for the disk. Safetensors and JSON, nothing pickled.
"""

import errno
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from src.checkpoint import manifest
from src.checkpoint.locate import WEIGHTS_KEY, lost_best, problem_of_best, unreadable
from src.checkpoint.manifest import OPTIMIZER, WEIGHTS, Manifest, refusal_of
from src.checkpoint.tensors import one_by_one, stored_digest, write_tensors
from src.config.places import CHECKPOINTS, MANIFEST, STATE, folder_of, remove_atomically, remove_tree, steps_in
from src.config.schema import CheckpointConfig
from src.errors import CheckpointError, DiskFullError, is_disk_full
from src.runtime.sharding import ShardedTensor
from src.util import human_bytes, sync, write_atomically

T_co = TypeVar("T_co", bound=Tensor | ShardedTensor, covariant=True)
SMALL_BYTES = 100_000
"""What state.json and manifest.json take at most, with what a file system needs for them."""


@dataclass(frozen=True)
class Snapshot(Generic[T_co]):
    """What a checkpoint holds: tensors by name, and all else as plain JSON values.

    `optimizer` is None where only weights are kept. Sharded tensors are gathered as they are written.
    """

    weights: Mapping[str, T_co]
    optimizer: Mapping[str, T_co] | None
    state: Mapping[str, Any]

    def files(self) -> dict[str, Mapping[str, T_co]]:
        """Return the tensors of each file, by the file's name."""
        return {WEIGHTS: self.weights} | ({} if self.optimizer is None else {OPTIMIZER: self.optimizer})

    @property
    def num_bytes(self) -> int:
        return sum(t.nbytes for tensors in self.files().values() for t in tensors.values())


AnySnapshot = Snapshot[Tensor | ShardedTensor]


def read_snapshot(checkpoint: Path) -> Snapshot[Tensor]:
    """Load a checkpoint onto the CPU; CheckpointError names what is damaged."""
    manifest.check_undamaged(checkpoint)
    optimizer = load_file(checkpoint / OPTIMIZER) if manifest.is_resumable(checkpoint) else None
    return Snapshot(load_file(checkpoint / WEIGHTS), optimizer, manifest.read_state(checkpoint))


@dataclass
class Checkpoints:
    """The checkpoints of one run, in `checkpoints/` of its folder. Built by `open_checkpoints`."""

    _config: CheckpointConfig
    _folder: Path
    _before: Callable[[], None]  # called by the thread that completes a save, before it completes it
    _writes: bool  # whether this process writes; of several, one does
    warnings: list[str] = field(default_factory=list)  # what an earlier start has left that can't be removed
    newest: int | None = None  # the last step that the run can resume from
    _worker: ThreadPoolExecutor = field(
        default_factory=partial(ThreadPoolExecutor, max_workers=1, thread_name_prefix="checkpoint")
    )
    _pending: Future[None] | None = None
    _present: set[int] = field(default_factory=set)  # steps whose weights are in the folder, or being written
    _ranking: list[tuple[float, int]] = field(default_factory=list)
    """Value and step of the best evaluations, best first, of equal ones the earlier; at most keep_best."""
    _best_at_save: set[int] = field(default_factory=set)
    """The steps of the best evaluations at the last save: a run that resumes from it needs their weights."""
    _written: dict[int, str] = field(default_factory=dict)  # checksums of the weights that this run wrote, by step

    def discard_after(self, newest: int) -> list[str]:
        """Remove the checkpoints after the step that the run resumes from; return a warning that names them.

        CheckpointError names one that can't be read, and may be whole.
        """
        left = [step for step in steps_in(self._folder) if step > newest] if self._writes else []
        for step in left:
            if refusal := refusal_of(self._at(step)):
                raise CheckpointError(unreadable(self._at(step), refusal, "It is later than where the run resumes"))
        for step in left:
            remove_atomically(self._at(step))
        steps = ", ".join(map(str, left))
        return [f"the run resumes after step {newest}; later checkpoints are removed: {steps}"] if left else []

    def load_index(
        self, lines: Iterable[Mapping[str, Any]], newest: int | None, written: Mapping[int, str] | None = None
    ) -> list[str]:
        """Find the checkpoints and best evaluations of earlier starts; return warnings.

        Args:
            lines: the lines of metrics so far, or of the best evaluations among them.
            newest: the step of this folder that the run resumes from; None where it begins, or resumes from another.
            written: checksums of the weights that the run wrote, see src.checkpoint.locate.written_weights.
        Raises:
            CheckpointError: where the best weights are lost, and are to be exported; or where some of the best can't be
                read, so that they may be lost.
        """
        written = written or {}
        if newest is not None:
            self.discard_after(newest)
            if manifest.is_resumable(self._at(newest)):  # else it is a copy by another name
                self.newest, self._present = newest, {newest}
        for line in lines:
            self._rank(int(line["step"]), line)
        problems = {step: problem_of_best(self._at(step), written.get(step)) for _, step in self._ranking}
        lost = {step: problem for step, problem in problems.items() if problem is not None}
        if self.best in lost and self._config.load_best_model_at_end and not self._config.allow_changed:
            raise CheckpointError(lost_best(folder_of(self._folder, self.best), lost[self.best]))
        self._present |= problems.keys() - lost.keys()
        complete = self._present if self._writes else set()
        self._written = {step: manifest.weights_checksum(self._at(step)) for step in complete}
        self._ranking = [(value, step) for value, step in self._ranking if step not in lost]
        self._best_at_save = self._best_steps
        return [f"the weights of step {step}, among the best so far, are lost: {lost[step]}" for step in lost]

    def save(self, step: int, take: Callable[[], AnySnapshot]) -> None:
        """Save what `take` returns as a step to resume from, unless it is saved already.

        DiskFullError says what it needs and what there is; earlier checkpoints are as they were.
        """
        if step != self.newest:
            best = self._best_at_save = self._best_steps
            self._write(step, take, best, step)
            self.newest = step

    def keep_if_best(self, step: int, metrics: Mapping[str, Any], take: Callable[[], AnySnapshot]) -> None:
        """Keep the weights, which `take` returns, of an evaluation that is among the best so far."""
        if self._rank(step, metrics) and step not in self._present:
            self._write(step, take, self._best_steps | self._best_at_save, self.newest)

    @property
    def _best_steps(self) -> set[int]:
        return {step for _, step in self._ranking}

    def _rank(self, step: int, metrics: Mapping[str, Any]) -> bool:
        value = metrics.get(self._config.metric_for_best_model)
        if value is None or not math.isfinite(value):
            return False
        others = [one for one in self._ranking if one[1] != step]  # it may be evaluated again
        sign = -1 if self._config.is_greater_better else 1
        ranking = sorted([*others, (value, step)], key=lambda one: (sign * one[0], one[1]))
        self._ranking = ranking[: self._config.keep_best]
        return (value, step) in self._ranking

    @property
    def best(self) -> int | None:
        """The step of the best evaluation so far; None where there is none."""
        return self._ranking[0][1] if self._ranking else None

    @property
    def best_evaluations(self) -> list[dict[str, Any]]:
        """The best evaluations so far, best first, as lines of metrics with that metric alone.

        Where the weights are complete, `weights` is their checksum.
        """
        return [
            {"step": step, self._config.metric_for_best_model: value}
            | ({WEIGHTS_KEY: self._written[step]} if step in self._written else {})
            for value, step in self._ranking
        ]

    def best_weights(self) -> dict[str, Tensor]:
        """Load the best evaluation's weights; CheckpointError says that they are damaged."""
        assert self.best is not None
        self.wait()
        checkpoint = self._at(self.best)
        if problem := problem_of_best(checkpoint, self._written.get(self.best)):
            raise CheckpointError(f"{checkpoint} is damaged: {problem}")
        return load_file(checkpoint / WEIGHTS)

    def wait(self) -> None:
        """Wait until the last save is complete; DiskFullError or OSError says why it could not be completed."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            try:
                pending.result()
            except (OSError, SafetensorError) as error:
                self.newest = manifest.newest_resumable(self._folder)
                raise self._full(error, None) from error

    def finish(self, *, was_due: bool = True) -> None:
        """Keep the last and the best checkpoints only, at the end of a run.

        Args:
            was_due: whether the last step would be evaluated if it were not the last. If not, a run that is made longer
                also needs the best before it.
        """
        self.wait()
        if self._writes:
            best = self._best_steps if was_due else self._best_steps | self._best_at_save
            self._tidy(max(self._present, default=0), best, self.newest)

    def close(self) -> None:
        """Complete the last save, whatever ended the run."""
        self._worker.shutdown(wait=True)

    def _at(self, step: int) -> Path:
        return folder_of(self._folder, step)

    def _write(self, step: int, take: Callable[[], AnySnapshot], best: set[int], newest: int | None) -> None:
        """Write a checkpoint, which a thread completes; for `best` and `newest` see `_tidy`."""
        if not self._writes:
            for tensors in take().files().values():
                for _ in one_by_one(tensors):
                    continue  # it takes part in gathering
            self._present.add(step)
            return
        self.wait()
        snapshot = take()  # after waiting: it names the weights that are complete by now
        need, part = snapshot.num_bytes + SMALL_BYTES, self._part(step)
        try:
            if not os.path.lexists(self._folder):
                self._folder.mkdir()
                sync(self._folder.parent)
            if (free := shutil.disk_usage(self._folder).free) < need:
                raise OSError(errno.ENOSPC, f"{human_bytes(free)} are free")
            remove_atomically(part)
            part.mkdir()
            digests = {name: write_tensors(part / name, tensors) for name, tensors in snapshot.files().items()}
            (part / STATE).write_text(json.dumps(snapshot.state), encoding="utf-8")
        except OSError as error:
            shutil.rmtree(part, ignore_errors=True)
            raise self._full(error, need) from error
        self._present.add(step)
        self._pending = self._worker.submit(self._complete, step, digests, best, newest)

    def _complete(self, step: int, digests: Mapping[str, str], best: set[int], newest: int | None) -> None:
        """Complete a written checkpoint, rename it into its place, and only then remove others."""
        part, place = self._part(step), self._at(step)
        try:
            self._before()
            for file in part.iterdir():
                sync(file)
            for name, digest in digests.items():
                if stored_digest(part / name) != digest:
                    raise OSError(errno.EIO, f"{name} can't be read back as it was written")
            files = {name: manifest.entry_of(part / name) for name in [*digests, STATE]}
            _write_manifest(part, Manifest(step, files, is_save=OPTIMIZER in files))
            remove_atomically(place)
            os.replace(part, place)
            self._written[step] = files[WEIGHTS].xxh3_128
            sync(self._folder)
        except (OSError, SafetensorError):
            shutil.rmtree(part, ignore_errors=True)  # status.json may need its room
            raise
        self._tidy(step, best, newest)

    def _tidy(self, last: int, best: set[int], newest: int | None) -> None:
        """Remove what is not to be kept, now that the last is complete.

        Later steps are of a course that was abandoned: the run resumed from an earlier checkpoint.

        Args:
            best: steps whose weights are kept.
            newest: the last step that the run can resume from; None: that is `last`.
        """
        newest = last if newest is None else newest
        there = [step for step in steps_in(self._folder) if not refusal_of(self._at(step))]  # others may be whole
        readable = {}
        for step in there:
            with suppress(ValueError):  # damaged, and not noticed so far
                readable[step] = manifest.read_manifest(self._at(step))
        saves = [step for step, one in readable.items() if one.is_save and step <= newest]
        recent = saves[-self._config.keep_last :]
        for step in there:
            if step > last or (step not in recent and step not in best):
                remove_atomically(self._at(step))
            elif step in readable and (step not in recent or (self._config.newest_optimizer_only and step != newest)):
                self._shrink(readable[step])

    def _shrink(self, whole: Manifest) -> None:
        """Remove the optimizer's state from a checkpoint, also one that an earlier start was about to remove."""
        if whole.is_resumable:
            files = {name: entry for name, entry in whole.files.items() if name != OPTIMIZER}
            _write_manifest(self._at(whole.step), Manifest(whole.step, files, whole.is_save))
        (self._at(whole.step) / OPTIMIZER).unlink(missing_ok=True)

    def _part(self, step: int) -> Path:
        return self._folder / f".{self._at(step).name}.part"

    def _full(self, error: Exception, need: int | None) -> Exception:
        """Return the error to raise: of a full disk one that says what is needed, else the error as it is."""
        if not is_disk_full(error):
            is_known = isinstance(error, OSError)
            return error if is_known else OSError(errno.EIO, f"a checkpoint can't be written: {error}")
        needs = "more than there is" if need is None else human_bytes(need)
        there = "there is no earlier checkpoint"
        if self.newest is not None:
            there = f"the checkpoint of step {self.newest} is whole, and the same command resumes from it"
        place = self._folder if self._folder.exists() else self._folder.parent
        free = human_bytes(shutil.disk_usage(place).free)
        return DiskFullError(
            f"the disk is full: a checkpoint needs {needs}, {free} are free in {self._folder}; "
            f"{there}. Make room, or keep fewer (checkpoint.keep_last, keep_best, newest_optimizer_only)"
        )


@contextmanager
def open_checkpoints(
    config: CheckpointConfig, run_dir: Path, before: Callable[[], None] = lambda: None, *, writes: bool = True
) -> Iterator[Checkpoints]:
    """Open the checkpoints of a run's folder, which is locked; remove what an earlier start left half written."""
    folder = run_dir / CHECKPOINTS
    checkpoints = Checkpoints(config, folder, before, writes)
    for left in folder.glob(".step-*") if writes else ():
        try:
            remove_tree(left)
        except OSError as error:  # it takes room, and is in nobody's way
            checkpoints.warnings.append(f"{left}, left by an earlier start, can't be removed: {error.strerror}")
    try:
        yield checkpoints
    finally:
        checkpoints.close()


def _write_manifest(folder: Path, content: Manifest) -> None:
    write_atomically(folder / MANIFEST, content.text())
    sync(folder)
