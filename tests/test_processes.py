"""Runs in several processes: the numbers of one process, whatever is shared out, and an end when any of them ends.

Everything here is `python -m src.run` on two processes over gloo; only the one-process runs that they are compared with
are made in the process of the tests. Where numbers are compared, the two are forked with what a launcher would put into
their environment, as importing everything twice takes most of such a run; where starts and ends are looked at, the
command launches them.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from src.checkpoint.manifest import newest_resumable, problems_of
from src.cli.start import run_job as run
from src.config import rules
from src.config.gate import admit
from src.config.places import steps_in
from src.config.schema import MixedPrecision
from src.data.batching import collate, windows
from src.data.dataset import build_data
from src.data.sets import EncodedSet
from src.data.tokenizer import load_tokenizer
from src.errors import ConfigError, Interrupted, TrainingError
from src.forecast.counting import MicroBatchShape
from src.forecast.memory import memory_forecast
from src.inspection.run_forecast import planned_parameters, sharding_of
from src.model import embeddings
from src.model.build import empty_model
from src.model.embeddings import resize_embeddings
from src.runtime.launch import launch, reserved_port
from src.runtime.session import start_runtime
from src.runtime.sharding import Sharded, deepspeed_settings
from src.runtime.signals import StopRequest
from src.training.head import ModelWithLoss
from src.training.resume import find_resume_point
from src.training.state import build_batch_sampler
from tests.conftest import ROOT, ForkedCommand, admitted, read_lines, towline, write_lines

T = TypeVar("T")
Rows = list[dict[str, Any]]

ROWS = 77  # at 8 a step: the tenth takes 5, in micro-batches of 2, 2 and 1
STEPS = 20
LIMIT = 300.0
"""Seconds that anything is waited for."""
TINY = (
    "runtime.device=cpu",
    "data.test_files=null",
    "optimizer.weight_decay=0.1",  # on matrices only, which have another shape where they are shared out
    "training.num_train_epochs=2",
    "training.per_device_train_batch_size=2",
    "training.per_device_eval_batch_size=4",
    "training.logging_steps=3",
    "evaluation.eval_steps=10",
    "evaluation.max_samples=5",
    "evaluation.sample_prompts=1",
    "generation.max_new_tokens=4",
    "checkpoint.checkpointing_steps=6",
    "checkpoint.keep_last=9",
)
ALONE = ("training.gradient_accumulation_steps=4",)
TWO = ("runtime.num_processes=2", "training.gradient_accumulation_steps=2")
ZERO3 = ("deepspeed=zero3", "deepspeed.zero_optimization.stage3_param_persistence_threshold=0")
SHARED_OUT = {"none": (), "zero1": ("deepspeed=zero1",), "zero2": ("deepspeed=zero2",), "zero3": ZERO3}
ONE_EPOCH = ("training.num_train_epochs=1",)
SUM = ("loss.reduction=sum", "optimizer.lr=1e-3", "training.max_grad_norm=1", *ONE_EPOCH)
FADED = ("data.thought_dropout=0.3", "data.thought_schedule={tokens_per_epoch: 2, smoothing: 0.5}")
LORA = ("adapter=lora", "adapter.lora_dropout=0", "optimizer.lr=1e-2", *ONE_EPOCH)


class Ended:
    """A command that came to its end."""

    def __init__(self, code: int, output: str) -> None:
        self.code, self.output = code, output


class Laboratory:
    """Runs by name in one folder, from the same weights, on the same rows; each is made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        sums = [(3 + 7 * i * i, 10 ** (i % 4) + 5 * i) for i in range(ROWS)]
        rows = [
            {"prompt": f"{a}+{b}=", "completion": "<ToW>1+1+0=02</ToW>" * (i * 5 % 4) + str(a + b)}
            for i, (a, b) in enumerate(sums)
        ]
        self.rows = f"data.train_files=['{write_lines(folder / 'train.jsonl', rows)}']"
        self._alone(self.at("base"), "tokens=none", "training.max_train_steps=2", *TINY, self.rows, *ALONE)
        self.exact = self.at("base") / "model"
        self.roomy = self.at("roomy")
        model = AutoModelForCausalLM.from_pretrained(self.exact)
        model.resize_token_embeddings(264, mean_resizing=False)
        model.save_pretrained(self.roomy)
        AutoTokenizer.from_pretrained(self.exact).save_pretrained(self.roomy)

    def asked(self, name: str, *overrides: str) -> list[str]:
        """Give a command line.

        The model has rows for the new tokens already, so that ZeRO-3 has shared them out when they are written; a
        matrix that has to grow is whole until it is prepared.
        """
        base = [
            "model=causal_lm",
            f"hydra.run.dir={self.at(name)}",
            self.rows,
            f"data.cache_dir={self.folder / 'rows'}",
        ]
        chosen = {
            override.partition("=")[0]: override for override in (*TINY, f"model.checkpoint={self.roomy}", *overrides)
        }
        return [*base, "tracking=none", *chosen.values()]

    def at(self, name: str) -> Path:
        return self.folder / name

    @functools.cache  # noqa: B019
    def alone(self, name: str, *overrides: str) -> Path:
        """Give the folder of a run that was made in one process: this one."""
        return self._alone(self.at(name), *self.asked(name, *ALONE, *overrides))

    @functools.cache  # noqa: B019
    def launched(self) -> Path:
        """Return the folder of a run whose two processes its command launched."""
        self.finish("none", *TWO)
        return self.at("none")

    @functools.cache  # noqa: B019
    def together(self, name: str, *overrides: str) -> Path:
        """Return the folder of a run that was made in two processes."""
        self.join(name, *overrides)
        return self.at(name)

    def join(self, name: str, *overrides: str) -> str:
        """Run two processes that are there already, as another launcher starts them, and return what they print."""
        codes, output = self.forked(self.asked(name, *TWO, *overrides))
        assert codes == [0, 0], output
        assert "Warning" not in output
        return output

    def forked(self, arguments: Sequence[str], prepare: Callable[[], object] | None = None) -> tuple[list[int], str]:
        """Run two processes to their end, and return their exit codes and what they print."""
        with self.two_forked(arguments, prepare) as (ranks, log):
            until(lambda: any(rank.poll() for rank in ranks) or all(rank.poll() == 0 for rank in ranks))
        return [rank.wait() for rank in ranks], log.read_text(encoding="utf-8")

    @contextmanager
    def two_forked(
        self, arguments: Sequence[str], prepare: Callable[[], object] | None = None
    ) -> Iterator[tuple[list[ForkedCommand], Path]]:
        """Start two processes, and give them with the file that they print to; what is left of them is killed."""
        shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
        with reserved_port() as port:
            log = self.folder / f"forked-{port}.log"
            shared["MASTER_PORT"] = str(port)
            ranks = [
                ForkedCommand(arguments, log, None, prepare, RANK=f"{i}", LOCAL_RANK=f"{i}", **shared) for i in range(2)
            ]
            try:
                yield ranks, log
            finally:
                for rank in ranks:
                    rank.kill()

    def finish(self, name: str, *overrides: str) -> str:
        with started(self.asked(name, *overrides), self.folder / f"{name}.log") as one:
            end = wait_for_end(one)
        assert end.code == 0, end.output
        assert "Warning" not in end.output
        return end.output

    @contextmanager
    def under_way(self, name: str, *overrides: str, behind: int) -> Iterator[Started]:
        """Give a run once a step behind this one is in its journal."""
        with started(self.asked(name, *overrides), self.folder / f"{name}.log") as one:
            self.await_step(name, one.popen, behind, one.log)
            yield one

    @contextmanager
    def one_forked(self, arguments: Sequence[str]) -> Iterator[tuple[list[ForkedCommand], Path]]:
        """Start one process, as `two_forked` starts two."""
        log = self.folder / "one-forked.log"
        command = ForkedCommand(arguments, log)
        try:
            yield [command], log
        finally:
            command.kill()

    def await_step(self, name: str, command: subprocess.Popen[bytes] | ForkedCommand, behind: int, log: Path) -> None:
        """Wait until a step behind this one is in a run's journal."""
        journal = self.at(name) / "metrics.jsonl"
        until(lambda: command.poll() is not None or any(step > behind for step in steps_of(journal)))
        assert command.poll() is None, log.read_text(encoding="utf-8")

    @staticmethod
    def _alone(run_dir: Path, *overrides: str) -> Path:
        run(admitted(f"hydra.run.dir={run_dir}", *overrides), StopRequest())
        return run_dir


