"""Exports: another form of what a run trained, whole or not there, with the run as it was."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from src import export
from src.checkpoint.exported import exported_digests
from src.cli.start import run_job as train
from src.config.frozen import read_status
from src.runtime.signals import StopRequest
from tests.conftest import ROOT, ForkedCommand, admitted, read_lines, write_lines

LEARNED = [{"prompt": f"{i % 7}=", "completion": f"<ToW>{i % 7}</ToW>{'xyz'[i % 3] * (1 + i % 7)}"} for i in range(24)]
SHORT = ["training.max_train_steps=4", "evaluation.eval_steps=2", "evaluation.sample_prompts=0"]
SHORT += ["checkpoint.checkpointing_steps=1", "checkpoint.keep_last=4", "optimizer.lr=0.01", "data.metrics=[]"]


def trained(folder: Path, *overrides: str) -> Path:
    """Train four steps, each of which is kept; return the run's folder."""
    rows = write_lines(folder.with_suffix(".jsonl"), LEARNED)
    files = [f"data.train_files=['{rows}']", f"data.validation_files=['{rows}']", "data.test_files=null"]
    train(admitted(*SHORT, *files, f"hydra.run.dir={folder}", *overrides), StopRequest())
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run that trained all weights, and adapters on its result with other new tokens, on whole and 4-bit weights."""
    base, before = tmp_path_factory.mktemp("runs"), os.getcwd()
    os.chdir(ROOT)
    try:
        whole = trained(base / "whole")
        on_it = [f"model.checkpoint={whole / 'model'}", "model.weights=pretrained", "tokens=hcot"]
        adapters = {name: trained(base / name, f"adapter={name}", *on_it) for name in ("lora", "qlora")}
    finally:
        os.chdir(before)
    return {"whole": whole, **adapters}


def logits(model: Any, tokenizer: Any) -> torch.Tensor:
    ids = torch.tensor([tokenizer("3= <ToW>3</ToW><hCoT>xx</hCoT>x")["input_ids"]])
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})
    with torch.no_grad():
        result: torch.Tensor = model.eval()(**inputs).logits
    return result


def with_adapter(run: Path, base: Any) -> Any:
    """Load a run's adapter as its model card says, by PEFT alone."""
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    num_ids = max(tokenizer.get_vocab().values()) + 1
    if base.get_input_embeddings().weight.shape[0] < num_ids:
        base.resize_token_embeddings(num_ids, mean_resizing=False)
    return PeftModel.from_pretrained(base, run / "model")


def everything_but_exports(run: Path) -> dict[str, Any]:
    return {name: digest for name, digest in exported_digests(run).items() if not name.startswith("export")}


def test_merged_weights_are_base_and_adapter_and_new_rows_bit_for_bit(runs: dict[str, Path]) -> None:
    run, before = runs["lora"], everything_but_exports(runs["lora"])
    assert export.main([f"run={run}"]) == 0
    folder = run / "export" / "merged-float32"
    tokenizer, merged = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(runs["whole"] / "model")
    adapted = with_adapter(run, base)
    torch.testing.assert_close(logits(merged, tokenizer), logits(adapted, tokenizer), rtol=0, atol=1e-5)
    rows = load_file(run / "model" / "adapter_model.safetensors")
    ids = tokenizer.convert_tokens_to_ids(["<hCoT>", "</hCoT>"])
    for name, matrix in (("embed_tokens", merged.get_input_embeddings()), ("lm_head", merged.get_output_embeddings())):
        (trained_rows,) = (tensor for key, tensor in rows.items() if f"{name}.token_adapter" in key)
        assert torch.equal(matrix.weight[ids], trained_rows)
    assert everything_but_exports(run) == before


def test_a_quantised_base_is_dequantised_first(runs: dict[str, Path]) -> None:
    run = runs["qlora"]
    assert export.main([f"run={run}"]) == 0
    folder = run / "export" / "merged-float32"
    tokenizer, merged = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert not hasattr(merged.config, "quantization_config")
    from transformers import BitsAndBytesConfig

    bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_use_double_quant=True,
    )
    base = AutoModelForCausalLM.from_pretrained(runs["whole"] / "model", quantization_config=bits, device_map="cpu")
    expected = logits(with_adapter(run, base.dequantize()), tokenizer)
    torch.testing.assert_close(logits(merged, tokenizer), expected, rtol=0, atol=1e-4)


