"""Files of a run's folder that are damaged: told by name, nothing lost on their word, nothing garbage trained on."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from src.checkpoint.exported import check_exported
from src.checkpoint.manifest import problems_of
from src.cli.exits import guarded_run as guarded
from src.config.frozen import config_hash, is_finished, read_config, read_status
from src.config.gate import admit, admit_finished
from src.config.kept import keep_options, kept_roots
from src.config.trust import is_signed, signature
from src.errors import ConfigError, DamagedFileError
from src.records import Digest, begins_with, read_json, read_lines, read_yaml
from src.sweep.plan import Plan
from src.tracking.lock import LOCK
from src.tracking.run_folder import RunFolder
from src.tracking.step_logs import read_step_log
from src.trials.folder import SweepFolder
from src.trials.trial import trial_of
from tests.conftest import ROWS, admitted, towline, unprivileged
from tests.conftest import read_lines as lines_of
from tests.sweeps import planned
from tests.test_resume import Fate, Killed, start

RUN = (
    *("tracking=none", "data.limit=40", "training.max_train_steps=9", "training.per_device_train_batch_size=4"),
    *("training.logging_steps=1", "evaluation.eval_steps=2", "evaluation.max_samples=8", "evaluation.metrics=[]"),
    *("evaluation.sample_steps=3", "evaluation.sample_prompts=1", "generation.max_new_tokens=2"),
    *("checkpoint.checkpointing_steps=3", "checkpoint.load_best_model_at_end=true", "scheduler=constant"),
    "optimizer.lr=1.0",  # the first evaluation is the best
)
NUM_CHECKS = 16
"""How often the run has asked whether it should stop when it dies behind step 7."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    done = towline(*RUN, f"hydra.run.dir={folder}")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def killed(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the same run as a kill behind step 7 leaves it: saved at 3 and 6, best at 2."""
    folder = tmp_path_factory.mktemp("killed") / "run"
    with pytest.raises(Killed):
        start(folder, *RUN, fate=Fate(NUM_CHECKS, dead=True))
    assert lines_of(folder / "metrics.jsonl")[-1]["step"] == 7
    assert saved(folder) == [2, 3, 6]
    return folder


@pytest.fixture
def run(killed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(killed, tmp_path / "run"))


def saved(folder: Path) -> list[int]:
    places = sorted((folder / "checkpoints").glob("step-*"))
    assert not [problem for place in places for problem in problems_of(place)]
    return [int(place.name[5:]) for place in places]


def go_on(folder: Path, *overrides: str) -> Any:
    return towline(*RUN, f"hydra.run.dir={folder}", *overrides)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and file.name != LOCK
    }


def numbers(folder: Path) -> dict[str, Any]:
    summary = json.loads((folder / "summary.json").read_text())
    unequal = ("perf/", "train_seconds", "tokens_per_second", "peak_memory")
    return {name: value for name, value in summary.items() if not name.startswith(unequal)}


def test_a_damaged_line_of_metrics_is_told_and_the_best_weights_live(run: Path) -> None:
    file = run / "metrics.jsonl"
    file.write_bytes(file.read_bytes()[:3] + b"\0" + file.read_bytes()[4:])
    before = contents(run)
    done = go_on(run)
    assert done.returncode == 2
    assert f"{file} is damaged: line 1" in done.stderr
    assert "sed -i '1d'" in done.stderr
    assert "Traceback" not in done.stderr
    assert contents(run) == before


def test_what_was_told_to_repair_it_repairs_it_and_the_best_weights_are_still_known(run: Path) -> None:
    file = run / "metrics.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[3:]))  # the best evaluation is gone
    refused = go_on(run)
    assert refused.returncode == 2
    assert "checkpoint.allow_changed=true" in refused.stderr
    assert saved(run) == [2, 3, 6]
    done = go_on(run, "checkpoint.allow_changed=true")
    assert done.returncode == 0, done.stderr
    assert "does not begin with" in done.stderr
    assert 2 in saved(run)
    test = [line for line in lines_of(run / "metrics.jsonl") if "eval/test/loss" in line]
    assert test[0]["step"] == 9


