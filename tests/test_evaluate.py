"""Evaluation by views: what a thought is worth to the words after it, on the same rows in every view."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from src import evaluate
from src.cli.start import run_job
from src.config.schema.entries import VIEWS
from src.data.dataset import build_evaluated, without_thoughts
from src.data.paired import PairedRows
from src.data.tokenizer import load_tokenizer
from src.evaluation.by_views import pair_rows
from src.evaluation.generate import Generator
from src.evaluation.scores import bits_per_byte
from src.evaluation.scoring import write_thoughts
from src.model.build import build_model, set_generation
from src.model.embeddings import resize_and_initialise
from src.runtime.session import Runtime
from src.runtime.signals import StopRequest
from tests.chat_templates import FAMILIES
from tests.conftest import ROOT, ForkedCommand, admitted, read_lines, write_lines
from tests.kinds import byte_bpe, character_level, one_control_token, thin_llama

WORDS = ["하나", "zwei ", "three", "vier"]
ROWS = [
    {
        "prompt": f"{i % 7}+{i % 5}=",
        "completion": "".join(f"<ToW>{(i + k) % 6}{'ab'[i % 2]}</ToW>{WORDS[(i + k) % 4]}" for k in range(1 + i % 2)),
    }
    for i in range(48)
]
ANSWERS = ["".join(WORDS[(i + k) % 4] for k in range(1 + i % 2)) for i in range(48)]


def small_run(folder: Path, *overrides: str, held_out: bool = False) -> Path:
    """Train a small run on the rows; its validation set are 22 of them, or those that are held out."""
    train, validation = (write_lines(folder.parent / f"{n}.jsonl", rows) for n, rows in (("t", ROWS), ("v", ROWS[:22])))
    run_job(
        admitted("data=prompt_completion", f"data.train_files=['{train}']",
                 "data.validation_fraction=0.3" if held_out else f"data.validation_files=['{validation}']",
                 "data.thought_pattern='<ToW>(.*?)</ToW>'", "data.metrics=[exact_match]", f"hydra.run.dir={folder}",
                 f"model.checkpoint={thin_llama()}", "training.per_device_train_batch_size=16",
                 "training.per_device_eval_batch_size=5", "generation.max_new_tokens=20",
                 "evaluation.sample_prompts=0", "evaluation.eval_steps=null", *overrides),
        StopRequest(),
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, evaluated by all views."""
    before = os.getcwd()
    os.chdir(ROOT)
    try:
        folder = small_run(tmp_path_factory.mktemp("evaluated") / "run", "training.max_train_steps=30")
        (folder.parent / "t.jsonl").unlink()  # nothing reads what it was trained on
        assert evaluate.main([f"run={folder}"]) == 0
    finally:
        os.chdir(before)
    return folder


def lines_of(run: Path, view: str, output: str = "evaluations") -> list[dict[str, Any]]:
    return read_lines(run / output / "validation" / f"{view}.jsonl")


def metrics_of(folder: Path) -> dict[str, float]:
    return json.loads((folder / "evaluation.json").read_text())["metrics"]


def by_hand(model: Any, ids: list[int], num_prompt: int) -> list[float]:
    """Return the nats of each token after the prompt, by the model's own logits."""
    with torch.no_grad():
        logs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return [-float(logs[i - 1, ids[i]]) for i in range(num_prompt, len(ids))]


def test_gold_is_what_the_run_measured(run: Path) -> None:
    summary, metrics = json.loads((run / "summary.json").read_text()), metrics_of(run / "evaluations")
    for name in ("loss", "perplexity", "thought_loss", "answer_loss"):
        measured = summary[f"eval/validation/{name}"]
        assert metrics[f"evaluate/validation/gold/{name}"] == pytest.approx(measured, rel=1e-6)
    assert metrics["evaluate/validation/exact_match"] == summary["eval/validation/exact_match"]