class Started:
    """A command that is under way, with what it prints."""

    def __init__(self, popen: subprocess.Popen[bytes], log: Path) -> None:
        self.popen, self.log = popen, log

    @property
    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")


@contextmanager
def started(
    arguments: Sequence[str], log: Path, command: Sequence[str] = ("-m", "src.run"), **environment: str
) -> Iterator[Started]:
    """Start Python on something; it and all it started are ended at the end of the block, if they live still."""
    with open(log, "wb") as file:
        popen = subprocess.Popen(
            [sys.executable, *command, *arguments],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        yield Started(popen, log)
    finally:
        if popen.poll() is None:
            left = [psutil.Process(popen.pid), *psutil.Process(popen.pid).children(recursive=True)]
            for process in left:
                process.kill()
        popen.wait()


def wait_for_end(one: Started) -> Ended:
    return Ended(one.popen.wait(timeout=LIMIT), one.output)


def until(found: Callable[[], T]) -> T:
    """Give what is found, as soon as there is something."""
    deadline = time.monotonic() + LIMIT
    while not (result := found()):
        assert time.monotonic() < deadline, "what was waited for did not come"
        time.sleep(0.02)
    return result


def steps_of(journal: Path) -> list[int]:
    lines = journal.read_text(encoding="utf-8").splitlines() if journal.exists() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("}")]


def workers_of(run_dir: Path) -> dict[int, psutil.Process]:
    """Give a run's living processes by rank."""
    found = {}
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "--frozen" in words and str(run_dir) in words:
            try:
                found[int(process.environ()["RANK"])] = process
            except (psutil.Error, KeyError):  # it ended, or has not begun
                continue
    return found


def plain(line: dict[str, Any]) -> dict[str, Any]:
    """Leave clocks out."""
    return {key: value for key, value in line.items() if not key.startswith("perf/")}


