"""Evaluation: scores by their numbers, losses over tokens, generation that does not depend on its batch."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from src.config.schema import Device, MixedPrecision, RuntimeConfig
from src.data.answers import strip_thoughts
from src.data.dataset import Data, build_data
from src.data.tokenizer import load_tokenizer
from src.errors import DataError, Interrupted, ModelError, NonFiniteLossError
from src.evaluation.evaluate import Evaluator, open_evaluator
from src.evaluation.generate import cut_at
from src.evaluation.samples import sample
from src.metrics import LOSSES, THOUGHTS, answer, compute_metrics, exact_match, greater_is_better, perplexity
from src.model.build import build_model, set_generation
from src.model.embeddings import resize_and_initialise
from src.model.export import export
from src.runtime.session import Runtime, start_runtime
from src.runtime.signals import StopRequest
from src.training.head import ModelWithLoss
from tests.conftest import ROOT, admitted, write_lines
from tests.kinds import words

TAGS = ("<ToW>", "</ToW>")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a<ToW>b</ToW>c", "ac"),
        ("<ToW>b</ToW><ToW>d\ne</ToW>c", "c"),
        ("a<ToW>never closed", "a"),
        ("a</ToW>b", "a</ToW>b"),
        ("plain", "plain"),
    ],
)
def test_thoughts_are_stripped(text: str, expected: str) -> None:
    assert strip_thoughts(text, TAGS) == expected
    assert strip_thoughts(text, None) == text


def test_exact_match_is_a_share_of_answers() -> None:
    assert exact_match([" 8798\n", "8799", ""], ["8798", "8798", "8798"], None) == pytest.approx(1 / 3)
    pattern = "#### *(-?[0-9.,]*[0-9])"
    predictions = ["so #### 72.", "#### 5 then #### 7", "no number", "#### -3"]
    assert exact_match(predictions, ["#### 72", "x\n#### 7", "#### 1", "#### -3"], pattern) == 0.75


def test_an_answer_is_the_last_match() -> None:
    assert answer("#### 1\n#### 22", r"#### (\d+)") == "22"
    assert answer("none", r"#### (\d+)") is None


def test_perplexity_and_directions() -> None:
    assert perplexity(math.log(32)) == pytest.approx(32)
    assert perplexity(1e6) == math.inf
    assert greater_is_better("eval/test/exact_match")
    assert not greater_is_better("eval/validation/loss")
    assert not greater_is_better("eval/validation/perplexity")


def test_what_stands_behind_eos_is_cut() -> None:
    assert cut_at([5, 6, 2, 0, 0], [2]).ids == [5, 6]
    assert cut_at([5, 6, 2, 0, 0], [2]).stop_reason == "eos"
    assert cut_at([5, 6], [2]).stop_reason == "length"


@pytest.fixture
def runtime() -> Iterator[Runtime]:
    cpu = RuntimeConfig(device=Device.cpu, deterministic=False)
    with start_runtime(cpu, MixedPrecision.no, 3, StopRequest()) as started:
        yield started


def evaluator(runtime: Runtime, *overrides: str) -> tuple[Evaluator, Data]:
    config = admitted("data.limit=12", *overrides).config
    tokenizer, new = load_tokenizer(config.model, config.tokens)
    data = build_data(config, tokenizer)
    torch.manual_seed(0)
    model = build_model(config, torch.device("cpu")).eval()
    resize_and_initialise(model, tokenizer, new, config.tokens, config.seed)
    if model.config.is_encoder_decoder:
        for parameter in model.parameters():
            parameter.data *= 6  # else its decoder hardly hears the encoder
    set_generation(model, config.generation, tokenizer, data.stop_ids)
    return open_evaluator(config, ModelWithLoss(model), model, data, runtime), data


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_bart"])
@pytest.mark.parametrize("how", ["greedy", "beam"])
def test_generation_in_batches_equals_one_by_one(runtime: Runtime, how: str, model: str) -> None:
    overrides = [f"model={model}", f"generation={how}", "generation.max_new_tokens=12"]
    batched, data = evaluator(runtime, *overrides, "training.per_device_eval_batch_size=5")
    prompts = [data.train.prompt_ids(i)[: 3 + i % 7] for i in range(12)]
    together = batched.generator.generate(prompts, seed=0)
    single, _ = evaluator(runtime, *overrides, "training.per_device_eval_batch_size=1")
    assert together == single.generator.generate(prompts, seed=0)
    assert len({tuple(completion.ids) for completion in together}) > 3


def test_sampling_is_seeded_and_its_settings_count(runtime: Runtime) -> None:
    one, data = evaluator(runtime, "generation=sample", "generation.max_new_tokens=8", "generation.min_new_tokens=8")
    prompts = [data.train.prompt_ids(i) for i in range(4)]
    assert one.generator.generate(prompts, seed=1) == one.generator.generate(prompts, seed=1)
    assert one.generator.generate(prompts, seed=1) != one.generator.generate(prompts, seed=2)
    assert {len(completion.ids) for completion in one.generator.generate(prompts, seed=1)} == {8}


def test_the_loss_is_weighted_by_tokens_not_by_batches(runtime: Runtime) -> None:
    results = []
    for size in (1, 5, 12):
        one, data = evaluator(runtime, f"training.per_device_eval_batch_size={size}", "evaluation.metrics=[]")
        results.append(one.evaluate(data.validation.values()))
    assert set(results[0]) == {f"eval/validation/{name}" for name in LOSSES}
    for result in results[1:]:
        assert result["eval/validation/loss"] == pytest.approx(results[0]["eval/validation/loss"], rel=1e-6)


def test_generated_thoughts_are_counted_whatever_the_batches(runtime: Runtime) -> None:
    drawn = ["generation=sample", "generation.temperature=3.0", "generation.num_return_sequences=3"]
    given = [*drawn, "evaluation.metrics=[pass_at_3]", "generation.max_new_tokens=6", "generation.thoughts=forced"]
    results = []
    for size in (2, 6):
        one, data = evaluator(
            runtime, *given, f"training.per_device_eval_batch_size={size}", "evaluation.max_samples=6"
        )
        results.append(one.evaluate(data.validation.values()))
    (rows,) = data.validation.values()
    opened, closed = data.encoder.tag_ids or (0, 0)
    prompts = [rows.prompt_ids(i) for i in range(6)]
    texts = [text.ids for row in one.generator.generate_samples(prompts, runtime.seed, count=3) for text in row]
    signs = ["".join({opened: "<", closed: ">"}.get(token, "x") for token in ids) for ids in texts]
    thoughts = [found for text in signs for found in re.findall("<([^>]*)(>?)", text)]
    assert all(text[0] == "<" for text in signs)
    for result in results:
        assert [result[f"eval/validation/{name}"] for name in THOUGHTS] == [
            len(thoughts) / len(texts),
            1.0,
            sum(end == ">" for _, end in thoughts) / len(thoughts),
            sum(len(inner) for inner, _ in thoughts) / len(thoughts),
        ]


def test_max_samples_takes_the_first_rows(runtime: Runtime) -> None:
    few, data = evaluator(runtime, "evaluation.max_samples=3", "evaluation.metrics=[]")
    all_of_three, three = evaluator(runtime, "data.limit=3", "evaluation.metrics=[]")
    ours = few.evaluate(data.test.values())
    assert ours == all_of_three.evaluate(three.test.values())


def test_metrics_of_several_samples_see_all_of_them(runtime: Runtime) -> None:
    names, k = ["exact_match", "majority", "pass_at_2"], 3
    sampling = ["generation=sample", "generation.max_new_tokens=4", f"generation.num_return_sequences={k}"]
    one, data = evaluator(runtime, *sampling, f"evaluation.metrics={names}", "data.limit=4")
    rows = data.validation["validation"]
    prompts = [rows.prompt_ids(i) for i in range(len(rows))]
    texts = [[one.reader.encoder.decode(each.ids) for each in some]
             for some in one.generator.generate_samples(prompts, runtime.seed, count=k)]  # fmt: skip
    answers = [[one.reader.answer(rows, i, text) for text in some] for i, some in enumerate(texts)]
    # references that some samples have, and a model that was trained on none of them
    references = [answers[0][0], answers[1][1], answers[2][2], "none"]
    reader = SimpleNamespace(encoder=one.reader.encoder, answer=one.reader.answer, reference=lambda _, i: references[i])
    found = replace(one, reader=reader).evaluate([rows])
    expected = compute_metrics(names, [first for first, *_ in answers], references, None, samples=answers)
    assert {name: found[f"eval/validation/{name}"] for name in names} == expected
    assert expected["pass_at_2"] > expected["exact_match"]
    first_only, _ = evaluator(runtime, *sampling, "evaluation.metrics=[exact_match]", "data.limit=4")
    assert first_only.num_samples == 1


def test_samples_are_what_plain_generate_writes(runtime: Runtime) -> None:
    one, data = evaluator(runtime, "generation.max_new_tokens=10")
    (first, *_) = sample(one, data.validation["validation"], 2, step=7)
    model = one.generator.model
    assert isinstance(model, AutoModelForCausalLM._model_mapping[type(model.config)])
    ids = torch.tensor([data.validation["validation"].prompt_ids(0)])
    assert one.reader.encoder.decode(ids[0].tolist()) == first.prompt
    plain = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False, pad_token_id=0)
    assert one.reader.encoder.decode(plain[0, ids.shape[1] :].tolist()) == first.text
    assert (first.step, first.reference) == (7, data.validation["validation"].reference(0))


def test_what_the_untrained_model_wrote_stands_beside(runtime: Runtime) -> None:
    one, data = evaluator(runtime, "generation.max_new_tokens=10")
    first = sample(one, data.validation["validation"], 2, step=0)
    assert [line.untrained for line in first] == [line.text for line in first]
    later = sample(one, data.validation["validation"], 2, step=7, untrained=["a", "b"])
    assert [(line.step, line.untrained, line.text) for line in later] == [
        (7, written, line.text) for written, line in zip("ab", first, strict=True)
    ]


def test_evaluating_leaves_the_model_in_the_mode_it_was_in(runtime: Runtime) -> None:
    one, data = evaluator(runtime, "generation.max_new_tokens=2")
    one.generator.model.train()
    one.generator.generate([data.train.prompt_ids(0)], seed=0)
    assert one.generator.model.training


def test_tags_that_stand_in_the_data_are_thoughts_in_references_too(runtime: Runtime) -> None:
    one, data = evaluator(runtime, "data.thought_pattern=null")
    rows = data.validation["validation"]
    assert "<ToW>" in rows.completion(0)
    assert one.reader.reference(rows, 0).isdigit()


def test_what_can_not_be_generated_from_is_refused_before_training(runtime: Runtime, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"max_new_tokens = 1020 more do not fit into the model's 1024"):
        evaluator(runtime, "generation.max_new_tokens=1020")
    words().save_pretrained(tmp_path)
    shutil.copy(ROOT / "assets" / "tiny_llama" / "config.json", tmp_path)
    file = write_lines(tmp_path / "rows.jsonl", [{"prompt": "", "completion": "low er"}])
    with pytest.raises(DataError, match=r"rows\.jsonl:1  nothing to generate from"):
        evaluator(runtime, "model=causal_lm", f"model.checkpoint={tmp_path}", "model.weights=random", "tokens=none",
                  f"data.validation_files=['{file}']", "data.max_dropped_fraction=1")  # fmt: skip


def test_a_signal_ends_generation_between_two_tokens(runtime: Runtime) -> None:
    one, data = evaluator(runtime, "generation.max_new_tokens=500", "generation.min_new_tokens=500")
    runtime.stop.is_deferred = True
    calls = []

    def signal_comes(*_: object) -> None:
        calls.append(1)
        runtime.stop.name = "SIGTERM"

    one.generator.model.register_forward_hook(signal_comes)
    with pytest.raises(Interrupted, match="SIGTERM"):
        one.generator.generate([data.train.prompt_ids(0)], seed=0)
    assert len(calls) == 1


def test_a_loss_that_is_not_finite_is_no_result(runtime: Runtime, tmp_path: Path) -> None:
    one, data = evaluator(runtime, "evaluation.metrics=[]")
    with torch.no_grad():
        one.generator.model.get_output_embeddings().weight.fill_(float("nan"))
    with pytest.raises(NonFiniteLossError, match="validation became nan"):
        one.evaluate(data.validation.values())
    with pytest.raises(NonFiniteLossError, match=r"lm_head\.weight"):
        export(one.generator.model, None, None, tmp_path / "model", admitted().config, "card")
    assert not (tmp_path / "model").exists()


def test_what_depends_on_thoughts_is_refused_where_there_are_none(runtime: Runtime, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "rows.jsonl", [{"prompt": "1+1=", "completion": "2"}] * 8)
    plain = ["data=prompt_completion", f"data.train_files=[{file}]", f"data.validation_files=[{file}]"]
    with pytest.raises(DataError, match=r"loss\.thought_weight = 0\.5, but no row of train has a thought"):
        evaluator(runtime, *plain, "loss.thought_weight=0.5")
    best = ["checkpoint.load_best_model_at_end=true", "checkpoint.metric_for_best_model=eval/validation/thought_loss"]
    refused = "metric_for_best_model = .*, but no evaluated row has such a token"
    with pytest.raises(DataError, match=refused):
        evaluator(runtime, *plain, *best)
    evaluator(runtime, *best)
    closing = [
        "training.early_stopping_patience=1",
        "checkpoint.metric_for_best_model=eval/validation/thought_close_loss",
    ]
    evaluator(runtime, *closing)
    with pytest.raises(DataError, match=refused):  # all are cut within their first thought
        evaluator(runtime, *closing, "data.max_seq_length=14")


def test_summaries_are_scored_without_being_asked_for() -> None:
    rouge = ["rouge1", "rouge2", "rougeL"]
    assert admitted("data=dialogue_summary", "data.train_files=[data/dialogues/train.jsonl]").config.metrics == rouge
