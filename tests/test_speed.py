"""The benchmark of speed: it compares what is the same, counts what is needed, and says where losses differ."""

from __future__ import annotations

import dataclasses
import importlib.util
from itertools import islice
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.speed import measuring, preparing, texts
from benchmarks.speed.__main__ import earlier, write
from benchmarks.speed.machine import RowLength, attention_flops, training_flops
from benchmarks.speed.measurement import Measurement
from benchmarks.speed.measuring import measure
from benchmarks.speed.preparing import prepare
from benchmarks.speed.results import Results, as_markdown
from benchmarks.speed.workloads import WAYS, WORKLOADS, Settings, Workload

SETTINGS = Settings("cpu", "no", warm_up=1, steps=3, rows_file=None, checkpoint=None)
SMALL = dataclasses.replace(WORKLOADS["small"], batch_size=4, width=64, num_layers=2, num_vocabulary=1024)


@pytest.mark.parametrize(
    "workload",
    [dataclasses.replace(SMALL, has_adapter=True), dataclasses.replace(SMALL, architecture="bart", texts="plain")],
    ids=["lora", "seq2seq"],
)
def test_all_ways_have_the_same_losses_at_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workload: Workload
) -> None:
    monkeypatch.setattr(measuring, "CALIBRATION_SECONDS", 0.01)
    monkeypatch.setattr(preparing, "TOKENIZER_ROWS", 50)
    monkeypatch.setattr(preparing, "TOKENIZER_SIZE", 500)
    prepare(workload, SETTINGS, tmp_path)
    has_trl = importlib.util.find_spec("trl") is not None
    ways = [way for way in WAYS.values() if way.follows_order and (has_trl or way.trainer != "trl")]
    rounds: dict[str, list[Measurement]] = {}
    for way in ways:
        if way.goes_with(workload, "cpu"):
            rounds[way.name] = [measure(workload, way, SETTINGS, tmp_path)]
            AcceleratorState._reset_state(reset_partial_state=True)
    results = Results(workload, "no", rounds)
    assert results.disagreements() == []
    assert len(rounds) >= 5
    assert {len(one.losses) for [one] in rounds.values()} == {4}
    for batching in ("padded", "length_grouped"):
        sizes = {
            (one.num_tokens, one.num_supervised) for way, [one] in rounds.items() if WAYS[way].batching == batching
        }
        assert len(sizes) == 1


def test_needed_products_are_those_that_torch_counts() -> None:
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        attn_implementation="eager",
    )
    model, length = LlamaForCausalLM(config), 24
    with FlopCounterMode(display=False) as counter:
        model(torch.arange(length)[None]).logits.sum().backward()
    row = RowLength(length, 0, supervised=length)
    masked_too = 3 * 2 * 32 * 4 * length**2  # eager attention computes what the mask hides
    needed = training_flops(model, [row]) - attention_flops(config, row) + masked_too
    assert counter.get_total_flops() == needed


def measurement(way: str, *losses: float, seconds: float = 1.0) -> Measurement:
    return Measurement(way, seconds, 100, 60, 200, list(losses), 2**30, 1e9, flops=5e8)


def test_losses_that_differ_are_reported_where_they_have_to_agree() -> None:
    rounds = {
        "towline": [measurement("towline", 5.0, 4.0)],
        "trl": [measurement("trl", 5.00001, 4.2, seconds=4.0)],
        "towline_grouped": [measurement("towline_grouped", 5.3, 4.4, seconds=1.0)],
        "trl_grouped": [measurement("trl_grouped", 5.3, 4.3, seconds=2.0)],
    }
    results = Results(WORKLOADS["small"], "no", rounds)
    assert results.disagreements() == [
        "step 2: the loss of trl is 4.200000, that of towline 4.000000",
        "step 2: the loss of trl_grouped is 4.300000, that of towline_grouped 4.400000",
    ]
    assert results.ratio("towline", "trl") == 4.0
    assert "2.00 times as many tokens a second as TRL SFTTrainer, by length" in as_markdown(results)
    assert "| TRL SFTTrainer | 25 (25 to 25) | 15 | 1.00 | 1.00 GiB | 12% | 50% | 5.0000 to 4.2000 |" in as_markdown(
        results
    )


def test_workloads_measured_before_stay_in_the_tables(tmp_path: Path) -> None:
    before, now = (
        Results(WORKLOADS[name], "no", {way: [measurement(way, 5.0, 4.0)] for way in ways}, f"{name} was measured")
        for name, ways in (("medium", ["towline", "trl"]), ("small", ["towline", "trl", "trl_grouped"]))
    )
    output = tmp_path / "speed.md"
    assert earlier(output) == {}
    write(output, {}, [before])
    kept = earlier(output)
    assert kept == {"medium": before}
    write(output, kept, [now])
    assert list(earlier(output)) == ["small", "medium"]
    written = output.read_text()
    assert written.index("small was measured") < written.index("medium was measured")
    write(output, kept, [dataclasses.replace(before, measured="medium was measured again")])
    assert earlier(output)["medium"].measured == "medium was measured again"
    assert output.with_suffix(".png").stat().st_size > 10_000


def test_rows_of_long_prompts_have_the_share_that_is_said() -> None:
    rows = list(islice(texts.rows("prompt_heavy", texts.pairs(None, seed=1)), 50))
    prompts, completions = (sum(len(row[part]) for row in rows) for part in ("prompt", "completion"))
    assert prompts / (prompts + completions) == pytest.approx(0.87, abs=0.02)
    assert rows == list(islice(texts.rows("prompt_heavy", texts.pairs(None, seed=1)), 50))