LINES = (
    *("[]", "{}", '{"step": "3"}', '{"step": 1}'),
    *('{"step": 3, "train/loss": "NaN"}', '{"step": 3, "train/loss": NaN}'),
)


@pytest.mark.parametrize("line", LINES)
def test_a_line_that_is_none_of_metrics_is_told(tmp_path: Path, line: str) -> None:
    whole = [json.dumps({"step": step, "train/loss": 0.5}) + "\n" for step in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(whole) + line + '\n{"step": 4}\n{"step": 5, "tr')
    with pytest.raises(DamagedFileError, match="line 3"):
        read_step_log(tmp_path, "metrics.jsonl")
    (tmp_path / "metrics.jsonl").write_text("".join(whole) + '{"step": 4}\n' + line)  # torn: it has no end
    assert [one.content["step"] for one in read_step_log(tmp_path, "metrics.jsonl")] == [1, 2, 4]


def test_a_changed_digit_in_a_journal_is_noticed(run: Path) -> None:
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    number = json.loads(lines[1])["eval/validation/loss"]
    file.write_text("".join(lines).replace(repr(number), repr(number + 1)))
    done = go_on(run)
    assert (done.returncode, "metrics.jsonl is damaged" in done.stderr) == (2, True)
    assert saved(run) == [2, 3, 6]


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i + 1}: &a{i + 1} [*a{i}, *a{i}, *a{i}]\n" for i in range(60))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("status.json", "[]"),
        ("status.json", '{"state": "FINISHED"}'),
        ("status.json", '{"state": "DONE", "step": 3}'),
        ("status.json", "[" * 100_000),
        ("config.yaml", "a: &a [*a]"),
        ("config.yaml", BOMB),
        ("config.yaml", "1: x"),
        ("config.yaml", "runtime: !!bool abc"),
        ("starts.jsonl", "{}\n"),
        ("samples.jsonl", '{"step": 3}\n'),
        ("samples.jsonl", None),
        ("metrics.jsonl", None),
        ("status.json", None),
        ("starts.jsonl", None),
        ("config.yaml", None),
    ],
)
def test_every_file_that_is_read_back_is_told_by_name(run: Path, name: str, damage: str | None) -> None:
    (run / name).unlink()
    if damage is None:
        (run / name).mkdir()
    else:
        (run / name).write_text(damage)
    before = contents(run)
    done = go_on(run)
    assert (done.returncode, name in done.stderr) == (2, True), done.stderr
    assert "Traceback" not in done.stderr
    assert contents(run) == before


DIGEST = {"num_bytes": 3, "xxh3_128": "0"}
SHAPES: tuple[dict[str, Any], ...] = (
    *({"journal": value} for value in (3, "x", [], {"metrics.jsonl": 3}, {"metrics.jsonl": None})),
    *({"journal": {"metrics.jsonl": DIGEST | one}} for one in ({"num_bytes": "3"}, {"num_bytes": -1}, {"x": 1})),
    *({"model": value} for value in (3, {"model.safetensors": []}, {"model.safetensors": {"num_bytes": 3}})),
    *({key: 5} for key in ("cause", "how_to_go_on", "started", "ended", "updated", "tracker_run_id")),
    *({key: "5"} for key in ("num_steps", "steps_per_epoch", "pid", "step")),
    *({key: []} for key in ("state", "num_steps", "cause")),
)


