"""adapter=tokens_only: the rows of new tokens are all that is trained, kept, loaded and merged."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from src import export, predict
from src.cli.start import run_job
from src.errors import ModelError
from src.runtime.signals import StopRequest
from tests.conftest import ROOT, admitted, read_lines, write_lines
from tests.test_gate import refusal

WIDTH = 128  # of tiny_llama
ROWS = [{"prompt": f"{i % 7}=", "completion": f"<ToW>{i % 7}</ToW>{'xyz'[i % 3] * (1 + i % 7)}"} for i in range(16)]
TEXT = "3=<ToW>3</ToW>xx"
SHORT = ["model=causal_lm", "training.max_train_steps=3", "evaluation.eval_steps=2", "evaluation.sample_prompts=0"]
SHORT += ["checkpoint.checkpointing_steps=1", "optimizer.lr=0.01", "data.metrics=[]", "generation.max_new_tokens=4"]


def trained(folder: Path, base: Path, *overrides: str) -> Path:
    rows = write_lines(folder.parent / "rows.jsonl", ROWS)
    files = [f"data.train_files=['{rows}']", f"data.validation_files=['{rows}']", f"data.test_files=['{rows}']"]
    start = [f"model.checkpoint={base}", "adapter=tokens_only"]
    run_job(admitted(*SHORT, *files, *start, f"hydra.run.dir={folder}", *overrides), StopRequest())
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Three steps on a tied and on an untied model: (base, run)."""
    place, before = tmp_path_factory.mktemp("tokens_only"), os.getcwd()
    os.chdir(ROOT)
    try:
        found = {}
        for tie in ("tied", "untied"):
            torch.manual_seed(0)
            config = AutoConfig.from_pretrained("assets/tiny_llama", tie_word_embeddings=tie == "tied")
            base = place / f"base-{tie}"
            AutoModelForCausalLM.from_config(config).save_pretrained(base)
            AutoTokenizer.from_pretrained("assets/tiny_llama").save_pretrained(base)
            found[tie] = (base, trained(place / tie, base))
    finally:
        os.chdir(before)
    return found


@pytest.mark.parametrize(
    ("tie", "matrices"), [("tied", ["model.embed_tokens"]), ("untied", ["lm_head", "model.embed_tokens"])]
)
def test_two_rows_of_each_matrix_are_trained_and_nothing_else(
    runs: dict[str, tuple[Path, Path]], tie: str, matrices: list[str]
) -> None:
    base, run = runs[tie]
    num = len(matrices) * 2 * WIDTH
    assert json.loads((run / "summary.json").read_text())["num_trained_parameters"] == num
    file = run / "model" / "adapter_model.safetensors"
    assert [tuple(rows.shape) for rows in load_file(file).values()] == len(matrices) * [(2, WIDTH)]
    assert file.stat().st_size < 4 * num + 1000
    assert export.main([f"run={run}"]) == 0
    merged = load_file(run / "export" / "merged-float32" / "model.safetensors")
    before = load_file(base / "model.safetensors")
    assert merged.keys() == before.keys()
    assert sorted(name for name in before if not torch.equal(merged[name], before[name])) == [
        f"{name}.weight" for name in matrices
    ]
    for name in matrices:  # new rows came, and none that was there has changed
        assert torch.equal(merged[f"{name}.weight"][: len(before[f"{name}.weight"])], before[f"{name}.weight"])


def test_a_fresh_process_loads_it_as_its_card_says_and_computes_what_was_merged(
    runs: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    parts = ["import torch"]
    for tie, (base, run) in runs.items():
        card = (run / "model" / "README.md").read_text()
        assert "An adapter of the rows of new tokens alone (tokens_only) on" in card
        code = card.split("```python\n")[1].split("```")[0]
        parts += [
            f"FOLDER, BASE = {str(run / 'model')!r}, {str(base)!r}",
            code,
            f"ids = torch.tensor([tokenizer({TEXT!r})['input_ids']])",
            f"torch.save(model.eval()(ids).logits[..., : len(tokenizer)], {str(tmp_path / tie)!r})",
        ]
    script = tmp_path / "load.py"
    script.write_text("\n".join(parts))
    done = subprocess.run([sys.executable, "-W", "error::UserWarning", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for tie, (_, run) in runs.items():
        if not (whole := run / "export" / "merged-float32").exists():
            assert export.main([f"run={run}"]) == 0
        tokenizer = AutoTokenizer.from_pretrained(whole)
        ids = torch.tensor([tokenizer(TEXT)["input_ids"]])
        with torch.no_grad():
            merged = AutoModelForCausalLM.from_pretrained(whole).eval()(ids).logits[..., : len(tokenizer)]
        torch.testing.assert_close(torch.load(tmp_path / tie), merged, rtol=0, atol=1e-5)


def test_it_resumes_exactly_is_trained_on_and_is_merged_where_all_weights_are_trained(
    runs: dict[str, tuple[Path, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, straight = runs["untied"]
    rows = load_file(straight / "model" / "adapter_model.safetensors")
    again = Path(shutil.copytree(straight, tmp_path / "again"))
    shutil.rmtree(again / "checkpoints" / "step-00000003")
    status = json.loads((again / "status.json").read_text())
    (again / "status.json").write_text(json.dumps(status | {"state": "FAILED"}))
    trained(again, base)
    assert "resumed" in capsys.readouterr().out
    resumed = load_file(again / "model" / "adapter_model.safetensors")
    assert all(torch.equal(resumed[name], rows[name]) for name in rows)
    still = ("training.max_train_steps=1", "optimizer.lr=1e-12", f"init_from={straight}")
    more = load_file(trained(tmp_path / "more", base, *still) / "model" / "adapter_model.safetensors")
    assert all(torch.allclose(more[name], rows[name], rtol=0, atol=1e-6) for name in rows)
    whole = load_file(trained(tmp_path / "whole", base, *still, "adapter=none") / "model" / "model.safetensors")
    for name in ("model.embed_tokens", "lm_head"):
        (learned,) = (tensor for key, tensor in rows.items() if name in key)
        torch.testing.assert_close(whole[f"{name}.weight"][259:261], learned, rtol=0, atol=1e-6)


def test_texts_are_generated_with_the_rows(runs: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    run = runs["tied"][1]
    assert predict.main([f"run={run}", f"predict.output={tmp_path / 'out'}"]) == 0
    assert len(read_lines(tmp_path / "out" / "test.jsonl")) == len(ROWS)


def test_it_lies_on_weights_in_4_bits_and_is_merged_into_them_dequantised(
    runs: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    run = trained(tmp_path / "run", runs["tied"][0], "quantization=nf4", "export.merge=true")
    (rows,) = load_file(run / "model" / "adapter" / "adapter_model.safetensors").values()
    merged = load_file(run / "model" / "model.safetensors")
    assert torch.equal(merged["model.embed_tokens.weight"][259:261], rows)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["num_trained_parameters"] == 2 * WIDTH


def test_it_is_refused_where_no_row_is_new(runs: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    base, run = runs["tied"]
    told = refusal(*SHORT, f"model.checkpoint={base}", "adapter=tokens_only", "tokens=none")
    assert "adapter.type = tokens_only" in told
    assert "tokens=tow, or adapter=lora" in told
    if not (whole := run / "export" / "merged-float32").exists():
        assert export.main([f"run={run}"]) == 0
    with pytest.raises(ModelError, match="has trained those of <ToW>, </ToW> already"):
        trained(tmp_path / "again", whole)