def metrics(run_dir: Path) -> Rows:
    return [plain(line) for line in read_lines(run_dir / "metrics.jsonl")]


def status(run_dir: Path) -> dict[str, Any]:
    return dict(json.loads((run_dir / "status.json").read_text(encoding="utf-8")))


def summary(run_dir: Path) -> dict[str, Any]:
    return dict(json.loads((run_dir / "summary.json").read_text(encoding="utf-8")))


def assert_same_numbers(ours: Path, theirs: Path, epochs: int = 2) -> None:
    """Hold the losses of every line together, and what was counted."""
    steps = STEPS * epochs // 2
    lines = list(zip(metrics(ours), metrics(theirs), strict=True))
    assert [one["step"] for one, _ in lines] == [other["step"] for _, other in lines]
    assert lines[-1][0]["step"] == steps
    keys = ("train/loss", "train/thought_loss", "train/answer_loss", "eval/validation/loss")
    compared = 0
    for one, other in lines:
        assert one.keys() <= other.keys()
        assert all(key.startswith("tokens/") and "grad_norm" in key for key in other.keys() - one.keys())  # shared out
        assert one["train/grad_norm"] == pytest.approx(other["train/grad_norm"], rel=1e-3)
        for key in keys:
            if key in other:
                assert one[key] == pytest.approx(other[key], rel=0, abs=1e-4), (key, one["step"])
                compared += 1
    assert compared > 12 * epochs
    for key in ("examples_seen", "tokens_seen", "steps"):
        assert summary(ours)[key] == summary(theirs)[key], key
    assert summary(ours)["examples_seen"] == epochs * ROWS
    one, other = (
        load_file(place / "checkpoints" / f"step-{steps:08}" / "model.safetensors") for place in (ours, theirs)
    )
    assert one.keys() == other.keys()
    assert not [name for name in one if (one[name] - other[name]).abs().max() > 1e-4]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Laboratory:
    return Laboratory(tmp_path_factory.mktemp("processes"))


# The same numbers


@pytest.mark.parametrize("what", list(SHARED_OUT))
def test_two_processes_give_the_losses_of_one(lab: Laboratory, what: str) -> None:
    ours = lab.together(what, *SHARED_OUT[what]) if SHARED_OUT[what] else lab.launched()
    assert_same_numbers(ours, lab.alone("one"))


@pytest.mark.parametrize("what", list(SHARED_OUT))
def test_losses_that_are_summed_are_those_of_one_process_too(lab: Laboratory, what: str) -> None:
    grows = (*SUM, *FADED, f"model.checkpoint={lab.exact}")  # the matrices have to grow
    ours = lab.together(f"{what}-sum", *SHARED_OUT[what], *grows)
    assert_same_numbers(ours, lab.alone("one-sum", *grows), epochs=1)
    assert metrics(ours)[0]["train/objective"] > 3 * metrics(ours)[0]["train/loss"]


def test_what_deepspeed_is_given_is_written_down(lab: Laboratory) -> None:
    given = json.loads((lab.together("zero3", *ZERO3) / "deepspeed.json").read_text(encoding="utf-8"))
    assert (given["train_batch_size"], given["train_micro_batch_size_per_gpu"]) == (8, 2)
    assert (given["gradient_clipping"], given["zero_optimization"]["stage"]) == (1.0, 3)
    assert "auto" not in json.dumps(given)


def test_a_file_of_deepspeeds_trains_as_one_process_and_is_not_needed_again(lab: Laboratory, tmp_path: Path) -> None:
    zero = {"stage": 3, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": 0}  # fmt: skip
    content = {
        "train_batch_size": 8, "gradient_clipping": "auto", "steps_per_print": 1, "zero_optimization": zero,
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": 0.1}},
        "scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": 4, "warmup_num_steps": "auto"}},
    }  # fmt: skip
    file = tmp_path / "ds_config.json"
    file.write_text(json.dumps(content), encoding="utf-8")
    short = ("training.max_train_steps=4", "training.logging_steps=1", "evaluation.eval_steps=null")
    ours = lab.together("file", "deepspeed=file", f"deepspeed.config_file={file}", *short)
    losses = [[line["train/loss"] for line in metrics(one)] for one in (ours, lab.alone("one-of-four", *short))]
    assert losses[0] == pytest.approx(losses[1], rel=0, abs=1e-4)
    given = json.loads((ours / "deepspeed.json").read_text(encoding="utf-8"))
    width = json.loads((lab.roomy / "config.json").read_text(encoding="utf-8"))["hidden_size"]
    assert given["zero_optimization"]["reduce_bucket_size"] == width**2
    assert given["zero_optimization"]["stage3_prefetch_bucket_size"] == int(0.9 * width**2)
    assert "auto" not in json.dumps(given)
    file.unlink()
    again = admit(
        [f"rerun={ours}", f"hydra.run.dir={ours}", "training.max_train_steps=5", "deepspeed.scheduler={}"]
    ).run
    assert again is not None
    found = find_resume_point(again.config.checkpoint, again.frozen, ours, force=False)
    assert (found.step, [change.key for change in found.changes if change.impact > 1]) == (4, [])


