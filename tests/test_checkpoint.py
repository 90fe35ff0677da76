"""Checkpoints: whole or not there, whatever happens; which of them stay; where a run goes on; a disk that is full."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import re
import shutil
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from src.checkpoint import store
from src.checkpoint.locate import newest_weights
from src.checkpoint.manifest import Entry, entry_of, is_resumable, newest_resumable, problems_of, read_manifest
from src.checkpoint.store import SMALL_BYTES, Checkpoints, Snapshot, open_checkpoints, read_snapshot
from src.checkpoint.tensors import stored_digest, tensors_digest, write_tensors
from src.cli.start import run_job as run
from src.config.places import folder_of, steps_in
from src.config.schema import CheckpointConfig
from src.errors import CheckpointError, ConfigError, DiskFullError
from src.runtime.sharding import ShardedTensor
from src.runtime.signals import StopRequest
from src.training.resume import ResumePoint, find_resume_point
from src.util import human_bytes
from tests.conftest import admitted, read_lines, towline, unprivileged

LOSS = "eval/validation/loss"
PLAIN = CheckpointConfig(
    checkpointing_steps=1,
    keep_last=2,
    keep_best=1,
    newest_optimizer_only=False,
    metric_for_best_model=LOSS,
    greater_is_better=None,
    load_best_model_at_end=False,
    resume="auto",
    allow_changed=False,
)
FROZEN = {"seed": 1}
FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "manifest.json")


def made_of(step: int, *, full: bool = True) -> Snapshot:
    """Give what a step is saved with; every step has other tensors."""
    weights = {"layer.weight": torch.arange(6.0).reshape(2, 3) + step, "scale": torch.tensor(step, dtype=torch.int64)}
    moments = {"layer.weight.exp_avg": torch.full((2, 3), 1 / step, dtype=torch.bfloat16)}
    return Snapshot(weights, moments if full else None, {"step": step, "config": FROZEN})


def put(checkpoints: Checkpoints, step: int) -> None:
    """Save a step."""
    checkpoints.save(step, lambda: made_of(step))


def rate(checkpoints: Checkpoints, step: int, value: float | None, name: str = LOSS) -> None:
    """Have an evaluation of a step come to a value; None: to nothing."""
    checkpoints.keep_if_best(step, {} if value is None else {name: value}, lambda: made_of(step, full=False))


def save(run_dir: Path, *steps: int, **settings: Any) -> None:
    """Have a run saved at some steps, all of which stay unless the settings say otherwise."""
    run_dir.mkdir(exist_ok=True)
    with open_checkpoints(replace(PLAIN, **{"keep_last": 1000} | settings), run_dir) as checkpoints:
        for step in steps:
            put(checkpoints, step)
        checkpoints.wait()


def at(run_dir: Path, step: int) -> Path:
    return folder_of(run_dir / "checkpoints", step)


def content(folder: Path) -> dict[str, bytes]:
    """Give every file below a folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def is_same(one: Snapshot, other: Snapshot) -> bool:
    tensors = [(a or {}, b or {}) for a, b in ((one.weights, other.weights), (one.optimizer, other.optimizer))]
    return one.state == other.state and all(
        a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)
        for a, b in tensors
    )


def whole(run_dir: Path) -> dict[int, str]:
    """Tell what a run's folder holds: step -> "all" or "weights"; each is whole, and what was saved."""
    found = {}
    for step in steps_in(run_dir / "checkpoints"):
        assert not list(problems_of(at(run_dir, step)))
        full = is_resumable(at(run_dir, step))
        assert is_same(read_snapshot(at(run_dir, step)), made_of(step, full=full))
        found[step] = "all" if full else "weights"
    return found


def kept(run_dir: Path) -> dict[int, str]:
    """Tell the same, where nothing else must lie there."""
    found = whole(run_dir)
    for step, what in found.items():
        assert (at(run_dir, step) / "optimizer.safetensors").exists() is (what == "all")
    names = {place.name for place in (run_dir / "checkpoints").glob("*")} if found else set()
    assert names == {at(run_dir, step).name for step in found}, "nothing else lies there"
    return found


def origin(run_dir: Path, resume: Path | str = "auto", *, force: bool = False) -> ResumePoint:
    return find_resume_point(replace(PLAIN, resume=str(resume)), FROZEN, run_dir, force=force)


@pytest.fixture
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Don't wait for the disk, in tests of hundreds of saves."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


