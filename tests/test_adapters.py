"""Adapters, quantised weights and rows of new tokens: where they start, that they alone learn, and that they last."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, BitsAndBytesConfig

from src import predict
from src.config.schema import Device, RunConfig, RuntimeConfig
from src.data.batching import collate
from src.data.dataset import Data, build_data
from src.data.tokenizer import load_tokenizer
from src.errors import ConfigError, ExportError, ModelError
from src.model import build
from src.model import export as exporting
from src.model.adapters import Adapter, add_adapter, with_rows
from src.model.build import build_model, set_generation
from src.model.card import model_card
from src.model.embeddings import InitialisedRows, check_new_rows, embedding_matrices, resize_and_initialise
from src.model.export import export, load_exported
from src.model.quantization import disable_cpu_packing
from src.model.untrained import untrained_tokens
from src.runtime.session import Runtime
from src.training.loop import train
from src.training.state import TrainState, build_train_state
from tests.conftest import admitted, read_lines, towline

CPU = RuntimeConfig(device=Device.cpu, deterministic=False)
FAMILIES = {"llama": "assets/tiny_llama", "bart": "assets/tiny_bart"}
TIES = ("tied", "untied")
WAYS = {
    "full": [],
    "lora": ["adapter=lora"],
    "dora": ["adapter=dora"],
    "int8": ["adapter=lora", "quantization=int8"],
    "qlora": ["adapter=qlora"],
    "rows": ["adapter=tokens_only"],
}


def auto(source: str) -> Any:
    return AutoModelForSeq2SeqLM if "bart" in source else AutoModelForCausalLM


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Write small models with weights: family-tie -> folder; BART scales its embeddings and has a bias on logits."""
    folders = {}
    for family, source in FAMILIES.items():
        for tie in TIES:
            torch.manual_seed(0)
            extra = {"scale_embedding": True} if family == "bart" else {}
            config = AutoConfig.from_pretrained(source, tie_word_embeddings=tie == "tied", **extra)
            model = auto(source).from_config(config)
            if family == "bart":
                model.final_logits_bias.normal_()
            folder = tmp_path_factory.mktemp(f"{family}-{tie}")
            model.save_pretrained(folder)
            AutoTokenizer.from_pretrained(source).save_pretrained(folder)
            folders[f"{family}-{tie}"] = str(folder)
    return folders


SMALL = ("debug=smoke", "data.limit=16", "optimizer.lr=1e-2")


class Assembled:
    """A run as src.run puts it together, up to its first step."""

    def __init__(self, runtime: Runtime, *overrides: str, config: RunConfig | None = None) -> None:
        self.runtime = runtime
        asked = (*SMALL, *overrides)
        self.config: RunConfig = admitted(*asked).config if config is None else config
        torch.manual_seed(0)
        self.tokenizer, self.new = load_tokenizer(self.config.model, self.config.tokens)
        self.data: Data = build_data(self.config, self.tokenizer)
        self.model = build_model(self.config, runtime.device)
        set_generation(self.model, self.config.generation, self.tokenizer, self.data.stop_ids)
        untrained = untrained_tokens(self.model, self.tokenizer, self.new, self.config.model)
        self.started: InitialisedRows = resize_and_initialise(
            self.model, self.tokenizer, self.new, self.config.tokens, self.config.seed, untrained
        )
        self.adapter: Adapter | None = add_adapter(self.model, self.config, list(self.started.ids.values()))
        self.state: TrainState = build_train_state(self.model, self.data.train, self.config, runtime, self.new.ids)

    def train(self) -> None:
        for _ in train(self.state, self.data.train, self.config, self.runtime, pad_token_id=0):
            pass

    def logits(self, model: Any | None = None) -> Tensor:
        """Give the logits of real tokens for some rows that hold the new ones, [rows, seq, tokens]."""
        model = model or self.model
        model.eval()
        batch = collate(self.data.train, [[0], [1], [2]], 0)
        inputs = {"input_ids": batch.input_ids}
        if batch.target_ids is not None:
            inputs |= {"attention_mask": batch.attention_mask, "decoder_input_ids": batch.target_ids}
        with torch.no_grad():
            return model(**inputs).logits[..., : len(self.tokenizer)].float()

    def export(self, folder: Path) -> Path:
        export(self.model, self.adapter, self.tokenizer, folder, self.config, "card")
        return folder


