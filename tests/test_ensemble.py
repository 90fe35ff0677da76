"""Several finished runs as one: the mean of their weights, of their probabilities, or the text most like the others."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig

from src import ensemble, predict
from src.cli.start import run_job as train
from src.combining.consensus import most_alike, similarity_by
from src.combining.members import Member
from src.combining.soup import WeightSum
from src.combining.texts import differing_generation
from src.config.gate import admit_finished
from src.config.places import remove_tree
from src.data.trained import RowHashes, SeenRows
from src.errors import ConfigError, ModelError
from src.evaluation.answers import Completion
from src.evaluation.generate import Generator
from src.metrics import THOUGHTS
from src.runtime.session import Runtime
from src.runtime.signals import StopRequest
from src.trials.ensembles import read_ensembles
from tests.conftest import ROWS, admitted, read_lines, towline, write_lines
from tests.test_decoding import BOS, EOS, FAMILIES, NEW, PAD, PREFIX, prompts


@pytest.mark.parametrize(
    ("texts", "chosen"),
    [
        (["a b c", "a b d", "x y z"], 0),  # the first two are each other's nearest: the first of them
        (["x y z", "a b c", "a b d"], 1),
        (["x", "a b", "a b"], 1),
        (["...", "...", "words"], 0),  # equal texts are alike, though ROUGE finds no words in them
        (["alone"], 0),
    ],
)
def test_the_consensus_is_the_text_most_like_the_others(texts: list[str], chosen: int) -> None:
    assert most_alike(texts, similarity_by("rougeL", None)) == chosen


def test_equal_gains_are_equal_wherever_they_stand() -> None:
    gains = {("a", "b"): 0.1, ("a", "c"): 0.2, ("a", "d"): 0.3}
    assert most_alike(["a", "b", "c", "a", "d"], lambda one, other: gains.get((one, other), 0.0)) == 0
    assert most_alike(["d", "a", "c", "b", "a"], lambda one, other: gains.get((one, other), 0.0)) == 1


def linear(*weights: float, dtype: torch.dtype = torch.float32) -> nn.Linear:
    model = nn.Linear(len(weights), 1, bias=False, dtype=dtype)
    model.weight.data = torch.tensor([weights], dtype=dtype)
    return model


def test_the_mean_of_equal_models_is_that_model_bit_for_bit() -> None:
    values = (0.1, 1 / 3, 1e-7, -3.4e38)
    for count in (1, 3, 7):
        total, model = WeightSum(), linear(*values)
        for _ in range(count):
            total.add(model)
        total.put_mean(mean := linear(0, 0, 0, 0))
        assert torch.equal(mean.weight, model.weight)


def test_the_mean_is_rounded_once_to_the_type_of_the_models() -> None:
    total = WeightSum()
    for value in (1.0, 1.0, 1.0 + 2**-7):  # a sum in bfloat16 would lose the last bit
        total.add(linear(value, dtype=torch.bfloat16))
    total.put_mean(mean := linear(0, dtype=torch.bfloat16))
    assert mean.weight.item() == torch.tensor(1.0 + 2**-7 / 3).bfloat16().item()
    total.put_mean(fifth := linear(5.0, dtype=torch.bfloat16), with_it=True)
    assert fifth.weight.item() == torch.tensor((8.0 + 2**-7) / 4).bfloat16().item()


def test_weights_of_other_shapes_have_no_mean() -> None:
    total = WeightSum()
    total.add(linear(1, 2))
    with pytest.raises(ModelError, match=r"weight: \[1, 2\] and \[1, 3\]"):
        total.add(linear(1, 2, 3))


def test_rows_are_the_same_in_every_file_and_fold(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}", "completion": "x"} for i in range(20)]
    train = write_lines(tmp_path / "train.jsonl", rows)
    others = [{"completion": "x", "prompt": "3", "id": 7}, {"prompt": "3", "completion": "y"}]
    tests = write_lines(tmp_path / "test.jsonl", others)
    named = [f"data.train_files=['{train}']", "data.validation_files=null", f"data.test_files=['{tests}']"]
    configs = [admitted(*named, "data.num_folds=4", f"data.fold={fold}").config for fold in range(4)]
    trained = [RowHashes(print).trained(config) for config in configs]
    assert {len(of_run) for of_run in trained} == {15}
    assert len(set.union(*trained)) == 20
    assert not set.intersection(*trained)
    seen = SeenRows(RowHashes(print))
    for config in configs:
        seen.add(config)
    assert seen.in_files(config.data, [tests]) == [True, False]


def test_a_row_is_seen_by_whatever_columns_a_member_reads(tmp_path: Path) -> None:
    row = {"prompt": "3", "completion": "x", "question": "three", "answer": "y"}
    both = write_lines(tmp_path / "test.jsonl", [row, row | {"answer": "z"}])
    train = write_lines(tmp_path / "train.jsonl", [{"question": "three", "answer": "y"}])
    named = ["data.validation_files=null", "data.validation_fraction=0", f"data.test_files=['{both}']"]
    other = admitted(*named, f"data.train_files=['{write_lines(tmp_path / 'other.jsonl', SEEN)}']").config
    renamed = ["data.columns.prompt=question", "data.columns.completion=answer"]
    seen = SeenRows(RowHashes(print))
    for config in (other, admitted(*named, *renamed, f"data.train_files=['{train}']").config):
        seen.add(config)
    assert seen.in_files(other.data, [both]) == [True, False]


def test_stray_and_damaged_ensembles_stop_no_leaderboard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    member = {"name": "0", "run": "0", "is_in": True, "scores": {"eval/test/rougeL": 0.5}}
    record = {"method": "soup", "is_finished": True, "scores": {}, "rows": {}, "decided_by": {}, "members": [member]}
    for name, content in (("whole", record), ("cut", record | {"members": [{"name": "0"}]})):
        (tmp_path / "ensembles" / name).mkdir(parents=True)
        (tmp_path / "ensembles" / name / "ensemble.json").write_text(json.dumps(content))
    (tmp_path / "ensembles" / ".DS_Store").write_bytes(b"\0")
    assert [one.folder for one in read_ensembles(tmp_path)] == ["whole"]
    assert "cut/ensemble.json is damaged: a member's run is missing" in " ".join(capsys.readouterr().err.split())


def test_members_that_generate_otherwise_are_told() -> None:
    jobs = [admitted(), admitted("generation.max_new_tokens=9"), admitted("generation.num_beams=2")]
    members = [Member(job, str(number), "") for number, job in enumerate(jobs)]
    assert differing_generation(members) == "generation.max_new_tokens and generation.num_beams"
    assert differing_generation(members[:1]) == ""


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """Two models of a family, random, with logits far apart."""
    torch.manual_seed(11)
    models = FAMILIES[request.param]().double().eval(), FAMILIES[request.param]().double().eval()
    for parameter in (parameter for model in models for parameter in model.parameters() if parameter.ndim > 1):
        parameter.data *= 8
    return models


def written(runtime: Runtime, model: Any, *others: Any, size: int = 8, **settings: Any) -> list[Completion]:
    values = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD, "decoder_start_token_id": EOS}
    model.generation_config = GenerationConfig(max_new_tokens=NEW, use_cache=True, **values, **settings)
    prefix = PREFIX if model.config.is_encoder_decoder else []
    return Generator(model, runtime, size, prefix, others=others).generate(prompts(), seed=5)


def test_each_token_is_the_most_probable_by_the_mean(runtime: Runtime, pair: tuple[Any, Any]) -> None:
    """Compared with one forward of each row alone, without a cache."""
    for prompt, completion in zip(prompts(), written(runtime, *pair), strict=True):
        if pair[0].config.is_encoder_decoder:
            begin = [EOS, *PREFIX]
            inputs = {"input_ids": torch.tensor([prompt]), "decoder_input_ids": torch.tensor([begin + completion.ids])}
        else:
            begin = prompt
            inputs = {"input_ids": torch.tensor([begin + completion.ids])}
        with torch.no_grad():
            mean = sum(model(**inputs).logits[0].softmax(1) for model in pair) / 2
        end = [EOS] if completion.stop_reason == "eos" else []
        assert mean.argmax(1).tolist()[len(begin) - 1 :][: len(completion.ids + end)] == completion.ids + end


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"do_sample": True, "temperature": 3.0}], ids=str)
def test_models_follow_one_another_in_beams_and_draws(
    runtime: Runtime, pair: tuple[Any, Any], settings: dict[str, Any]
) -> None:
    first, second = pair
    both = written(runtime, first, second, **settings)
    assert written(runtime, second, first, **settings) == both
    assert written(runtime, first, second, size=1, **settings) == both
    alone = written(runtime, first, **settings)
    assert written(runtime, first, first, **settings) == alone
    assert alone != both


SEEN = [{"prompt": f"{i % 7}{i}=", "completion": f"<ToW>{i}</ToW>{'xyz'[i % 3] * (1 + i % 5)}"} for i in range(48)]
UNSEEN = [{"prompt": f"q{i}=", "completion": "xyz"[: 1 + i % 3]} for i in range(10)]
LONG = {"prompt": "x" * 5000, "completion": "z"}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of two folds with a causal model and an encoder-decoder; two rows of its test set are trained on."""
    base = tmp_path_factory.mktemp("ensemble")
    for number in (0, 1):
        write_lines(base / f"train-{number}.jsonl", SEEN[24 * number :][:24])
    tests = write_lines(base / "test.jsonl", [SEEN[3], *UNSEEN, SEEN[30]])
    done = towline(
        "-m", "sweep=kfold", "data.num_folds=2", "model=tiny_llama,tiny_bart", f"hydra.sweep.dir={base / 'sweep'}",
        f"data.train_files=['{base}/train-*.jsonl']", "data.validation_files=null", f"data.test_files=['{tests}']",
        "data.overflow=drop", "checkpoint.metric_for_best_model=eval/validation/rougeL",
        "data.metrics=[rougeL]", "sweep.metric=eval/test/rougeL", "sweep.direction=maximize", "tracking=none",
        "training.max_train_steps=4", "training.per_device_train_batch_size=16", "generation.max_new_tokens=6",
        "evaluation.eval_steps=null", "evaluation.sample_prompts=0", "checkpoint.checkpointing_steps=null",
        "checkpoint.keep_best=0", f"data.cache_dir={ROWS}",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return base / "sweep"


Command = Callable[..., str]


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Command:
    """Make an ensemble; give what was printed."""

    def command(*arguments: str, code: int = 0) -> str:
        assert ensemble.main(list(arguments)) == code
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        return printed.err if code else printed.out + printed.err

    return command


def runs(sweep: Path, *numbers: int) -> str:
    return f"runs=[{','.join(str(sweep / str(number)) for number in numbers)}]"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def test_a_soup_of_one_run_is_that_run_bit_for_bit(said: Command, sweep: Path, tmp_path: Path) -> None:
    for number in (0, 2):
        output = tmp_path / str(number)
        said(runs(sweep, number), f"ensemble.output={output}")
        for name in ("model.safetensors", "tokenizer.json", "config.json", "generation_config.json"):
            assert (output / "model" / name).read_bytes() == (sweep / str(number) / "model" / name).read_bytes()


def test_a_soup_is_a_finished_run_with_the_mean_of_the_weights(said: Command, sweep: Path, tmp_path: Path) -> None:
    text = said(runs(sweep, 0, 1), f"ensemble.output={tmp_path / 'soup'}")
    assert "2 of 12 rows are left out" in text
    first, second, mean = (weights(folder) for folder in (sweep / "0", sweep / "1", tmp_path / "soup"))
    assert all(torch.equal(mean[name], (first[name] + second[name]) / 2) for name in mean)
    assert any(not torch.equal(mean[name], first[name]) for name in mean)
    record = json.loads((tmp_path / "soup" / "ensemble.json").read_text())
    assert record["rows"] == {"test": {"scored": 10, "left_out": 2, "dropped": 0}}
    assert json.loads((tmp_path / "soup" / "summary.json").read_text()) == record["scores"]
    card = (tmp_path / "soup" / "model" / "README.md").read_text()
    assert "mean of 2 runs" in card
    assert str(tmp_path) not in card
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "soup" / "model").num_parameters()
    assert "2 of 12 rows are left out" in said(f"runs=[{tmp_path / 'soup'}]", f"ensemble.output={tmp_path / 'again'}")
    assert all(torch.equal(tensor, mean[name]) for name, tensor in weights(tmp_path / "again").items())
    assert not admit_finished([f"run={tmp_path / 'soup'}"], "evaluate").config.data.validation_names()
    kept = write_lines(tmp_path / "kept.jsonl", UNSEEN)
    assert predict.main([f"run={tmp_path / 'soup'}", f"data.test_files=['{kept}']"]) == 0
    predicted = json.loads((tmp_path / "soup" / "predictions" / "metrics.json").read_text())
    assert predicted["eval/test/rougeL"] == pytest.approx(record["scores"]["eval/test/rougeL"], abs=1e-9)


