"""Tokens that a checkpoint knows but never learned start as new ones, in every way that a model is trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from src import preflight
from src.config.schema import Weights
from src.data.tokenizer import load_tokenizer
from src.errors import TokenError
from src.model import untrained
from src.model.build import empty_model, load_weights
from src.model.embeddings import check_new_rows, embedding_matrices, resize_and_initialise
from src.model.export import load_exported
from src.model.untrained import never_trained, stored_untrained_tokens, untrained_tokens
from src.runtime.session import Runtime
from tests.conftest import ROWS, admitted, towline
from tests.test_adapters import Assembled

RESERVED = ["<|r0|>", "<|r1|>", "<|small|>", "<|learned|>"]  # ids 259 to 262
NAMED = "tokens.additional_special_tokens=['<|r0|>','<|small|>','<|learned|>','<new>']"
TAGS = ["tokens.thought_open='<|r0|>'", "tokens.thought_close='<new>'", "tokens.init.method=mean"]
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 264}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Write small models whose reserved tokens have rows as Llama 3's: kind -> folder."""
    text = {"vocab_size": 264, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    bart = AutoConfig.from_pretrained("assets/tiny_bart", vocab_size=264)
    bart.tie_word_embeddings = False
    configs = {
        "tied": AutoConfig.from_pretrained("assets/tiny_llama", tie_word_embeddings=True, **SIZES),
        "untied": AutoConfig.from_pretrained("assets/tiny_llama", tie_word_embeddings=False, **SIZES),
        "half": AutoConfig.from_pretrained("assets/tiny_llama", tie_word_embeddings=False, **SIZES),
        "own matrices": bart,
        "gpt2": AutoConfig.for_model("gpt2", **text, n_embd=64, n_layer=1, n_head=2),
    }
    folders = {}
    for kind, config in configs.items():
        torch.manual_seed(0)
        model = (AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM).from_config(config)
        for matrix in embedding_matrices(model):
            spoil(matrix.weight.data)
            if kind == "half":
                break  # its output matrix has learned all of them
        folder = tmp_path_factory.mktemp(kind.replace(" ", "_"))
        model.save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained("assets/tiny_llama")
        tokenizer.add_tokens(RESERVED)
        tokenizer.save_pretrained(folder)
        folders[kind] = str(folder)
    return folders


def spoil(weight: torch.Tensor) -> None:
    """Make rows as those of reserved tokens: two alike, one next to nothing, one learned."""
    weight[260] = weight[259]
    weight[261] *= 1e-4
    weight[263] = weight[259]  # padding, which is no token's


def chosen(base: str, *more: str) -> list[str]:
    kind = "encoder_decoder" if "own" in base else "causal_lm"
    return [f"model={kind}", f"model.checkpoint={base}", NAMED, *TAGS, *more]


def test_a_row_is_untrained_where_it_is_anothers_or_next_to_nothing() -> None:
    weight = torch.tensor([[3.0, 4.0], [5.0, 0.0], [5.0, 0.0], [0.04, 0.0], [0.06, 0.0], [0.0, 5.0], [-0.0, 5.0]])
    added = {token: i for i, token in enumerate("abcdefg")} | {"no row": 9}
    assert never_trained(weight, added) == {"b", "c", "d"}  # the median norm is 5, and -0.0 is not 0.0 in bits
    assert never_trained(weight, {"a": 0, "b": 1, "f": 5}) == set()  # only other added tokens' rows count
    assert never_trained(weight.bfloat16(), added) == {"b", "c", "d"}
    assert never_trained(weight, {}) == set()


def test_padding_decides_nothing() -> None:
    weight = torch.zeros(40, 2)
    weight[0], weight[1], weight[2] = torch.tensor([3.0, 4.0]), torch.tensor([5.0, 0.0]), torch.tensor([0.04, 0.0])
    assert never_trained(weight, {"a": 0, "b": 1, "c": 2}) == {"c"}  # the median of rows that are not 0 is 5


def test_a_tag_that_is_named_nowhere_else_starts_too(runtime: Runtime, bases: dict[str, str]) -> None:
    tags = ["tokens=none", "tokens.thought_open='<|r0|>'", "tokens.thought_close='<|learned|>'"]
    base = ["model=causal_lm", f"model.checkpoint={bases['untied']}"]
    run = Assembled(runtime, *base, *tags, "adapter=lora")
    assert run.new.tags == {"<|r0|>": 259, "<|learned|>": 262}
    assert set(run.started.ids) == {"<|r0|>"}
    trained = [p for name, p in run.model.named_parameters() if "trainable_tokens_delta" in name]
    assert [len(rows) for rows in trained] == [1, 1]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("tied", {"<|r0|>", "<|r1|>", "<|small|>"}),
        ("untied", {"<|r0|>", "<|r1|>", "<|small|>"}),
        ("half", set()),
        ("own matrices", {"<|r0|>", "<|r1|>", "<|small|>"}),
        ("gpt2", {"<|r0|>", "<|r1|>", "<|small|>"}),
    ],
)
def test_weights_and_their_files_say_the_same(bases: dict[str, str], kind: str, expected: set[str]) -> None:
    config = admitted(*chosen(bases[kind])).config
    tokenizer, new = load_tokenizer(config.model, config.tokens)
    empty = empty_model(config.model)
    model = load_weights(config.model, None, config.model.checkpoint)
    found = untrained_tokens(model, tokenizer, new, config.model)
    assert found & set(RESERVED) == expected
    assert stored_untrained_tokens(empty, tokenizer, new, config.model) == found
    config.model.weights = Weights.random
    assert untrained_tokens(model, tokenizer, new, config.model) == frozenset()
    assert stored_untrained_tokens(empty, tokenizer, new, config.model) == frozenset()