def chosen(base: str, *more: str) -> list[str]:
    kind = "encoder_decoder" if "bart" in base else "causal_lm"
    return [f"model={kind}", f"model.checkpoint={base}", *more]


def plain_base(base: str, tokenizer: Any, quantization: BitsAndBytesConfig | None = None) -> Any:
    """Load a base as an adapter's card says."""
    settings = {} if quantization is None else {"quantization_config": quantization, "device_map": {"": "cpu"}}
    model = auto(base).from_pretrained(base, **settings)
    assert model.get_input_embeddings().weight.shape[0] < len(tokenizer)
    model.resize_token_embeddings(len(tokenizer))
    return model


def of_lookups(model: Any) -> dict[str, Tensor]:
    """Give every matrix by name, also those that are tied to others."""
    return {matrix.name: matrix.weight.detach() for matrix in embedding_matrices(model)}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tie", TIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_new_rows_start_where_they_should_learn_and_last(
    runtime: Runtime, bases: dict[str, str], tmp_path: Path, family: str, tie: str, way: str
) -> None:
    base = bases[f"{family}-{tie}"]
    merge = ["export.merge=true"] if way != "full" else []
    run = Assembled(runtime, *chosen(base, *WAYS[way], *merge))
    original = auto(base).from_pretrained(base)
    check_new_rows(run.model, run.started)
    dash = run.tokenizer("---", add_special_tokens=False)["input_ids"]
    before = of_lookups(original)
    matrices = embedding_matrices(run.model)
    assert {matrix.name for matrix in matrices} == before.keys()
    expected_names = {"llama": {"input", "output"}, "bart": {"input", "encoder", "decoder", "output"}}[family]
    assert before.keys() == ({"input"} if tie == "tied" else expected_names)
    ids = list(run.new.ids.values())
    for matrix in matrices:  # before the first step: new rows as their recipe says, old rows as they were
        recipe = before[matrix.name][dash].mean(dim=0)
        torch.testing.assert_close(matrix.rows(ids), recipe.expand(2, -1), rtol=0, atol=1e-7)
        assert torch.equal(matrix.weight.detach()[: len(before[matrix.name])], before[matrix.name])

    run.train()
    used = [
        m for m in matrices if not (family == "bart" and tie == "untied" and m.name == "input")
    ]  # looked up by none
    for matrix in used:
        recipe = before[matrix.name][dash].mean(dim=0)
        # an encoder reads no thought, and a decoder nothing behind the last closing tag
        moved = (matrix.rows(ids) - recipe).norm(dim=1)
        assert matrix.name == "encoder" or moved.min() > 1e-3, matrix.name
        if way != "full":
            assert torch.equal(matrix.weight.detach()[: len(before[matrix.name])], before[matrix.name])

    trained = run.logits()
    folder = run.export(tmp_path / "model")
    if way == "full":
        reloaded = auto(base).from_pretrained(folder)
        torch.testing.assert_close(run.logits(reloaded), trained, rtol=0, atol=1e-5)
        return
    settings = {
        "qlora": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        ),
        "int8": BitsAndBytesConfig(load_in_8bit=True),
    }.get(way)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tolerance = 5e-2 if way == "int8" else 1e-5  # int8 rounds what its layers are fed too
    merged = auto(base).from_pretrained(folder)
    torch.testing.assert_close(run.logits(merged), trained, rtol=0, atol=tolerance)
    assert not hasattr(merged.config, "quantization_config")
    if (family, tie) == ("bart", "untied"):
        return  # transformers can't resize such a base: see the test below
    adapted = PeftModel.from_pretrained(plain_base(base, tokenizer, settings), folder / "adapter")
    disable_cpu_packing(adapted)  # else bitsandbytes computes in bfloat16 on CPUs that have it: 1e-2
    torch.testing.assert_close(run.logits(adapted), trained, rtol=0, atol=1e-5)