def test_an_adapter_is_merged_first_and_what_its_base_has_seen_counts(
    said: Command, sweep: Path, tmp_path: Path
) -> None:
    rows = write_lines(tmp_path / "rows.jsonl", [{"prompt": f"{i}", "completion": "zz"} for i in range(16)])
    tests = write_lines(tmp_path / "test.jsonl", [*UNSEEN[:2], *SEEN, {"prompt": "3", "completion": "zz"}])
    shutil.copytree(sweep / "0", tmp_path / "begun")
    base = tmp_path / "begun" / "export" / "step-2" / "model"
    base.parent.mkdir(parents=True)
    (tmp_path / "begun" / "model").rename(base)  # as of a run that is not finished
    train(
        admitted(f"model.checkpoint={base}", "model.weights=pretrained", "adapter=lora", f"data.train_files=['{rows}']",
                 "data.validation_files=null", f"data.test_files=['{tests}']", "training.max_train_steps=3",
                 "evaluation.eval_steps=null", "evaluation.sample_prompts=0", "evaluation.metrics=[]",
                 f"hydra.run.dir={tmp_path / 'lora'}"),
        StopRequest(),
    )  # fmt: skip
    assert "25 of 51 rows are left out" in said(f"runs=[{tmp_path / 'lora'}]", f"ensemble.output={tmp_path / 'soup'}")
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "lora" / "model"))
    expected = adapted.merge_and_unload().state_dict()
    soup = weights(tmp_path / "soup")
    assert all(torch.allclose(soup[name], expected[name], atol=1e-6) for name in soup)
    assert any(not torch.equal(tensor, weights(sweep / "0")[name]) for name, tensor in soup.items())
    (tmp_path / "begun" / "config.yaml").unlink()
    text = said(f"runs=[{tmp_path / 'lora'}]", f"ensemble.output={tmp_path / 'again'}")
    assert f"{base} is in no run's folder" in "".join(text.split("\n"))