def test_each_process_has_a_log(lab: Laboratory) -> None:
    run_dir = lab.launched()
    assert sorted(file.name for file in (run_dir / "logs").iterdir()) == ["rank-0.log", "rank-1.log"]
    assert (run_dir / "logs" / "rank-0.log").read_text(encoding="utf-8") == (lab.folder / "none.log").read_text("utf-8")


def test_processes_draw_random_numbers_of_their_own(lab: Laboratory) -> None:
    for place in (lab.launched(), lab.together("zero3", *ZERO3)):
        state = json.loads((place / "checkpoints" / "step-00000006" / "state.json").read_text(encoding="utf-8"))
        first, second = (drawn["torch"] for drawn in state["rng"])
        assert first != second  # else dropout would be alike in all


def test_rows_that_lie_in_16_bits_are_the_recipe_rounded(lab: Laboratory) -> None:
    few = ("deepspeed=zero2", "training.mixed_precision=bf16", "training.max_train_steps=2")
    done = towline(*lab.asked("bf16", *ALONE, *few))
    assert done.returncode == 0, done.stderr
    assert status(lab.at("bf16"))["state"] == "FINISHED"


def test_an_adapter_that_a_run_begins_with_is_what_is_shared_out(lab: Laboratory) -> None:
    lora = (*LORA, f"model.checkpoint={lab.exact}")
    first = lab.alone("lora1", *lora)
    still = ("optimizer.lr=1e-12", "optimizer.weight_decay=0", "training.max_train_steps=1")
    lab.join("from-lora1", *ZERO3, *lora, *still, f"init_from={first}")
    ours, theirs = (load_file(p / "model" / "adapter_model.safetensors") for p in (lab.at("from-lora1"), first))
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if (ours[name] - theirs[name]).abs().max() > 1e-6]


def test_an_adapter_and_new_rows_beside_it_are_trained_alike_and_exported(lab: Laboratory) -> None:
    from peft import PeftModel

    asked = (*LORA, f"model.checkpoint={lab.exact}")  # its matrices have to grow
    ours, theirs = lab.together("lora3", *ZERO3, *asked), lab.alone("lora1", *asked)
    assert_same_numbers(ours, theirs, epochs=1)
    tokenizer = AutoTokenizer.from_pretrained(ours / "model")
    ids = torch.tensor([tokenizer("12+3=<ToW>1</ToW>15")["input_ids"]])
    logits = []
    for place in (ours, theirs):
        model = AutoModelForCausalLM.from_pretrained(lab.exact)
        model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=8, mean_resizing=False)
        adapted = PeftModel.from_pretrained(model, place / "model").eval()
        logits.append(adapted(ids).logits[..., : len(tokenizer)])  # behind: padding, of no token
    assert (logits[0] - logits[1]).abs().max() < 1e-3
    untouched = AutoModelForCausalLM.from_pretrained(lab.exact).eval()(ids[:, :3]).logits
    assert (logits[0][:, :3, : untouched.shape[-1]] - untouched).abs().max() > 0.01


@pytest.mark.parametrize("epoch_of", [1, 3])
def test_a_step_takes_the_same_rows_of_any_number_of_processes(lab: Laboratory, epoch_of: int) -> None:
    def taken(num_processes: int) -> list[Any]:
        config = admitted(*lab.asked("none-such", f"training.gradient_accumulation_steps={4 // num_processes}")).config
        tokenizer = load_tokenizer(config.model, config.tokens)[0]
        train = build_data(config, tokenizer).train
        assert isinstance(train, EncodedSet)
        found = []
        for window in windows(train, build_batch_sampler(config, train, num_processes), config.seed):
            found.append((window.after, [row for _, part in window.micro_batches for rows in part for row in rows]))
            if window.epoch == epoch_of - 1 and window.ends_epoch:
                return found
        raise AssertionError("windows never end")

    one = taken(1)
    assert one == taken(2) == taken(4)
    rows = [row for _, some in one for row in some]
    for start in range(0, len(rows), ROWS):
        assert sorted(rows[start : start + ROWS]) == list(range(ROWS))


# Memory


def _count_held(found: Path) -> None:
    """Have the first process write the most bytes that the run's tensors hold behind a backward pass."""
    most, add_gradients = 0, Sharded.backward

    def count() -> int:
        gc.collect()
        tensors = [one for one in gc.get_objects() if isinstance(one, torch.Tensor)]
        tensors += [one.grad for one in tensors if one.is_leaf and one.grad is not None]
        return sum({one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}.values())

    def counted(self: Sharded, loss: torch.Tensor, *, last: bool = True) -> None:
        nonlocal most
        add_gradients(self, loss, last=last)
        torch.distributed.barrier()
        if os.environ["RANK"] != "0":
            return
        held, again = count(), count()
        while held != again:  # a thread of gloo's lets go of what it has sent a little later
            held, again = again, count()
        most = max(most, held - before)
        found.write_text(str(most), encoding="utf-8")

    gc.collect()
    gc.freeze()  # what the imports made
    before = count()
    Sharded.backward = counted