def test_type_and_padding_are_as_asked(runs: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "small"
    assert (
        export.main([f"run={runs['lora']}", "export.dtype=bfloat16", "export.padding=false", f"export.output={out}"])
        == 0
    )
    stored, tokenizer = load_file(out / "model.safetensors"), AutoTokenizer.from_pretrained(out)
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert json.loads((out / "config.json").read_text())["vocab_size"] == len(tokenizer) == 263
    whole = (
        load_file(runs["lora"] / "export" / "merged-float32" / "model.safetensors")
        if (export.main([f"run={runs['lora']}"]) == 0)
        else {}
    )
    for name, tensor in whole.items():
        assert torch.equal(stored[name], tensor[: len(stored[name])].to(torch.bfloat16)), name
    assert not list(tmp_path.glob(".*"))


def test_an_encoder_decoder_loses_padding_and_no_tie(tmp_path: Path) -> None:
    run = trained(tmp_path / "bart", "model=tiny_bart")
    assert export.main([f"run={run}", "export.padding=false"]) == 0
    folder = run / "export" / "merged-float32-unpadded"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    before, after = (AutoModelForSeq2SeqLM.from_pretrained(place) for place in (run / "model", folder))
    assert (
        after.get_input_embeddings().weight.shape[0] == len(tokenizer) < before.get_input_embeddings().weight.shape[0]
    )
    assert after.get_output_embeddings().weight is after.get_input_embeddings().weight
    torch.testing.assert_close(logits(after, tokenizer), logits(before, tokenizer)[..., : len(tokenizer)])
    assert not (folder / "Modelfile").exists()  # Ollama takes causal models only


@pytest.mark.parametrize("kind", ["whole", "lora", "qlora"])
def test_a_checkpoint_is_exported_as_the_run_would_have(runs: dict[str, Path], kind: str, tmp_path: Path) -> None:
    """The last step's weights are those of model/; an earlier one's are what a run of so many steps ends with."""
    run = runs[kind]
    for which in ("last", "step-2"):
        assert export.main([f"run={run}", f"export.checkpoint={which}", f"export.output={tmp_path / which}"]) == 0
    assert export.main([f"run={run}", f"export.output={tmp_path / 'model'}"]) == 0
    tensors = {name: load_file(tmp_path / name / "model.safetensors") for name in ("last", "step-2", "model")}
    assert all(torch.equal(tensors["last"][name], tensor) for name, tensor in tensors["model"].items())
    assert any(not torch.equal(tensors["step-2"][name], tensor) for name, tensor in tensors["model"].items())


def test_the_card_of_a_checkpoint_says_which_and_what_it_was_trained_on(runs: dict[str, Path], tmp_path: Path) -> None:
    out, run = tmp_path / "out", runs["whole"]
    assert export.main([f"run={run}", "export.checkpoint=step-2", "export.dtype=bfloat16", f"export.output={out}"]) == 0
    card = (out / "README.md").read_text()
    assert "after step 2. They are written in bfloat16" in card
    assert "- whole.jsonl" in card  # the training rows
    assert "base_model" not in card  # random weights are on no hub
    assert json.loads((out / "export.json").read_text())["source"]["config_hash"] in card


def test_the_best_is_the_best_evaluations(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs["whole"]
    lines = [line for line in read_lines(run / "metrics.jsonl") if "eval/validation/loss" in line]
    best = min(lines, key=lambda line: line["eval/validation/loss"])["step"]
    assert export.main([f"run={run}", "export.checkpoint=best", f"export.output={tmp_path / 'best'}"]) == 0
    assert f"step-{best:08}" in capsys.readouterr().out


def test_a_run_that_was_stopped_is_exported_from_its_checkpoints(runs: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "stopped"
    shutil.copytree(runs["whole"], run)
    (run / "status.json").write_text(json.dumps(read_status(run) | {"state": "PREEMPTED"}))
    shutil.rmtree(run / "model")
    assert export.main([f"run={run}"]) == 2
    assert export.main([f"run={run}", "export.checkpoint=last"]) == 0
    last = load_file(run / "export" / "merged-float32-last" / "model.safetensors")
    assert all(
        torch.equal(last[name], t) for name, t in load_file(runs["whole"] / "model" / "model.safetensors").items()
    )


def test_the_adapter_alone_is_what_the_run_wrote(runs: dict[str, Path]) -> None:
    assert export.main([f"run={runs['lora']}", "export.merge=false"]) == 0
    folder, name = runs["lora"] / "export" / "adapter-float32", "adapter_model.safetensors"
    before, after = (load_file(place / name) for place in (runs["lora"] / "model", folder))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_the_card_and_the_modelfile_say_how_to_serve_it(runs: dict[str, Path], tmp_path: Path) -> None:
    assert export.main([f"run={runs['lora']}", f"export.output={tmp_path / 'whole'}"]) == 0
    card = (tmp_path / "whole" / "README.md").read_text()
    for line in ("vllm serve FOLDER", "ollama create NAME -f FOLDER/Modelfile", "hf upload USER/NAME FOLDER"):
        assert f"\n{line}\n" in card
    assert str(tmp_path) not in card
    assert (tmp_path / "whole" / "Modelfile").read_text() == (
        "FROM .\nPARAMETER num_ctx 128\nPARAMETER num_predict 64\nPARAMETER repeat_penalty 1.0\n"
        'PARAMETER temperature 0\nPARAMETER stop "</s>"\nTEMPLATE """{{ .Prompt }}"""\n'
    )
    adapter_card = (runs["lora"] / "model" / "README.md").read_text()
    assert "vLLM refuses adapters with rows of new tokens" in adapter_card
    assert "vllm serve" not in adapter_card


def test_a_modelfile_can_quote_what_ends_an_answer() -> None:
    from src.data.answers import AnswerFrame
    from src.data.dataset import build_encoder
    from src.data.tokenizer import load_tokenizer
    from src.exporting.modelfile import modelfile

    config = admitted().config
    tokenizer, _ = load_tokenizer(config.model, config.tokens)
    prompts = replace(build_encoder(config, tokenizer), frame=AnswerFrame(after='"end"\nof turn'))
    assert 'PARAMETER stop "</s>"\nPARAMETER stop """"end"\nof turn"""\n' in modelfile(config, tokenizer, prompts)


def test_a_modelfile_has_what_was_around_a_prompt_in_training(tmp_path: Path) -> None:
    from src.data.dataset import build_data, build_encoder
    from src.data.tokenizer import load_tokenizer
    from src.exporting.modelfile import modelfile

    chats = [{"messages": [{"role": "user", "content": "What {{is}} it?"}, {"role": "assistant", "content": "It."}]}]
    file = write_lines(tmp_path / "chats.jsonl", chats)
    files = [f"data.train_files=['{file}']", "data.validation_files=null", "data.test_files=null"]
    for overrides in (["data=messages"], ["data=messages", "data.system_prompt='Be \"{{kind}}\".'"]):
        config = admitted(*overrides, *files, "data.validation_fraction=0", "evaluation.eval_steps=null").config
        tokenizer, _ = load_tokenizer(config.model, config.tokens)
        data = build_data(config, tokenizer)
        template = (
            modelfile(config, tokenizer, build_encoder(config, tokenizer))
            .partition('TEMPLATE """')[2]
            .removesuffix('"""\n')
        )
        written = template.replace("{{ .Prompt }}", "What {{is}} it?").replace('{{ "{{" }}', "{{")
        assert tokenizer.decode(data.train.first.prompt_ids(0)) == tokenizer.bos_token + written


def test_what_is_there_is_left_and_nothing_else_is_overwritten(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    ask = [f"run={runs['whole']}", f"export.output={out}"]
    assert export.main(ask) == 0
    stamp = (out / "model.safetensors").stat().st_mtime_ns
    assert export.main(ask) == 0
    assert "left as it is" in capsys.readouterr().out
    assert (out / "model.safetensors").stat().st_mtime_ns == stamp
    assert export.main([*ask, "export.dtype=float16"]) == 2
    assert "force=true" in capsys.readouterr().err
    assert export.main([*ask, "export.dtype=float16", "force=true"]) == 0
    (out / "Modelfile").write_text("FROM .\n# mine\n")
    (out / "model.gguf").write_text("converted")
    assert export.main([*ask, "export.dtype=float16"]) == 0  # what people add and edit is theirs
    assert export.main([*ask, "export.dtype=float16", "force=true"]) == 2
    assert "model.gguf" in capsys.readouterr().err
    assert (out / "model.gguf").read_text() == "converted"
    (out / "model.gguf").unlink()
    (out / "config.json").write_text("{}")
    assert export.main([*ask, "export.dtype=float16"]) == 2
    assert "not as it was written: config.json" in capsys.readouterr().err
    assert export.main([*ask, "export.dtype=float16", "force=true"]) == 0
    (out / "export.json").unlink()
    assert export.main([*ask, "force=true"]) == 2  # whatever it is now, it is not known to be an export
    assert "no export" in capsys.readouterr().err
    assert (out / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["export.merge=false"], "this run has none"),
        (["export.checkpoint=step-9"], "keeps no weights of step 9"),
        (["export.checkpoint=newest"], "best, last or step-N"),
        (["export.dtype=int4"], "export.dtype"),
        (["model.dtype=bfloat16"], "does not read it"),
        (["optimizer=sgd"], "keeps the options"),
        (["export.output=RUN"], "a run's folder"),
        (["export.output=RUN/model/small"], "what a run has written"),
        (["export.output=RUN/checkpoints/step-00000099"], "what a run has written"),
        (["dir=RUN"], "unknown key"),
    ],
)
def test_each_problem_is_told(
    runs: dict[str, Path], overrides: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs["whole"]
    before = sorted(run.iterdir())
    assert export.main([f"run={run}", *(one.replace("RUN", str(run)) for one in overrides)]) == 2
    err = capsys.readouterr().err
    assert told in err
    assert "Traceback" not in err
    assert sorted(run.iterdir()) == before


def test_weights_that_the_type_cannot_hold_are_no_export(runs: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs["whole"], run)
    from safetensors.torch import save_file

    tensors = load_file(run / "model" / "model.safetensors")
    tensors["model.norm.weight"][0] = 1e6  # more than 16 bits hold
    save_file(tensors, run / "model" / "model.safetensors", metadata={"format": "pt"})
    status = read_status(run)
    (run / "status.json").write_text(json.dumps(status | {"model": exported_digests(run / "model")}))
    assert export.main([f"run={run}", "export.dtype=float16", f"export.output={tmp_path / 'half'}"]) == 1
    assert not (tmp_path / "half").exists()
    assert export.main([f"run={run}", f"export.output={tmp_path / 'full'}"]) == 0


def kill_at(number: int, folder: str) -> None:
    """Have this process killed at the N-th time that it opens, makes, renames or removes something in a folder."""
    count = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event in ("open", "os.mkdir", "os.rename", "os.remove") and str(arguments[0]).startswith(folder):
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


MOMENTS = int(os.environ.get("TOWLINE_EXPORT_KILLS", "4"))


def test_a_kill_leaves_the_run_as_it_was_and_an_export_whole_or_not_there(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    run, out = runs["lora"], tmp_path / "out"
    before = everything_but_exports(run)
    assert export.main([f"run={run}", f"export.output={out}"]) == 0
    for moment in range(MOMENTS):
        arguments = [f"run={run}", f"export.output={out}", "force=true"]
        command = ForkedCommand(
            arguments,
            tmp_path / "said",
            prepare=partial(kill_at, 3 + moment * 48 // MOMENTS, str(tmp_path)),
            main=export.main,
        )
        assert command.wait(120) == -signal.SIGKILL
        assert everything_but_exports(run) == before
        if out.exists():
            there = {name: digest for name, digest in exported_digests(out).items() if name != "export.json"}
            assert json.loads((out / "export.json").read_text())["files"] == there
    assert export.main([f"run={run}", f"export.output={out}", "force=true"]) == 0
    AutoModelForCausalLM.from_pretrained(out)
    assert not list(tmp_path.glob(".*"))