@pytest.mark.parametrize("change", SHAPES, ids=str)
def test_every_value_of_a_status_is_held_against_its_shape(tmp_path: Path, change: dict[str, Any]) -> None:
    whole = {
        "state": "FAILED",
        "step": 8,
        "cause": "x",
        "how_to_go_on": None,
        "started": "2026-01-01T00:00:00+00:00",
        "ended": "2026-01-01T00:01:00+00:00",
        "pid": 1,
        "num_steps": 9,
        "steps_per_epoch": None,
        "journal": {"metrics.jsonl": DIGEST},
        "model": None,
    }
    (tmp_path / "status.json").write_text(json.dumps(whole))
    assert read_status(tmp_path) == whole
    (tmp_path / "status.json").write_text(json.dumps(whole | change))
    with pytest.raises(DamagedFileError, match=rf"status\.json is damaged: .*{next(iter(change))}.*Move it away"):
        read_status(tmp_path)


@pytest.mark.parametrize("change", SHAPES[:4:3], ids=str)
def test_a_status_of_another_shape_ends_no_command_with_a_traceback(run: Path, change: dict[str, Any]) -> None:
    file = run / "status.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    before = contents(run)
    done = go_on(run)
    assert (done.returncode, f"{file} is damaged: journal" in done.stderr) == (2, True)
    assert "Traceback" not in done.stderr
    assert contents(run) == before


@pytest.mark.parametrize("more", [(), ("training.max_train_steps=12",)])
def test_another_runs_word_that_it_is_finished_is_not_taken(
    run: Path, finished: Path, more: tuple[str, ...], sweep: SweepFolder
) -> None:
    shutil.copy(finished / "status.json", run / "status.json")
    before = contents(run)
    done = go_on(run, *more)
    assert (done.returncode, f"{run / 'status.json'} is damaged: it says FINISHED" in done.stderr) == (2, True)
    assert contents(run) == before
    shutil.copytree(run, sweep.run_dir(0))
    shutil.copy(finished / "summary.json", sweep.run_dir(0))
    status = sweep.status(0, ("eval/validation/loss",))
    assert (status.state, status.values, "metrics.jsonl" in status.cause) == ("FAILED", (), True)
    (run / "status.json").unlink()  # as it was told
    assert go_on(run).returncode == 0
    assert numbers(run) == numbers(finished)
    assert is_finished(run)
    (run / "metrics.jsonl").unlink()
    with pytest.raises(DamagedFileError, match=r"metrics\.jsonl does not begin with"):
        is_finished(run)


def test_a_pipe_in_a_files_place_is_not_waited_for(run: Path) -> None:
    for name in ("status.json", "lock"):
        kept = (run / name).read_bytes()
        (run / name).unlink()
        os.mkfifo(run / name)
        done = go_on(run)
        assert (done.returncode, name in done.stderr) == (2, True), done.stderr
        (run / name).unlink()
        (run / name).write_bytes(kept)


@pytest.mark.parametrize("name", ["status.json", "config.yaml", "tracking.json", "data_report.json", "provenance.json"])
def test_a_run_goes_on_without_a_file_that_it_can_do_without(run: Path, finished: Path, name: str) -> None:
    (run / name).unlink(missing_ok=True)
    done = go_on(run)
    assert done.returncode == 0, done.stderr
    assert (run / "model" / "model.safetensors").read_bytes() == (finished / "model" / "model.safetensors").read_bytes()
    assert numbers(run) == numbers(finished)


def test_a_configuration_that_was_changed_by_hand_is_not_repeated(finished: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished, tmp_path / "run")
    file = folder / "config.yaml"
    file.write_text(file.read_text().replace("lr: 1.0", "lr: 2.0"))
    done = towline(f"rerun={folder}")
    assert (done.returncode, "config.yaml is damaged" in done.stderr) == (2, True)
    assert "command line" in done.stderr


def test_the_configuration_of_a_folder_is_the_one_that_its_start_wrote_down(finished: Path) -> None:
    (start,) = lines_of(finished / "starts.jsonl")
    assert config_hash(read_config(finished)) == start["config_hash"]