@pytest.mark.parametrize(
    ("kind", "way"),
    [
        ("tied", []),
        ("tied", ["adapter=lora"]),
        ("tied", ["adapter=dora", "export.merge=true"]),
        ("untied", ["adapter=lora"]),
        ("untied", ["adapter=qlora"]),
    ],
)
def test_untrained_tokens_start_as_new_ones_and_trained_ones_stay(
    runtime: Runtime, bases: dict[str, str], tmp_path: Path, kind: str, way: list[str]
) -> None:
    run = Assembled(runtime, *chosen(bases[kind], *way))
    assert run.started.ids == {"<|r0|>": 259, "<|small|>": 261, "<new>": 263}
    assert run.new.existing == {"<|r0|>": 259, "<|small|>": 261, "<|learned|>": 262}
    original = AutoModelForCausalLM.from_pretrained(bases[kind])
    before = {matrix.name: matrix.weight.detach() for matrix in embedding_matrices(original)}
    not_learned = {0, 259, 260, 261, 263} if kind == "tied" else {259, 260, 261, 263}  # 0 pads: zeros, if not in a head
    learned = sorted({*run.tokenizer.get_vocab().values()} - not_learned)
    check_new_rows(run.model, run.started)
    for matrix in embedding_matrices(run.model):
        old = before[matrix.name]
        torch.testing.assert_close(matrix.rows([259, 261, 263]), old[learned].mean(dim=0).expand(3, -1))
        assert torch.equal(matrix.rows([260, 262]), old[[260, 262]])
    run.train()
    for matrix in embedding_matrices(run.model):
        assert (matrix.rows([259]) - run.started.values[matrix.name][:1]).norm() > 1e-3
        if way:
            assert matrix.adapter_rows[0].keys() == {259, 261, 263}
            assert torch.equal(matrix.rows([260, 262]), before[matrix.name][[260, 262]])
    trained = run.logits()
    run.export(tmp_path / "model")
    torch.testing.assert_close(run.logits(load_exported(tmp_path, run.config)), trained, rtol=0, atol=1e-5)


def test_half_learned_is_learned(runtime: Runtime, bases: dict[str, str]) -> None:
    run = Assembled(runtime, *chosen(bases["half"], "adapter=lora"))
    assert run.started.ids == {"<new>": 263}


def test_an_encoder_decoder_starts_them_in_every_matrix(runtime: Runtime, bases: dict[str, str]) -> None:
    run = Assembled(runtime, *chosen(bases["own matrices"], "adapter=lora", "export.merge=true"))
    assert run.started.ids == {"<|r0|>": 259, "<|small|>": 261, "<new>": 263}
    assert run.started.values.keys() == {"input", "encoder", "decoder", "output"}
    check_new_rows(run.model, run.started)


