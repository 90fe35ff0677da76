"""A run that was stopped anywhere is the same run: bit for bit, in fresh objects, for every way to batch and to train.

Stops are counted in checks (one a micro-batch, one a batch of an evaluation, one a token of a sample), so they fall in
the middle of steps, evaluations and samples. `Killed` leaves nothing saved behind, as SIGKILL does.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Sequence
from copy import deepcopy
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from src.checkpoint.compatibility import Fingerprint
from src.checkpoint.manifest import newest_resumable, problems_of, read_state
from src.cli.start import run_job as run
from src.config.job import Job
from src.config.places import steps_in
from src.errors import CheckpointError, ConfigError, DamagedFileError, Interrupted, ModelError
from src.runtime.signals import StopRequest
from src.training.resume import ResumePoint, tokenizer_hash
from tests.conftest import admitted, read_lines, towline, write_lines
from tests.kinds import thin_llama

SHORT = (
    f"model.checkpoint={thin_llama()}",
    "training.per_device_eval_batch_size=4",
    "evaluation.max_samples=6",
    "evaluation.sample_prompts=2",
    "generation.max_new_tokens=4",
    "data.limit=70",
)
THIRTY = (
    *SHORT,
    "data.limit=26",
    "training.max_train_steps=30",
    "training.per_device_train_batch_size=2",
    "training.gradient_accumulation_steps=2",
    "training.logging_steps=4",
    "evaluation.eval_steps=7",
    "evaluation.sample_steps=13",
    "checkpoint.checkpointing_steps=5",
)
FADED = ("data.thought_dropout=0.3", "data.thought_schedule={tokens_per_epoch: 2, smoothing: 0.5}")
LORA = ("adapter=lora", "adapter.lora_dropout=0.1", "optimizer.lr=1e-2", "export.merge=true")


class Killed(BaseException):
    """The process is gone; nothing is saved any more."""


class Fate(StopRequest):
    """Stops a run at its n-th check: as a signal would, or dead."""

    def __init__(self, at: int | None = None, *, dead: bool = False) -> None:
        super().__init__()
        self.at, self.dead, self.seen = at, dead, 0

    def check(self) -> None:
        if self.is_deferred:
            self.seen += 1
            if self.at is not None and self.seen >= self.at:
                if self.dead:
                    raise Killed
                self.name = "SIGTERM"
        super().check()


@cache
def job_of(*overrides: str) -> Job:
    return admitted("hydra.run.dir=elsewhere", *overrides)


def start(run_dir: Path, *overrides: str, fate: Fate | None = None) -> dict[str, float]:
    """Train in a folder, with a job of its own; the same command is composed once."""
    return run(dataclasses.replace(deepcopy(job_of(*overrides)), run_dir=run_dir), fate or Fate())


def broken(run_dir: Path, overrides: Sequence[str], fates: Sequence[Fate]) -> dict[str, float]:
    """Start a run again and again until it comes to its end."""
    for fate in fates:
        with pytest.raises((Interrupted, Killed)):
            start(run_dir, *overrides, fate=fate)
        if not fate.dead:
            status = json.loads((run_dir / "status.json").read_text())
            assert status["state"] == "PREEMPTED"
            newest = newest_resumable(run_dir / "checkpoints")
            assert newest == status["step"]
            assert not list(problems_of(run_dir / "checkpoints" / f"step-{newest:08}"))
    return start(run_dir, *overrides)


def weights_of(run_dir: Path) -> dict[str, torch.Tensor]:
    names = ("model.safetensors", "adapter_model.safetensors")
    return next(load_file(run_dir / "model" / name) for name in names if (run_dir / "model" / name).exists())


def plain(values: dict[str, Any]) -> dict[str, Any]:
    """Leave out what may differ between two identical runs."""
    clocks = ("perf/", "tokens_per_second", "peak_memory_bytes")
    return {k: v for k, v in values.items() if not k.startswith(clocks) and not k.endswith("_seconds")}


def assert_same(first: Path, second: Path) -> None:
    one, other = weights_of(first), weights_of(second)
    assert one.keys() == other.keys()
    assert not [name for name in one if not torch.equal(one[name], other[name])]
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert [plain(line) for line in read_lines(first / name)] == [plain(line) for line in read_lines(second / name)]
    numbers = [plain(json.loads((place / "summary.json").read_text())) for place in (first, second)]
    assert numbers[0] == numbers[1]


BUDGET = ("data.max_seq_length=64", "training.per_device_train_tokens=256", *FADED)


@pytest.mark.parametrize(
    ("adapter", "batching"),
    [((), "padded"), ((), "length_grouped"), (BUDGET, "length_grouped"), ((), "packed"), (LORA, "packed")],
    ids=["padded", "length_grouped", "budget", "packed", "packed-lora"],
)
def test_thirty_steps_with_stops_equal_thirty_steps_straight(
    tmp_path: Path, adapter: tuple[str, ...], batching: str
) -> None:
    packed = ("data.max_seq_length=128", *FADED) if batching == "packed" else ()
    overrides = (*THIRTY, *adapter, *packed, f"data.batching={batching}")
    start(tmp_path / "straight", *overrides)
    fates = [
        Fate(5),  # in the third step's window
        Fate(3, dead=True),  # nothing came of this start
        Fate(17, dead=True),
        Fate(12),
        Fate(16),
        Fate(1),  # at once
    ]
    broken(tmp_path / "broken", overrides, fates)
    assert_same(tmp_path / "straight", tmp_path / "broken")
    steps = [line["step"] for line in read_lines(tmp_path / "broken" / "metrics.jsonl")]
    assert steps == sorted({*range(4, 31, 4), *range(7, 31, 7), 30})
    starts = [line["resumed_step"] for line in read_lines(tmp_path / "broken" / "starts.jsonl")]
    assert starts[0] is None
    assert len(starts) == 7
    assert starts[3:] == sorted(starts[3:])


TWELVE = (
    *SHORT,
    "training.max_train_steps=12",
    "training.per_device_train_batch_size=4",
    "training.logging_steps=5",
    "evaluation.eval_steps=4",
    "evaluation.sample_steps=null",
    "checkpoint.checkpointing_steps=3",
)


@pytest.mark.parametrize(
    "overrides",
    [
        ("optimizer=adamw_8bit", "model.type=causal_lm"),
        ("optimizer=paged_adamw_32bit",),
        ("optimizer=adafactor",),
        ("optimizer=sgd", "optimizer.momentum=0.9", "optimizer.lr=0.1"),
        ("optimizer=sgd", "optimizer.momentum=0.0", "optimizer.lr=0.1"),
        ("training.mixed_precision=bf16", "model.gradient_checkpointing=true"),
        ("model.dtype=bfloat16", "optimizer=adafactor"),
        (
            "model=tiny_bart",
            "model.checkpoint=assets/tiny_bart",
            "data.max_seq_length=64",
            "data.max_target_length=128",
            "tokens.init.text=[-]",
        ),
        ("adapter=dora", "adapter.lora_dropout=0.2", "optimizer.embedding_lr=1e-2", "export.merge=true"),
        ("loss.reduction=sum", "loss.thought_weight=0.5", "loss.label_smoothing=0.1", "optimizer.lr=1e-4"),
        ("data.streaming=true", "data.validation_fraction=0"),
        ("data.streaming=true", "data.batching=length_grouped", *FADED),
        ("data.streaming=true", "training.per_device_train_tokens=128", "data.max_seq_length=64"),
        ("scheduler=linear", "scheduler.warmup_steps=4", "training.max_grad_norm=null"),
    ],
    ids=lambda overrides: " ".join(overrides[:2]),
)
def test_every_way_to_train_goes_on_exactly(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    start(tmp_path / "straight", *TWELVE, *overrides)
    broken(tmp_path / "broken", (*TWELVE, *overrides), [Fate(2), Fate(9, dead=True), Fate(9)])
    assert_same(tmp_path / "straight", tmp_path / "broken")


@pytest.mark.parametrize("bits", ["int8", "nf4"])
def test_an_adapter_on_quantised_weights_goes_on_exactly(tmp_path: Path, bits: str) -> None:
    start(tmp_path / "base", *TWELVE, "tokens=none")
    base = ("model=causal_lm", f"model.checkpoint={tmp_path / 'base' / 'model'}", f"quantization={bits}")
    overrides = (*TWELVE, *base, "adapter=lora", "adapter.lora_dropout=0.1", "optimizer.lr=1e-2")
    start(tmp_path / "straight", *overrides)
    broken(tmp_path / "broken", overrides, [Fate(2), Fate(9, dead=True), Fate(9)])
    assert_same(tmp_path / "straight", tmp_path / "broken")


def test_a_stop_in_an_evaluation_has_it_done_again_whole(tmp_path: Path) -> None:
    overrides = (*TWELVE, "checkpoint.checkpointing_steps=null")
    start(tmp_path / "straight", *overrides)
    # four micro-batches, then the second batch of step 4's evaluation
    broken(tmp_path / "broken", overrides, [Fate(6)])
    assert [line["resumed_step"] for line in read_lines(tmp_path / "broken" / "starts.jsonl")] == [None, 4]
    assert_same(tmp_path / "straight", tmp_path / "broken")


@pytest.mark.parametrize("killed_in", ["src.training.saving.export", "src.tracking.tracker.FolderTracker.finish"])
def test_a_run_that_was_killed_while_or_after_it_exported_only_exports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_in: str
) -> None:
    start(tmp_path / "straight", *TWELVE)
    with monkeypatch.context() as patched:
        patched.setattr(killed_in, lambda *_: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            start(tmp_path / "broken", *TWELVE)
    assert read_lines(tmp_path / "broken" / "metrics.jsonl")[-1]["step"] == 12
    fate = Fate()
    start(tmp_path / "broken", *TWELVE, fate=fate)
    assert_same(tmp_path / "straight", tmp_path / "broken")
    assert read_lines(tmp_path / "broken" / "starts.jsonl")[-1]["resumed_step"] == 12


@pytest.mark.parametrize("fates", [[Fate(14, dead=True)], [Fate(25), Fate(2)]])
def test_the_best_weights_are_exported_after_a_resume_too(tmp_path: Path, fates: list[Fate]) -> None:
    # the greatest loss counts as the best, which is the first
    best = ("checkpoint.load_best_model_at_end=true", "checkpoint.greater_is_better=true")
    overrides = (*TWELVE, *best)
    start(tmp_path / "straight", *overrides)
    broken(tmp_path / "broken", overrides, fates)
    assert_same(tmp_path / "straight", tmp_path / "broken")
    lines = read_lines(tmp_path / "broken" / "metrics.jsonl")
    losses = {line["step"]: line["eval/validation/loss"] for line in lines if "eval/validation/loss" in line}
    step = max(losses, key=lambda step: losses[step])
    assert step < 12, "the best must not be the last, or this shows nothing"
    kept = load_file(tmp_path / "broken" / "checkpoints" / f"step-{step:08}" / "model.safetensors")
    exported = weights_of(tmp_path / "broken")
    assert all(torch.equal(kept[name], exported[name]) for name in kept)


def test_evaluations_of_other_rows_are_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # the greatest loss counts as the best, which is the first
    best = ("checkpoint.load_best_model_at_end=true", "checkpoint.greater_is_better=true")
    with pytest.raises(Interrupted):
        start(tmp_path / "run", *TWELVE, *best, fate=Fate(14))
    assert [line["step"] for line in read_lines(tmp_path / "run" / "metrics.jsonl")] in ([4], [4, 5])
    capsys.readouterr()
    fewer = "evaluation.max_samples=3"
    with pytest.raises(Interrupted):
        start(tmp_path / "run", *TWELVE, *best, fewer, fate=Fate(8))
    told = capsys.readouterr()
    assert "evaluated on other rows, so the best so far is forgotten" in " ".join((told.out + told.err).split())
    assert {4, 8} <= {line["step"] for line in read_lines(tmp_path / "run" / "metrics.jsonl")} < set(range(12))
    start(tmp_path / "run", *TWELVE, *best, fewer)
    told = capsys.readouterr()
    assert "are lost" not in told.out + told.err
    kept = load_file(tmp_path / "run" / "checkpoints" / "step-00000008" / "model.safetensors")
    exported = weights_of(tmp_path / "run")
    assert all(torch.equal(kept[name], exported[name]) for name in kept)


def test_rows_are_neither_encoded_nor_collated_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = (
        *TWELVE,
        "training.max_train_steps=40",
        "checkpoint.checkpointing_steps=39",
        "evaluation.eval_steps=null",
    )
    with pytest.raises(Killed):
        start(tmp_path / "run", *overrides, fate=Fate(40, dead=True))
    collated = []
    from src.training import loop

    real = loop.collate
    monkeypatch.setattr(loop, "collate", lambda *given, **named: collated.append(1) or real(*given, **named))
    monkeypatch.setattr("src.data.encoding.Encoder.encode_batch", None, raising=False)
    start(tmp_path / "run", *overrides)
    assert len(collated) == 1


def test_more_epochs_are_harmless_and_fewer_are_not(tmp_path: Path) -> None:
    once = tuple(one for one in TWELVE if "max_train_steps" not in one)
    with pytest.raises(Interrupted):
        start(tmp_path / "run", *once, "training.num_train_epochs=2", fate=Fate(20))
    with pytest.raises(ConfigError, match=r"num_train_epochs: 2 → 1\.5(.|\n)*allow_changed"):
        start(tmp_path / "run", *once, "training.num_train_epochs=1.5")
    summary = start(tmp_path / "run", *once, "training.num_train_epochs=3")
    assert summary["steps"] == 3 * 18  # ceil(70 / 4) steps an epoch
    assert summary["examples_seen"] == 3 * 70


EAGER = "model.attn_implementation=eager"  # with torch's own attention nothing is padded on a CPU, or grouped
UNEVEN = [{"prompt": "1" * (1 + i * 7 % 40) + "=", "completion": f"{i}."} for i in range(26)]


@pytest.mark.parametrize("before", ["padded", "length_grouped", "auto"])
@pytest.mark.parametrize("now", ["padded", "length_grouped", "auto"])
def test_auto_is_what_it_was_where_a_run_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], before: str, now: str
) -> None:
    rows = f"data.train_files=[{write_lines(tmp_path / 'rows.jsonl', UNEVEN)}]"
    own = (*THIRTY, rows, "data=prompt_completion", "training.max_train_steps=9", "training.num_train_epochs=1", EAGER)
    meant = "length_grouped" if before == "auto" else before
    start(tmp_path / "straight", *own, f"data.batching={meant}")
    with pytest.raises(Interrupted):
        start(tmp_path / "broken", *own, f"data.batching={before}", fate=Fate(5))
    if now not in (meant, "auto"):
        with pytest.raises(ConfigError, match=rf"data\.batching: {meant} → {now}"):
            start(tmp_path / "broken", *own, f"data.batching={now}")
        return
    capsys.readouterr()
    start(tmp_path / "broken", *own, f"data.batching={now}")
    assert "differently" not in capsys.readouterr().out
    assert_same(tmp_path / "straight", tmp_path / "broken")


def test_auto_is_not_chosen_anew_for_other_rows(tmp_path: Path) -> None:
    own = (*THIRTY, "data=prompt_completion", "training.max_train_steps=9", EAGER)
    files = [write_lines(tmp_path / f"{name}.jsonl", rows) for name, rows in (("a", UNEVEN), ("b", UNEVEN[:1] * 26))]
    found = []
    for file, fate in zip(files, (Fate(5), Fate(9)), strict=True):
        changed = (f"data.train_files=[{file}]", "checkpoint.allow_changed=true")
        with pytest.raises(Interrupted):
            start(tmp_path / "run", *own, *changed, fate=fate)
        folder = tmp_path / "run" / "checkpoints"
        found.append(read_state(folder / f"step-{newest_resumable(folder):08}")["chosen"]["data.batching"])
    assert found == ["length_grouped", "length_grouped"]


def test_another_batch_size_ends_the_epoch_with_every_row_once(tmp_path: Path) -> None:
    overrides = tuple(one for one in TWELVE if "max_train_steps" not in one)
    with pytest.raises(Interrupted):
        start(tmp_path / "run", *overrides, "training.num_train_epochs=2", fate=Fate(12))
    changed = (*overrides, "training.num_train_epochs=2", "training.per_device_train_batch_size=10")
    with pytest.raises(ConfigError, match="per_device_train_batch_size: 4 → 10"):
        start(tmp_path / "run", *changed)
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "PREEMPTED"
    summary = start(tmp_path / "run", *changed, "checkpoint.allow_changed=true")
    assert summary["examples_seen"] == 2 * 70


def test_other_rows_are_told_before_the_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": f"{i}+{i}=", "completion": str(2 * i)} for i in range(40)]
    file = write_lines(tmp_path / "rows.jsonl", rows)
    own = ("data=prompt_completion", f"data.train_files=[{file}]", "data.validation_fraction=0.1")
    with pytest.raises(Interrupted):
        start(tmp_path / "run", *TWELVE, *own, fate=Fate(8))
    write_lines(tmp_path / "rows.jsonl", [*rows[:-1], {"prompt": "1+1=", "completion": "2"}])
    with monkeypatch.context() as patched:
        patched.setattr("src.model.build.build_model", None)
        with pytest.raises(ConfigError, match="the train rows changed"):
            start(tmp_path / "run", *TWELVE, *own)
    summary = start(tmp_path / "run", *TWELVE, *own, "checkpoint.allow_changed=true")
    assert summary["steps"] == 12


def test_a_run_goes_on_in_another_folder(tmp_path: Path) -> None:
    start(tmp_path / "straight", *TWELVE)
    with pytest.raises(Interrupted):
        start(tmp_path / "first", *TWELVE, fate=Fate(20))
    step = newest_resumable(tmp_path / "first" / "checkpoints")
    start(tmp_path / "second", *TWELVE, f"checkpoint.resume={tmp_path / 'first'}")
    assert not [
        n
        for n, t in weights_of(tmp_path / "straight").items()
        if not torch.equal(t, weights_of(tmp_path / "second")[n])
    ]
    lines = [plain(line) for line in read_lines(tmp_path / "straight" / "metrics.jsonl")]
    assert [plain(line) for line in read_lines(tmp_path / "second" / "metrics.jsonl")] == [
        line for line in lines if line["step"] >= step and (line["step"] > step or "eval/validation/loss" in line)
    ]
    assert steps_in(tmp_path / "first" / "checkpoints")[-1] == step, "the other's folder is as it was"


def test_old_weights_start_a_new_run(tmp_path: Path) -> None:
    start(tmp_path / "old", *TWELVE)
    before = weights_of(tmp_path / "old")
    once = (*TWELVE, "training.max_train_steps=1", "optimizer.lr=1e-12")
    folders = (tmp_path / "old", tmp_path / "old" / "model", tmp_path / "old" / "checkpoints" / "step-00000012")
    for number, folder in enumerate(folders):
        summary = start(tmp_path / f"new-{number}", *once, f"init_from={folder}")
        after = weights_of(tmp_path / f"new-{number}")
        assert all(torch.allclose(after[name], before[name], atol=1e-9) for name in before)
        assert summary["steps"] == 1
    unfinished = tmp_path / "unfinished"
    shutil.copytree(tmp_path / "old", unfinished)
    shutil.rmtree(unfinished / "model")
    shutil.rmtree(unfinished / "checkpoints" / "step-00000012")
    start(tmp_path / "new", *once, f"init_from={unfinished}")
    kept = load_file(unfinished / "checkpoints" / "step-00000009" / "model.safetensors")
    after = weights_of(tmp_path / "new")
    assert all(torch.allclose(after[name], kept[name], atol=1e-9) for name in kept)
    with pytest.raises(CheckpointError, match=r"tokens of .* have other ids"):
        start(tmp_path / "none", *once, "tokens=none", f"init_from={unfinished}")


def test_an_old_adapter_starts_a_new_run(tmp_path: Path) -> None:
    start(tmp_path / "base", *TWELVE, "tokens=none")
    base = ("model=causal_lm", f"model.checkpoint={tmp_path / 'base' / 'model'}", "optimizer.lr=1e-2")
    lora = (*TWELVE, *base, "adapter=lora", "adapter.target_modules=all-linear")
    start(tmp_path / "old", *lora)
    once = ("training.max_train_steps=1", "optimizer.lr=1e-12", f"init_from={tmp_path / 'old'}")
    start(tmp_path / "new", *lora, *once)
    before, after = weights_of(tmp_path / "old"), weights_of(tmp_path / "new")
    assert all(torch.allclose(after[name], before[name], atol=1e-9) for name in before)
    with pytest.raises(ModelError, match="of another form"):
        start(tmp_path / "rank", *lora, *once, "adapter.r=3")
    cut = Path(shutil.copytree(tmp_path / "old" / "model", tmp_path / "cut"))
    weights = cut / "adapter_model.safetensors"
    for content in (weights.read_bytes()[:-9], weights.read_bytes()[:99], b"", None):
        weights.unlink()
        os.mkfifo(weights) if content is None else weights.write_bytes(content)
        with pytest.raises(ModelError, match=r"the adapter in .*cut can't be read: .*adapter_model\.safetensors"):
            start(tmp_path / "cut_off", *lora, *once, f"init_from={cut}")
    shutil.rmtree(tmp_path / "old" / "model")
    start(tmp_path / "from_checkpoint", *lora, *once)
    after = weights_of(tmp_path / "from_checkpoint")
    assert all(torch.allclose(after[name], before[name], atol=1e-9) for name in before)
    with pytest.raises(CheckpointError, match="not those of this model"):
        start(tmp_path / "full", *TWELVE, *base, *once)


def test_an_old_adapter_is_merged_into_the_weights_of_a_run_that_trains_them_all(tmp_path: Path) -> None:
    start(tmp_path / "base", *TWELVE, "tokens=none")
    base = ("model=causal_lm", f"model.checkpoint={tmp_path / 'base' / 'model'}", "optimizer.lr=1e-2")
    lora = (*TWELVE, *base, "adapter=lora", "adapter.target_modules=all-linear")
    start(tmp_path / "old", *lora)
    start(tmp_path / "merged", *lora, "export.merge=true")
    adapters = [
        load_file(tmp_path / place / "adapter_model.safetensors") for place in ("old/model", "merged/model/adapter")
    ]
    assert all(torch.equal(tensor, adapters[1][name]) for name, tensor in adapters[0].items())
    full = (*TWELVE, *base, f"init_from={tmp_path / 'old'}")
    summary = start(tmp_path / "new", *full, "training.max_train_steps=1", "optimizer.lr=1e-12")
    assert summary["num_trained_parameters"] == summary["num_parameters"]
    before, after = weights_of(tmp_path / "merged"), weights_of(tmp_path / "new")
    assert before.keys() == after.keys()
    assert all(torch.allclose(after[name], before[name], atol=1e-6) for name in before)
    straight = start(tmp_path / "straight", *full)
    broken(tmp_path / "broken", full, [Fate(7), Fate(9, dead=True)])
    assert_same(tmp_path / "straight", tmp_path / "broken")
    assert straight["eval/validation/loss"] != summary["eval/validation/loss"]
    with pytest.raises(ModelError, match=r"other ids than here"):
        start(tmp_path / "other", *full, "tokens=none")
    changed = load_file(tmp_path / "base" / "model" / "model.safetensors")
    save_file({name: 2 * tensor for name, tensor in changed.items()}, tmp_path / "base" / "model" / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    with pytest.raises(DamagedFileError, match=r"it is not what the adapter in .* was trained on"):
        start(tmp_path / "other", *full)


def test_a_run_that_begins_with_old_weights_goes_on_exactly(tmp_path: Path) -> None:
    start(tmp_path / "old", *TWELVE)
    overrides = (*TWELVE, f"init_from={tmp_path / 'old'}", "seed=7")
    start(tmp_path / "straight", *overrides)
    broken(tmp_path / "broken", overrides, [Fate(7), Fate(9, dead=True)])
    assert_same(tmp_path / "straight", tmp_path / "broken")


def test_time_that_is_up_stops_as_a_signal_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock(Fate):
        """Time is up at the fifth check."""

        def check(self) -> None:
            if self.is_deferred and self.seen == 4:
                self.set_time_limit(1e-9)
            self.at = None
            super().check()

    with pytest.raises(Interrupted, match=r"training\.max_seconds"):
        start(tmp_path / "run", *TWELVE, "training.max_seconds=1000", fate=Clock())
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["how_to_go_on"]) == ("PREEMPTED", f"make resume run={tmp_path / 'run'}")
    assert newest_resumable(tmp_path / "run" / "checkpoints") == status["step"] == 4


def test_time_that_is_up_ends_the_process_with_75(tmp_path: Path) -> None:
    done = towline("tracking=none", *TWELVE, f"hydra.run.dir={tmp_path / 'run'}", "training.max_seconds=0.001")
    assert (done.returncode, "Stopped by training.max_seconds = 0.001" in done.stderr) == (75, True)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("chosen", [{}, {"chosen": {"data.batching": "length_grouped"}}], ids=["older", "present"])
@pytest.mark.parametrize("batching", ["padded", "length_grouped"])
def test_steps_that_an_earlier_version_grouped_otherwise_begin_their_epoch_again(
    accumulation: int, chosen: dict[str, Any], batching: str
) -> None:
    how = (f"data.batching={batching}", f"training.gradient_accumulation_steps={accumulation}")
    job = job_of(*how, "training.per_device_train_batch_size=2")
    rows = SimpleNamespace(train=SimpleNamespace(digest=lambda: "rows"), num_train_rows=9)
    tokenizer = SimpleNamespace(get_vocab=dict)
    facts = Fingerprint(3, 9, "rows", 9, tokenizer_hash(tokenizer), None, "cpu", 1, 2 * accumulation, {})
    state = {
        **chosen,
        "config": job.frozen,
        "facts": dataclasses.asdict(facts),
        "position": {"epoch": 0, "num_sequences": 4, "block": None},
        "step": 3,
    }
    found = ResumePoint(Path("there"), state).checked(rows, tokenizer, job, 1)
    assert found.repeats_epoch is (not chosen and batching == "length_grouped" and accumulation > 1)
    assert found.position is not None
    assert found.position["num_sequences"] == (0 if found.repeats_epoch else 4)