def test_an_adapter_alone_is_what_is_exported_and_loads_as_its_card_says(
    runtime: Runtime, bases: dict[str, str], tmp_path: Path
) -> None:
    run = Assembled(runtime, *chosen(bases["llama-tied"], "adapter=qlora"))
    run.train()
    folder = run.export(tmp_path / "model")
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert weights < 4 * 1.1 * sum(p.numel() for p in run.model.parameters() if p.requires_grad)  # no whole matrix
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == bases["llama-tied"]
    loaded = load_exported(tmp_path, run.config)
    torch.testing.assert_close(run.logits(loaded), run.logits(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("way", ["full", "lora", "int8", "qlora", "merged"])
def test_the_code_on_the_card_loads_the_result(
    runtime: Runtime, bases: dict[str, str], tmp_path: Path, way: str
) -> None:
    overrides = ["adapter=lora", "export.merge=true"] if way == "merged" else WAYS[way]
    frozen = admitted(*chosen(bases["llama-untied"], *overrides)).frozen
    run = Assembled(runtime, *chosen(bases["llama-untied"], *overrides))
    run.train()
    report = {"train": {"rows_kept": 16, "tokens": 905, "supervised_tokens": 729}}
    made = {"git": {"commit": "0123abc", "dirty": True}, "config_hash": "4567"}
    card = model_card(frozen, report, {"eval/test/loss": 1.23456, "perf/x": 1.0}, made, run.new.ids)
    export(run.model, run.adapter, run.tokenizer, tmp_path / "model", run.config, card)
    text = (tmp_path / "model" / "README.md").read_text()
    for part in (
        "0123abc, with changes",
        "| train | 16 | 905 | 729 |",
        "| eval/test/loss | 1.235 |",
        "| `<ToW>` | 259 |",
    ):
        assert part in text
    assert "perf/x" not in text
    code = text.split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {"FOLDER": str(tmp_path / "model"), "BASE": bases["llama-untied"]}
    exec(code, names)
    disable_cpu_packing(names["model"])
    assert names["tokenizer"].get_vocab() == run.tokenizer.get_vocab()
    torch.testing.assert_close(run.logits(names["model"]), run.logits(), rtol=0, atol=1e-5)


def test_only_the_adapter_and_the_new_rows_have_gradients(runtime: Runtime, bases: dict[str, str]) -> None:
    run = Assembled(runtime, *chosen(bases["llama-untied"], "adapter=lora"))
    run.model.train()
    batch = collate(run.data.train, [[0], [1], [2]], 0)
    run.state.loss_model(**batch.inputs()).objective.backward()
    trained = {name for name, parameter in run.model.named_parameters() if parameter.grad is not None}
    assert trained == {n for n, p in run.model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or "trainable_tokens_delta" in name for name in trained)
    rows = [p for name, p in run.model.named_parameters() if "trainable_tokens_delta" in name]
    assert [tuple(p.shape) for p in rows] == [(2, 128), (2, 128)]
    assert all(p.grad is not None and p.grad.norm() > 0 for p in rows)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", ["int8", "qlora"])
def test_gradients_through_quantised_weights_are_the_same_after_an_evaluation(
    runtime: Runtime, bases: dict[str, str], family: str, way: str
) -> None:
    """Against bitsandbytes 0.50 on a CPU with AVX512-BF16: weights packed in evaluation pass no gradient on."""
    run = Assembled(runtime, *chosen(bases[f"{family}-tied"], *WAYS[way]))

    def gradients() -> dict[str, Tensor]:
        run.model.train()
        run.model.zero_grad()
        run.state.loss_model(**collate(run.data.train, [[0], [1]], 0).inputs()).objective.backward()
        return {n: p.grad.clone() for n, p in run.model.named_parameters() if p.grad is not None}

    before = gradients()
    run.logits()
    after = gradients()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    first_layer = [
        norm for name, g in before.items() if "layers.0." in name and "lora_B" in name and (norm := g.norm())
    ]
    assert first_layer


class Reference(nn.Module):
    """A matrix with some rows replaced, as PEFT computes it: by a copy."""

    def __init__(self, base: nn.Module, ids: Tensor) -> None:
        super().__init__()
        self.base, self.ids = base, ids

    def forward(self, x: Tensor, rows: Tensor) -> Tensor:
        whole = self.base.weight.index_copy(0, self.ids, rows)
        if isinstance(self.base, nn.Linear):
            return functional.linear(x, whole, self.base.bias)
        return functional.embedding(x, whole)


@pytest.mark.parametrize("kind", ["embedding", "head", "head with a bias"])
def test_rows_of_their_own_compute_as_if_they_stood_in_the_matrix(kind: str) -> None:
    torch.manual_seed(0)
    ids = torch.tensor([7, 3])
    rows = torch.randn(2, 4, requires_grad=True)
    base = nn.Embedding(9, 4) if kind == "embedding" else nn.Linear(4, 9, bias="bias" in kind)
    base.requires_grad_(False)
    x = torch.tensor([[3, 1, 7], [0, 7, 7]]) if kind == "embedding" else torch.randn(2, 3, 4)
    expected = Reference(base, ids)(x, rows)
    (expected_gradient,) = torch.autograd.grad(expected.square().sum(), rows)
    found = with_rows(base, x, ids, rows)
    (gradient,) = torch.autograd.grad(found.square().sum(), rows)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("merge", ["false", "true"])
@pytest.mark.parametrize("init", ["gaussian", "olora", "orthogonal", "pissa"])
def test_each_start_of_an_adapter_is_the_same_model_when_loaded(
    runtime: Runtime, bases: dict[str, str], tmp_path: Path, init: str, merge: str
) -> None:
    settings = ["adapter=lora", f"adapter.init_lora_weights={init}", f"export.merge={merge}"]
    run = Assembled(runtime, *chosen(bases["llama-untied"], *settings))
    run.train()
    trained = run.logits()
    loaded = load_exported(run.export(tmp_path / "model").parent, run.config)
    torch.testing.assert_close(run.logits(loaded), trained, rtol=0, atol=1e-5)


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_checkpointed_activations_train_alike(runtime: Runtime, bases: dict[str, str], adapter: str) -> None:
    weights = []
    for is_on in ("false", "true"):
        base = chosen(bases["llama-untied"], f"adapter={adapter}", f"model.gradient_checkpointing={is_on}")
        run = Assembled(runtime, *base)
        run.train()
        weights.append({name: p.detach().clone() for name, p in run.model.named_parameters() if p.requires_grad})
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=0, atol=1e-6)


def test_a_known_token_is_left_alone(runtime: Runtime, bases: dict[str, str], tmp_path: Path) -> None:
    first = Assembled(runtime, *chosen(bases["llama-tied"], "tokens.init.text=[a,b]"))
    folder = first.export(tmp_path / "model")
    again = Assembled(
        runtime, *chosen(str(folder), "adapter=lora", "tokens.additional_special_tokens=['<ToW>','</ToW>','<x>']")
    )
    assert again.started.ids == {"<x>": again.new.added["<x>"]}
    (apart,) = [p for name, p in again.model.named_parameters() if "trainable_tokens_delta" in name and p.shape[0] == 1]
    assert apart.shape == (1, 128)
    known = list(again.new.existing.values())
    (matrix,) = embedding_matrices(again.model)
    (before,) = embedding_matrices(first.model)
    assert torch.equal(matrix.rows(known), before.rows(known))


TARGETS = [
    ("[q_proj,lm_head]", "lm_head can't have an adapter where rows of new tokens are trained in it"),
    ("[q_proj,embed_tokens]", r"model\.embed_tokens can't have an adapter"),
    ("[q_prj]", r"q_prj \(did you mean q_proj\?\) not found in LlamaForCausalLM; its linear layers are down_proj, "),
    ("[q_proj,wrong]", r"adapter\.target_modules: wrong not found"),
    ("'.*attn.*query'", "not found"),
    ("q_proj", r"a list of names is written \[q_proj\]"),
]


@pytest.mark.parametrize(("targets", "message"), TARGETS)
def test_targets_that_are_not_there_are_told_before_weights_are_read(
    runtime: Runtime, bases: dict[str, str], monkeypatch: pytest.MonkeyPatch, targets: str, message: str
) -> None:
    if "can't" not in message:  # told once the matrices of the model are known
        monkeypatch.setattr(build, "load_weights", lambda *_, **__: pytest.fail("weights are read"))
    with pytest.raises(ModelError, match=message):
        Assembled(runtime, *chosen(bases["llama-tied"], "adapter=lora", f"adapter.target_modules={targets}"))


def test_modules_that_are_left_out_must_be_there(runtime: Runtime, bases: dict[str, str]) -> None:
    with pytest.raises(ModelError, match=r"adapter\.exclude_modules: q_prjo \(did you mean q_proj\?\) not found"):
        Assembled(runtime, *chosen(bases["llama-tied"], "adapter=lora", "adapter.exclude_modules=[q_prjo]"))


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_a_model_with_code_of_its_own_is_exported_and_loaded_again(
    runtime: Runtime, bases: dict[str, str], tmp_path: Path
) -> None:
    folder = tmp_path / "own"
    shutil.copytree(bases["llama-untied"], folder)
    (folder / "own_code.py").write_text(OWN_CODE)
    settings = json.loads((folder / "config.json").read_text())
    code = {"AutoConfig": "own_code.OwnConfig", "AutoModelForCausalLM": "own_code.OwnModel"}
    (folder / "config.json").write_text(json.dumps(settings | {"model_type": "own", "auto_map": code}))
    with pytest.raises(ModelError, match="trust_remote_code"):
        Assembled(runtime, *chosen(str(folder)))
    run = Assembled(runtime, *chosen(str(folder), "model.trust_remote_code=true"))
    run.export(tmp_path / "model")
    assert torch.equal(run.logits(load_exported(tmp_path, run.config)), run.logits())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["adapter=none"], "is stored quantised, and such weights can't be trained"),
        (["adapter=lora", "quantization=int8"], "is stored quantised already: quantization=none"),
        (["adapter=lora", "export.merge=true"], "nothing can be merged into it"),
    ],
)
def test_weights_that_are_stored_quantised_take_an_adapter_only(
    runtime: Runtime, bases: dict[str, str], tmp_path: Path, overrides: list[str], message: str
) -> None:
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(bases["llama-untied"], quantization_config=four_bits)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained("assets/tiny_llama").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=message):
        Assembled(runtime, *chosen(str(tmp_path), *overrides))
    Assembled(runtime, *chosen(str(tmp_path), "adapter=lora")).train()


