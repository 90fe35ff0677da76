"""Several finished runs as one: the mean of their weights, of their probabilities, or the text most like the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GenerationConfig

from src.combining.consensus import most_alike, similarity_by
from src.combining.soup import WeightSum
from src.data.trained import rows_of_files, trained_rows
from src.errors import ModelError
from src.evaluation.answers import Completion
from src.evaluation.generate import Generator
from src.runtime.session import Runtime
from tests.conftest import admitted, write_lines
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
    trained = []
    for fold in range(4):
        config = admitted(*named, "data.num_folds=4", f"data.fold={fold}").config
        trained.append(trained_rows(config, print))
        assert len(trained[-1]) == 15
    assert len(set.union(*trained)) == 20
    assert not set.intersection(*trained)
    same, other = rows_of_files(config.data, [tests], print)
    assert same in set.union(*trained)
    assert other not in set.union(*trained)


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