# What is whole


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def lengthened(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\n")


def flipped(index: Callable[[int], int]) -> Callable[[Path], None]:
    def flip(file: Path) -> None:
        text = bytearray(file.read_bytes())
        text[index(len(text))] ^= 1
        file.write_bytes(text)

    return flip


DAMAGES: dict[str, Callable[[Path], None]] = {
    "truncated": truncated,
    "emptied": emptied,
    "lengthened": lengthened,
    "deleted": Path.unlink,
    "the first byte": flipped(lambda size: 0),
    "a middle byte": flipped(lambda size: size // 2),
    "the last byte": flipped(lambda size: size - 1),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_damage_is_noticed_and_the_checkpoint_before_is_taken(tmp_path: Path, name: str, damage: str) -> None:
    save(tmp_path, 5, 10)
    damaged, before = at(tmp_path, 10), at(tmp_path, 5)
    DAMAGES[damage](damaged / name)
    problems = list(problems_of(damaged))
    assert [problem.split()[0] for problem in problems] == [name]
    with pytest.raises(CheckpointError, match=rf"step-00000010 is damaged: {re.escape(name)} "):
        read_snapshot(damaged)

    found = origin(tmp_path)
    assert (found.checkpoint, found.step, found.own_step) == (before, 5, 5)
    assert found.warnings == [f"{damaged} is damaged ({problems[0]}); passed over"]

    for run_dir in (tmp_path, tmp_path / "elsewhere"):
        with pytest.raises(CheckpointError, match=rf"step-00000010 is damaged: {re.escape(name)} "):
            origin(run_dir, damaged)
    assert origin(tmp_path / "elsewhere", tmp_path).warnings == found.warnings

    shutil.rmtree(before)
    with pytest.raises(CheckpointError, match=rf"step-00000010 is damaged \({re.escape(name)} (.|\n)*force=true"):
        origin(tmp_path)
    with pytest.raises(CheckpointError, match=rf"step-00000010 is damaged \({re.escape(name)} ") as refused:
        origin(tmp_path / "elsewhere", tmp_path)
    assert "force" not in str(refused.value), "which would not touch the other's folder"
    with pytest.raises(CheckpointError, match=rf"step-00000010 is damaged \({re.escape(name)} "):
        newest_weights(tmp_path)
    assert origin(tmp_path, force=True) == ResumePoint()


def plain_file(place: Path) -> None:
    place.write_text("mine")


def dangling_link(place: Path) -> None:
    place.symlink_to("nowhere")


def endless_link(place: Path) -> None:
    place.symlink_to(place.name)


KINDS: dict[str, Callable[[Path], None]] = {
    "file": plain_file,
    "dangling": dangling_link,
    "endless": endless_link,
    "pipe": os.mkfifo,
}
"""What may stand where a folder should."""


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_folder_in_a_checkpoints_place_is_told_and_in_nobodys_way(tmp_path: Path, kind: str) -> None:
    save(tmp_path, 1, 2)
    KINDS[kind](at(tmp_path, 4))
    found = origin(tmp_path)
    what = "a dangling link" if "dangling endless".count(kind) else "no folder"
    assert (found.step, found.warnings) == (2, [f"{at(tmp_path, 4)} is damaged (it is {what}); passed over"])
    with open_checkpoints(replace(PLAIN, keep_last=2), tmp_path) as checkpoints:
        checkpoints.load_index([], 2)
        KINDS[kind](at(tmp_path, 3))  # meanwhile
        put(checkpoints, 3)
        put(checkpoints, 4)
        checkpoints.wait()
    assert kept(tmp_path) == {3: "all", 4: "all"}


def test_a_checkpoint_that_lies_elsewhere_is_one_and_stays_there(tmp_path: Path) -> None:
    save(tmp_path / "run", 1, 2)
    elsewhere = at(tmp_path / "run", 2).rename(tmp_path / "elsewhere")
    at(tmp_path / "run", 2).symlink_to(elsewhere)
    before = content(elsewhere)
    found = origin(tmp_path / "run")
    assert (found.step, found.warnings) == (2, [])
    save(tmp_path / "run", 3, keep_last=1)
    assert kept(tmp_path / "run") == {3: "all"}
    assert content(elsewhere) == before


@pytest.mark.parametrize("kind", KINDS)
def test_leftovers_of_any_kind_are_in_nobodys_way(tmp_path: Path, kind: str) -> None:
    save(tmp_path, 1)
    for end in ("part", "gone", "part.gone"):
        KINDS[kind](tmp_path / "checkpoints" / f".step-00000002.{end}")
    save(tmp_path, 2, keep_last=1)
    assert kept(tmp_path) == {2: "all"}


@pytest.mark.parametrize("kind", ["file", "dangling", "endless", "pipe"])
def test_a_folder_that_cannot_be_looked_into_is_not_one_without_checkpoints(tmp_path: Path, kind: str) -> None:
    KINDS[kind](tmp_path / "checkpoints")
    with pytest.raises(CheckpointError, match=r"checkpoints can't be looked into: .*Put the folder .* back"):
        origin(tmp_path)
    with pytest.raises(CheckpointError, match="can't be looked into"):
        newest_weights(tmp_path)
    with pytest.raises(CheckpointError, match="can't be looked into"):
        origin(tmp_path / "elsewhere", tmp_path)
    assert steps_in(tmp_path / "nowhere") == []
    assert origin(tmp_path, "never") == ResumePoint()


def test_what_may_not_be_read_is_neither_passed_over_nor_removed(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3)
    before = content(tmp_path / "checkpoints")
    files = [at(tmp_path, 3) / name for name in ("manifest.json", "model.safetensors", "optimizer.safetensors")]
    for place in (tmp_path / "checkpoints", at(tmp_path, 3), *files):
        mode = place.stat().st_mode
        place.chmod(0)
        with (
            unprivileged(),
            pytest.raises(CheckpointError, match=rf"{place.name}.*Permission denied.*make it readable"),
        ):
            origin(tmp_path)
        place.chmod(mode)
    at(tmp_path, 3).chmod(0)
    with (
        unprivileged(),
        open_checkpoints(PLAIN, tmp_path) as checkpoints,
        pytest.raises(CheckpointError, match=r"step-00000003 can't be read: Permission denied.*make it readable"),
    ):
        checkpoints.discard_after(2)  # as one that was named
    at(tmp_path, 3).chmod(0o755)
    assert content(tmp_path / "checkpoints") == before
    for place in (at(tmp_path, 1), at(tmp_path, 2) / "manifest.json"):
        place.chmod(0)
    with unprivileged(), open_checkpoints(replace(PLAIN, keep_last=1), tmp_path) as checkpoints:
        checkpoints.load_index([], 3)
        put(checkpoints, 4)
        checkpoints.wait()
        checkpoints.finish()
    for place in (at(tmp_path, 1), at(tmp_path, 2) / "manifest.json"):
        place.chmod(0o755)
    assert kept(tmp_path) == {1: "all", 2: "all", 4: "all"}


def test_leftovers_that_may_not_be_removed_are_told_and_in_nobodys_way(tmp_path: Path) -> None:
    save(tmp_path, 1)
    left = [tmp_path / "checkpoints" / name for name in (".step-00000001.gone", ".step-00000001.gone-2")]
    for place in left:
        (place / "inner").mkdir(parents=True)
        place.chmod(0o500)
    with unprivileged(), open_checkpoints(replace(PLAIN, keep_last=1), tmp_path) as checkpoints:
        told = sorted(checkpoints.warnings)
        checkpoints.load_index([], 1)
        put(checkpoints, 2)
        checkpoints.wait()
    assert [f"{place}, left by an earlier start, can't be removed: Permission denied" for place in left] == told
    assert whole(tmp_path) == {2: "all"}


def test_the_best_that_may_not_be_read_are_told_and_not_given_up(tmp_path: Path) -> None:
    with open_checkpoints(PLAIN, tmp_path) as checkpoints:
        rate(checkpoints, 2, 1.0)
        put(checkpoints, 3)
        checkpoints.wait()
        best = checkpoints.best_evaluations
    weights = at(tmp_path, 2) / "model.safetensors"
    weights.chmod(0)
    for allow_changed in (False, True):
        with (
            unprivileged(),
            open_checkpoints(replace(PLAIN, allow_changed=allow_changed), tmp_path) as checkpoints,
            pytest.raises(CheckpointError, match=r"model\.safetensors can't be read: Permission denied.*best weights"),
        ):
            checkpoints.load_index(best, 3)
    weights.chmod(0o644)
    assert kept(tmp_path) == {2: "weights", 3: "all"}


def test_the_best_weights_are_those_that_this_run_wrote(tmp_path: Path) -> None:
    config = replace(PLAIN, load_best_model_at_end=True)
    for name, scale in (("own", 1), ("other", 2)):
        with open_checkpoints(config, tmp_path / name) as checkpoints:
            (tmp_path / name).mkdir()
            checkpoints.keep_if_best(2, {LOSS: 1.0}, lambda scale=scale: made_of(2 * scale, full=False))
            put(checkpoints, 3)
            checkpoints.wait()
            best = checkpoints.best_evaluations
            if name == "own":
                known, known_best = {2: str(best[0]["weights"])}, best
    assert known[2] == read_manifest(at(tmp_path / "own", 2)).files["model.safetensors"].xxh3_128
    with open_checkpoints(config, tmp_path / "own") as checkpoints:
        assert checkpoints.load_index(known_best, 3, known) == []
        assert checkpoints.best_evaluations == known_best
        shutil.rmtree(at(tmp_path / "own", 2))
        shutil.copytree(at(tmp_path / "other", 2), at(tmp_path / "own", 2))
        with pytest.raises(CheckpointError, match="it is another run's"):
            checkpoints.best_weights()
    with (
        open_checkpoints(config, tmp_path / "own") as checkpoints,
        pytest.raises(CheckpointError, match=r"another run's.*load_best_model_at_end"),
    ):
        checkpoints.load_index(known_best, 3, known)
    with open_checkpoints(replace(config, load_best_model_at_end=False), tmp_path / "own") as checkpoints:
        (told,) = checkpoints.load_index(known_best, 3, known)
    assert "the weights of step 2" in told
    assert "another run's" in told


def test_several_damaged_files_are_all_named(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (at(tmp_path, 1) / "model.safetensors").unlink()
    (at(tmp_path, 1) / "model.safetensors").mkdir()
    truncated(at(tmp_path, 1) / "optimizer.safetensors")
    (at(tmp_path, 1) / "state.json").unlink()
    assert [problem.split()[0] for problem in problems_of(at(tmp_path, 1))] == list(FILES[:3])


def test_where_all_is_damaged_nothing_is_trained(tmp_path: Path) -> None:
    save(tmp_path, 1)
    flipped(lambda size: size // 2)(at(tmp_path, 1) / "model.safetensors")
    before = content(tmp_path)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        run(admitted(f"hydra.run.dir={tmp_path}"), StopRequest())
    assert {name: text for name, text in content(tmp_path).items() if name != "lock"} == before


def test_a_damaged_checkpoint_that_is_named_is_refused_with_exit_code_2(tmp_path: Path) -> None:
    save(tmp_path, 1)
    truncated(at(tmp_path, 1) / "state.json")
    done = towline("tracking=none", f"checkpoint.resume={at(tmp_path, 1)}", f"hydra.run.dir={tmp_path / 'run'}")
    assert done.returncode == 2
    assert f"{at(tmp_path, 1)} is damaged: state.json has " in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "status.json").exists()
    (at(tmp_path, 1) / "manifest.json").unlink()
    with pytest.raises(ConfigError, match=r"checkpoint\.resume = .* nor a folder with a checkpoint"):
        admitted(f"checkpoint.resume={at(tmp_path, 1)}")


def test_every_bit_of_a_manifest_counts(tmp_path: Path) -> None:
    save(tmp_path, 1)
    file = at(tmp_path, 1) / "manifest.json"
    first = file.read_bytes()
    others = [(i, first[i] ^ 1 << bit) for i in range(len(first)) for bit in range(8)]
    others += [(i, ord("\r")) for i in range(len(first)) if first[i] == ord("\n")]
    with open(file, "r+b", buffering=0) as changed:
        for i, other in others:
            os.pwrite(changed.fileno(), bytes([other]), i)
            with pytest.raises(ValueError, match=r"manifest\.json (is damaged|can't be read|is of a later version)"):
                read_manifest(at(tmp_path, 1))
            os.pwrite(changed.fileno(), first[i : i + 1], i)
    for text in (first.replace(b"\n", b"\r\n"), first[:-1], first + b" ", b"[]", b"3", b"{}", b'{"format": "1"}'):
        file.write_bytes(text)
        with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
            read_manifest(at(tmp_path, 1))
    file.write_bytes(first)
    assert not list(problems_of(at(tmp_path, 1)))


def test_a_manifest_lists_sizes_and_checksums_of_the_files(tmp_path: Path) -> None:
    save(tmp_path, 7)
    manifest = read_manifest(at(tmp_path, 7))
    assert manifest.text() == (at(tmp_path, 7) / "manifest.json").read_text()
    assert (manifest.step, manifest.is_save, manifest.is_resumable) == (7, True, True)
    assert set(manifest.files) == set(FILES[:3])
    for name, entry in manifest.files.items():
        text = (at(tmp_path, 7) / name).read_bytes()
        assert entry == Entry(len(text), xxhash.xxh3_128_hexdigest(text))
        assert entry_of(at(tmp_path, 7) / name) == entry
    listed = json.loads(manifest.text())
    own = listed.pop("xxh3_128")
    assert own == xxhash.xxh3_128_hexdigest(json.dumps(listed).encode())


@pytest.mark.parametrize(
    "files", [{"model.safetensors": {"bytes": 1, "xxh3_128": "0"}}, {"blocks": [[1, 2]]}, [], None]
)
def test_a_manifest_of_a_later_format_is_told_as_such(tmp_path: Path, files: Any) -> None:
    save(tmp_path, 5, 10)
    listed = {"format": 2, "step": 10, "is_save": True} | ({} if files is None else {"files": files})
    (at(tmp_path, 10) / "manifest.json").write_text(json.dumps(listed))
    told = "manifest.json is of a later version of Towline (format 2, known: 1)"
    assert list(problems_of(at(tmp_path, 10))) == [told]
    with pytest.raises(CheckpointError, match=r"step-00000010 was written by a later version of Towline.*force=true"):
        origin(tmp_path)
    assert steps_in(tmp_path / "checkpoints") == [5, 10], "nothing is removed"


def test_other_files_do_no_harm(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    (at(tmp_path, 2) / "notes.txt").write_text("mine")
    (at(tmp_path, 2) / "plots").mkdir()
    (at(tmp_path, 2) / ".manifest.json.part").write_text("{")
    for name in ("step-", "step-x", "step-²", "step-０0000003", "step--0000001", "notes.txt"):
        (tmp_path / "checkpoints" / name).touch()
    (tmp_path / "checkpoints" / "step-00000009.old").mkdir()
    assert not list(problems_of(at(tmp_path, 2)))
    assert steps_in(tmp_path / "checkpoints") == [1, 2]
    assert (origin(tmp_path).step, origin(tmp_path).warnings) == (2, [])
    assert is_same(read_snapshot(at(tmp_path, 2)), made_of(2))
    with open_checkpoints(replace(PLAIN, keep_last=1), tmp_path) as checkpoints:
        assert checkpoints.load_index([], 2) == []
        put(checkpoints, 4)
    assert steps_in(tmp_path / "checkpoints") == [4]
    assert (tmp_path / "checkpoints" / "step-00000009.old").exists()


# What stays

COURSES: dict[str, list[float | None]] = {
    "falling": [20.0 - i for i in range(20)],
    "rising": [float(i) for i in range(20)],
    "the least in the middle": [abs(i - 7.5) + (i == 8) * 0.1 for i in range(20)],
    "the greatest in the middle": [-abs(i - 7.5) - (i == 8) * 0.1 for i in range(20)],
    "equal": [1.0] * 20,
    "two levels": [float(i // 3 % 2) for i in range(20)],
    "what is no number is never the best": [math.nan, math.inf, None, -math.inf] * 3 + [3.0, 3.0, math.nan, 2.0] * 2,
    "no number at all": [math.nan, math.inf, None, -math.inf] * 5,
}


def best_of(values: Sequence[float | None], count: int, *, greater: bool) -> list[int]:
    """Give the steps of the best values, the best first and of equals the first; steps count from 1."""
    ranked = [(-value if greater else value, i + 1) for i, value in enumerate(values) if value is not None]
    return [step for value, step in sorted(one for one in ranked if math.isfinite(one[0]))[:count]]


@pytest.mark.usefixtures("unsynced")
@pytest.mark.parametrize("greater", [None, True, False])
@pytest.mark.parametrize("course", COURSES)
def test_the_last_two_and_the_best_stay(tmp_path: Path, course: str, greater: bool | None) -> None:
    values = COURSES[course]
    with open_checkpoints(replace(PLAIN, greater_is_better=greater), tmp_path) as checkpoints:
        for step in range(1, 21):
            put(checkpoints, step)
            at_save = best_of(values[: step - 1], 1, greater=bool(greater))
            rate(checkpoints, step, values[step - 1])
            assert [checkpoints.best] == (best_of(values[:step], 1, greater=bool(greater)) or [None])
            if step % 7 == 0 or step == 20:
                checkpoints.wait()
                recent = dict.fromkeys((step - 1, step), "all")
                assert kept(tmp_path) == dict.fromkeys(at_save, "weights") | recent
        checkpoints.finish()
        best = best_of(values, 1, greater=bool(greater))
        assert kept(tmp_path) == dict.fromkeys(best, "weights") | {19: "all", 20: "all"}
        if best:
            assert is_same(
                Snapshot(checkpoints.best_weights(), None, {}), replace(made_of(best[0], full=False), state={})
            )


@pytest.mark.usefixtures("unsynced")
@pytest.mark.parametrize("keep_best", [0, 3])
@pytest.mark.parametrize("course", COURSES)
def test_as_many_of_the_best_stay_as_asked_for(tmp_path: Path, course: str, keep_best: int) -> None:
    values = COURSES[course]
    with open_checkpoints(replace(PLAIN, keep_best=keep_best, keep_last=1), tmp_path) as checkpoints:
        for step in range(1, 21):
            put(checkpoints, step)
            rate(checkpoints, step, values[step - 1])
        checkpoints.finish()
    best = best_of(values, keep_best, greater=False)
    assert kept(tmp_path) == dict.fromkeys(best, "weights") | {20: "all"}


def test_scores_rise_by_themselves(tmp_path: Path) -> None:
    score = "eval/validation/exact_match"
    with open_checkpoints(replace(PLAIN, metric_for_best_model=score), tmp_path) as checkpoints:
        for step, value in enumerate((0.1, 0.9, 0.9, 0.5), 1):
            rate(checkpoints, step, value, score)
        checkpoints.finish()
    assert (checkpoints.best, kept(tmp_path)) == (2, {2: "weights"})


def test_only_weights_are_kept_of_evaluations_between_saves(tmp_path: Path) -> None:
    values = [9.0, 8.0, 9.0, 7.0, 6.0, 9.0, 9.0, 5.0, 9.0, 9.0, 9.0, 9.0]
    seen = []
    with open_checkpoints(PLAIN, tmp_path) as checkpoints:
        for step, value in enumerate(values, 1):
            if step % 5 == 0:
                put(checkpoints, step)
            rate(checkpoints, step, value)
            checkpoints.wait()
            seen.append(kept(tmp_path))
        checkpoints.finish()
    assert seen[0] == {1: "weights"}
    assert seen[1] == seen[2] == {2: "weights"}
    assert seen[3] == {4: "weights"}
    assert seen[4] == seen[6] == {4: "weights", 5: "all"}, "who goes on from 5 evaluates 5 again"
    assert seen[7] == seen[8] == {4: "weights", 5: "all", 8: "weights"}
    assert seen[9] == seen[11] == kept(tmp_path) == {5: "all", 8: "weights", 10: "all"}


def go(run_dir: Path, config: CheckpointConfig, values: Sequence[float], every: int, last: int) -> None:
    """Do a run's saves and evaluations from where it can go on to a step, in run.py's order; the last one ends it."""
    newest = newest_resumable(run_dir / "checkpoints")
    done = newest or 0
    with open_checkpoints(config, run_dir) as checkpoints:
        lines = [{"step": step, LOSS: values[step - 1]} for step in range(1, done + 1)]
        assert checkpoints.load_index(lines, newest) == [], "what a run needs that goes on is there"
        for step in range(done + 1, last + 1):
            if step % every == 0 or step == len(values):
                put(checkpoints, step)
            rate(checkpoints, step, values[step - 1])
        if last == len(values):
            checkpoints.finish()


@pytest.mark.usefixtures("unsynced")
@pytest.mark.parametrize("seed", range(12))
def test_a_run_with_stops_keeps_what_one_without_keeps(tmp_path: Path, seed: int) -> None:
    dice = random.Random(seed)
    values = [float(dice.randrange(12)) for _ in range(20)]
    config = replace(PLAIN, keep_last=dice.choice([1, 2, 3]), keep_best=dice.choice([0, 1, 2]),
                     newest_optimizer_only=dice.random() < 0.5)  # fmt: skip
    every = dice.choice([2, 4, 7])
    (tmp_path / "straight").mkdir()
    (tmp_path / "stopped").mkdir()
    go(tmp_path / "straight", config, values, every, 20)
    for stop in sorted(dice.sample(range(1, 20), 4)):
        go(tmp_path / "stopped", config, values, every, stop)
    go(tmp_path / "stopped", config, values, every, 20)
    assert kept(tmp_path / "stopped") == kept(tmp_path / "straight")


def test_only_the_newest_can_be_resumed_where_that_is_asked_for(tmp_path: Path) -> None:
    config = replace(PLAIN, keep_last=3, newest_optimizer_only=True)
    with open_checkpoints(config, tmp_path) as checkpoints:
        for step in range(1, 7):
            put(checkpoints, step)
            rate(checkpoints, step, float(step))
        checkpoints.finish()
    assert kept(tmp_path) == {1: "weights", 4: "weights", 5: "weights", 6: "all"}
    assert [read_manifest(at(tmp_path, step)).is_save for step in (1, 4, 5, 6)] == [True] * 4
    assert origin(tmp_path).step == 6
    for run_dir in (tmp_path, tmp_path / "elsewhere"):
        shrunk = at(tmp_path, 5)
        with pytest.raises(CheckpointError, match=rf"{shrunk} holds weights only.*init_from={shrunk} starts a new run"):
            origin(run_dir, shrunk)
    assert newest_weights(at(tmp_path, 5)) == (at(tmp_path, 5), [])

    with open_checkpoints(config, tmp_path) as checkpoints:
        assert checkpoints.load_index([{"step": step, LOSS: float(step)} for step in range(1, 7)], 6) == []
        rate(checkpoints, 7, 0.5)
        checkpoints.wait()
        assert kept(tmp_path) == {1: "weights", 4: "weights", 5: "weights", 6: "all", 7: "weights"}
        put(checkpoints, 8)
        checkpoints.wait()
    assert kept(tmp_path) == {5: "weights", 6: "weights", 7: "weights", 8: "all"}


def test_a_shrink_that_was_cut_short_is_ended(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, newest_optimizer_only=True)
    (at(tmp_path, 1) / "optimizer.safetensors").write_bytes(bytes(1000))  # listed no more, but still there
    assert not list(problems_of(at(tmp_path, 1)))
    with open_checkpoints(replace(PLAIN, newest_optimizer_only=True), tmp_path) as checkpoints:
        checkpoints.load_index([], 2)
        rate(checkpoints, 3, 1.0)
    assert kept(tmp_path) == {1: "weights", 2: "all", 3: "weights"}


def test_a_step_is_saved_once(tmp_path: Path) -> None:
    with open_checkpoints(PLAIN, tmp_path) as checkpoints:
        rate(checkpoints, 3, 1.0)
        checkpoints.wait()
        assert kept(tmp_path) == {3: "weights"}
        put(checkpoints, 3)
        checkpoints.save(3, lambda: pytest.fail("it is saved"))
        checkpoints.keep_if_best(3, {LOSS: 1.0}, lambda: pytest.fail("it is saved"))
        checkpoints.wait()
        assert kept(tmp_path) == {3: "all"}
    before = content(tmp_path)
    with open_checkpoints(PLAIN, tmp_path) as checkpoints:
        checkpoints.load_index([], 3)
        checkpoints.save(3, lambda: pytest.fail("it is saved"))
    assert content(tmp_path) == before


def test_a_course_that_was_left_leaves_nothing(tmp_path: Path) -> None:
    save(tmp_path, 4, 8, 12, 16)
    assert (origin(tmp_path, at(tmp_path, 8)).own_step, origin(tmp_path).own_step) == (8, 16)
    with open_checkpoints(PLAIN, tmp_path) as checkpoints:
        assert checkpoints.load_index([], 8) == []
        assert kept(tmp_path) == {4: "all", 8: "all"}, "a run that is killed now goes on from 8, as its journal does"
        put(checkpoints, 20)
        checkpoints.wait()
    assert kept(tmp_path) == {8: "all", 20: "all"}


def test_weights_of_a_start_that_came_to_no_save_leave_nothing(tmp_path: Path) -> None:
    with open_checkpoints(replace(PLAIN, keep_best=2), tmp_path) as checkpoints:
        rate(checkpoints, 3, 1.0)
        rate(checkpoints, 11, 0.5)
    assert kept(tmp_path) == {3: "weights", 11: "weights"}
    with open_checkpoints(replace(PLAIN, keep_best=2), tmp_path) as checkpoints:
        assert checkpoints.load_index([], None) == []
        rate(checkpoints, 3, 2.0)
        rate(checkpoints, 6, 3.0)
        put(checkpoints, 8)
        checkpoints.wait()
        assert kept(tmp_path) == {3: "weights", 6: "weights", 8: "all"}


def test_a_copy_by_another_name_is_gone_on_from_and_left_alone(tmp_path: Path) -> None:
    save(tmp_path, 8, 12)
    copy = tmp_path / "checkpoints" / "step-8"
    at(tmp_path, 8).rename(copy)
    found = origin(tmp_path, copy)
    assert (found.checkpoint, found.own_step) == (copy, 8)
    with open_checkpoints(PLAIN, tmp_path) as checkpoints:
        checkpoints.load_index([], 8)
        put(checkpoints, 8)
        checkpoints.wait()
    assert steps_in(tmp_path / "checkpoints") == [8]
    assert is_same(read_snapshot(copy), made_of(8))


def test_bests_that_are_lost_are_told_and_count_no_more(tmp_path: Path) -> None:
    config = replace(PLAIN, keep_best=3, keep_last=1)
    values = [1.0, 2.0, 3.0, 4.0, 5.0]
    go(tmp_path, config, values, 5, 5)
    assert kept(tmp_path) == {1: "weights", 2: "weights", 3: "weights", 5: "all"}
    truncated(at(tmp_path, 1) / "model.safetensors")
    shutil.rmtree(at(tmp_path, 3))
    with open_checkpoints(config, tmp_path) as checkpoints:
        warnings = checkpoints.load_index([{"step": i, LOSS: value} for i, value in enumerate(values, 1)], 5)
        assert len(warnings) == 2
        assert warnings[0].startswith("the weights of step 1, among the best so far, are lost: model.safetensors has ")
        assert warnings[1].startswith(
            "the weights of step 3, among the best so far, are lost: manifest.json is missing"
        )
        assert checkpoints.best == 2
    with open_checkpoints(config, tmp_path) as checkpoints:
        checkpoints.load_index([{"step": 2, LOSS: 2.0}], 5)
        flipped(lambda size: size - 1)(at(tmp_path, 2) / "model.safetensors")
        with pytest.raises(CheckpointError, match=r"step-00000002 is damaged: model\.safetensors"):
            checkpoints.best_weights()


# Whatever goes wrong while it is written


class Killed(BaseException):
    """The process is gone."""


OPERATIONS = ((os, "fsync"), (os, "replace"), (os, "mkdir"), (os, "unlink"), (os, "rmdir"),
              (store, "write_tensors"), (store, "stored_digest"), (Path, "write_text"))  # fmt: skip


class Fate:
    """Counts what is done to the disk, and has it go wrong: once, or for good where the process is gone.

    Args:
        at: number of the operation that goes wrong; 0: none.
        error: what is raised there.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int = 0, error: BaseException | None = None) -> None:
        self.at, self.error, self.seen = at, error, 0
        for holder, name in OPERATIONS:
            monkeypatch.setattr(holder, name, self._counted(getattr(holder, name)))

    def _counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*given: Any, **named: Any) -> Any:
            self.seen += 1
            if self.seen == self.at or (0 < self.at < self.seen and isinstance(self.error, Killed)):
                assert self.error is not None
                raise self.error
            return call(*given, **named)

        return counted


def eventful(checkpoints: Checkpoints, done: int) -> None:
    """Go on to the end: weights are kept and then saved with all, new ones are the best, others are so no more."""
    losses = {2: 9.0, 3: 5.0, 4: 9.0, 6: 4.0, 7: 3.0, 8: 9.0}
    lines = [{"step": step, LOSS: loss} for step, loss in losses.items() if step <= done]
    assert checkpoints.load_index(lines, done) == [], "what a run needs that goes on is there"
    for step in (6, 7, 8):
        if step > done:
            rate(checkpoints, step, losses[step])
            if step != 7:
                put(checkpoints, step)
    checkpoints.finish()


@pytest.fixture(scope="module", params=[False, True], ids=["", "newest_optimizer_only"])
def eventful_run(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, CheckpointConfig]:
    """A run that was saved at steps 2 and 4, was best at 3, and was saved at 5 in a course that it leaves."""
    config = replace(PLAIN, newest_optimizer_only=request.param)
    run_dir = tmp_path_factory.mktemp("eventful")
    with open_checkpoints(config, run_dir) as checkpoints:
        put(checkpoints, 2)
        rate(checkpoints, 3, 5.0)
        put(checkpoints, 4)
        checkpoints.wait()
    left = tmp_path_factory.mktemp("left")
    save(left, 5)
    at(left, 5).rename(at(run_dir, 5))
    first = "weights" if request.param else "all"
    assert kept(run_dir) == {2: first, 3: "weights", 4: "all", 5: "all"}
    return run_dir, config


@pytest.mark.usefixtures("unsynced")
@pytest.mark.parametrize("error", [Killed(), OSError(errno.EIO, "went wrong")], ids=["killed", "an error"])
def test_wherever_it_goes_wrong_what_seems_whole_is_whole(
    eventful_run: tuple[Path, CheckpointConfig], tmp_path: Path, error: BaseException
) -> None:
    template, config = eventful_run
    shutil.copytree(template, tmp_path / "straight")
    with pytest.MonkeyPatch.context() as patched:
        straight = Fate(patched)
        with open_checkpoints(config, tmp_path / "straight") as checkpoints:
            eventful(checkpoints, 4)
    result = kept(tmp_path / "straight")
    assert result == {6: "weights" if config.newest_optimizer_only else "all", 7: "weights", 8: "all"}
    assert straight.seen > 80
    for number in range(1, straight.seen + 1):
        run_dir = tmp_path / str(number)
        shutil.copytree(template, run_dir)
        is_told = False
        with pytest.MonkeyPatch.context() as patched:
            Fate(patched, number, error)
            try:
                with open_checkpoints(config, run_dir) as checkpoints:
                    eventful(checkpoints, 4)
            except (Killed, OSError):
                is_told = True
        assert is_told or kept(run_dir) == result, f"the error at {number} is told, or did no harm"
        newest = newest_resumable(run_dir / "checkpoints")
        with open_checkpoints(config, run_dir) as checkpoints:
            assert newest in whole(run_dir), "what was left half written is removed, and what stands there is whole"
            assert newest in (4, 5, 6, 8)
            eventful(checkpoints, 4 if newest == 5 else newest)
        assert kept(run_dir) == result
        shutil.rmtree(run_dir)


@pytest.mark.parametrize("told_by", ["save", "consider", "wait", "finish", "best_weights"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_what_goes_wrong_in_the_thread_reaches_the_caller(tmp_path: Path, told_by: str, number: int) -> None:
    def before() -> None:
        if is_broken:
            raise OSError(number, os.strerror(number))

    is_broken = False
    with open_checkpoints(replace(PLAIN, keep_last=1), tmp_path, before) as checkpoints:
        put(checkpoints, 1)
        rate(checkpoints, 1, 1.0)
        checkpoints.wait()
        before_it = content(tmp_path)
        is_broken = True
        put(checkpoints, 2)
        assert checkpoints.newest == 2
        next_call = {
            "save": lambda: put(checkpoints, 3),
            "consider": lambda: rate(checkpoints, 3, 0.5),
            "wait": checkpoints.wait,
            "finish": checkpoints.finish,
            "best_weights": checkpoints.best_weights,
        }[told_by]
        with pytest.raises(OSError if number == errno.EIO else DiskFullError) as told:
            next_call()
        if number != errno.EIO:
            assert "the disk is full" in str(told.value)
            assert "the checkpoint of step 1 is whole" in str(told.value)
        assert checkpoints.newest == 1
        assert content(tmp_path) == before_it, "nothing is removed before what comes is whole"
    with open_checkpoints(replace(PLAIN, keep_last=1), tmp_path) as checkpoints:
        assert checkpoints.load_index([{"step": 1, LOSS: 1.0}], 1) == []
        put(checkpoints, 2)
    assert kept(tmp_path) == {1: "weights", 2: "all"}


@pytest.mark.parametrize("what", ["a flipped bit", "half a file"])
def test_what_does_not_read_as_it_was_written_is_no_checkpoint(tmp_path: Path, what: str) -> None:
    def spoil() -> None:
        for file in (tmp_path / "checkpoints").glob(".step-00000002.part/model.safetensors"):
            text = file.read_bytes()
            file.write_bytes(text[:-1] + bytes([text[-1] ^ 1]) if what == "a flipped bit" else text[: len(text) // 2])

    with open_checkpoints(replace(PLAIN, keep_last=1), tmp_path, spoil) as checkpoints:
        put(checkpoints, 1)
        put(checkpoints, 2)
        with pytest.raises(OSError, match=r"can't be (read back|written)"):
            checkpoints.wait()
    assert kept(tmp_path) == {1: "all"}


def test_leftovers_are_removed_when_a_run_starts(tmp_path: Path) -> None:
    save(tmp_path, 1)
    for name in (".step-00000002.part", ".step-00000003.gone", ".step-00000004.part.gone"):
        shutil.copytree(at(tmp_path, 1), tmp_path / "checkpoints" / name)
    assert origin(tmp_path).step == 1
    with open_checkpoints(PLAIN, tmp_path):
        assert kept(tmp_path) == {1: "all"}


def test_all_is_on_the_disk_before_it_is_relied_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: set[tuple[int, int]] = set()
    moved = []
    fsync, move = os.fsync, os.replace

    def identity(place: Path | int) -> tuple[int, int]:
        found = os.fstat(place) if isinstance(place, int) else place.stat()
        return found.st_ino, found.st_mtime_ns

    def watched_fsync(descriptor: int) -> None:
        fsync(descriptor)
        synced.add(identity(descriptor))

    def watched_move(source: Path, target: Path) -> None:
        if target.name == "manifest.json":
            assert identity(source) in synced
            assert all(identity(source.parent / name) in synced for name in listed_in(source))
        elif target.name.endswith(".gone"):
            assert identity(target.parent) in synced, "the new one's name is on the disk before an old one goes"
        else:
            assert all(identity(place) in synced for place in (source, *source.iterdir()))
        moved.append(target.name)
        move(source, target)

    def listed_in(part: Path) -> list[str]:
        return list(json.loads(part.read_text())["files"])

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_move)
    save(tmp_path, 1, 2, keep_last=1)
    assert moved == ["manifest.json", "step-00000001", "manifest.json", "step-00000002", ".step-00000001.gone"]


def test_files_are_as_readable_as_the_umask_says(tmp_path: Path) -> None:
    for umask in (0o022, 0o027, 0o077, 0o002):
        before = os.umask(umask)
        try:
            save(tmp_path / f"{umask:o}", 1, 2, newest_optimizer_only=True)
        finally:
            os.umask(before)
        places = [*(tmp_path / f"{umask:o}" / "checkpoints").rglob("*")]
        assert len(places) == 2 + 3 + 4
        for place in places:
            assert place.stat().st_mode & 0o777 == (0o777 if place.is_dir() else 0o666) & ~umask, place


# A disk that is full


def large(step: int, *, num_bytes: int, full: bool = True) -> Snapshot:
    """Give a snapshot whose tensors take so many bytes in all."""
    count = num_bytes // (8 if full else 4)
    tensors = {"w": torch.full((count,), float(step))}
    return Snapshot(tensors, tensors if full else None, {"step": step, "config": FROZEN})


@pytest.mark.parametrize("full", [True, False], ids=["a save", "the best weights"])
def test_a_disk_that_is_too_small_is_told_before_anything_is_written(
    small_disk: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, full: bool
) -> None:
    run_dir = small_disk("size=1m")
    config = replace(PLAIN, keep_best=2)

    def keep(checkpoints: Checkpoints, step: int) -> None:
        if full:
            checkpoints.save(step, lambda: large(step, num_bytes=400_000))
        else:
            checkpoints.keep_if_best(step, {LOSS: 1 / step}, lambda: large(step, num_bytes=400_000, full=False))

    with open_checkpoints(config, run_dir) as checkpoints:
        with pytest.raises(DiskFullError, match=r"needs 2\.0 MiB, 1\.0 MiB are free in .*; there is no earlier"):
            checkpoints.save(1, lambda: large(1, num_bytes=2_000_000))
        assert not list((run_dir / "checkpoints").iterdir())
        keep(checkpoints, 1)
        keep(checkpoints, 2)
        checkpoints.wait()
        before, free = content(run_dir), shutil.disk_usage(run_dir).free
        monkeypatch.setattr(store, "write_tensors", lambda file, tensors: pytest.fail("it can't be done"))
        with pytest.raises(DiskFullError) as told:
            keep(checkpoints, 3)
        monkeypatch.undo()
    needed = human_bytes(400_000 + SMALL_BYTES)
    assert f"a checkpoint needs {needed}, {human_bytes(free)} are free in {run_dir}" in str(told.value)
    there = "the checkpoint of step 2 is whole, and the same command resumes from it" if full else "no earlier"
    assert there in str(told.value)
    assert "keep_last" in str(told.value)
    assert (content(run_dir), shutil.disk_usage(run_dir).free) == (before, free)

    small_disk("size=4m")
    with open_checkpoints(config, run_dir) as checkpoints:
        lines = [] if full else [{"step": step, LOSS: 1 / step} for step in (1, 2)]
        assert checkpoints.load_index(lines, 2 if full else None) == []
        keep(checkpoints, 3)
        checkpoints.finish()
    assert steps_in(run_dir / "checkpoints") == [2, 3]
    assert not [problem for step in (2, 3) for problem in problems_of(at(run_dir, step))]


@pytest.mark.parametrize("what", ["tensors", "state", "manifest"])
def test_a_disk_that_fills_up_while_it_is_written_costs_only_that_save(
    small_disk: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    run_dir = small_disk("size=1m")
    others = run_dir / "what others write"

    def fill() -> None:
        if is_filling:
            with open(others, "wb") as file, pytest.raises(OSError, match="No space left"):
                while True:
                    file.write(bytes(4096))
                    file.flush()

    is_filling = False
    with open_checkpoints(replace(PLAIN, keep_last=1), run_dir, fill) as checkpoints:
        checkpoints.save(1, lambda: large(1, num_bytes=300_000))
        checkpoints.wait()
        before = content(run_dir / "checkpoints")
        snapshot = large(2, num_bytes=300_000)
        if what == "tensors":  # what is free is not always what can be had
            usage = shutil.disk_usage(run_dir)._replace(free=1 << 40)
            monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
            snapshot = large(2, num_bytes=1_000_000)
        if what == "state":
            snapshot = replace(snapshot, state={"step": 2, "text": "x" * 1_000_000})
        is_filling = what == "manifest"
        with pytest.raises(DiskFullError, match=r"the disk is full.*the checkpoint of step 1 is whole"):
            checkpoints.save(2, lambda: snapshot)
            checkpoints.wait()
        is_filling = False
        monkeypatch.undo()
        assert content(run_dir / "checkpoints") == before
        assert not list((run_dir / "checkpoints").glob(".*")), "its room is given back: status.json needs some"
        assert checkpoints.newest == 1
        others.unlink(missing_ok=True)
        checkpoints.save(2, lambda: large(2, num_bytes=300_000))
        checkpoints.wait()
    assert steps_in(run_dir / "checkpoints") == [2]
    assert not list(problems_of(at(run_dir, 2)))


def test_a_disk_that_can_hold_no_more_files_is_told(small_disk: Callable[[str], Path]) -> None:
    run_dir = small_disk("size=1m,nr_inodes=1")
    with open_checkpoints(PLAIN, run_dir) as checkpoints, pytest.raises(DiskFullError, match="no earlier checkpoint"):
        put(checkpoints, 1)


def test_a_run_whose_disk_is_full_fails_by_name_and_goes_on_when_there_is_room(
    small_disk: Callable[[str], Path],
) -> None:
    run_dir = small_disk("size=22m") / "run"
    command = (
        "debug=smoke", "tracking=none", "evaluation.metrics=[]", "evaluation.sample_prompts=0",
        "checkpoint.checkpointing_steps=1", f"hydra.run.dir={run_dir}",
    )  # fmt: skip
    done = towline(*command)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    told = (
        r"the disk is full: a checkpoint needs 8\.\d MiB, \d\.\d MiB are free in .*; the checkpoint of step 2 is whole"
    )
    assert re.search(told, done.stderr), done.stderr
    status = json.loads((run_dir / "status.json").read_text())
    assert status["state"] == "FAILED"
    assert re.search(f"^DiskFullError: {told}", status["cause"])
    assert status["how_to_go_on"] == f"make resume run={run_dir}"
    assert newest_resumable(run_dir / "checkpoints") == 2
    assert not [problem for step in steps_in(run_dir / "checkpoints") for problem in problems_of(at(run_dir, step))]

    small_disk("size=64m")
    done = towline(*command)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads((run_dir / "status.json").read_text())["state"] == "FINISHED"
    assert [line["resumed_step"] for line in read_lines(run_dir / "starts.jsonl")] == [None, 2]
    assert [line["step"] for line in read_lines(run_dir / "metrics.jsonl")] == [1, 2, 3, 4]
    assert newest_resumable(run_dir / "checkpoints") == 4


# Where a run goes on


@pytest.mark.parametrize(("older", "newer"), [(9, 10), (2, 10), (99_999_999, 100_000_000), (9, 100_000_000)])
def test_the_newest_is_the_one_with_the_greatest_number(tmp_path: Path, older: int, newer: int) -> None:
    save(tmp_path, older, newer)
    assert steps_in(tmp_path / "checkpoints") == [older, newer]
    found = origin(tmp_path)
    assert (found.step, found.checkpoint, found.warnings) == (newer, at(tmp_path, newer), [])
    assert newest_resumable(tmp_path / "checkpoints") == newer
    assert newest_weights(tmp_path)[0] == at(tmp_path, newer)


def test_a_name_written_by_hand_is_not_taken_for_the_newest(tmp_path: Path) -> None:
    save(tmp_path, 9, 10)
    for name in ("step-9", "step-0000000000099", "step-99.copy"):
        shutil.copytree(at(tmp_path, 9), tmp_path / "checkpoints" / name)
    assert (origin(tmp_path).step, origin(tmp_path).warnings) == (10, [])
    save(tmp_path, 11)
    assert (tmp_path / "checkpoints" / "step-9").exists()


def test_a_checkpoint_by_another_steps_name_is_passed_over(tmp_path: Path) -> None:
    save(tmp_path, 9, 10)
    shutil.copytree(at(tmp_path, 9), at(tmp_path, 12))
    found = origin(tmp_path)
    assert found.step == 10
    assert found.warnings == [f"{at(tmp_path, 12)} is damaged (manifest.json is of step 9); passed over"]


def test_a_run_begins_anew_where_that_is_asked_for_or_nothing_is_there(tmp_path: Path) -> None:
    assert origin(tmp_path) == origin(tmp_path / "nowhere") == ResumePoint()
    save(tmp_path, 1)
    for begun in (
        origin(tmp_path, "never"),
        origin(tmp_path, force=True),
        origin(tmp_path, at(tmp_path, 1), force=True),
    ):
        assert begun == ResumePoint()
        assert (begun.step, begun.own_step) == (None, None)


def test_a_run_goes_on_from_what_is_named(tmp_path: Path) -> None:
    save(tmp_path / "other", 3, 6)
    own = tmp_path / "own"
    for named, step in ((tmp_path / "other", 6), (at(tmp_path / "other", 3), 3), (at(tmp_path / "other", 6), 6)):
        found = origin(own, named)
        assert (found.checkpoint, found.step) == (at(tmp_path / "other", step), step)
        assert (found.own_step, found.warnings, found.changes) == (None, [], [])
        assert found.state == {"step": step, "config": FROZEN}


def test_its_own_newest_comes_before_anothers(tmp_path: Path) -> None:
    own, other = tmp_path / "own", tmp_path / "other"
    save(other, 3, 60)
    save(own, 2, 4)
    for named in (other, at(other, 60)):
        found = origin(own, named)
        assert (found.checkpoint, found.own_step) == (at(own, 4), 4)
        assert found.warnings == [f"the run resumes from its own {at(own, 4)}, not from checkpoint.resume = {named}"]
    for named, step in ((own, 4), (at(own, 2), 2), (at(own, 4), 4), (own / "checkpoints" / ".." / ".." / "own", 4)):
        found = origin(own, named)
        assert (found.checkpoint.resolve(), found.own_step, found.warnings) == (at(own, step), step, [])


def test_weights_alone_are_skipped_without_a_word(tmp_path: Path) -> None:
    with open_checkpoints(PLAIN, tmp_path) as checkpoints:
        rate(checkpoints, 2, 2.0)
        checkpoints.wait()
        assert origin(tmp_path) == ResumePoint()
        with pytest.raises(CheckpointError, match="has no checkpoint that a run could resume from"):
            origin(tmp_path / "elsewhere", tmp_path)
        put(checkpoints, 4)
        rate(checkpoints, 6, 1.0)
        checkpoints.wait()
    assert kept(tmp_path) == {2: "weights", 4: "all", 6: "weights"}
    assert (origin(tmp_path).step, origin(tmp_path).warnings) == (4, [])
    assert newest_weights(tmp_path)[0] == at(tmp_path, 6)


# Tensors

TENSORS: dict[str, Tensor] = {
    "float32": torch.tensor([[1.5, -0.0, math.inf], [math.nan, 1e-45, -3.0]]),
    "bfloat16": torch.tensor([1.5, -2.0, math.nan], dtype=torch.bfloat16),
    "float16": torch.tensor([65504.0, 6e-8], dtype=torch.float16),
    "uint8": torch.arange(256, dtype=torch.uint8),
    "int64": torch.tensor([2**63 - 1, -(2**63)]),
    "bool": torch.tensor([True, False]),
    "0-dim": torch.tensor(7.25),
    "0-dim int64": torch.tensor(-3),
    "empty": torch.empty(0),
    "empty in one dimension": torch.empty(3, 0, 2, dtype=torch.bfloat16),
}


def bits(tensor: Tensor) -> tuple[torch.dtype, list[int], bytes]:
    flat = tensor.contiguous().reshape(-1)
    return tensor.dtype, list(tensor.shape), bytes(flat.view(torch.uint8).tolist()) if tensor.numel() else b""


def test_tensors_come_back_bit_for_bit(tmp_path: Path) -> None:
    views = {"transposed": torch.arange(6.0).reshape(2, 3).T, "every other": torch.arange(9)[::2]}
    given = TENSORS | views
    state = {"step": 1, "not a number": math.nan, "text": "Zürich\n", "nested": {"list": [1, None, 0.1]}}
    with open_checkpoints(PLAIN, tmp_path) as checkpoints:
        checkpoints.save(1, lambda: Snapshot(given, dict(reversed(given.items())), state))
    back = read_snapshot(at(tmp_path, 1))
    assert back.optimizer is not None
    for tensors in (back.weights, back.optimizer):
        assert {name: bits(tensor) for name, tensor in tensors.items()} == {n: bits(t) for n, t in given.items()}
    assert repr(back.state) == repr(state)


def test_a_snapshot_may_change_once_it_is_saved(tmp_path: Path) -> None:
    weights = {"w": torch.zeros(1000)}
    with open_checkpoints(PLAIN, tmp_path) as checkpoints:
        checkpoints.save(1, lambda: Snapshot(weights, weights, {"step": 1}))
        weights["w"] += 1  # as the next step does, while the thread is at work
    assert not read_snapshot(at(tmp_path, 1)).weights["w"].any()


def test_a_digest_differs_with_names_types_shapes_and_every_bit() -> None:
    first = {"a": torch.arange(4, dtype=torch.int32), "b": torch.ones(2, 3)}
    digests = [
        tensors_digest(tensors)
        for tensors in (
            first,
            {},
            {"a": first["a"]},
            {"c": first["a"], "b": first["b"]},
            {"a": first["b"], "b": first["a"]},
            first | {"a": first["a"].view(torch.float32)},
            first | {"a": first["a"].reshape(2, 2)},
            first | {"a": first["a"].reshape(4, 1)},
            first | {"b": first["b"].T},
            first | {"c": torch.empty(0)},
            first | {"c": torch.empty(0, dtype=torch.int64)},
            first | {"c": torch.empty(0, 1)},
            first | {"c": torch.tensor(0.0)},
            first | {"c": torch.tensor(-0.0)},
            first | {"c": torch.zeros(1)},
        )
    ]
    assert len(set(digests)) == len(digests)
    assert all(re.fullmatch("[0-9a-f]{32}", digest) for digest in digests)
    raw = first["b"].numpy().tobytes()
    for bit in range(8 * len(raw)):
        changed = bytearray(raw)
        changed[bit // 8] ^= 1 << bit % 8
        other = torch.frombuffer(changed, dtype=torch.float32).reshape(2, 3)
        assert tensors_digest(first | {"b": other}) != digests[0]


@pytest.mark.parametrize("name", TENSORS)
def test_a_digest_is_of_the_content_alone(name: str) -> None:
    tensor = TENSORS[name]
    digest = tensors_digest({"x": tensor, "y": tensor})
    assert tensors_digest({"y": tensor.clone(), "x": tensor.clone()}) == digest
    assert tensors_digest({"x": tensor.clone().requires_grad_(tensor.is_floating_point()), "y": tensor}) == digest
    if tensor.dim():
        turned = tensor.movedim(0, -1).contiguous().movedim(-1, 0)
        assert tensors_digest({"x": turned, "y": torch.stack([tensor, tensor], dim=-1)[..., 1]}) == digest


def test_what_is_shared_out_comes_together_tensor_by_tensor_in_every_process(tmp_path: Path) -> None:
    alive = 0

    def of(value: float, order: list[float]) -> ShardedTensor:
        def gather() -> Tensor:
            nonlocal alive
            order.append(value)
            tensor = torch.full((1000,), value)
            alive += 1
            weakref.finalize(tensor, left)
            assert alive <= 2, "no more than one is held beside the one that comes"
            return tensor

        def left() -> None:
            nonlocal alive
            alive -= 1

        return ShardedTensor(torch.float32, (1000,), gather)

    orders: list[list[float]] = [[], []]
    for order, writes in zip(orders, (True, False), strict=True):
        given = {f"w{i}": of(float(i), order) for i in range(5)} | {"plain": torch.tensor(3, dtype=torch.int8)}
        moments = {f"w{i}/exp_avg": of(float(10 + i), order) for i in range(5)}
        with open_checkpoints(PLAIN, tmp_path, writes=writes) as checkpoints:
            checkpoints.save(1, lambda given=given, moments=moments: Snapshot(given, moments, {"step": 1}))
    assert orders[0] == orders[1] == [*map(float, range(5)), *map(float, range(10, 15))]
    back = read_snapshot(at(tmp_path, 1))
    assert all(torch.equal(back.weights[f"w{i}"], torch.full((1000,), float(i))) for i in range(5))
    assert int(back.weights["plain"]) == 3


def test_a_file_of_ours_is_read_as_one_of_safetensors_own(tmp_path: Path) -> None:
    digest = write_tensors(tmp_path / "ours", TENSORS)
    save_file(TENSORS, tmp_path / "theirs")
    ours, theirs = load_file(tmp_path / "ours"), load_file(tmp_path / "theirs")
    assert {name: bits(tensor) for name, tensor in ours.items()} == {n: bits(t) for n, t in theirs.items()}
    assert digest == tensors_digest(theirs) == stored_digest(tmp_path / "theirs")
    with safe_open(tmp_path / "ours", "pt") as file:
        assert set(file.keys()) == set(TENSORS)
