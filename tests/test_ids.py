"""Ids: a new token's is no other token's, whatever vocabulary and matrix it comes to, and no learned row is written."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from src.config.schema import RunConfig
from src.data.encoding import Encoder
from src.data.tokenizer import load_tokenizer
from src.errors import TokenError
from src.model.adapters import add_adapter
from src.model.card import model_card
from src.model.embeddings import embedding_matrices, resize_and_initialise
from src.model.export import export, load_exported
from src.tokens import num_token_ids
from tests.conftest import ROOT, admitted, towline
from tests.kinds import byte_bpe, sentencepiece, unigram, wordpiece, words

WORDS = ["<unk>", "</s>", "-", *"abcdefgh", "<|x|>", "<|y|>"]
HOLES = ROOT.parent / "shared" / "cases" / "vocabulary_with_holes.py"


def with_ids(kind: str, ids: Sequence[int], num_added: int) -> Any:
    """Make a tokenizer whose vocabulary has these ids; the last few of its tokens are added ones."""
    vocabulary = dict(zip(WORDS, ids, strict=True))
    model: Any = {
        "words": lambda: models.WordLevel(vocabulary, unk_token="<unk>"),
        "pieces": lambda: models.WordPiece(vocabulary, unk_token="<unk>"),
        "pairs": lambda: models.BPE(vocabulary, [], unk_token="<unk>"),
    }[kind]()
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in WORDS[len(WORDS) - num_added :]])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


def small_model(num_rows: int, *, tied: bool) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=num_rows, tie_word_embeddings=tied, **sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


@cache
def composed(*overrides: str) -> RunConfig:
    return admitted("model=causal_lm", "model.checkpoint=hub/id", "tokens.init.method=mean", *overrides).config


def config_of(folder: Path, *overrides: str) -> RunConfig:
    config = composed(*overrides)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, checkpoint=str(folder)))


def of_matrices(model: Any) -> dict[str, torch.Tensor]:
    return {matrix.name: matrix.weight.detach().clone() for matrix in embedding_matrices(model)}


@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(
    kind=st.sampled_from(["words", "pieces", "pairs"]),
    gaps=st.lists(st.integers(1, 3), min_size=len(WORDS), max_size=len(WORDS)),
    num_added=st.integers(0, 2),
    more_rows=st.sampled_from([-2, 0, 0, 1, 5]),
    tied=st.booleans(),
    is_adapter=st.booleans(),
)
def test_whatever_the_ids_only_new_rows_are_written_and_the_export_loads(
    tmp_path_factory: pytest.TempPathFactory,
    kind: str,
    gaps: list[int],
    num_added: int,
    more_rows: int,
    tied: bool,
    is_adapter: bool,
) -> None:
    base, out = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("run")
    ids = [sum(gaps[:n]) for n in range(len(gaps))]
    with_ids(kind, ids, num_added).save_pretrained(base)
    small_model(ids[-1] + 1 + more_rows, tied=tied).save_pretrained(base)
    config = config_of(base, *(["adapter=lora"] if is_adapter else []))
    tokenizer, new = load_tokenizer(config.model, config.tokens)
    vocabulary = tokenizer.get_vocab()
    assert list(new.added.values()) == [ids[-1] + 1, ids[-1] + 2]
    assert len(set(vocabulary.values())) == len(vocabulary) == len(WORDS) + 2
    assert num_token_ids(tokenizer) == ids[-1] + 3
    assert {word: vocabulary[word] for word in WORDS} == dict(zip(WORDS, ids, strict=True))

    model = AutoModelForCausalLM.from_pretrained(base)
    before = of_matrices(model)
    started = resize_and_initialise(model, tokenizer, new, config.tokens, seed=1)
    rowless = {word: i for word, i in zip(WORDS, ids, strict=True) if i > ids[-1] + more_rows}
    assert started.ids == new.added | rowless
    adapter = None
    if is_adapter:
        adapter = add_adapter(model, config, list(started.ids.values()))
    row = torch.tensor([[vocabulary["a"], new.added["<ToW>"], vocabulary["b"], new.added["</ToW>"]]])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0, weight_decay=0.1)
    model(input_ids=row, labels=row).loss.backward()
    optimizer.step()
    for name, weight in of_matrices(model).items():
        old = [i for i in range(len(before[name])) if i not in started.ids.values()]
        assert torch.equal(weight[old], before[name][old])
        learned = before[name][[i for i in ids if i not in rowless.values()]]
        torch.testing.assert_close(weight[new.added["<ToW>"]], learned.mean(dim=0))
    tokens = sorted(vocabulary.values())  # a hole past the end of the matrix is padding, which nothing keeps
    expected = model.eval()(input_ids=row).logits[..., tokens]

    assert export(model, adapter, tokenizer, out / "model", config, "card") == []
    again = AutoTokenizer.from_pretrained(out / "model")
    assert again.get_vocab() == vocabulary
    assert again("a<ToW>b</ToW>", add_special_tokens=False)["input_ids"] == row[0].tolist()
    found = load_exported(out, config).eval()(input_ids=row).logits[..., tokens]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def folder_with(tokenizer: Any, folder: Path, kind: str | None = None) -> Path:
    """Save a tokenizer, under the name of another class of transformers where one is given."""
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    if kind is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": kind}))
    return folder


def without(tokenizer: Any, *gone: str) -> Any:
    """Take tokens out of a vocabulary, which leaves holes; one that is a list can't have any."""
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in gone:
        del spec["model"]["vocab"][token]
    if "merges" in spec["model"]:
        spec["model"]["merges"] = [pair for pair in spec["model"]["merges"] if "".join(pair) not in gone]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(spec))
    return tokenizer