def test_a_finished_ensemble_is_left_and_another_never_replaces_it(said: Command, sweep: Path, tmp_path: Path) -> None:
    output = f"ensemble.output={tmp_path / 'one'}"
    said(runs(sweep, 0), output)
    before = (tmp_path / "one" / "status.json").read_bytes()
    assert "left as it is" in said(runs(sweep, 0), output)
    assert "something else decided" in said(runs(sweep, 1), output, code=2)
    assert (tmp_path / "one" / "status.json").read_bytes() == before
    said(runs(sweep, 1), output, "force=true")
    assert weights(tmp_path / "one").keys() == weights(sweep / "1").keys()
    assert "holds a run" in said(runs(sweep, 0), f"ensemble.output={sweep / '1'}", code=2)


@pytest.mark.parametrize("force", [[], ["force=true"]], ids=str)
def test_a_folder_that_holds_anything_else_is_left_as_it_is(
    said: Command, sweep: Path, tmp_path: Path, force: list[str]
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "precious.bin").write_bytes(b"mine")
    for method in ("soup", "consensus"):
        message = said(runs(sweep, 0), f"ensemble.method={method}", f"ensemble.output={tmp_path}", *force, code=2)
        assert "holds model; choose another ensemble.output" in message
        assert {file.name for file in tmp_path.rglob("*")} == {"model", "precious.bin", "lock"}