def test_memory_is_forecast_as_it_is_held(lab: Laboratory, tmp_path: Path) -> None:
    few = ("training.max_train_steps=2", "training.num_train_epochs=1", "evaluation.metrics=[]")
    few += ("checkpoint.checkpointing_steps=null", "evaluation.max_samples=1")
    options = {
        "zero1": ("deepspeed=zero1",),
        "zero2": ("deepspeed=zero2", "training.mixed_precision=bf16"),
        "zero3": ZERO3,
        "zero3-lora": (*ZERO3, "adapter=lora"),
    }
    for name, option in options.items():
        asked, found = lab.asked(f"counted-{name}", *few, *TWO, *option), tmp_path / name
        codes, output = lab.forked(asked, functools.partial(_count_held, found))
        assert codes == [0, 0], output
        config = admitted(*asked).config
        tokenizer, new = load_tokenizer(config.model, config.tokens)
        model = empty_model(config.model)
        resize_embeddings(model, len(tokenizer), config.tokens.pad_to_multiple_of)
        parameters = planned_parameters(config, model, list(new.ids.values()))
        sharding = sharding_of(config)
        shape = MicroBatchShape(batch=2, seq=64, num_supervised=126)
        forecast = memory_forecast(parameters, config.optimizer, shape, None, sharding=sharding)
        parts = {part.name: part.bytes or 0 for part in forecast.parts}
        lasting = sum(parts.values())  # what is counted is not there between steps
        if sharding is not None and sharding.stage == 2:
            lasting -= parts["gradient buckets"]  # let go of when the count is taken
        assert int(found.read_text(encoding="utf-8")) == pytest.approx(lasting, rel=0.02), name


# Stops


def test_a_run_shared_out_that_was_stopped_is_the_run_that_was_not(lab: Laboratory) -> None:
    straight = lab.together("zero3", *ZERO3)
    with lab.under_way("stopped", *TWO, *ZERO3, behind=2) as one:
        one.popen.send_signal(signal.SIGTERM)
        end = wait_for_end(one)
    run_dir = lab.at("stopped")
    assert end.code == 75, end.output
    assert "Stopped by SIGTERM" in end.output
    newest = newest_resumable(run_dir / "checkpoints")
    assert newest is not None
    assert newest == status(run_dir)["step"] < STEPS
    assert status(run_dir)["state"] == "PREEMPTED"
    assert not list(problems_of(run_dir / "checkpoints" / f"step-{newest:08}"))
    assert not workers_of(run_dir)
    assert "resumed" in lab.join("stopped", *ZERO3)
    assert metrics(run_dir) == metrics(straight)
    for file in ("model/model.safetensors", f"checkpoints/step-{STEPS:08}/optimizer.safetensors"):
        ours, theirs = load_file(run_dir / file), load_file(straight / file)
        assert ours.keys() == theirs.keys()
        assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]


def test_a_finished_run_of_two_processes_goes_on_for_longer_as_one_of_one_does(lab: Laboratory) -> None:
    longer = ("training.num_train_epochs=2.3",)
    for name, run_dir in (("longer", lab.launched()), ("longer-alone", lab.alone("one"))):
        shutil.copytree(run_dir, lab.at(name))
    codes, output = lab.forked([f"rerun={lab.at('longer')}", f"hydra.run.dir={lab.at('longer')}", *longer])
    assert codes == [0, 0], output
    run(admitted(f"rerun={lab.at('longer-alone')}", f"hydra.run.dir={lab.at('longer-alone')}", *longer), StopRequest())
    ours, theirs = metrics(lab.at("longer")), metrics(lab.at("longer-alone"))
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    assert (ours[-1]["step"], status(lab.at("longer"))["state"]) == (23, "FINISHED")
    for one_line, other in zip(ours, theirs, strict=True):
        assert one_line["train/loss"] == pytest.approx(other["train/loss"], rel=0, abs=1e-4)
    assert [line["resumed_step"] for line in read_lines(lab.at("longer") / "starts.jsonl")] == [None, STEPS]


def test_one_process_that_is_killed_ends_all_and_the_run_goes_on(lab: Laboratory) -> None:
    run_dir = lab.at("killed")
    for rank, behind in ((1, 6), (0, 9)):
        with lab.under_way("killed", *TWO, behind=behind) as one:
            workers = until(lambda: found if len(found := workers_of(run_dir)) == 2 else None)
            parent = psutil.Process(one.popen.pid)
            everything = [parent, *parent.children(recursive=True)]
            workers[rank].kill()
            end = wait_for_end(one)
        assert end.code == 1, end.output
        assert f"process {rank} was ended by SIGKILL" in end.output
        assert not [process for process in everything if process.is_running()]
        assert not workers_of(run_dir)
        told = status(run_dir)
        assert told["state"] == "FAILED"
        assert told["cause"]
        assert "SIGKILL" in told["cause"]
    with lab.under_way("killed", *TWO, behind=12) as one:  # the one that started them
        workers = list(until(lambda: found if len(found := workers_of(run_dir)) == 2 else None).values())
        for worker in workers:
            worker.suspend()
        one.popen.kill()
        one.popen.wait()
        with started(lab.asked("killed", *TWO), lab.folder / "second.log") as second:
            end = wait_for_end(second)
        assert end.code == 2, end.output
        assert f"is in use by another process: process {one.popen.pid}" in end.output
        assert "it has died, but processes that it started" in end.output
        for worker in workers:
            worker.resume()
        psutil.wait_procs(workers, timeout=LIMIT)
    assert status(run_dir)["state"] == "PREEMPTED"
    lab.join("killed")
    assert status(run_dir)["state"] == "FINISHED"
    assert summary(run_dir)["examples_seen"] == 2 * ROWS
    assert metrics(run_dir) == metrics(lab.launched())
    ours, theirs = (load_file(place / "model/model.safetensors") for place in (run_dir, lab.launched()))
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]