def test_every_view_has_the_same_rows_and_answers(run: Path) -> None:
    sizes = [len(text.encode()) for text in ANSWERS[:22]]
    for view in VIEWS:
        lines = lines_of(run, view)
        assert [line["row"] for line in lines] == list(range(22))
        assert [line["source"] for line in lines] == [f"{run.parent / 'v.jsonl'}:{i + 1}" for i in range(22)]
        assert [line["num_bytes"] for line in lines] == sizes
        total = sum(line["answer_nll"] for line in lines) / math.log(2) / sum(sizes)
        assert metrics_of(run / "evaluations")[f"evaluate/validation/{view}/bits_per_byte"] == pytest.approx(total)
    assert [line["num_thought_tokens"] for line in lines_of(run, "none")] == [0] * 22


def test_each_view_is_what_plain_transformers_computes(run: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    model = AutoModelForCausalLM.from_pretrained(run / "model").eval()
    opened, closed, eos = tokenizer.convert_tokens_to_ids(["<ToW>", "</ToW>", "</s>"])

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    views = {view: lines_of(run, view) for view in VIEWS}
    for i in (0, 1, 2, 3):
        prompt = tokenizer(ROWS[i]["prompt"])["input_ids"]
        written = {"gold": encode(ROWS[i]["completion"]), "none": encode(ANSWERS[i]), "own": list[int]()}
        for k in range(1 + i % 2):  # what the model itself writes, one thought after the other
            begun = torch.tensor([[*prompt, *written["own"], opened]])
            made = model.generate(begun, attention_mask=torch.ones_like(begun), max_new_tokens=3, do_sample=False,
                                  eos_token_id=[closed, eos])[0, begun.shape[1] :].tolist()  # fmt: skip
            inner = list(itertools.takewhile(lambda token: token not in (closed, eos), made))[:2]
            assert views["own"][i]["thoughts"][k] == tokenizer.decode(inner)
            written["own"] += [opened, *inner, closed, *encode(WORDS[(i + k) % 4])]
        for view, ids in written.items():
            nats = by_hand(model, [*prompt, *ids, eos], len(prompt))
            is_thought, mask = False, []
            for token in [*ids, eos]:
                mask.append(is_thought or token == opened)
                is_thought = mask[-1] and token != closed
            line = views[view][i]
            assert line["nll"] == pytest.approx(sum(nats), rel=1e-4)
            assert line["thought_nll"] == pytest.approx(sum(itertools.compress(nats, mask)), rel=1e-4, abs=1e-4)
            answer = [nat for nat, one in zip(nats[:-1], mask, strict=False) if not one]  # EOS is none of it
            assert (line["answer_nll"], line["num_answer_tokens"]) == (
                pytest.approx(sum(answer), rel=1e-4),
                len(answer),
            )


def test_what_thoughts_are_worth_is_compared(run: Path) -> None:
    content = json.loads((run / "evaluations" / "evaluation.json").read_text())
    own = [thought for line in read_lines(run / "evaluations/validation/own_thoughts.jsonl") for thought in line["ids"]]
    mean = sum(len(thought) - 2 for thought in own) / len(own)
    assert content["metrics"]["evaluate/validation/own/thought_tokens"] == pytest.approx(mean)
    found = {(one["view"], one["baseline"]): one for one in content["comparisons"]["validation"]}
    pairs = [("gold", "none"), ("shuffled", "none"), ("own", "none"), ("shuffled", "gold"), ("own", "gold")]
    assert list(found) == pairs
    for (view, baseline), one in found.items():
        theirs, ours = (content["metrics"][f"evaluate/validation/{name}/bits_per_byte"] for name in (baseline, view))
        assert one["bits_per_byte_saved"] == pytest.approx(theirs - ours)
        assert one["low"] <= one["bits_per_byte_saved"] <= one["high"]
    assert content["rows"]["validation"] == {"scored": 22, "left_out": {}}


def contents(folder: Path) -> dict[str, bytes]:
    files = (file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != "lock")
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def test_a_killed_evaluation_continues_to_the_same_files(run: Path, tmp_path: Path) -> None:
    own = [f"run={run}", f"evaluate.output={tmp_path / 'out'}", "training.per_device_eval_batch_size=1"]
    for name in ("own_thoughts", "none"):
        process = ForkedCommand(own, Path(os.devnull), tmp_path / "err", main=evaluate.main)
        file = tmp_path / "out" / "validation" / f"{name}.jsonl"
        try:
            while not file.is_file() or not file.stat().st_size:
                assert process.poll() is None, (tmp_path / "err").read_text()
                time.sleep(0.01)
        finally:
            process.kill()
    assert not (tmp_path / "out" / "evaluation.json").exists()
    assert evaluate.main(own) == 0
    whole, expected = contents(tmp_path / "out"), contents(run / "evaluations")
    assert whole.keys() == expected.keys()
    for name in ("own_thoughts", "predictions"):  # bit for bit, also where the batches are others
        assert whole[f"validation/{name}.jsonl"] == expected[f"validation/{name}.jsonl"]
    for view in VIEWS:
        ours, theirs = (json.loads(one[f"validation/{view}.jsonl"].splitlines()[-1]) for one in (whole, expected))
        assert ours["nll"] == pytest.approx(theirs["nll"], rel=1e-5)


def test_what_is_whole_is_left_and_what_something_else_decided_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(shutil.copytree(run / "evaluations", tmp_path / "out"))
    before = contents(out)
    own = [f"run={run}", f"evaluate.output={out}"]
    assert evaluate.main(own) == 0
    assert contents(out) == before
    for override, told in (
        ("seed=7", "seed   42 there, 7 now"),
        ("evaluate.views=[gold]", 'evaluate.views   null there, ["gold"] now'),
        ("evaluation.max_samples=3", "evaluation.max_samples   null there, 3 now"),
    ):
        assert evaluate.main([*own, override]) == 2
        assert told in capsys.readouterr().err
    assert contents(out) == before
    assert evaluate.main([*own, "evaluation.max_samples=3", "evaluate.views=[none,gold]", "force=true"]) == 0
    assert [len(read_lines(out / "validation" / f"{view}.jsonl")) for view in ("none", "gold")] == [3, 3]
    assert not (out / "validation" / "own.jsonl").exists()


@pytest.mark.parametrize("name", ["evaluation.json", "validation/none.jsonl"])
def test_what_was_changed_is_told_and_kept(
    run: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(shutil.copytree(run / "evaluations", tmp_path / "out"))
    text = "[" + (out / name).read_text()[1:]
    (out / name).write_text(text)
    assert evaluate.main([f"run={run}", f"evaluate.output={out}"]) == 2
    assert f"{out / name} is damaged" in capsys.readouterr().err
    assert (out / name).read_text() == text


def test_two_evaluations_are_paired_by_file_and_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copy(run.parent / "v.jsonl", tmp_path / "elsewhere.jsonl"))
    own = ["evaluate.views=[gold]", "evaluation.metrics=[]", f"evaluate.against={run}", f"run={run}"]
    assert evaluate.main([*own, f"data.validation_files=['{copy}']", f"evaluate.output={tmp_path / 'same'}"]) == 0
    against = json.loads((tmp_path / "same" / "evaluation.json").read_text())["against"]["validation"]
    assert [(one["view"], one["num_rows"], one["p_value"]) for one in against] == [("gold", 22, 1.0)]
    again = [one for one in own if not one.startswith("evaluate.against")]
    again += [f"data.validation_files=['{copy}']", f"evaluate.output={tmp_path / 'same'}"]
    for more, expected in (([], against), (["evaluation.max_samples=3", "force=true"], [])):
        assert evaluate.main([*again, *more]) == 0  # what nobody asked to compare again stays while it is true
        assert json.loads((tmp_path / "same" / "evaluation.json").read_text())["against"]["validation"] == expected
    other = write_lines(tmp_path / "other.jsonl", ROWS[30:34])
    assert evaluate.main([*own, f"data.validation_files=['{other}']", f"evaluate.output={tmp_path / 'other'}"]) == 2
    assert "of 4 rows here and 22 there none are common" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["evaluate.sets=[validation,test]"], "no set is called test; there are validation"),
        (["evaluate.views=[gold,gold]"], "not a list of views, each one of gold, none, shuffled, own, and once"),
        (["evaluate.against=assets"], "no evaluation there; make one first: python -m src.evaluate run=assets"),
        (["data.max_seq_length=4"], "22 of 22 rows would be dropped (22 too long)"),
        (["evaluate.output={run}"], "a run's folder; what evaluate writes needs one of its own"),
        (["optimizer.lr=1"], "python -m src.evaluate does not read it"),
    ],
)
def test_mistakes_are_told(
    run: Path, tmp_path: Path, overrides: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [override.format(run=run) for override in overrides]
    output = [] if "evaluate.output" in overrides[0] else [f"evaluate.output={tmp_path / 'out'}"]
    asked = [f"run={run}", *output, "data.overflow=drop", *overrides]
    assert evaluate.main(asked) == 2
    message = capsys.readouterr().err
    assert told in message
    assert "Traceback" not in message
    assert not (tmp_path / "out" / "validation").exists()


def uniform_model(folder: Path, tokenizer: Any) -> Path:
    """Save a model to which all of its 320 tokens or more are equally likely."""
    architecture = AutoConfig.from_pretrained(thin_llama(), vocab_size=max(320, len(tokenizer)))
    model = AutoModelForCausalLM.from_config(architecture)
    torch.nn.init.zeros_(model.get_output_embeddings().weight)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def score_plainly(folder: Path, *overrides: str) -> int:
    """Evaluate a model that no run has trained."""
    given = ["model=causal_lm", f"model.checkpoint={folder}", "tokens=none", "data=prompt_completion", "tracking=none"]
    return evaluate.main([*given, *overrides])


@pytest.mark.parametrize("tokenizer", [character_level, byte_bpe])
def test_a_uniform_model_has_its_tokens_times_its_vocabulary_a_byte(
    tokenizer: Callable[[], Any], runtime: Runtime, tmp_path: Path
) -> None:
    cutter = tokenizer()
    folder = uniform_model(tmp_path / "uniform", cutter)
    texts = ["What is 12 plus 30?", "안녕하세요", "lower and lower"]
    file = write_lines(tmp_path / "rows.jsonl", [{"prompt": "q=", "completion": text} for text in texts])
    assert score_plainly(folder, f"data.test_files=['{file}']", f"evaluate.output={tmp_path / 'out'}") == 0
    num_tokens = sum(len(cutter(text, add_special_tokens=False)["input_ids"]) for text in texts)
    num_bytes = sum(len(text.encode()) for text in texts)
    found = metrics_of(tmp_path / "out")["evaluate/test/gold/bits_per_byte"]
    nats = float(torch.zeros(1, 320).log_softmax(1)[0, 0].neg())  # as float32 has it
    assert found == pytest.approx(num_tokens * nats / math.log(2) / num_bytes, rel=1e-9)
    assert bits_per_byte(num_tokens * math.log(320), num_bytes) == pytest.approx(
        num_tokens * math.log2(320) / num_bytes, rel=1e-9
    )


@pytest.mark.parametrize("family", ["Qwen 3", "DeepSeek R1"])
def test_a_thought_that_the_template_writes_is_no_part_of_the_answer(tmp_path: Path, family: str) -> None:
    tokenizer = byte_bpe()
    template, added = FAMILIES[family]
    tokenizer.add_tokens(added)
    tokenizer.chat_template = template
    answers = ["lower", "안녕, 42"]
    chats = [
        {
            "messages": [
                {"role": "user", "content": "hi"},
                {"role": "assistant", "content": answer, "reasoning_content": f"a b {i}"},
            ]
        }
        for i, answer in enumerate(answers)
    ]
    file = write_lines(tmp_path / "rows.jsonl", chats)
    options = ["data=messages", f"data.test_files=['{file}']", f"evaluate.output={tmp_path / 'out'}"]
    assert score_plainly(uniform_model(tmp_path / "uniform", tokenizer), *options) == 0
    lines = read_lines(tmp_path / "out" / "test" / "gold.jsonl")
    assert [line["num_bytes"] for line in lines] == [len(answer.encode()) for answer in answers]
    sizes = [len(tokenizer(answer, add_special_tokens=False)["input_ids"]) for answer in answers]
    assert [line["num_answer_tokens"] for line in lines] == sizes
    metrics = metrics_of(tmp_path / "out")
    bits = sum(sizes) * math.log2(max(320, len(tokenizer))) / sum(len(answer.encode()) for answer in answers)
    assert metrics["evaluate/test/gold/bits_per_byte"] == pytest.approx(bits, rel=1e-6)
    assert metrics["evaluate/test/gold/thought_loss"] == pytest.approx(math.log(max(320, len(tokenizer))), rel=1e-6)


def test_a_plain_model_has_one_folder_and_its_tokenizer_and_the_rows_of_a_data_set_are_in_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    model = uniform_model(tmp_path / "uniform", byte_bpe())
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for split in ("train", "validation"):
        write_lines(corpus / f"{split}.jsonl", [{"prompt": "q=", "completion": "lower"}])
    own = ["name=plain", f"data.dataset_name='{corpus}'", "data.validation_split=validation"]
    assert score_plainly(model, *own) == 0
    (output,) = (tmp_path / "outputs" / "plain").iterdir()
    before = contents(output)
    assert score_plainly(model, *own) == 0
    assert list((tmp_path / "outputs" / "plain").iterdir()) == [output]
    assert contents(output) == before
    settings = model / "tokenizer_config.json"
    text = settings.read_text()
    settings.write_text(text.replace("{", '{"chat_template": "{{ messages }}",', 1))
    assert score_plainly(model, *own) == 2
    assert "model   another model's weights, settings or tokenizer" in capsys.readouterr().err
    settings.write_text(text)
    assert score_plainly(model, *own) == 0
    write_lines(corpus / "validation.jsonl", [{"prompt": "q=", "completion": "other and longer"}])
    assert score_plainly(model, *own) == 2
    assert "data.files" in capsys.readouterr().err
    assert contents(output) == before


def paired_rows(
    tmp_path: Path, rows: list[dict[str, Any]], *overrides: str, views: Sequence[str] = VIEWS
) -> PairedRows:
    file = write_lines(tmp_path / "rows.jsonl", rows)
    config = admitted(f"data.train_files=['{file}']", f"data.validation_files=['{file}']", *overrides).config
    tokenizer, _ = load_tokenizer(config.model, config.tokens)
    built = build_evaluated(config, tokenizer, ["validation"])
    bare = build_evaluated(without_thoughts(config), tokenizer, ["validation"]).sets["validation"]
    return pair_rows(built, "validation", bare, views, config, tokenizer)


def row(*thoughts: str, answer: str = "b") -> dict[str, Any]:
    return {"prompt": "a=", "completion": "".join(f"<ToW>{thought}</ToW>" for thought in thoughts) + answer}


@pytest.mark.parametrize("seed", [42, 1])
def test_rows_that_one_view_lacks_are_left_out_of_all(tmp_path: Path, seed: int) -> None:
    rows = [row("1"), row("2"), row("3", "4"), row(), row("5" * 40), row("6", answer="x" * 26), row("7" * 90)]
    own = ["data=prompt_completion", "data.max_seq_length=60", "evaluation.max_samples=6", f"seed={seed}"]
    paired = paired_rows(tmp_path, rows, *own)
    is_long = paired.donors[5] == 4  # what 4 thinks does not fit before the answer of 5
    assert paired.kept == ([0, 1, 3, 4] if is_long else [0, 1, 3, 4, 5])
    assert +paired.left_out == +Counter(no_partner=1, beyond_max_samples=1, too_long=int(is_long))
    assert all(len(paired.row("shuffled", i).labels) <= 60 for i in paired.kept)
    paired.keep(dict.fromkeys(paired.kept[1:]) | {0: [[8, 9]]})
    assert (paired.kept, sum(paired.left_out.values())) == ([0], 6)


def test_a_row_that_is_nothing_without_its_thought_is_left_out_for_that(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(thin_llama(), tmp_path / "model"))
    one_control_token().save_pretrained(folder)  # no BOS: EOS alone has nothing that predicts it
    rows = [{"text": f"<ToW>{i}</ToW>{'b' * (i % 2)}"} for i in range(4)]
    own = ["data=text", f"model.checkpoint={folder}", "data.max_dropped_fraction=1"]
    paired = paired_rows(tmp_path, rows, *own, views=["gold", "none"])
    assert (paired.kept, +paired.left_out) == ([1, 3], Counter(no_supervised_token=2))


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_bart"])
def test_chats_have_their_turns_in_every_view(tmp_path: Path, model: str) -> None:
    user = {"role": "user", "content": "hi"}
    turns = [f"<ToW>{i}</ToW>ok {i} 안녕" for i in range(6)]
    chats = [
        {
            "messages": [
                user,
                {"role": "assistant", "content": turns[i]},
                user,
                {"role": "assistant", "content": turns[i + 1]},
            ]
        }
        for i in range(0, 6, 2)
    ]
    options = ["data=messages", "tokens=tow", f"model={model}", "data.thought_pattern='<ToW>(.*?)</ToW>'"]
    options += ["data.supervised_turns=last"] if model == "tiny_bart" else []
    paired = paired_rows(tmp_path, chats, *options)
    first = 1 if model == "tiny_bart" else 0  # an encoder-decoder learns the last turn
    assert paired.kept == [0, 1, 2]
    for i in paired.kept:
        answers = [turn.partition("</ToW>")[2] for turn in turns[2 * i + first : 2 * i + 2]]
        for view in ("gold", "none", "shuffled"):
            assert paired.num_bytes(view, i) == sum(len(answer.encode()) for answer in answers)


@pytest.mark.parametrize("by", [["model=tiny_bart"], []])
def test_own_thoughts_are_written_after_what_was_written_before(
    by: list[str], runtime: Runtime, tmp_path: Path
) -> None:
    """An encoder-decoder's and a decoder's: the same row by row as many at once, and each is closed."""
    rows = [row("12", answer="x" + WORDS[i % 4]) for i in range(4)] + [row("3", "4567") for _ in range(2)]
    paired = paired_rows(tmp_path, rows, "data=prompt_completion", *by)
    config = admitted(*by).config
    tokenizer, new = load_tokenizer(config.model, config.tokens)
    torch.manual_seed(0)
    model = build_model(config, torch.device("cpu")).eval()
    resize_and_initialise(model, tokenizer, new, config.tokens, config.seed)
    for parameter in model.parameters():
        parameter.data *= 4  # else it repeats itself
    set_generation(model, config.generation, tokenizer, [tokenizer.eos_token_id])
    written = {
        size: write_thoughts(paired, paired.kept, Generator(model, runtime, size, []), 4, [tokenizer.eos_token_id], 0)
        for size in (1, 6)
    }
    assert written[1] == written[6]
    open_id, close_id = paired.tags.ids
    for i, (thoughts, num_cut) in zip(paired.kept, written[1], strict=True):
        assert thoughts is not None
        assert len(thoughts) == paired.num_thoughts(i)
        assert all(one[0] == open_id and one[-1] == close_id and len(one) <= 6 for one in thoughts)
        assert num_cut == sum(len(one) == 6 for one in thoughts)
    second = written[1][4][0]
    assert second is not None
    begun = [*paired.pieces(4)[0].ids, *second[0], open_id] if not by else [*second[0], open_id]
    prompt = torch.tensor([paired.gold[4].input_ids.tolist() if by else begun])
    more = {"decoder_input_ids": torch.tensor([[model.config.decoder_start_token_id, *begun]])} if by else {}
    made = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False, **more)
    assert made[0, -4:].tolist()[: len(second[1]) - 2] == second[1][1:-1]


def test_an_adapter_is_scored_as_it_was_trained_on_the_rows_that_were_held_out(tmp_path: Path) -> None:
    base = Path(shutil.copytree(thin_llama(), tmp_path / "base"))
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base, vocab_size=264)).save_pretrained(base)
    run = small_run(tmp_path / "run", "adapter=lora", f"model.checkpoint={base}", "model.weights=pretrained",
                    "training.max_train_steps=2", "evaluation.metrics=[]", held_out=True)  # fmt: skip
    assert evaluate.main([f"run={run}", "evaluate.views=[gold]", f"evaluate.output={tmp_path / 'out'}"]) == 0
    measured = json.loads((run / "summary.json").read_text())["eval/validation/loss"]
    assert metrics_of(tmp_path / "out")["evaluate/validation/gold/loss"] == pytest.approx(measured, rel=1e-6)