KINDS = {
    "TokenizersBackend": lambda: without(byte_bpe(), "Ġreturn", "Ġplus"),
    "LlamaTokenizer": lambda: without(sentencepiece(legacy=False), "▁low▁lower▁lowest", "▁안녕하세요▁세계"),
    "BertTokenizer": lambda: without(wordpiece("abc"), "c", "##b"),
    "PreTrainedTokenizerFast": lambda: without(words(), "b"),
    "T5Tokenizer": unigram,
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_class_of_tokenizer_keeps_the_ids_when_it_is_saved_loaded_and_copied(tmp_path: Path, kind: str) -> None:
    folder = folder_with(KINDS[kind](), tmp_path / "base", kind)
    before = AutoTokenizer.from_pretrained(folder).get_vocab()
    config = config_of(folder)
    tokenizer, new = load_tokenizer(config.model, config.tokens)
    first = max(before.values()) + 1
    assert new.added == {"<ToW>": first, "</ToW>": first + 1}
    assert tokenizer.get_vocab() == before | new.added
    tokenizer.save_pretrained(tmp_path / "again")
    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert again.get_vocab() == tokenizer.get_vocab()
    (ids,) = Encoder(tokenizer).encode_texts(["low<ToW>a</ToW>"], is_rendered=False)
    assert [i for i in ids if i >= first] == [first, first + 1]
    _, known = load_tokenizer(config_of(tmp_path / "again").model, config.tokens)
    assert known.existing == new.added


def test_two_tokens_with_one_id_are_refused_by_name(tmp_path: Path) -> None:
    """GPT2Tokenizer adds its own end of text to a vocabulary that lacks it, by counting."""
    folder = folder_with(without(byte_bpe(), "Ġreturn", "Ġplus"), tmp_path, "GPT2Tokenizer")
    config = config_of(folder)
    with pytest.raises(TokenError, match=r"has one id for two tokens:\n  '<\|endoftext\|>' and '.*' are both 313\n"):
        load_tokenizer(config.model, config.tokens)


def test_a_token_that_can_have_no_id_of_its_own_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("src.data.tokenizer._pin", lambda *_: None)  # as where a vocabulary takes no ids
    config = config_of(folder_with(without(words(), "b"), tmp_path))
    with pytest.raises(TokenError, match=r"'<ToW>' should be 8 and is 7, the id of '<New>'"):
        load_tokenizer(config.model, config.tokens)


def test_rows_are_counted_by_the_highest_id_wherever_they_are_counted(tmp_path: Path) -> None:
    """len(tokenizer) would leave the new tokens without rows: 14 of 17 ids are tokens."""
    base, out = tmp_path / "base", tmp_path / "run"
    ids = [0, 1, 2, *range(6, 16)]
    folder_with(with_ids("pairs", ids, 2), base)
    small_model(16, tied=True).save_pretrained(base)
    config = config_of(base, "adapter=lora")
    tokenizer, new = load_tokenizer(config.model, config.tokens)
    assert (len(tokenizer), num_token_ids(tokenizer)) == (15, 18)
    model = AutoModelForCausalLM.from_pretrained(base)
    started = resize_and_initialise(model, tokenizer, new, config.tokens, seed=1)
    assert model.get_input_embeddings().weight.shape[0] == 24
    adapter = add_adapter(model, config, list(started.ids.values()))
    frozen = admitted("adapter=lora", "model=causal_lm", f"model.checkpoint={base}").frozen
    export(model, adapter, tokenizer, out / "model", config, model_card(frozen, {}, {}, {}, new.ids))
    card = (out / "model" / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {"FOLDER": str(out / "model"), "BASE": str(base)}
    exec(code, names)
    assert names["base"].get_input_embeddings().weight.shape[0] == 18
    row = torch.tensor([[16, 2, 17]])
    expected = model.eval()(input_ids=row).logits[..., :18]
    torch.testing.assert_close(names["model"].eval()(input_ids=row).logits, expected, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_a_real_vocabulary_with_holes(tmp_path: Path) -> None:
    """SmolLM2's, less five ids: the case as a user has it, through preflight and a run."""
    real = os.environ.get("TOWLINE_SMOLLM2")
    if real is None or not Path(real).is_dir():
        pytest.skip("TOWLINE_SMOLLM2 does not name the folder of SmolLM2-135M")
    if not HOLES.is_file():
        pytest.skip("the case is not beside this checkout")
    base, out = tmp_path / "base", tmp_path / "run"
    subprocess.run([sys.executable, HOLES, base, real], check=True, capture_output=True)
    done = towline(
        "debug=smoke", "tracking=none", "model=causal_lm", f"model.checkpoint={base}", f"hydra.run.dir={out}",
        "adapter=lora", "export.merge=true", "data.limit=8", "training.max_train_steps=1",
        "evaluation.max_samples=2", "evaluation.sample_prompts=0",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    before, tokenizer = AutoTokenizer.from_pretrained(base).get_vocab(), AutoTokenizer.from_pretrained(out / "model")
    assert tokenizer.get_vocab() == before | {"<ToW>": 49152, "</ToW>": 49153}
    old = AutoModelForCausalLM.from_pretrained(base).get_input_embeddings().weight
    new = AutoModelForCausalLM.from_pretrained(out / "model").get_input_embeddings().weight
    assert torch.equal(new[: len(old)], old)