def ask_by_files(run_dir: Path) -> None:
    """Have a run save, then stop, as `touch` does; all its processes must save the same step."""
    before = set(steps_in(run_dir / "checkpoints"))
    (run_dir / "save").touch()
    until(lambda: not (run_dir / "save").exists())
    assert until(lambda: set(steps_in(run_dir / "checkpoints")) - before)
    (run_dir / "stop").touch()
    until(lambda: not (run_dir / "stop").exists())


def test_the_number_of_processes_may_change_over_stops_in_an_epoch(lab: Laboratory) -> None:
    one_epoch = ("training.num_train_epochs=1", "training.per_device_train_batch_size=1", "training.logging_steps=2")
    one_epoch += ("checkpoint.checkpointing_steps=null",)
    one_epoch += ("training.gradient_accumulation_steps=1",)  # two rows a step: 39 steps, the last takes one
    seen = []
    for number, behind, zero in ((2, 4, ZERO3), (1, 14, ())):
        asked = lab.asked("changed", *one_epoch, *zero, f"runtime.num_processes={number}")
        with lab.two_forked(asked) if number == 2 else lab.one_forked(asked) as (ranks, log):
            lab.await_step("changed", ranks[0], behind, log)
            if number == 2:
                ask_by_files(lab.at("changed"))
            else:
                ranks[0].send_signal(signal.SIGTERM)
            assert [rank.wait(LIMIT) for rank in ranks] == [75] * number, log.read_text()
        newest = newest_resumable(lab.at("changed") / "checkpoints")
        state = json.loads((lab.at("changed") / "checkpoints" / f"step-{newest:08}" / "state.json").read_text())
        assert state["counters"]["examples_seen"] == state["position"]["num_sequences"] == 2 * state["step"]
        seen.append((newest, log.read_text()))
    assert "Stopped by the file stop" in seen[0][1]
    output = lab.join("changed", *one_epoch, "runtime.num_processes=2")
    assert seen[0][0] < seen[1][0] < 39
    assert "instead of" not in seen[0][1]
    assert "1 process instead of 2" in seen[1][1]
    assert "gradient_accumulation_steps is 2 instead of 1" in seen[1][1]
    assert "num_processes" in output
    assert summary(lab.at("changed"))["examples_seen"] == ROWS
    assert summary(lab.at("changed"))["steps"] == 39


def test_two_processes_stop_early_at_one_step(lab: Laboratory) -> None:
    early = ("training.early_stopping_patience=1", "training.early_stopping_threshold=100", "evaluation.eval_steps=5")
    run_dir = lab.together("early", *early)
    assert (status(run_dir)["state"], status(run_dir)["step"]) == ("FINISHED", 10)
    assert status(run_dir)["cause"].startswith("stopped early: ")
    assert summary(run_dir)["examples_seen"] == summary(lab.alone("early-alone", *early))["examples_seen"]


# The export


def test_what_was_shared_out_is_exported_whole(lab: Laboratory) -> None:
    run_dir = lab.together("zero3", *ZERO3)
    exported = AutoModelForCausalLM.from_pretrained(run_dir / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "model")
    first, last = (load_file(run_dir / "checkpoints" / f"step-{step:08}" / "model.safetensors") for step in (6, STEPS))
    again = AutoModelForCausalLM.from_config(exported.config).eval()
    left_out, unknown = again.load_state_dict(last, strict=False)
    assert not unknown
    assert all("lm_head" in name for name in left_out)
    again.tie_weights()
    ids = torch.tensor([tokenizer("4930+61=<ToW>0+1+0=01</ToW>4991")["input_ids"]])
    with torch.no_grad():
        assert (exported(ids).logits - again(ids).logits).abs().max() < 1e-5
    config = admitted(*lab.asked("zero3", *TWO, *ZERO3)).config
    rows = build_data(config, load_tokenizer(config.model, config.tokens)[0]).validation["validation"]
    batch = collate(rows, [[i] for i in range(5)], 0)  # those that were evaluated
    with torch.no_grad():
        loss = ModelWithLoss(exported)(batch.input_ids, batch.labels).objective / batch.num_supervised
    assert loss.item() == pytest.approx(summary(run_dir)["eval/validation/loss"], rel=0, abs=1e-5)
    new = tokenizer.convert_tokens_to_ids(["<ToW>", "</ToW>"])
    assert len(set(new)) == 2
    for name, rows in last.items():
        if "embed_tokens" in name or "lm_head" in name:
            assert all(not torch.equal(rows[i], first[name][i]) for i in new)
    told = [line for line in metrics(run_dir) if "tokens/<ToW>/cosine_to_start" in line][-1]
    assert told["tokens/<ToW>/cosine_to_start"] < 0.999
    assert told["tokens/</ToW>/cosine_to_start"] < 0.999