def test_yaml_that_multiplies_or_holds_itself_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("a: &a [1, 2]\nb: *a\n")
    assert read_yaml(file) == {"a": [1, 2], "b": [1, 2]}
    for text, reason in (
        ("a: &a {b: *a}", "holds itself"),
        ("a: " + "[" * 200 + "]" * 200, "nested"),
        ("- 1", "no mapping"),
        ("a: [", "line 1"),
        ("a: !!python/object/apply:os.system [ls]", "line 1"),
        *(
            (f"x: 1\n{key}: b", "line 2: a key that is no text")
            for key in ("? [a]\n", "1", "2020-01-01", "null", "true")
        ),
        ("a: {b: 1, 2: 3}", "line 1: a key that is no text"),
        ("a: &x {b: 1}\nc: {<<: *x}", "line 2: a key that is no text"),
        *(
            (f"x: 1\na: !!{kind} abc", f"line 2: .abc. can't be of the kind {kind}")
            for kind in ("bool", "int", "float")
        ),
        *((f"x: 1\na: !!{kind} abc", f"line 2: .abc. can't be of the kind {kind}") for kind in ("timestamp", "binary")),
        ("a: 2020-01-01", "line 1: .2020-01-01. can't be of the kind timestamp"),
        *(
            (f"a: !!{kind} [b: 1]", f"line 1: .*can't be of the kind {kind}")
            for kind in ("omap", "pairs", "str", "map")
        ),
        ("a: !!set {b, c}", "line 1: .*can't be of the kind set"),
        ("!!set {b}", "line 1: .*can't be of the kind set"),
        ("a: !mine b", "line 1: .b. can't be of the kind !mine"),
        (f"a: !!int {'9' * 5000}", "line 1: .9999.*can't be of the kind int"),
    ):
        file.write_text(text)
        with pytest.raises(DamagedFileError, match=reason):
            read_yaml(file)


