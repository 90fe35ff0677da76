"""Tasks of lm-evaluation-harness: what is asked is what training saw, and what is scored is the answer alone."""

from __future__ import annotations

import importlib.util
import json
import math
import multiprocessing
import os
import re
import shlex
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from src import benchmark
from src.cli.start import run_job as train
from src.config.schema import ThoughtMode
from src.data.answers import AnswerFrame, strip_thoughts
from src.data.dataset import build_prompts, is_chat
from src.data.tokenizer import load_tokenizer
from src.errors import DataError
from src.evaluation.answers import AnswerReader
from src.harness.settings import generation_settings
from src.model.build import build_model, set_generation
from src.progress import NO_PROGRESS
from src.runtime.session import Runtime
from src.runtime.signals import StopRequest
from tests.conftest import ROOT, admitted, read_lines, write_lines

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="lm-evaluation-harness is not installed: pip install '.[benchmark]'",
)
TAGS = ("<ToW>", "</ToW>")
ROWS = [
    {"prompt": f"{'ab' * (i % 3)}{i % 8}=", "completion": f"{i % 8}<ToW>x{i % 8}</ToW>{'yz'[i % 2] * (1 + i % 4)}"}
    for i in range(96)
]
"""Answers with a thought in the middle."""
TASK = yaml.safe_load((ROOT / "data" / "tow_addition" / "tasks" / "tow_addition.yaml").read_text())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run that is finished and knows some of the answers."""
    base = tmp_path_factory.mktemp("benchmark")
    train_file, test_file = write_lines(base / "train.jsonl", ROWS), write_lines(base / "test.jsonl", ROWS[:40])
    before = os.getcwd()
    os.chdir(ROOT)
    try:
        train(
            admitted(f"data.train_files=['{train_file}']", "data.validation_files=null",
                     f"data.test_files=['{test_file}']", "training.per_device_train_batch_size=16",
                     "training.max_train_steps=36", "evaluation.eval_steps=null", "evaluation.sample_prompts=0",
                     "generation.max_new_tokens=14", "training.per_device_eval_batch_size=5",
                     f"hydra.run.dir={base / 'run'}"),
            StopRequest(),
        )  # fmt: skip
    finally:
        os.chdir(before)
    return base / "run"


@pytest.fixture(scope="module")
def tasks(run: Path) -> Path:
    """A folder of tasks: one that generates, of the run's test file, one that chooses, one that scores whole texts."""
    folder = run.parent / "tasks"
    folder.mkdir()
    test = str(run.parent / "test.jsonl")
    letters = [
        {"question": row["prompt"], "choices": ["yy", "z", "0x"], "label": i % 3} for i, row in enumerate(ROWS[:6])
    ]
    choices, text = (
        write_lines(run.parent / "choices.jsonl", letters),
        {"doc_to_text": "", "doc_to_target": "{{prompt}}!"},
    )

    def write(name: str, file: str, **settings: Any) -> None:
        common = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": file}}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(TASK | common | settings))

    metric = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
    write("sums", test)
    write("again", test, generation_kwargs={"until": ["y", "z"], "max_gen_toks": 3}, doc_to_target="{{prompt[-2]}}")
    choosing = {"output_type": "multiple_choice", "doc_to_text": "question", "doc_to_target": "label"}
    write("chosen", choices, **choosing, doc_to_choice="choices", metric_list=metric, generation_kwargs=None)
    perplexity = [{"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}]
    write("texts", test, **text, output_type="loglikelihood_rolling", metric_list=perplexity, generation_kwargs=None)
    return folder


Command = Callable[..., str]


@pytest.fixture
def said(run: Path, tasks: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run the command in this process; return what it printed."""

    def command(names: str, *overrides: str, code: int = 0) -> str:
        given = [f"run={run}", f"benchmark.tasks=[{names}]", f"benchmark.task_dir={tasks}", *overrides]
        assert benchmark.main(given) == code
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        return printed.err if code else printed.out + printed.err

    return command


@needs_harness
def test_a_task_of_the_test_file_scores_what_the_run_scored(said: Command, run: Path) -> None:
    expected = json.loads((run / "summary.json").read_text())["eval/test/exact_match"]
    assert 0.1 < expected < 0.99  # else nothing is compared
    assert "no chat template" in said("sums")
    result = json.loads((run / "benchmarks" / "sums.json").read_text())
    assert result["metrics"]["exact_match"]["value"] == expected
    error = math.sqrt(expected * (1 - expected) / (40 - 1))
    assert result["metrics"]["exact_match"]["stderr"] == pytest.approx(error)
    assert (result["num_samples"], result["version"], result["lm_eval"]) == (40, 1.0, "0.4.13")
    assert re.fullmatch("[0-9a-f]{64}", result["task_hash"])
    summary = json.loads((run / "summary.json").read_text())
    assert summary["benchmark/sums/exact_match"] == expected
    assert summary["benchmark/sums/exact_match_stderr"] == pytest.approx(error)
    assert summary["eval/test/exact_match"] == expected
    samples = read_lines(run / "benchmarks" / "sums.jsonl")
    hits = [
        sample["resps"][0][0] == strip_thoughts(row["completion"], TAGS)
        for sample, row in zip(samples, ROWS, strict=False)
    ]
    assert sum(hits) / 40 == expected
    with_thoughts = [sample for sample in samples if re.search("[0-7]<ToW>.*</ToW>[yz]", sample["generated"][0])]
    assert with_thoughts
    for sample in with_thoughts:
        assert sample["resps"] == [[strip_thoughts(sample["generated"][0], TAGS)]]


@needs_harness
def test_scores_are_those_of_plain_transformers(said: Command, run: Path, tmp_path: Path) -> None:
    said("chosen,texts", f"benchmark.output={tmp_path}")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(run / "model"), AutoTokenizer.from_pretrained(run / "model")

    def nats(context: str, continuation: str) -> float:
        before = tokenizer(context)["input_ids"]  # of nothing it is BOS
        after = tokenizer(continuation, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            log_probs = model(torch.tensor([before + after])).logits[0].log_softmax(-1)
        return sum(float(log_probs[len(before) + i - 1, one]) for i, one in enumerate(after))

    rows = read_lines(run.parent / "choices.jsonl")
    by_hand = [[nats(row["question"], choice) for choice in row["choices"]] for row in rows]
    for sample, values in zip(read_lines(tmp_path / "chosen.jsonl"), by_hand, strict=True):
        assert [response[0][0] for response in sample["resps"]] == pytest.approx(values, abs=1e-4)
    right = [values.index(max(values)) == row["label"] for values, row in zip(by_hand, rows, strict=True)]
    assert json.loads((tmp_path / "chosen.json").read_text())["metrics"]["acc"]["value"] == sum(right) / 6
    texts = [f"{row['prompt']}!" for row in ROWS[:40]]
    bits = -sum(nats("", text) for text in texts) / math.log(2) / sum(map(len, texts))
    assert json.loads((tmp_path / "texts.json").read_text())["metrics"]["bits_per_byte"]["value"] == pytest.approx(bits)


@needs_harness
def test_what_is_done_is_left_and_what_was_killed_is_continued(
    said: Command, run: Path, tasks: Path, tmp_path: Path
) -> None:
    out = f"benchmark.output={tmp_path / 'out'}"
    given = [f"run={run}", "benchmark.tasks=[again,sums]", f"benchmark.task_dir={tasks}", out, "benchmark.batch_size=1"]
    process = multiprocessing.get_context("fork").Process(target=benchmark.main, args=(given,))
    process.start()
    first = tmp_path / "out" / "again.json"
    while process.is_alive() and not first.exists():
        time.sleep(0.002)
    process.kill()
    process.join()
    written = first.stat().st_mtime_ns
    assert not (tmp_path / "out" / "sums.json").exists()
    printed = said("again,sums", out)
    assert "again: done and left as it is" in printed
    assert first.stat().st_mtime_ns == written
    assert (tmp_path / "out" / "sums.json").exists()
    assert "benchmark/again/exact_match" not in json.loads((run / "summary.json").read_text())
    refused = said("again,sums", out, "benchmark.num_fewshot=2", code=2)
    assert "task.num_fewshot   0 there, 2 now" in refused
    assert "force=true" in refused
    said("again", out, "benchmark.num_fewshot=2", "force=true", "benchmark.limit=7")
    assert json.loads(first.read_text())["num_samples"] == 7
    first.with_suffix(".jsonl").write_text("")
    assert "again.jsonl" in said("again", out, "benchmark.num_fewshot=2", "benchmark.limit=7", code=2)


@needs_harness
def test_a_tasks_length_is_that_of_the_answer_and_its_stop_texts_end_no_thought(
    said: Command, run: Path, tmp_path: Path
) -> None:
    said("again", f"benchmark.output={tmp_path / 'silent'}", "generation.thoughts=none")
    assert not any("<ToW>" in sample["generated"][0] for sample in read_lines(tmp_path / "silent" / "again.jsonl"))
    said("again", f"benchmark.output={tmp_path}")
    samples = read_lines(tmp_path / "again.jsonl")
    assert any(re.search(r"\d<ToW>x\d</ToW>[yz]$", sample["generated"][0]) for sample in samples)
    assert not {letter for sample in samples for letter in sample["resps"][0][0]} & {"y", "z"}


@needs_harness
def test_the_pages_command_does_the_pages_task(said: Command, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "benchmark.md").read_text()
    (task,) = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    assert yaml.safe_load(task) == TASK
    *_, command = re.findall(r"```bash\n(.*?)```", page, flags=re.DOTALL)[0].splitlines()
    given = [word for word in shlex.split(command)[3:] if not word.startswith("run=")]
    said("tow_addition", *given, f"benchmark.output={tmp_path}", "benchmark.limit=3")
    assert [sample["target"] for sample in read_lines(tmp_path / "tow_addition.jsonl")] == ["11457", "12977", "10285"]


@needs_harness
def test_a_group_has_the_mean_of_its_tasks(said: Command, run: Path, tasks: Path, tmp_path: Path) -> None:
    from lm_eval.tasks import TaskManager

    from src.harness.results import TaskResult, group_metrics

    said("sums,again", f"benchmark.output={tmp_path}")
    group = {"group": "both", "task": ["sums", "again"]}
    group |= {"aggregate_metric_list": [{"metric": "exact_match", "weight_by_size": False}]}
    (tmp_path / "both.yaml").write_text(yaml.safe_dump(group))
    loaded = TaskManager(include_path=[tasks, tmp_path], include_defaults=False).load("both")["groups"]["both"]
    results = {name: TaskResult(tmp_path, name, {}) for name in ("sums", "again")}
    scores = [result.read()["metrics"]["exact_match"] for result in results.values()]
    values = group_metrics(loaded, results)
    assert values["benchmark/both/exact_match"] == pytest.approx(sum(score["value"] for score in scores) / 2)
    errors = math.hypot(*(score["stderr"] for score in scores)) / 2
    assert values["benchmark/both/exact_match_stderr"] == pytest.approx(errors)
    result = json.loads(results["again"].file.read_text())
    result["metrics"]["exact_match"]["stderr"] = 0.0  # of a task at 0 or 100 %
    results["again"].file.write_text(json.dumps(result))
    found = group_metrics(loaded, results)["benchmark/both/exact_match_stderr"]
    assert found == pytest.approx(scores[0]["stderr"] / 2)


BAD = {
    "sum": "(?s)no such task; did you mean sums?.*torn.yaml in it can't be read",
    "broken": "broken can't be loaded: .*no.jsonl",
    "offline": "(?s)offline can't be loaded: .*HF_HOME.*benchmark.task_dir",
    "odd": "odd can't be asked or scored: .*UndefinedError",
    "metric": "metrics that the harness does not know: exactmatch",
    "unsafe": "runs code that the model writes",
    "sampled": "typical_p can't be set by a task",
    "long": "fit into the model's",
}


@needs_harness
@pytest.mark.parametrize("name", BAD)
def test_a_task_that_can_not_be_done_is_refused_by_name(said: Command, run: Path, tmp_path: Path, name: str) -> None:
    test = {"data_files": {"test": str(run.parent / "test.jsonl")}}
    changed: dict[str, Any] = {
        "sum": {"task": "sums"},
        "broken": {"dataset_kwargs": {"data_files": {"test": "no.jsonl"}}},
        "offline": {"dataset_path": "Rowan/hellaswag", "dataset_kwargs": None},
        "odd": {"metric_list": None, "doc_to_target": "{{'a' if prompt[0] == 'a' else nothing.at_all}}"},
        "metric": {"metric_list": [TASK["metric_list"][0] | {"metric": "exactmatch"}]},
        "unsafe": {"unsafe_code": True},
        "sampled": {"generation_kwargs": {"until": [], "typical_p": 0.5}},
        "long": {"generation_kwargs": {"until": [], "max_gen_toks": 10**6}},
    }[name]
    if name == "odd":
        test = {"data_files": {"test": write_lines(tmp_path / "rows.jsonl", [ROWS[1], ROWS[0]])}}
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(TASK | {"task": name, "dataset_kwargs": test} | changed))
    (tmp_path / "torn.yaml").write_text("task: [")
    if name == "sum":  # near names are looked for among the harness's own too, which takes seconds to read
        from lm_eval.tasks import TaskManager

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TaskManager.__init__, "__defaults__", (None, None, False, None))
            printed = said(name, f"benchmark.task_dir={tmp_path}", f"benchmark.output={tmp_path / 'out'}", code=2)
    else:
        printed = said(name, f"benchmark.task_dir={tmp_path}", f"benchmark.output={tmp_path / 'out'}", code=2)
    assert re.search(BAD[name], re.sub(r"\s+", " ", printed)), printed


def test_what_can_be_known_at_once_is_refused_at_once(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert benchmark.main([f"run={run}", "benchmark.tasks=[sums]"]) == 2
    assert "'.[benchmark]'" in capsys.readouterr().err
    assert benchmark.main([f"run={run}", "data.test_files=[a.jsonl]", "benchmark.tasks=[]"]) == 2
    printed = capsys.readouterr().err
    assert "python -m src.benchmark does not read it" in printed
    assert "a list of one or more names of tasks" in printed


def test_settings_of_a_task_are_on_top_of_the_runs() -> None:
    run = admitted("generation.max_new_tokens=20", "generation.num_beams=2").config.generation
    settings, stops = generation_settings(
        {"until": ["\n", ""], "max_gen_toks": 5, "temperature": 0.0}, run, thinks=False
    )
    assert (settings, stops) == (replace(run, max_new_tokens=5), ("\n",))
    settings, stops = generation_settings({"until": "Q:", "max_new_tokens": 5, "temperature": 0.5}, run, thinks=True)
    assert (settings, stops) == (replace(run, max_new_tokens=25, do_sample=True, temperature=0.5), ("Q:",))
    silent = replace(run, thoughts=ThoughtMode.none, num_return_sequences=3)
    settings, _ = generation_settings({"max_gen_toks": 5}, silent, thinks=True)
    assert settings == replace(silent, max_new_tokens=5, num_return_sequences=1)
    assert generation_settings({}, run, thinks=True) == (run, ())
    with pytest.raises(DataError, match="typical_p"):
        generation_settings({"typical_p": 0.9}, run, thinks=False)


@pytest.fixture
def asked(runtime: Runtime) -> Callable[..., Any]:
    """Build a run's model, with random weights, as the harness asks it."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install '.[benchmark]'")
    from src.harness.model import LoadedRun, RunModel

    def build(*overrides: str) -> Any:
        config = admitted("data.validation_files=null", "data.test_files=null", *overrides).config
        tokenizer, _ = load_tokenizer(config.model, config.tokens)
        prompts = build_prompts(config, tokenizer)
        model = build_model(config, runtime.device)
        model.resize_token_embeddings(264, mean_resizing=False)
        set_generation(model, config.generation, tokenizer, prompts.stop_ids)
        run = LoadedRun(model, tokenizer, prompts, config, runtime, 4, is_chat(config.data))
        return RunModel(run, begins_turn=True, name="task", progress=NO_PROGRESS)

    return build


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, one, 0, ("task", i, 1)) for i, one in enumerate(arguments)]


def test_an_encoder_decoder_scores_what_its_decoder_writes(asked: Callable[..., Any]) -> None:
    model = asked("model=tiny_bart")
    pairs = [("1+1=", "2"), ("12+30=", "42"), ("", "x")]
    scored = model.loglikelihood(requests("loglikelihood", *pairs))
    bart, tokenizer = model._run.model.eval(), model._run.tokenizer
    for (context, continuation), (nats, is_greedy) in zip(pairs, scored, strict=True):
        labels = tokenizer(text_target=continuation)["input_ids"][:-1]  # without EOS
        with torch.no_grad():
            logits = bart(
                input_ids=torch.tensor([tokenizer(context)["input_ids"]]), labels=torch.tensor([labels])
            ).logits
        log_probs = logits[0].log_softmax(-1)
        first = len(model._encoder.target_prefix)
        by_hand = sum(float(log_probs[i, one]) for i, one in enumerate(labels) if i >= first)
        assert nats == pytest.approx(by_hand, abs=1e-4)
        assert is_greedy == (log_probs.argmax(-1).tolist()[first:] == labels[first:])
    whole = model.loglikelihood_rolling(requests("loglikelihood_rolling", ("x",)))
    assert whole == [pytest.approx(scored[2][0], abs=1e-4)]


def test_a_chat_is_asked_as_it_was_trained(asked: Callable[..., Any], tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "1+1="}]
    file = write_lines(tmp_path / "chats.jsonl", [{"messages": [*messages, {"role": "assistant", "content": "2"}]}])
    chats = ("data=messages", f"data.train_files=['{file}']")
    model = asked(*chats)
    config = admitted(*chats, f"data.validation_files=['{file}']", f"data.test_files=['{file}']").config
    (rows,) = build_prompts(config, load_tokenizer(config.model, config.tokens)[0]).sets.values()
    row = model._encoded(model.apply_chat_template(messages), "", 128, needs_eos=True)
    assert row.input_ids[: row.prompt_length] == rows.prompt_ids(0)
    begun = model.apply_chat_template([*messages, {"role": "assistant", "content": "the"}], False)
    assert begun == model.apply_chat_template(messages) + "the"