WRONG_MODELS = [
    ("bart-tied", ["model=causal_lm"], "is of the type encoder_decoder; model.type is causal_lm"),
    ("llama-tied", ["model=encoder_decoder"], "is of the type causal_lm; model.type is encoder_decoder"),
    ("llama-tied", ["model=causal_lm", "model.attn_implementation=flash_attention_2", "runtime.device=auto"],
     "needs a GPU, the package flash-attn"),
]  # fmt: skip


@pytest.mark.parametrize(("base", "overrides", "message"), WRONG_MODELS)
def test_a_model_that_does_not_go_with_the_choices_is_told_before_weights_are_read(
    runtime: Runtime,
    bases: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    base: str,
    overrides: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(build, "load_weights", lambda *_, **__: pytest.fail("weights are read"))
    with pytest.raises(ModelError, match=message):
        Assembled(runtime, *overrides, f"model.checkpoint={bases[base]}")


def test_qlora_goes_all_the_way_by_its_commands(bases: dict[str, str], tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(bases["llama-tied"], base)
    run = tmp_path / "run"
    done = towline("debug=smoke", "tracking=none", *chosen(str(base)), "adapter=qlora", f"hydra.run.dir={run}")
    assert (done.returncode, done.stderr) == (0, "")
    assert "frozen in 4 bits (nf4)" in done.stdout
    summary = json.loads((run / "summary.json").read_text())
    assert 0 < summary["num_trained_parameters"] < summary["num_parameters"]
    asked = (f"run={run}", "data.limit=3")
    ends = towline(*asked, main=predict.main)
    assert (ends.returncode, ends.stderr) == (0, "")
    assert len(read_lines(run / "predictions" / "test.jsonl")) == 3
    shutil.rmtree(base)
    gone = towline(*asked, "force=true", main=predict.main)
    assert gone.returncode == 2
    assert str(base) in gone.stderr
    assert "Traceback" not in gone.stderr


@pytest.mark.parametrize("targets", ["[q_proj,v_proj]", "'model.layers.1.*_proj'", "all-linear"])
def test_targets_are_names_or_a_pattern(runtime: Runtime, bases: dict[str, str], targets: str) -> None:
    run = Assembled(runtime, *chosen(bases["llama-tied"], "adapter=lora", f"adapter.target_modules={targets}"))
    adapted = {n.split(".lora_")[0] for n, p in run.model.named_parameters() if p.requires_grad and "lora_" in n}
    assert len(adapted) == {"[": 6, "'": 7, "a": 21}[targets[0]]
    assert not any("lm_head" in name for name in adapted)


def test_an_untied_encoder_decoder_is_exported_whole_or_not_at_all(runtime: Runtime, bases: dict[str, str]) -> None:
    with pytest.raises(ModelError, match=r"matrices of their own.* export\.merge=true"):
        Assembled(runtime, *chosen(bases["bart-untied"], "adapter=lora"))


def test_4_bits_on_a_cpu_need_widths_of_64(runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = AutoConfig.from_pretrained("assets/tiny_llama", intermediate_size=100)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained("assets/tiny_llama").save_pretrained(tmp_path)
    monkeypatch.setattr(build, "load_weights", lambda *_, **__: pytest.fail("weights are read"))
    with pytest.raises(ModelError, match=r"multiple of 64.*quantization=int8(.|\n)*mlp\.down_proj: 100"):
        Assembled(runtime, *chosen(str(tmp_path), "adapter=qlora"))


REFUSED = [
    (["quantization=nf4", "model=causal_lm", "model.checkpoint=hub/id"], "quantised weights can't be trained"),
    (["quantization=int8", "adapter=lora"], "only a checkpoint's weights are quantised"),
    (["model.dtype=float16"], "float16 weights can't be trained"),
    (
        ["data.metrics=[rouge9]"],
        "rouge9 is not one of exact_match, majority, rouge1, rouge2, rougeL, chrf, bleu, pass_at_<k>; did",
    ),
    (["adapter=lora"], "an adapter on random weights fits no other model"),
    (["export.merge=true"], "there is no adapter to merge"),
    (["adapter=lora", "export.merge=true", "tokens=none", "optimizer.embedding_lr=1e-3"], "tokens has none"),
    (["loss.thought_weight=2", "tokens=none"], "no thoughts are written"),
    (["adapter=lora", "adapter.r=0"], "not a whole number of at least 1"),
    (["adapter=lora", "adapter.target_modules=[]"], "not a text, or a list of texts"),
    (["adapter=lora", "adapter.init_lora_weights=pizza"], "gaussian, olora, orthogonal, pissa"),
    (["adapter=lora", "adapter.init_lora_weights=pissa_niter_4"], "gaussian, olora, orthogonal, pissa"),
    (["adapter=dora", "quantization=int8", "model=causal_lm", "model.checkpoint=hub/id"], "DoRA on weights in 8 bits"),
    (["adapter=lora", "adapter.layers_to_transform=0"], "only where adapter.target_modules is a list"),
    (["adapter=qlora", "adapter.init_lora_weights=pissa"], "changes the base weights"),
    (["adapter=lora", "adapter.rank=8"], "unknown key; did you mean adapter.r?"),
    (["quantization=int8", "quantization.load_in_4bit=true", "adapter=lora"], "8 bits or 4, not both"),
]


@pytest.mark.parametrize(("overrides", "message"), REFUSED, ids=lambda value: " ".join(value)[:40])
def test_what_can_not_work_is_refused_at_the_gate(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        admitted(*overrides)


def test_a_result_that_does_not_load_as_it_was_trained_fails_the_run(
    runtime: Runtime, bases: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Assembled(runtime, *chosen(bases["llama-untied"]))

    save = type(run.model).save_pretrained

    def spoilt(model: Any, folder: Path) -> None:
        save(model, folder)
        stored = load_file(folder / "model.safetensors")
        stored["lm_head.weight"][run.new.added["</ToW>"]] += 1e-3
        save_file(stored, folder / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(type(run.model), "save_pretrained", spoilt)
    with pytest.raises(ExportError, match=r"differ:\n  lm_head\.weight"):
        run.export(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    adapted = Assembled(runtime, *chosen(bases["llama-untied"], "adapter=lora"))
    file = "adapter_model.safetensors"
    monkeypatch.setattr(exporting, "load_file", lambda path: load_file(path) | {"more": torch.zeros(1)})
    with pytest.raises(ExportError, match=r"does not hold what was trained:\n  more"):
        adapted.export(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / file).exists()


def test_an_export_is_compared_without_a_second_model(
    runtime: Runtime, bases: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Any] = []

    def remembered(*given: Any, **settings: Any) -> Any:
        loaded.append(build.load_weights(*given, **settings))
        return loaded[-1]

    monkeypatch.setattr(exporting, "load_weights", remembered)
    Assembled(runtime, *chosen(bases["llama-tied"])).export(tmp_path / "model")
    (model,) = loaded
    assert all(parameter.is_meta for parameter in model.parameters())


def test_experts_that_are_stored_one_by_one_are_compared_as_they_load(
    runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = AutoConfig.for_model(
        "mixtral", vocab_size=2048, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained("assets/tiny_llama").save_pretrained(tmp_path / "base")
    run = Assembled(runtime, *chosen(str(tmp_path / "base")))
    stored = load_file(run.export(tmp_path / "model") / "model.safetensors")
    assert stored.keys() - run.model.state_dict().keys()
    monkeypatch.setattr(exporting, "_differing", lambda written, _: [name for name, _ in written if "experts" in name])
    with pytest.raises(ExportError, match=r"differ:\n  model\.layers\.0\.mlp\.experts\.\w+_proj\n"):
        run.export(tmp_path / "again")


def test_an_adapter_that_does_not_fit_its_base_fails_the_run(
    runtime: Runtime, bases: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Assembled(runtime, *chosen(bases["llama-untied"], "adapter=lora"))
    smaller = AutoConfig.from_pretrained(bases["llama-untied"], intermediate_size=64)
    with torch.device("meta"):
        monkeypatch.setattr(exporting, "empty_model", lambda _: AutoModelForCausalLM.from_config(smaller))
        with pytest.raises(ExportError, match=r"can't be loaded onto .*size mismatch"):
            run.export(tmp_path / "model")
    monkeypatch.undo()
    save = type(run.adapter).save

    def other_token(adapter: Adapter, folder: Path) -> None:
        save(adapter, folder)
        settings = json.loads((folder / "adapter_config.json").read_text())
        settings["trainable_token_indices"]["lm_head"] = [5, 6]
        (folder / "adapter_config.json").write_text(json.dumps(settings))

    monkeypatch.setattr(Adapter, "save", other_token)
    with pytest.raises(ExportError, match="other tokens have rows of their own"):
        run.export(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_rows_are_watched(runtime: Runtime, bases: dict[str, str]) -> None:
    run = Assembled(runtime, *chosen(bases["llama-untied"], "adapter=lora", "optimizer=sgd", "optimizer.lr=0.5"))
    watched = run.state.token_monitor
    start = watched.metrics()
    for name in ("<ToW>", "</ToW>"):
        assert start[f"tokens/{name}/cosine_to_start"] == pytest.approx(1.0)
        assert f"tokens/{name}/grad_norm" not in start
    run.train()
    after = watched.metrics()
    (inputs, output) = embedding_matrices(run.model)
    row = inputs.rows([run.new.added["<ToW>"]])[0]
    assert after["tokens/<ToW>/norm"] == pytest.approx(row.norm().item())
    assert after["tokens/<ToW>/cosine_to_start"] < 1 - 1e-6
    assert after["tokens/<ToW>/grad_norm"] > 0
    assert after["tokens/</ToW>/output_norm"] == pytest.approx(output.rows([run.new.added["</ToW>"]]).norm().item())


def test_two_new_tokens_cost_no_matrix_of_memory(tmp_path: Path) -> None:
    """PEFT by itself would hold a copy of both matrices and their gradients: 131 MB here."""
    config = AutoConfig.from_pretrained("assets/tiny_llama", vocab_size=32_000, hidden_size=256)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained("assets/tiny_llama").save_pretrained(tmp_path / "base")
    peaks = []
    for name, tokens in (("without", "[]"), ("with", "['<a>','</a>']")):
        done = towline(
            "debug=smoke", "tracking=none", "model=causal_lm", f"model.checkpoint={tmp_path}/base", "adapter=lora",
            "tokens=none", f"tokens.additional_special_tokens={tokens}", f"hydra.run.dir={tmp_path}/{name}",
            "training.per_device_train_batch_size=2",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        peaks.append(json.loads((tmp_path / name / "summary.json").read_text())["peak_memory_bytes"])
    assert peaks[1] < 1.05 * peaks[0]
    assert peaks[1] - peaks[0] < 32_000 * 256 * 4 / 2  # half of one matrix