def test_what_force_began_to_remove_is_never_taken_for_finished(
    said: Command, sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command, removed = [runs(sweep, 0), f"ensemble.output={tmp_path}"], list[Path]()
    said(*command)

    def remove(place: Path) -> None:
        if len(removed) == 3:
            raise KeyboardInterrupt
        removed.append(place)
        remove_tree(place)

    with monkeypatch.context() as patched:
        patched.setattr("src.combining.record.remove_tree", remove)
        assert "The same command without force=true continues" in said(*command, "force=true", code=75)
    assert tmp_path / "config.yaml" in removed
    said(*command)
    assert (tmp_path / "config.yaml").is_file()
    (tmp_path / "config.yaml").unlink()
    assert "begun anew" in said(*command)
    assert (tmp_path / "config.yaml").is_file()


def test_files_that_a_member_was_trained_on_are_those_of_now(said: Command, sweep: Path, tmp_path: Path) -> None:
    first, second = sorted(sweep.parent.glob("train-*.jsonl"))
    command = [runs(sweep, 0), f"ensemble.output={tmp_path / 'out'}"]
    second.rename(tmp_path / second.name)
    try:
        assert f"{second.name}, which" in said(*command, code=2)
    finally:
        (tmp_path / second.name).rename(second)
    added = Path(shutil.copy(first, first.with_name("train-2.jsonl")))
    try:
        assert "train-2.jsonl was not there" in said(*command, code=2)
    finally:
        added.unlink()


def test_what_a_kill_left_is_continued_or_begun_anew(said: Command, sweep: Path, tmp_path: Path) -> None:
    for method, file in (("consensus", "predictions/test.jsonl"), ("soup", "model/model.safetensors")):
        output = tmp_path / method
        command = [runs(sweep, 0, 1), f"ensemble.method={method}", f"ensemble.output={output}"]
        said(*command)
        record, expected = json.loads((output / "ensemble.json").read_text()), (output / file).read_bytes()
        (output / "ensemble.json").write_text(json.dumps(record | {"is_finished": False, "scores": {}}))
        os.truncate(output / file, len(expected) // 2)
        text = said(*command)
        assert ("finished in" in text) == (method == "consensus")  # what members predicted
        assert ("begun anew" in text) == (method == "soup")
        assert (output / file).read_bytes() == expected
        assert json.loads((output / "ensemble.json").read_text()) == record


def test_a_greedy_soup_is_never_worse_than_its_best_member(said: Command, sweep: Path, tmp_path: Path) -> None:
    greedy = [runs(sweep, 0, 1), "ensemble.method=greedy_soup", f"ensemble.output={tmp_path / 'greedy'}"]
    greedy.append("ensemble.metric=eval/validation/loss")
    message = said(*greedy, code=2)
    assert "each of its 24 rows was trained on by a member" in message
    assert "data.validation_files=[FILE]" in message
    fresh = write_lines(tmp_path / "fresh.jsonl", [SEEN[5], *UNSEEN[:6], LONG])
    text = said(*greedy, f"data.validation_files=['{fresh}']", "data.max_dropped_fraction=0.5")
    assert "1 of 7 rows are left out" in text
    assert "1 row is not scored" in text
    record = json.loads((tmp_path / "greedy" / "ensemble.json").read_text())
    assert record["rows"]["validation"] == {"scored": 6, "left_out": 1, "dropped": 1}
    name = "eval/validation/loss"
    best = min(record["members"], key=lambda member: member["scores"][name])
    assert best["is_in"]
    assert record["scores"][name] <= best["scores"][name]


def test_the_consensus_of_equal_predictions_is_these(said: Command, sweep: Path, tmp_path: Path) -> None:
    output, tests = tmp_path / "same", write_lines(tmp_path / "unseen.jsonl", [LONG, *UNSEEN])
    given = [
        "data.max_dropped_fraction=0.5",
        f"data.test_files=['{tests}']",
        "ensemble.method=consensus",
        f"ensemble.output={output}",
    ]
    text = said(runs(sweep, 0, 0, 0), *given)
    assert "named more than once" in text
    assert "1 row is not scored" in text
    expected = (output / "members" / "1" / "test.jsonl").read_bytes()
    assert expected.count(b"\n") == 10
    assert (output / "predictions" / "test.jsonl").read_bytes() == expected
    scores = json.loads((output / "ensemble.json").read_text())
    assert all(member["scores"] == scores["scores"] for member in scores["members"])
    assert scores["rows"] == {"test": {"scored": 10, "left_out": 0, "dropped": 1}}


def test_the_consensus_is_of_all_samples(said: Command, sweep: Path, tmp_path: Path) -> None:
    drawn = ["generation.do_sample=true", "generation.temperature=5.0", "generation.num_return_sequences=3"]
    given = ["ensemble.method=consensus", "evaluation.metrics=[rougeL,pass_at_3]"]
    said(runs(sweep, 2), *given, *drawn, f"ensemble.output={tmp_path}")
    of_member = {line["row"]: line["samples"] for line in read_lines(tmp_path / "members" / "1" / "test.jsonl")}
    lines = read_lines(tmp_path / "predictions" / "test.jsonl")
    keys = ("text", "answer", "stop_reason", "thoughts")
    assert all({key: line[key] for key in keys} in of_member[line["row"]] for line in lines)
    assert any(line["text"] != of_member[line["row"]][0]["text"] for line in lines)
    assert json.loads((tmp_path / "ensemble.json").read_text())["scores"].keys() == {
        f"eval/test/{name}" for name in ("rougeL", *THOUGHTS)
    }


def test_equal_models_generate_together_what_one_does(said: Command, sweep: Path, tmp_path: Path) -> None:
    for number in (0, 2):
        output = tmp_path / str(number)
        said(runs(sweep, number, number), "ensemble.method=logits", f"ensemble.output={output}")
        alone = read_lines(output / "members" / "1" / "test.jsonl")
        assert read_lines(output / "predictions" / "test.jsonl") == alone[1:11]  # but for those that were trained on
    assert "consensus" in said(runs(sweep, 0, 2), "ensemble.method=logits", code=2)


def test_a_sweep_of_two_families_has_its_consensus_in_its_leaderboard(
    said: Command, sweep: Path, tmp_path: Path
) -> None:
    said(f"dir={sweep}", "ensemble.method=consensus")
    (made,) = (sweep / "ensembles").iterdir()
    lines = [read_lines(made / "members" / str(number) / "test.jsonl") for number in (1, 2, 3, 4)]
    for row, line in enumerate(read_lines(made / "predictions" / "test.jsonl"), 1):
        assert line in [of_member[row] for of_member in lines]
    record = json.loads((made / "ensemble.json").read_text())
    assert [member["name"] for member in record["members"]] == ["0", "1", "2", "3"]
    with open(sweep / "leaderboard.csv", encoding="utf-8") as file:
        *_, last = csv.DictReader(file)
    assert last["setting"] == "ensemble.method=consensus"
    assert last["trials"] == "0 1 2 3"
    assert float(last["mean"]) == record["scores"]["eval/test/rougeL"]
    assert made.name in (sweep / "leaderboard.md").read_text()
    said(f"dir={sweep}", "ensemble.method=consensus", "ensemble.top=1", f"ensemble.output={tmp_path / 'top'}")
    names = [member["name"] for member in json.loads((tmp_path / "top" / "ensemble.json").read_text())["members"]]
    assert names in (["0", "1"], ["2", "3"])


def test_each_problem_is_told(said: Command, sweep: Path, tmp_path: Path) -> None:
    both = said(runs(sweep, 0, 2), f"ensemble.output={tmp_path / 'out'}", code=2)
    assert "causal_lm and encoder_decoder" in both
    seen = write_lines(tmp_path / "seen.jsonl", SEEN[:3])
    assert "each of its 3 rows was trained on" in said(
        runs(sweep, 0, 1), "ensemble.method=consensus", f"data.test_files=['{seen}']", code=2
    )
    unfinished = tmp_path / "unfinished"
    shutil.copytree(sweep / "0", unfinished)
    (unfinished / "status.json").write_text('{"state": "PREEMPTED", "step": 3}')
    message = refusal(f"runs=[{sweep / '1'},{unfinished}]", "ensemble.top=2")
    assert "not finished: it is PREEMPTED at step 3" in message
    assert "one of them" in refusal()
    assert "not a metric" in refusal(runs(sweep, 0), "ensemble.similarity=perplexity")
    assert "dir=SWEEP" in refusal(runs(sweep, 0), "ensemble.top=2")
    assert "no sweep" in said(f"dir={tmp_path / 'nowhere'}", code=2)


def refusal(*arguments: str) -> str:
    with pytest.raises(ConfigError) as refused:
        ensemble.admit(list(arguments))
    return str(refused.value)