def test_a_prompt_that_is_too_long_loses_its_beginning_and_a_text_in_windows_is_scored_once(
    asked: Callable[..., Any],
) -> None:
    model = asked()
    model._positions = 24
    short, long = requests("loglikelihood", ("a" * 10 + "b" * 21, "cd"), ("b" * 21, "cd"))
    (cut,), (same,) = model.loglikelihood([short]), model.loglikelihood([long])
    assert cut == same
    assert model.num_truncated == 1
    windows = list(model._windows("abcdefghij" * 7))
    supervised = [one for row in windows for _, start, stop in row.spans for one in row.input_ids[start:stop]]
    assert supervised == model._encoder.encode_texts(["abcdefghij" * 7], is_rendered=False)[0]
    assert all(len(row.input_ids) <= 24 for row in windows)
    with pytest.raises(Exception, match="longer than the model has positions for"):
        model.loglikelihood(requests("loglikelihood", ("a", "b" * 30)))


def test_a_stop_text_ends_an_answer_and_no_thought(asked: Callable[..., Any]) -> None:
    encoder = asked()._encoder
    reader = AnswerReader(encoder, TAGS, AnswerFrame(), ("\n\n", "Q:"))
    text = "a<ToW>\n\nQ: why</ToW>b\n<ToW>t</ToW>\nc\n\nQ: d"
    assert reader.answer_text(text) == "ab"
    ids = encoder.encode_texts([text], is_rendered=False)[0]
    over = next(i for i in range(len(ids) + 1) if reader.is_over(ids[:i]))
    assert encoder.decode(ids[:over]) == "a<ToW>\n\nQ: why</ToW>b\n<ToW>t</ToW>\n"