def test_a_text_of_untrained_tokens_is_no_start(bases: dict[str, str]) -> None:
    config = admitted(*chosen(bases["tied"], "tokens.init.method=text", "tokens.init.text=['<|r1|>']")).config
    tokenizer, new = load_tokenizer(config.model, config.tokens)
    model = load_weights(config.model, None, config.model.checkpoint)
    found = untrained_tokens(model, tokenizer, new, config.model)
    with pytest.raises(TokenError, match=r"tokens\.init.*r1.*no pretrained token"):
        resize_and_initialise(model, tokenizer, new, config.tokens, 1, found)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Note the names of the tensors that are read from files."""
    seen: list[str] = []

    class Watched:
        def __init__(self, *given: Any, **settings: Any) -> None:
            self.file = safe_open(*given, **settings)

        def __enter__(self) -> Watched:
            self.file.__enter__()
            return self

        def __exit__(self, *given: Any) -> None:
            self.file.__exit__(*given)

        def get_tensor(self, name: str) -> torch.Tensor:
            seen.append(name)
            return self.file.get_tensor(name)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    monkeypatch.setattr(untrained, "safe_open", Watched)
    return seen


def preflighted(capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    asked = ["tracking=none", f"data.cache_dir={ROWS}", "data.limit=8", "preflight.rows=0", *overrides]
    preflight.main(asked)
    return capsys.readouterr().out


def test_preflight_says_which_are_untrained_and_reads_the_matrices_alone(
    bases: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], reads: list[str]
) -> None:
    shards = tmp_path / "shards"
    AutoModelForCausalLM.from_pretrained(bases["untied"]).save_pretrained(shards, max_shard_size="100KB")
    assert len(list(shards.glob("*.safetensors"))) > 1
    AutoTokenizer.from_pretrained(bases["untied"]).save_pretrained(shards)
    for base in (bases["untied"], str(shards)):
        reads.clear()
        text = preflighted(capsys, *chosen(base, "adapter=lora", "name=untrained_test"))
        assert sorted(reads) == ["lm_head.weight", "model.embed_tokens.weight"]
        assert "<|r0|>  one id, 259; fed" in text
        assert text.count("untrained in the checkpoint: initialised from the mean") == 2
        assert text.count("its row is kept") == 1
        assert "note     <|r0|>, <|small|>: in the tokenizer, but never trained" in text


def test_preflight_finds_matrices_under_other_names_and_says_where_it_finds_none(
    bases: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(bases["gpt2"], tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    save_file({name.removeprefix("transformer."): t for name, t in tensors.items()}, other / "model.safetensors")
    asked = chosen(str(other), "name=untrained_test", "data.max_seq_length=128")
    assert preflighted(capsys, *asked).count("untrained in the checkpoint: initialised from") == 2
    (other / "model.safetensors").unlink()
    torch.save(tensors, other / "pytorch_model.bin")
    text = preflighted(capsys, *asked, "model.use_safetensors=false")
    assert text.count("is seen when the weights are loaded") == 3


def test_a_run_says_so_and_resumes_with_the_same_rows(bases: dict[str, str], tmp_path: Path) -> None:
    command = [
        "debug=smoke", "tracking=none", *chosen(bases["tied"], "adapter=lora"), f"hydra.run.dir={tmp_path}/run",
        "data.limit=8", "checkpoint.checkpointing_steps=1", "training.max_train_steps=2",
    ]  # fmt: skip
    first = towline(*command)
    assert first.returncode == 0, first.stderr
    assert "<|r0|>, <|small|>, <new> initialised from the mean" in first.stdout
    assert "untrained in the checkpoint: <|r0|>, <|small|>; in the vocabulary, rows kept: <|learned|>" in (first.stdout)
    trained = load_file(tmp_path / "run" / "model" / "adapter_model.safetensors")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000002")
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    (tmp_path / "run" / "status.json").write_text(json.dumps(status | {"state": "FAILED"}))
    resumed = towline(*command)
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed" in resumed.stdout
    again = load_file(tmp_path / "run" / "model" / "adapter_model.safetensors")
    assert again.keys() == trained.keys()
    assert all(torch.equal(again[name], trained[name]) for name in again)
    settings = json.loads((tmp_path / "run" / "model" / "adapter_config.json").read_text())
    assert settings["trainable_token_indices"] == {"model.embed_tokens": [259, 261, 263]}
    more = towline(*command, f"hydra.run.dir={tmp_path}/more", f"init_from={tmp_path}/run")
    assert more.returncode == 0, more.stderr