def test_json_is_held_against_the_types_of_its_keys(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    with pytest.raises(FileNotFoundError):
        read_json(file)
    file.symlink_to(tmp_path / "nowhere")
    with pytest.raises(DamagedFileError, match="a dangling link"):
        read_json(file)
    file.unlink()
    for text, reason in (
        ("{", "no JSON"),
        ("3", "no JSON object but 3"),
        ("{}", "a is missing"),
        ('{"a": true}', "a can't be true"),
        ('{"a": "1"}', 'a can\'t be "1"'),
        ('{"a": Infinity}', "Infinity is no number"),
        ("[" * 5000, "nested"),
        ('{"a": 1, "b": ' + "[" * 200 + "]" * 200 + "}", "nested"),
    ):
        file.write_text(text)
        with pytest.raises(DamagedFileError, match=reason):
            read_json(file, {"a": int})
    file.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(DamagedFileError, match="no text: byte 7 is 0xff"):
        read_json(file)
    file.write_text('{"a": 1}')
    assert read_json(file, {"a": int, "b": str}, optional=("b",)) == {"a": 1}


def test_a_digest_is_of_a_beginning(tmp_path: Path) -> None:
    digest = Digest(b"one\n")
    digest.add(b"two\n")
    assert begins_with(b"one\ntwo\nthree\n", digest.as_dict())
    assert not begins_with(b"one\n", digest.as_dict())
    assert not begins_with(b"one\ntwO\nthree\n", digest.as_dict())
    assert read_lines(tmp_path / "none.jsonl") == []


def test_best_weights_that_are_lost_are_told_before_another_model_is_exported(run: Path) -> None:
    weights = run / "checkpoints" / "step-00000002" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    done = go_on(run)
    assert (done.returncode, "step-00000002 is damaged: model.safetensors has" in done.stderr) == (2, True)
    assert "checkpoint.allow_changed=true" in done.stderr
    done = go_on(run, "checkpoint.allow_changed=true")
    assert (done.returncode, "the weights of step 2" in done.stderr) == (0, True)


@pytest.mark.parametrize("more", [(), ("checkpoint.allow_changed=true",)])
def test_checkpoints_that_cannot_be_looked_into_are_not_taken_for_none(run: Path, more: tuple[str, ...]) -> None:
    same = (f"data.cache_dir={ROWS}", *more)  # the run could begin again
    away = (run / "checkpoints").rename(run.with_name("away"))
    (run / "checkpoints").symlink_to("nowhere")
    before = contents(run)
    for arguments in ((*RUN, f"hydra.run.dir={run}", *same), (f"rerun={run}", f"hydra.run.dir={run}", *more)):
        done = towline(*arguments)
        assert (done.returncode, "Traceback" in done.stderr) == (2, False)
        assert f"{run / 'checkpoints'} can't be looked into: a dangling link" in done.stderr
        assert contents(run) == before
    (run / "checkpoints").unlink()
    away.rename(run / "checkpoints")
    assert go_on(run, *same).returncode == 0


def test_checkpoints_that_may_not_be_read_are_not_taken_for_none(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(run)
    for place in ("checkpoints", "checkpoints/step-00000006", "checkpoints/step-00000002/model.safetensors"):
        mode = (run / place).stat().st_mode
        (run / place).chmod(0)
        with unprivileged():
            assert guarded(admitted(f"hydra.run.dir={run}", *RUN), Fate()) == 2
        (run / place).chmod(mode)
        said = capsys.readouterr().err
        assert str(run / place).removesuffix("/model.safetensors") in said
        assert "Permission denied" in said
        assert contents(run) == before


def test_what_was_logged_of_a_run_without_checkpoints_is_not_dropped_without_a_word(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    done = go_on(run, f"data.cache_dir={ROWS}")
    assert done.returncode == 0, done.stderr
    assert "the run begins again: what was logged up to step 7 is removed" in done.stderr


def test_another_runs_best_weights_are_not_exported(run: Path, finished: Path, tmp_path: Path) -> None:
    other, best = tmp_path / "other", "checkpoints/step-00000002"
    with pytest.raises(Killed):
        start(other, *RUN, "seed=7", fate=Fate(NUM_CHECKS, dead=True))
    own = (run / best).rename(tmp_path / "own")
    shutil.copytree(other / best, run / best)
    before = contents(run)
    done = go_on(run)
    assert (done.returncode, "step-00000002" in done.stderr, "another run's" in done.stderr) == (2, True, True)
    assert contents(run) == before
    shutil.rmtree(run / best)
    own.rename(run / best)
    assert go_on(run).returncode == 0
    assert numbers(run) == numbers(finished)


@pytest.mark.parametrize("kind", ["file", "dangling"])
def test_what_is_no_folder_in_the_models_place_is_told_before_it_is_trained(run: Path, kind: str) -> None:
    (run / "model").write_text("mine") if kind == "file" else (run / "model").symlink_to("nowhere")
    before = contents(run)
    done = go_on(run)
    assert (done.returncode, f"{run / 'model'} is damaged: it is no folder" in done.stderr) == (2, True)
    assert contents(run) == before


def test_a_model_that_lies_elsewhere_is_replaced_and_stays_there(run: Path, finished: Path, tmp_path: Path) -> None:
    elsewhere = Path(shutil.copytree(finished / "model", tmp_path / "elsewhere"))
    (elsewhere / "mine.txt").write_text("mine")
    (run / "model").symlink_to(elsewhere)
    for name in (".model.gone", ".model.part"):
        (run / name).write_text("left")
    before = contents(elsewhere)
    done = go_on(run)
    assert done.returncode == 0, done.stderr
    assert contents(elsewhere) == before
    assert contents(run / "model").keys() == contents(finished / "model").keys()
    assert not list(run.glob(".model*"))


def test_a_checkpoint_of_other_kinds_of_files_is_passed_over(run: Path, finished: Path) -> None:
    manifest = run / "checkpoints" / "step-00000006" / "manifest.json"
    manifest.unlink()
    manifest.symlink_to("nowhere")
    os.mkfifo(run / "checkpoints" / "step-00000003" / "fifo")
    done = go_on(run)
    assert (done.returncode, "passed over" in done.stderr) == (0, True), done.stderr
    assert numbers(run) == numbers(finished)
    for name in ("manifest.json", "model.safetensors"):
        file = run / "checkpoints" / "step-00000009" / name
        content = file.read_bytes()
        file.unlink()
        os.mkfifo(file)
        assert list(problems_of(file.parent))
        file.unlink()
        file.write_bytes(content)


def test_lines_of_a_step_that_may_be_done_again_are_not_counted_on(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "hash")
    folder.cut("samples.jsonl", 0)
    sizes = []
    for step in (1, 3, 3):
        folder.append("samples.jsonl", {"step": step, "prompt": "", "text": ""})
        sizes.append((tmp_path / "samples.jsonl").stat().st_size)
    counted = [folder.journal_before(step)["samples.jsonl"]["num_bytes"] for step in (3, 4)]
    assert counted == [sizes[0], sizes[2]]
    folder.cut("samples.jsonl", 3)
    assert [folder.journal_before(step)["samples.jsonl"]["num_bytes"] for step in (3, 4)] == counted


TRUSTING: dict[str, Any] = {
    "model": {"checkpoint": "x", "revision": None, "trust_remote_code": True, "use_safetensors": True}
}


def test_code_of_a_checkpoint_runs_on_this_users_word_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    here, there = tmp_path / "here", tmp_path / "there"
    signed = signature(here, TRUSTING)
    key = tmp_path / "state" / "towline" / "key"
    assert key.stat().st_mode & 0o777 == 0o600
    assert is_signed(here, TRUSTING, [None, signed])
    assert not is_signed(there, TRUSTING, [signed])
    other = {"model": TRUSTING["model"] | {"checkpoint": "y"}}
    assert not is_signed(here, other, [signed])
    key.write_bytes(bytes(32))
    assert not is_signed(here, TRUSTING, [signed])
    harmless = {"model": TRUSTING["model"] | {"trust_remote_code": False}}
    assert signature(here, harmless) is None


def keep(plan: Plan) -> None:
    """Leave a sweep's folder as its first start does."""
    record = SweepFolder(plan.folder)
    keep_options(record.conf, plan.line.roots)
    texts = dict.fromkeys(("name", "state", "started", "updated"), "x") | {"id": plan.line.sweep_id}
    mappings: dict[str, Any] = {key: {} for key in ("space", "sweep", "counts")}
    record.write(texts | mappings | {"history": [], "elapsed_seconds": 0, "signatures": plan.signatures})


def test_a_sweeps_folder_from_elsewhere_switches_nothing_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    folder, own = tmp_path / "sweep", tmp_path / "own"
    command = ("seed=1", f"hydra.sweep.dir={folder}")
    plan = planned(*command)
    keep(plan)
    (folder / "conf" / "manifest.json").unlink()  # whoever changes the one changes the other
    option = folder / "conf" / "0" / "model" / "causal_lm.yaml"
    text = option.read_text().replace("trust_remote_code: false", "trust_remote_code: true")
    option.write_text(text)
    with pytest.raises(ConfigError, match=r"model\.trust_remote_code.*not started here by you") as caught:
        planned(*command)
    assert "say so yourself: model.trust_remote_code=true" in str(caught.value)
    (own / "model").mkdir(parents=True)
    (own / "model" / "mine.yaml").write_text("defaults:\n  - tiny_llama\ntrust_remote_code: true\n")
    command = ("seed=1", "model=mine", f"hydra.sweep.dir={tmp_path / 'mine'}", "--config-dir", str(own))
    plan = planned(*command)  # this user's own options are this user's word, and stay it when the sweep is repeated
    keep(plan)
    assert len(plan.signatures) == 1
    assert planned(*command).is_repeated
    key = tmp_path / "state" / "towline" / "key"
    key.write_bytes(bytes(32))
    with pytest.raises(ConfigError, match=r"model\.trust_remote_code"):
        planned(*command)


@pytest.mark.parametrize("command", ["src.run", "src.predict"])
def test_a_folder_from_elsewhere_switches_nothing_on(
    finished: Path, tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    text = (folder / "config.yaml").read_text().replace("trust_remote_code: false", "trust_remote_code: true")
    (folder / "config.yaml").write_text(text)
    (start,) = lines_of(folder / "starts.jsonl")
    start["config_hash"] = config_hash(yaml.safe_load(text))
    (folder / "starts.jsonl").write_text(json.dumps(start) + "\n")
    ask: Callable[..., Any] = admit if command == "src.run" else partial(admit_finished, entry="predict")
    given = [f"rerun={folder}"] if command == "src.run" else [f"run={folder}"]
    with pytest.raises(ConfigError, match=r"model\.trust_remote_code=true"):
        ask(given)
    assert ask([*given, "model.trust_remote_code=true"])
    start["signature"] = signature(folder, yaml.safe_load(text))
    (folder / "starts.jsonl").write_text(json.dumps(start) + "\n")
    assert ask(given)


class Meanwhile(Fate):
    """Does something to the run when it first asks whether to stop in training."""

    def __init__(self, do: Callable[[], object]) -> None:
        super().__init__()
        self.do = do

    def check(self) -> None:
        super().check()
        if self.seen == 12:
            self.do()


def ends_with(folder: Path, do: Callable[[], object], capsys: pytest.CaptureFixture[str], code: int = 1) -> str:
    """Run, do something to it meanwhile, and return what it said at last."""
    assert guarded(admitted(f"hydra.run.dir={folder}", *RUN), Meanwhile(do)) == code
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


def test_a_folder_that_is_moved_away_ends_the_run_and_is_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, moved = tmp_path / "run", tmp_path / "moved"
    said = ends_with(folder, lambda: folder.rename(moved), capsys)
    assert f"{folder} is not there any more" in said
    assert not folder.exists()
    assert 3 in saved(moved)
    assert go_on(moved).returncode == 0


CHANGES: dict[str, Callable[[Path], object]] = {
    "removed": Path.unlink,
    "emptied": lambda file: file.write_bytes(b""),
    "added to": lambda file: file.write_bytes(file.read_bytes() + b"{}\n"),
    "a byte": lambda file: file.write_bytes(file.read_bytes()[:-3] + bytes([file.read_bytes()[-3] ^ 1]) + b"}\n"),
}


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_journal_that_is_changed_while_the_run_goes_on_ends_it_by_name(
    tmp_path: Path, finished: Path, name: str, change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    kept: list[bytes] = []

    def do() -> None:
        kept.append((folder / name).read_bytes())
        CHANGES[change](folder / name)

    said = ends_with(folder, do, capsys, 2)
    assert f"{folder / name} is damaged" in said
    assert "while the run was training" in said
    assert json.loads((folder / "status.json").read_text())["state"] == "FAILED"
    done = go_on(folder)
    assert (done.returncode, f"{folder / name} is damaged" in done.stderr) == (2, True)
    if (name, change) == ("samples.jsonl", "removed"):  # of the other file its lines since then are lost
        (folder / name).write_bytes(kept[0])
        assert go_on(folder).returncode == 0
        assert numbers(folder) == numbers(finished)
    elif change in ("removed", "emptied"):
        assert go_on(folder, "checkpoint.allow_changed=true").returncode == 0


@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS, errno.EFBIG])
def test_an_error_of_the_system_says_what_is_safe_and_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], number: int, finished: Path
) -> None:
    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patched:

        def refuse(*_: Any) -> None:
            raise OSError(number, os.strerror(number))

        said = ends_with(folder, lambda: patched.setattr(os, "replace", refuse), capsys)
    assert os.strerror(number) in said
    assert re.search(rf"Step [36] is saved: make resume run={folder}", said)
    assert go_on(folder).returncode == 0
    assert numbers(folder) == numbers(finished)


def test_a_finished_run_where_nothing_may_be_written_is_left_as_it_is(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda place, mode: not mode & os.W_OK)
    assert guarded(admitted(f"hydra.run.dir={finished}", *RUN), Fate()) == 0
    with pytest.raises(ConfigError, match="no permission"):
        admitted(f"hydra.run.dir={finished}", *RUN, "force=true")


@pytest.fixture
def sweep(tmp_path: Path) -> SweepFolder:
    """Return the folder of a sweep of two trials."""
    record = SweepFolder(tmp_path / "sweep")
    record.folder.mkdir()
    frozen = admitted("data.limit=8").frozen
    trials = [trial_of(n, n, (f"seed={n}",), frozen | {"seed": n}, "setting") for n in (0, 1)]
    record.write_trials(trials)
    content = dict.fromkeys(("name", "id", "state", "started", "updated"), "x")
    history = [{"trial": 0, "value": 1.0, "best": 1.0, "elapsed_seconds": 0.1}]
    more = {"space": {}, "sweep": {}, "counts": {}, "history": history, "elapsed_seconds": 1.0}
    record.write(content | more)
    assert record.read()["history"] == history
    assert record.trials() == trials
    return record


def test_options_of_a_sweep_that_cannot_be_looked_into_are_not_taken_for_none(sweep: SweepFolder) -> None:
    assert kept_roots(sweep.conf) == []
    (sweep.folder / "conf").symlink_to("nowhere")
    with pytest.raises(DamagedFileError, match="conf is damaged: it can't be looked into: a dangling link"):
        kept_roots(sweep.conf)
    (sweep.folder / "conf").unlink()
    (sweep.folder / "conf" / "0").mkdir(parents=True)
    (sweep.folder / "conf" / "notes").mkdir()
    assert kept_roots(sweep.conf) == [(sweep.folder / "conf" / "0").resolve()]


def test_a_model_that_may_not_be_read_is_told_by_name(finished: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    check_exported(folder)
    (folder / "model" / "config.json").chmod(0)
    with (
        unprivileged(),
        pytest.raises(DamagedFileError, match=r"config\.json is damaged: it can't be read: Permission"),
    ):
        check_exported(folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"history": [3]}', "{\x00}"])
def test_a_sweeps_file_is_told_by_name(sweep: SweepFolder, text: str) -> None:
    file = sweep.folder / "sweep.json"
    file.write_text(text)
    with pytest.raises(DamagedFileError, match=r"sweep\.json is damaged.*force=true"):
        sweep.read()
    assert file.read_text() == text


@pytest.mark.parametrize(
    ("before", "after"), [("1.0", "7.0"), ('"seed": 1', '"seed": 2'), ('"config"', '"konfig"'), ("{", "[")]
)
def test_a_trial_whose_configuration_changed_is_not_trained(sweep: SweepFolder, before: str, after: str) -> None:
    file = sweep.folder / "trials.jsonl"
    first, second = file.read_text().splitlines(keepends=True)
    assert before in second
    file.write_text(first + second.replace(before, after))
    with pytest.raises(DamagedFileError, match=r"trials\.jsonl is damaged: line 2"):
        sweep.trials()
    file.write_text(first + second[:-9])  # torn
    assert [trial.number for trial in sweep.trials()] == [0]


def test_a_trial_with_damaged_files_has_failed_by_name(sweep: SweepFolder) -> None:
    folder = sweep.run_dir(0)
    folder.mkdir()
    (folder / "status.json").write_text("{")
    status = sweep.status(0, ("eval/validation/loss",))
    assert (status.state, "status.json is damaged" in status.cause) == ("FAILED", True)
    (folder / "status.json").write_text('{"state": "FINISHED", "step": 3}')
    (folder / "summary.json").write_text("[1]")
    status = sweep.status(0, ("eval/validation/loss",))
    assert (status.state, "summary.json is damaged" in status.cause) == ("FAILED", True)
