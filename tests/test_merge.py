"""Merging: the whole weights compute what was trained, or the run is refused before it trains, or keeps the adapter."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import Linear
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedModel

from src import preflight
from src.cli.start import run_job as run
from src.config.schema import LoraConfig, RunConfig
from src.errors import ExportError, ModelError
from src.model import build
from src.model.export import export, load_exported
from src.model.quantization import disable_cpu_packing
from src.runtime.session import Runtime
from src.runtime.signals import StopRequest
from tests.conftest import admitted
from tests.test_adapters import SMALL, Assembled, chosen

SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
WAYS = {"lora": "adapter=lora", "dora": "adapter=dora", "qlora": "adapter=qlora"}
TARGETS = ["all-linear", "[lm_head]", "[embed_tokens]", "[lm_head,embed_tokens]"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Write small models with weights: kind -> folder."""
    text = {"vocab_size": 259, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    t5 = text | {"d_model": 64, "d_kv": 32, "d_ff": 64, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    scaled = SIZES | {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    configs = {
        "tied": AutoConfig.from_pretrained("assets/tiny_llama", tie_word_embeddings=True, **SIZES),
        "untied": AutoConfig.from_pretrained("assets/tiny_llama", tie_word_embeddings=False, **SIZES),
        "scaled embedding": AutoConfig.for_model("gemma3_text", **text, **scaled),
        "head with a bias": AutoConfig.for_model("phi", **text, **SIZES, num_attention_heads=2),
        "matrices that lie the other way": AutoConfig.for_model("gpt2", **text, n_embd=64, n_layer=1, n_head=2),
        "untied t5": AutoConfig.for_model("t5", **t5),
    }
    folders = {}
    for kind, config in configs.items():
        torch.manual_seed(0)
        model = (AutoModelForSeq2SeqLM if "t5" in kind else AutoModelForCausalLM).from_config(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.data.normal_(std=0.3)
        folder = tmp_path_factory.mktemp(kind.replace(" ", "_"))
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained("assets/tiny_llama").save_pretrained(folder)
        folders[kind] = str(folder)
    file = Path(folders["untied t5"], "model.safetensors")
    tensors = load_file(file)
    tensors["lm_head.weight"] = torch.randn_like(tensors["shared.weight"])
    save_file(tensors, file, metadata={"format": "pt"})
    return folders


@cache
def composed(kind: str, *overrides: str) -> RunConfig:
    lengths = ["data.max_seq_length=128", "data.max_target_length=128"]
    return admitted(*SMALL, f"model={kind}", "model.checkpoint=hub/id", *lengths, *overrides).config


def assembled(runtime: Runtime, base: str, *overrides: str, targets: str = "all-linear") -> Assembled:
    """Put a run together; configurations that differ in base and targets only are composed once."""
    config = composed("encoder_decoder" if "t5" in base else "causal_lm", *overrides)
    config = replace(config, model=replace(config.model, checkpoint=base))
    if targets != "all-linear":
        assert isinstance(config.adapter, LoraConfig)
        config.adapter = replace(config.adapter, target_modules=targets.strip("[]").split(","))
    return Assembled(runtime, config=config)


def assert_merged_is_trained(run: Assembled, folder: Path, tolerance: float = 1e-4) -> None:
    run.train()
    trained = run.logits()
    assert export(run.model, run.adapter, run.tokenizer, folder / "model", run.config, "merged", "adapter") == []
    assert (folder / "model" / "README.md").read_text() == "merged"
    torch.testing.assert_close(run.logits(load_exported(folder, run.config)), trained, rtol=0, atol=tolerance)


@pytest.mark.parametrize("tokens", ["tow", "none"])
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("tie", ["tied", "untied"])
@pytest.mark.parametrize("way", WAYS)
def test_merged_weights_are_what_was_trained_or_it_is_refused_before(
    runtime: Runtime,
    bases: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    way: str,
    tie: str,
    targets: str,
    tokens: str,
) -> None:
    asked = [WAYS[way], f"tokens={tokens}", "export.merge=true"]
    if targets != "all-linear" and tie == "tied":
        monkeypatch.setattr(build, "load_weights", lambda *_, **__: pytest.fail("weights are read"))
        with pytest.raises(ModelError, match=r"has its matrix in common with .*, and export\.merge=true writes the"):
            assembled(runtime, bases[tie], *asked, targets=targets)
    elif targets != "all-linear" and tokens == "tow":
        with pytest.raises(ModelError, match="can't have an adapter where rows of new tokens are trained in it"):
            assembled(runtime, bases[tie], *asked, targets=targets)
    else:
        assert_merged_is_trained(assembled(runtime, bases[tie], *asked, targets=targets), tmp_path)


@pytest.mark.parametrize("targets", ["[lm_head]", "[embed_tokens]"])
def test_an_adapter_on_a_tied_matrix_is_kept_apart(
    runtime: Runtime, bases: dict[str, str], tmp_path: Path, targets: str
) -> None:
    run = assembled(runtime, bases["tied"], "adapter=lora", "tokens=none", targets=targets)
    run.train()
    run.export(tmp_path / "model")
    torch.testing.assert_close(run.logits(load_exported(tmp_path, run.config)), run.logits(), rtol=0, atol=1e-6)


OTHERS = {
    "scaled embedding": [],
    "matrices that lie the other way": ["adapter.bias=all", "adapter.use_rslora=true"],
    "head with a bias": ["adapter.init_lora_weights=olora"],
    "untied t5": [],
    "untied": ["adapter.init_lora_weights=pissa", "adapter.use_dora=true"],
}


@pytest.mark.parametrize("kind", OTHERS)
def test_models_that_compute_otherwise_are_merged_with_new_tokens(
    runtime: Runtime, bases: dict[str, str], tmp_path: Path, kind: str
) -> None:
    run = assembled(runtime, bases[kind], "adapter=lora", "export.merge=true", *OTHERS[kind])
    assert_merged_is_trained(run, tmp_path)


@pytest.mark.parametrize(
    ("kind", "message"),
    [("head with a bias", "has a bias, which PEFT"), ("untied t5", "are two, but its configuration")],
)
def test_what_plain_peft_would_load_otherwise_is_written_whole_only(
    runtime: Runtime, bases: dict[str, str], kind: str, message: str
) -> None:
    with pytest.raises(ModelError, match=rf"{message}.*export\.merge=true"):
        assembled(runtime, bases[kind], "adapter=lora")


def test_rows_alone_are_refused_where_encoder_and_decoder_would_not_get_them(
    runtime: Runtime, bases: dict[str, str]
) -> None:
    with pytest.raises(ModelError, match=r"tokens_only: decoder\.embed_tokens and encoder\.embed_tokens of this T5"):
        assembled(runtime, bases["untied t5"], "adapter=tokens_only", "export.merge=true")


def test_an_untied_head_survives_where_the_configuration_calls_it_tied(runtime: Runtime, bases: dict[str, str]) -> None:
    """transformers 5.23 loads the two matrices of such a T5 and makes them one when the model is resized."""
    run = assembled(runtime, bases["untied t5"])
    stored = load_file(Path(bases["untied t5"], "model.safetensors"))
    assert torch.equal(run.model.lm_head.weight[:259], stored["lm_head.weight"])
    assert torch.equal(run.model.shared.weight[:259], stored["shared.weight"])


def test_weights_of_16_bits_are_merged_as_closely_as_they_compute(
    runtime: Runtime, bases: dict[str, str], tmp_path: Path
) -> None:
    """At most twice what casting the unmerged weights changes."""
    run = assembled(runtime, bases["tied"], "adapter=lora", "export.merge=true", "model.dtype=bfloat16")
    run.train()
    cast = run.logits()
    assert export(run.model, run.adapter, run.tokenizer, tmp_path / "model", run.config, "card", "card") == []
    merged = load_exported(tmp_path, run.config)
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}
    plain = AutoModelForCausalLM.from_pretrained(bases["tied"])
    plain.resize_token_embeddings(261, mean_resizing=False)
    exact = run.logits(PeftModel.from_pretrained(plain, tmp_path / "model" / "adapter"))
    by_casting, by_merging = ((logits - exact).square().mean().sqrt() for logits in (cast, run.logits(merged)))
    assert 0 < by_merging <= 2 * by_casting


def test_attention_that_computes_on_gpus_only_is_no_reason_to_keep_the_adapter(
    runtime: Runtime, bases: dict[str, str], tmp_path: Path
) -> None:
    run = assembled(runtime, bases["tied"], "adapter=lora", "export.merge=true")
    run.train()
    trained = run.logits()
    run.model.config._attn_implementation = "flash_attention_2"
    assert export(run.model, run.adapter, run.tokenizer, tmp_path / "model", run.config, "card", "card") == []
    torch.testing.assert_close(run.logits(load_exported(tmp_path, run.config)), trained, rtol=0, atol=1e-5)


@pytest.fixture
def wrong_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have PEFT merge another function than the adapter's."""
    right = Linear.get_delta_weight
    monkeypatch.setattr(Linear, "get_delta_weight", lambda self, adapter: 1.5 * right(self, adapter))


@pytest.mark.usefixtures("wrong_sums")
@pytest.mark.parametrize("way", [["adapter=lora"], ["adapter=qlora"], ["adapter=lora", "model.dtype=bfloat16"]])
def test_a_merge_that_changes_the_model_is_seen_and_the_adapter_kept(
    runtime: Runtime, bases: dict[str, str], tmp_path: Path, way: list[str]
) -> None:
    run = assembled(runtime, bases["untied"], *way, "export.merge=true")
    run.train()
    trained = run.logits()
    (warning,) = export(run.model, run.adapter, run.tokenizer, tmp_path / "model", run.config, "merged", "adapter")
    assert "merging changes the model: logits of" in warning
    assert "model/ holds the adapter" in warning
    assert sorted(file.name for file in (tmp_path / "model").iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "generation_config.json", "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip
    assert (tmp_path / "model" / "README.md").read_text() == "adapter"
    loaded = load_exported(tmp_path, run.config)
    disable_cpu_packing(loaded)
    tolerance = 1e-5 if "model.dtype=bfloat16" not in way else 2e-2
    torch.testing.assert_close(run.logits(loaded), trained, rtol=0, atol=tolerance)


@pytest.mark.parametrize("fault", ["other weights", "a lost adapter"])
def test_a_base_made_float32_wrongly_is_seen_and_the_adapter_kept(
    runtime: Runtime, bases: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    run = assembled(runtime, bases["untied"], "adapter=qlora", "adapter.lora_alpha=512", "export.merge=true")
    run.train()
    if fault == "other weights":
        right = PreTrainedModel.dequantize

        def dequantize(self: Any, **settings: Any) -> Any:
            whole = right(self, **settings)
            for name, parameter in whole.named_parameters():
                parameter.data *= 3 if "mlp" in name else 1
            return whole

        monkeypatch.setattr(PreTrainedModel, "dequantize", dequantize)
    else:
        load = PeftModel.from_pretrained

        def from_pretrained(*given: Any, **settings: Any) -> Any:
            loaded = load(*given, **settings)
            for name, parameter in loaded.named_parameters():
                parameter.data *= 0 if "lora_B" in name else 1
            return loaded

        monkeypatch.setattr(PeftModel, "from_pretrained", from_pretrained)
    (warning,) = export(run.model, run.adapter, run.tokenizer, tmp_path / "model", run.config, "merged", "adapter")
    assert "can't be made float32 as they were trained" in warning
    assert (tmp_path / "model" / "adapter_config.json").exists()


def test_a_library_that_fails_to_merge_costs_no_run(
    runtime: Runtime, bases: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = assembled(runtime, bases["untied"], "adapter=lora", "export.merge=true")
    run.train()

    def fails(*_: Any) -> None:
        raise KeyError("base_layer")

    monkeypatch.setattr(Linear, "get_delta_weight", fails)
    (warning,) = export(run.model, run.adapter, run.tokenizer, tmp_path / "model", run.config, "merged", "adapter")
    assert "the adapter can't be merged" in warning
    assert (tmp_path / "model" / "adapter_config.json").exists()


@pytest.mark.usefixtures("wrong_sums")
def test_an_adapter_that_nobody_could_load_is_no_result(runtime: Runtime, tmp_path: Path) -> None:
    run = Assembled(runtime, "adapter=lora", "export.merge=true")
    run.train()
    with pytest.raises(ExportError, match=r"merging changes the model.*its base, random weights, is nowhere else"):
        run.export(tmp_path / "model")


@pytest.mark.usefixtures("wrong_sums")
def test_a_run_whose_merge_failed_says_so_and_is_finished(
    bases: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = admitted("debug=smoke", *chosen(bases["tied"], "adapter=lora", "export.merge=true"), "data.limit=8")
    run(replace(asked, run_dir=tmp_path / "run"), StopRequest())
    assert "warning: export.merge: merging changes the model" in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "FINISHED"
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "PeftModel.from_pretrained(base, FOLDER)" in card
    assert "merged into the weights" not in card


def test_what_merging_would_change_is_refused_by_preflight_too(
    bases: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [
        "tracking=none",
        "data.limit=8",
        *chosen(bases["tied"], "adapter=lora", "adapter.target_modules=[lm_head]"),
    ]
    assert preflight.main([*asked, "export.merge=true", "tokens=none"]) == 2
    message = capsys.readouterr().err
    assert "lm_head has its matrix in common with model.embed_tokens (tied weights)" in message
    assert "or export.merge=false keeps the adapter apart" in message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["adapter.init_lora_weights=pissa"], "adapter.init_lora_weights=pissa changes it: model.embed_tokens would"),
        (["adapter.use_dora=true"], "DoRA divides by norms, and lm_head has rows of zeros .the first is 0;"),
    ],
)
def test_a_tied_head_that_an_adapter_would_spoil_is_refused_without_merging_too(
    runtime: Runtime, bases: dict[str, str], settings: list[str], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        assembled(runtime, bases["tied"], "adapter=lora", "tokens=none", *settings, targets="[lm_head]")