def _lose_writes() -> None:
    """Have what is written to gathered parameters be lost."""
    gathered = embeddings.gathered
    embeddings.gathered = lambda parameters, *, writes=False: gathered(parameters)


def test_new_rows_that_do_not_stay_are_noticed(lab: Laboratory) -> None:
    codes, output = lab.forked(lab.asked("lost", *TWO, *ZERO3), _lose_writes)
    assert not {0, 75} & {*codes}, output
    assert "lost their starting rows" in output
    assert status(lab.at("lost"))["state"] == "FAILED"


GROUPS = """
import sys

from torch import distributed, nn

from src.config.gate import admit
from src.config.places import steps_in
from src.config.schema import MixedPrecision
from src.runtime.session import start_runtime
from src.runtime.signals import StopRequest

sys.setswitchinterval(100)
config = admit(["tracking=none", "runtime.device=cpu"]).run.config.runtime
for _ in range(100):
    with start_runtime(config, MixedPrecision.no, 0, StopRequest()):
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
        model = nn.parallel.DistributedDataParallel(nn.Linear(2, 2))
        distributed.all_gather_object([None], "a")
    del model
"""


def test_a_process_does_not_hang_when_it_leaves_the_others(tmp_path: Path) -> None:
    with started(["-c", GROUPS], tmp_path / "log", ()) as one:  # about one in ten hung
        end = wait_for_end(one)
    assert end.code == 0, end.output


TROUBLE = """
import os, signal, sys, time
rank, what = os.environ["RANK"], sys.argv[1]
if what == "fails" and rank == "0":
    time.sleep(0.5)
    sys.exit("closed by peer")
if what == "fails":
    print("the cause", file=sys.stderr)
    sys.exit(3)
if what == "is deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN if rank == "1" else lambda *_: sys.exit(75))
else:
    os.fstat(int(sys.argv[2]))
if rank == "1":
    time.sleep(0.5)
    open(sys.argv[3], "w").close()
time.sleep(60)
"""


def launched(tmp_path: Path, *arguments: str, stop: StopRequest, locks: Sequence[int] = ()) -> int:
    """Launch two processes that do as TROUBLE says."""
    config = admitted("runtime.num_processes=2").config.runtime
    return launch(config, [sys.executable, "-c", TROUBLE, *arguments], tmp_path, stop, locks)


def test_the_process_that_failed_first_is_named_with_its_words(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"process 1 ended with exit code 3.*\n  the cause$"):
        launched(tmp_path, "fails", stop=StopRequest())


class WhenBegun(StopRequest):
    """Asks for a stop as soon as there is a file."""

    file: Path

    @property
    def name(self) -> str:
        return "SIGTERM" if self.file.exists() else ""

    @name.setter
    def name(self, value: str) -> None:
        pass


def test_processes_that_are_stopped_before_they_can_say_so_are_stopped(tmp_path: Path) -> None:
    stop = WhenBegun()
    stop.file = tmp_path / "begun"
    with open(tmp_path / "lock", "w") as lock:
        number = lock.fileno()
        assert launched(tmp_path, "waits", str(number), str(stop.file), stop=stop, locks=[number]) == 75


def test_a_process_that_can_not_follow_a_stop_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("src.runtime.launch.LEAVE_SECONDS", 0.5)
    stop = WhenBegun()
    stop.file = tmp_path / "begun"
    with pytest.raises(Interrupted, match="SIGTERM"):
        launched(tmp_path, "is deaf", "", str(stop.file), stop=stop)


def test_the_environment_is_as_it_was_behind_a_run_of_deepspeeds(tmp_path: Path) -> None:
    before = dict(os.environ)
    config = admitted("deepspeed=zero1", "runtime.device=cpu").config
    settings = deepspeed_settings(config, 1)
    with start_runtime(config.runtime, MixedPrecision.no, 0, StopRequest(), settings) as runtime:
        assert runtime.num_processes == 1
    assert dict(os.environ) == before


# Other launchers


def test_torchrun_makes_one_run_of_its_processes(lab: Laboratory) -> None:
    asked = lab.asked("torchrun/run", *TWO[1:], "training.max_train_steps=3")
    with reserved_port() as port:
        torchrun = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port), "-m")
        with started(["src.run", *asked], lab.folder / "torchrun.log", torchrun) as one:
            end = wait_for_end(one)
    assert end.code == 0, end.output
    assert [place.name for place in lab.at("torchrun").iterdir()] == ["run"]
    assert status(lab.at("torchrun/run"))["state"] == "FINISHED"
    assert summary(lab.at("torchrun/run"))["examples_seen"] == 24


def test_two_machines_make_one_run(lab: Laboratory) -> None:
    with reserved_port() as port:
        meet = ("runtime.num_machines=2", "runtime.main_process_ip=127.0.0.1", f"runtime.main_process_port={port}")
        asked = lab.asked("machines", *meet, *TWO[1:], "training.max_train_steps=3")
        with (
            started([*asked, "runtime.machine_rank=1"], lab.folder / "machine-1.log") as second,
            started(asked, lab.folder / "machine-0.log") as first,
        ):
            ends = [wait_for_end(one) for one in (first, second)]
    assert [end.code for end in ends] == [0, 0], [end.output for end in ends]
    assert status(lab.at("machines"))["state"] == "FINISHED"
    assert summary(lab.at("machines"))["examples_seen"] == 24


# The gate

OFFLOAD = ["deepspeed=zero2_offload"]


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["runtime.num_machines=2", "runtime.machine_rank=2", "runtime.main_process_ip=a"],
         ["runtime.machine_rank = 2", "from 0 to runtime.num_machines - 1, which is 1"]),
        (["runtime.num_machines=2"], ["runtime.main_process_ip", "the address of the one with rank 0"]),
        (["runtime.num_machines=2", "runtime.main_process_ip=a"],
         ["hydra.run.dir", "one folder that all of them reach"]),
        (["deepspeed=zero3", "adapter=dora"], ["adapter.use_dora = true", "whole matrices", "deepspeed=zero2"]),
        (["deepspeed=zero3", "adapter=lora", "adapter.init_lora_weights=pissa"],
         ["adapter.init_lora_weights = pissa", "whole matrices"]),
        (["deepspeed=zero2", "training.mixed_precision=fp16"], ["training.mixed_precision = fp16", "bf16"]),
        (["runtime.num_processes=0"], ["runtime.num_processes = 0", "at least 1"]),
        (["runtime.main_process_port=70000"], ["runtime.main_process_port = 70000", "from 1 to 65535"]),
        (["deepspeed=zero4"], ["deepspeed = zero4", "zero3"]),
        (["deepspeed=zero2", "+deepspeed.zero_optimization.reduce_bucket=1"],
         ["deepspeed.zero_optimization.reduce_bucket = 1", "did you mean reduce_bucket_size?"]),
        (["deepspeed=zero2", "deepspeed.zero_optimization.stage=0"],
         ["deepspeed.zero_optimization.stage = 0", "1, 2 or 3", "deepspeed=none"]),
        (["deepspeed=zero3", "deepspeed.zero_optimization.stage3_gather_16bit_weights_on_model_save=false"],
         ["stage3_gather_16bit_weights_on_model_save = false", "must be true"]),
        (["deepspeed=zero1", "deepspeed.train_batch_size=7"],
         ["deepspeed.train_batch_size = 7", "rows x ", "processes says", "auto, or the same"]),
        (["deepspeed=zero1", "deepspeed.train_micro_batch_size_per_gpu=999"],
         ["deepspeed.train_micro_batch_size_per_gpu = 999", "training.per_device_train_batch_size says"]),
        (["deepspeed=zero1", "deepspeed.gradient_accumulation_steps=999"],
         ["deepspeed.gradient_accumulation_steps = 999", "training.gradient_accumulation_steps says"]),
        (["deepspeed=zero1", "deepspeed.gradient_clipping=999"],
         ["deepspeed.gradient_clipping = 999", "training.max_grad_norm says"]),
        (["deepspeed=zero1", "deepspeed.bf16.enabled=true"],
         ["deepspeed.bf16.enabled = true", "training.mixed_precision = no: auto, or false"]),
        (["deepspeed=zero1", "deepspeed.fp16.enabled=true"],
         ["deepspeed.fp16.enabled = true", "training.mixed_precision = no: auto, or false"]),
        (["deepspeed=zero2", "optimizer=adafactor"], ["optimizer.type = adafactor", "adamw and sgd"]),
        (["deepspeed=zero3", "model=qwen3_0_6b", "adapter=qlora", "quantization=nf4"],
         ["quantization", "deepspeed=zero2"]),
    ],
)  # fmt: skip
def test_what_could_not_be_shared_out_is_refused(overrides: list[str], told: list[str]) -> None:
    message = refusal(*overrides)
    for words in told:
        assert words in message


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        admit(overrides)
    return str(caught.value)


def test_offload_needs_a_compiler_and_adamw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        rules.deepspeed.shutil, "which", lambda tool, **_: None if tool == "ninja" else f"/usr/bin/{tool}"
    )
    message = refusal(*OFFLOAD)
    assert "deepspeed.zero_optimization.offload_optimizer" in message
    assert "and ninja can't be found here" in message
    assert "g++" not in message
    monkeypatch.setattr(rules.deepspeed.shutil, "which", lambda tool, **_: f"/usr/bin/{tool}")
    admitted(*OFFLOAD)
    assert "offloaded updates are AdamW's" in refusal(*OFFLOAD, "optimizer=sgd")


def test_what_is_auto_or_the_same_is_admitted() -> None:
    same = ("training.per_device_train_batch_size=3", "training.gradient_accumulation_steps=2", *TWO[:1])
    given = ("deepspeed.train_batch_size=12", "deepspeed.train_micro_batch_size_per_gpu=3")
    given += ("deepspeed.gradient_accumulation_steps=2", "deepspeed.bf16.enabled=false")
    admitted("deepspeed=zero2", *same, *given)
