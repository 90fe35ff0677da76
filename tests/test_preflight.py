"""Preflight: what it says is so, what it draws is there, and an error in the data gives exit code 1."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from src import preflight
from src.checkpoint.store import SMALL_BYTES
from src.config.gate import admit
from src.data.dataset import build_data
from src.data.encoding import IGNORE_INDEX
from src.data.tokenizer import load_tokenizer
from src.inspection.drawing import Paint, histogram
from tests.conftest import GSM8K, ROOT, ROWS, ForkedCommand, read_lines, write_lines

QUIET = ["tracking=none", f"data.cache_dir={ROWS}"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a folder of its own, with the project's own files at hand."""
    for name in ("assets", "data"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def said(capsys: pytest.CaptureFixture[str], *overrides: str, code: int = 0) -> str:
    assert preflight.main([*QUIET, *overrides]) == code
    return capsys.readouterr().out


def only(file: str) -> list[str]:
    return [f"data.train_files=['{file}']", "data.validation_files=null", "data.test_files=null"]


def test_it_shows_what_will_be_assembled_without_loading_weights(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = said(capsys, "data.limit=100", "preflight.rows=1")
    for words in (
        "LlamaForCausalLM of assets/tiny_llama",
        "707,456 parameters, 3 layers",
        "<ToW>  one id, 259; fed 400 times, supervised 400 times; initialised from the mean of '-' '-' '-'",
        "100 of 100 rows (0 truncated, 0 dropped)",
        "data/tow_addition/train.jsonl:1",
        "<s>9714+7703={<ToW>4+3+0=07</ToW>",
        "}[17417]<</s>>",
        "8 (2 epochs) of 32 x 1 rows",
        "2 x 707,456 trained parameters x 4 B: exp_avg, exp_avg_sq",
        "100 of 100 whole rows decode to their text",
        "100 teach where to end",
    ):
        assert words in text
    assert (here / "outputs/default/preflight/lengths.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((here / "outputs/default/preflight/preflight.json").read_text())
    assert report["steps"] == 8
    assert report["memory"]["optimizer state"] == 2 * 4 * 707_456
    assert report["data"]["train"]["rows_kept"] == 100
    assert not list(here.glob("outputs/default/2*"))  # no run's folder


def test_the_dump_holds_every_row_of_train_in_the_order_of_the_file(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said(capsys, "data.limit=30", "preflight.dump=rows.jsonl", "preflight.rows=0")
    request = admit([*QUIET, "data.limit=30"])
    assert request.run is not None
    config = request.run.config
    tokenizer, _ = load_tokenizer(config.model, config.tokens)
    train = build_data(config, tokenizer).train
    dumped = read_lines(here / "rows.jsonl")
    source = read_lines(here / "data/tow_addition/train.jsonl")
    assert len(dumped) == 30
    for i, line in enumerate(dumped):
        assert line["input_ids"] == train[i].input_ids.tolist()
        assert line["labels"] == train[i].labels.tolist()
        assert tokenizer.decode(line["input_ids"][1:-1]) == source[i]["prompt"] + source[i]["completion"]
        covered = np.zeros(len(line["labels"]), dtype=bool)
        for span in line["spans"]:
            text = tokenizer.decode(line["input_ids"][span["start"] : span["stop"]])
            assert text.startswith("<ToW>") == text.endswith("</ToW>") == (span["kind"] == "thought")
            covered[span["start"] : span["stop"]] = True
        assert covered.tolist() == [label != IGNORE_INDEX for label in line["labels"]]


def test_a_row_is_shown_as_several_epochs_have_it(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": "a b", "completion": f" <ToW> {'why' * i} </ToW> c <ToW>xyz</ToW> d"} for i in range(3)]
    fades = ["data.thought_schedule={tokens_per_epoch: 3}", "training.num_train_epochs=5", "preflight.rows=0"]
    # two steps in the first epoch, one in the others
    fades += ["data.batching=packed", "data.max_seq_length=64", "training.per_device_train_batch_size=1"]
    text = said(capsys, *only(write_lines(here / "rows.jsonl", rows)), *fades)
    assert "\nsteps       6" in text
    assert re.search(r"\n +at most \d+ tokens fed \(thoughts fade\);", text)
    shown = text.partition("fading ")[2].partition("\nsteps ")[0]
    parts = [line.strip() for line in shown.splitlines()[1:]]
    assert parts == [
        *("epoch 0", "<s>a b[ ]{<ToW>  </ToW>}[ c ]{<ToW>xyz</ToW>}[ d]<</s>>"),
        *("epoch 1", "<s>a b[ c d]<</s>>", "epoch 2", "<s>a b[ c d]<</s>>", "epoch 4", "<s>a b[ c d]<</s>>"),
    ]


def test_a_row_of_weight_0_is_dumped_as_one_that_is_not_learned(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": "p", "completion": "<ToW>a</ToW>b", "w": w} for w in (2, 0)]
    text = said(capsys, *only(write_lines(here / "rows.jsonl", rows)), "data.weight_column=w", "preflight.dump=dump")
    assert "error" not in text
    assert "rows.jsonl:1  weight 2\n" in text
    assert "rows.jsonl:2  weight 0\n" in text
    learned, unlearned = read_lines(here / "dump")
    assert learned["weights"] == [0, 0, 2, 2, 2, 2, 2]
    assert (unlearned["weights"], unlearned["parts"], unlearned["spans"]) == ([0] * 7, [None] * 7, [])


def test_a_streamed_set_is_dumped_whole(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write_lines(here / "rows.jsonl", [{"prompt": f"{i}=", "completion": "x"} for i in range(1200)])
    overrides = [*only(rows), "data.streaming=true", "training.max_train_steps=3"]
    assert "streamed" in said(capsys, *overrides, "preflight.dump=dump.jsonl")
    assert len(read_lines(here / "dump.jsonl")) == 1200


def test_rows_of_which_none_teaches_to_stop_are_an_error(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_lines(here / "rows.jsonl", [{"prompt": "a", "completion": "b" * 50}] * 4)
    text = said(capsys, *only(file), "data.max_seq_length=20", code=1)
    assert "error    train: no row teaches the model to stop" in text
    assert "all are cut" in text
    assert "4 rows (100.0%) are cut at data.max_seq_length = 20" in text


def test_rows_of_validation_that_stand_in_train_are_told(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = write_lines(here / "train.jsonl", [{"prompt": f"{i}", "completion": "x"} for i in (1, 2, 3, 3)])
    test = write_lines(here / "test.jsonl", [{"prompt": f"{i}", "completion": "x"} for i in (3, 4)])
    text = said(capsys, *only(train), f"data.validation_files=['{test}']")
    assert "warning  validation: 1 row of 2 also in train" in text
    assert "test.jsonl:1)" in text
    assert "train: 1 row is exactly like an earlier one" in text
    assert "<ToW>, </ToW> are in no training row, so they will not be trained" in text


def test_rows_that_merge_over_the_seam_are_counted(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.kinds import byte_bpe

    byte_bpe().save_pretrained("model")
    (here / "model" / "config.json").write_bytes((here / "assets/tiny_llama/config.json").read_bytes())
    rows = [{"prompt": "lo", "completion": "w"}, {"prompt": "low ", "completion": "1"}]
    overrides = ["model=causal_lm", "model.checkpoint=model", "model.weights=random", "tokens=none"]
    text = said(capsys, *only(write_lines(here / "rows.jsonl", rows)), *overrides)
    assert "train: 1 row would be other tokens if prompt and completion were tokenised together" in text
    assert "rows.jsonl:1" in text


def test_dropped_rows_are_listed_by_reason_and_place(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": "x" * (40 if i % 10 == 3 else 4), "completion": "y"} for i in range(40)]
    file = write_lines(here / "rows.jsonl", rows)
    text = said(capsys, *only(file), "data.max_seq_length=20", "data.max_dropped_fraction=0.2", "data.overflow=drop")
    assert f"too long: {file}:4, {file}:14, {file}:24, {file}:34" in text


def test_one_micro_batch_is_measured_on_request(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "data.limit=64", "preflight.measure=true", "preflight.rows=0")
    assert "the widest micro-batch kept" in text
    report = json.loads((here / "outputs/default/preflight/preflight.json").read_text())
    saved = report["measured"]["activation_bytes"]
    assert saved == pytest.approx(report["memory"]["activations"], rel=0.02)
    assert list(report["time"]) == ["training", "evaluation", "generation"]
    assert all(part["seconds"] > 0 and not part["is_lower_bound"] for part in report["time"].values())


def test_what_is_wrong_is_told_as_by_a_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert preflight.main(["preflight.rowz=1", "optimizer.lrr=1"]) == 2
    told = capsys.readouterr().err
    assert "did you mean preflight.rows?" in told
    assert "did you mean optimizer.lr?" in told
    assert preflight.main([*QUIET, "preflight.dump=nowhere/rows.jsonl", "data.limit=3"]) == 2
    assert "nowhere/rows.jsonl can't be written: No such file" in capsys.readouterr().err
    assert preflight.main(["-m", "seed=1,2"]) == 2
    assert "looks at one run" in capsys.readouterr().err


def test_a_run_does_not_take_what_preflight_reads() -> None:
    from tests.test_gate import refusal

    assert "read by python -m src.preflight" in refusal("preflight.rows=1")


def test_colours_on_a_terminal_and_signs_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert Paint(io.StringIO())(Paint.THOUGHT, "a") == "{a}"
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert Paint(io.StringIO())(Paint.THOUGHT, "a\nb") == "\x1b[36ma\x1b[0m\n\x1b[36mb\x1b[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert Paint(io.StringIO())(Paint.PROMPT, "a") == "a"


def test_bars_count_every_row_once() -> None:
    lengths = np.array([5, 5, 6, 30, 104])
    lines = list(histogram(lengths, 30))
    assert sum(int(line.split()[-1]) for line in lines if "max_seq" not in line) + 1 == 5
    assert lines[0].startswith("  5–14")
    assert "1  ← data.max_seq_length 30" in lines[2]
    assert list(histogram(np.array([7, 7]), 50)) == ["7 ████████████████████████████████████████ 2"]


@pytest.mark.skipif(not GSM8K.is_file(), reason="the GSM8K file is not beside this checkout")
def test_gsm8k_from_the_command_line(tmp_path: Path) -> None:
    arguments = ["data=gsm8k", f"data.train_files=['{GSM8K}']", "data.max_seq_length=1000", "name=gsm8k_test"]
    arguments += ["preflight.rows=1", f"preflight.dump={tmp_path}/rows"]
    code = ForkedCommand(arguments, tmp_path / "printed", tmp_path / "err", main=preflight.main).wait(240)
    assert (code, (tmp_path / "err").read_text()) == (0, "")
    assert "7,099 of 7,099 rows" in (tmp_path / "printed").read_text()
    assert len((tmp_path / "rows").read_text().splitlines()) == 7099


def test_text_without_bos_is_proven_from_its_first_word(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.kinds import byte_bpe

    byte_bpe(bos=False).save_pretrained("model")
    (here / "model" / "config.json").write_bytes((here / "assets/tiny_llama/config.json").read_bytes())
    overrides = ["model=causal_lm", "model.checkpoint=model", "model.weights=random", "tokens=none", "data=text"]
    file = write_lines(here / "rows.jsonl", [{"text": f"a b c {i}"} for i in range(30)])
    text = said(capsys, *overrides, *only(file))
    assert "30 of 30 whole rows decode to their text" in text
    assert "error" not in text


def test_every_learned_turn_of_a_chat_is_proven(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b")) * 3]
    chat[3]["weight"] = 0  # type: ignore[assignment]
    file = write_lines(here / "rows.jsonl", [{"messages": chat}])
    text = said(capsys, "data=messages", *only(file))
    assert "1 of 1 whole rows decode to their text" in text
    assert text.count("[b]<</s>>") == 2


def test_a_wrong_mask_is_an_error(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from src.data.encoding import Encoder

    spans = Encoder._spans
    monkeypatch.setattr(
        Encoder, "_spans", lambda self, ids, learned: spans(self, ids, [(a - 1, b) for a, b in learned])
    )
    text = said(capsys, "data.limit=20", f"data.cache_dir={here}/cache", code=1)
    assert "error    train: in 20 rows the supervised ids" in text


def test_what_a_run_would_refuse_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert preflight.main([*QUIET, "data.limit=9", "data.max_seq_length=5000"]) == 2
    assert "has room for 1024 positions; data.max_seq_length = 5000 is more" in capsys.readouterr().err
    assert preflight.main([*QUIET, "data.limit=9", "generation.max_new_tokens=1020"]) == 2
    assert "do not fit into the model's 1024 positions" in capsys.readouterr().err


def test_eager_attention_keeps_its_matrix_in_the_forecast(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = {}
    for attention in ("sdpa", "eager"):
        said(capsys, "data.limit=9", f"model.attn_implementation={attention}", "preflight.measure=true")
        report = json.loads((here / "outputs/default/preflight/preflight.json").read_text())
        kept[attention] = report["memory"]["activations"]
        assert report["measured"]["activation_bytes"] == pytest.approx(kept[attention], rel=0.02)
    assert kept["eager"] > kept["sdpa"]


@pytest.fixture
def weights(here: Path) -> list[str]:
    """Overrides for a checkpoint with weights: the default model's shape."""
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained("assets/tiny_llama")).save_pretrained("tiny")
    AutoTokenizer.from_pretrained("assets/tiny_llama").save_pretrained("tiny")
    return ["model=causal_lm", "model.checkpoint=tiny", "data.limit=32", "preflight.rows=0"]


def forecasts(here: Path) -> dict[str, Any]:
    return json.loads((here / "outputs/default/preflight/preflight.json").read_text())


MATRICES = 3 * (4 * 128 * 128 + 3 * 128 * 384)  # three blocks of tiny_llama
OF_LORA = 3 * 16 * (4 * (128 + 128) + 3 * (128 + 384)) + 2 * 2 * 128  # r = 16, and two new rows in two matrices


def test_an_adapter_run_is_forecast_as_one(here: Path, weights: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, *weights, "adapter=lora")
    assert f"{OF_LORA:,} trained parameters x 4 B" in text
    found = forecasts(here)
    assert found["memory"]["parameters"] == 4 * (707_456 + OF_LORA)
    assert found["memory"]["optimizer state"] == 2 * 4 * OF_LORA
    assert found["disk"]["checkpoints"] == 3 * (3 * 4 * OF_LORA + SMALL_BYTES)  # of 2 epochs, and at a signal
    assert found["disk"]["best checkpoints"] == 4 * OF_LORA + SMALL_BYTES
    assert found["disk"]["adapter"] - 4 * OF_LORA < 10_000  # the tokenizer
    lora = found["memory"]["activations"]
    said(capsys, *weights, "adapter=lora", "model.gradient_checkpointing=true", "export.merge=true")
    again = forecasts(here)
    assert again["memory"]["activations"] < lora / 1.5
    assert again["disk"]["model"] > 4 * 707_456
    said(capsys, *weights)
    assert forecasts(here)["memory"]["activations"] > lora


def test_checkpoints_are_forecast_as_they_are_kept(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "data.limit=100", "checkpoint.checkpointing_steps=1", "checkpoint.newest_optimizer_only=true")
    bare = 4 * 707_456 + SMALL_BYTES
    resumable = bare + 2 * 4 * 707_456
    assert forecasts(here)["disk"]["checkpoints"] == 2 * resumable + bare
    assert "1 resumable of 8.2 MiB, 1 with weights only, of 2.8 MiB, and one more resumable while it is written" in text
    rows = ["data.train_files=['data/tow_addition/train.jsonl']", "data.validation_files=null"]
    text = said(capsys, "data.limit=100", *rows, "training.num_train_epochs=1")
    assert "2 resumable of 8.2 MiB\n" in text
    assert "best checkpoints" not in forecasts(here)["disk"]  # no validation set gives the metric


def test_a_disk_without_room_is_a_warning(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    full = SimpleNamespace(free=10 * 2**20)
    monkeypatch.setattr("src.forecast.disk.shutil.disk_usage", lambda place: full)
    text = said(capsys, "data.limit=100")
    assert "warning  the run may write 30." in text
    assert "and 10.0 MiB are free in" in text
    assert forecasts(here)["findings"][0]["level"] == "warning"


def test_a_qlora_run_is_forecast_with_its_weights_in_4_bits(
    here: Path, weights: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [*weights, "adapter=qlora", "optimizer=paged_adamw_32bit", "model.dtype=bfloat16"]
    text = said(capsys, *overrides, "preflight.measure=true")
    assert f"{MATRICES:,} in 4 bits, {MATRICES // 64:,} scales x 1 B" in text
    found = forecasts(here)
    of_4_bits = MATRICES // 2 + MATRICES // 64
    rest = 2 * (707_456 - MATRICES) + 4 * OF_LORA
    tables = found["memory"]["parameters"] - of_4_bits - rest
    assert 0 < tables < 21 * 1200  # of 21 layers: what the codes mean, and the scales of scales
    saved = found["measured"]["activation_bytes"]
    assert saved == pytest.approx(found["memory"]["activations"], rel=0.05)


def test_an_adapter_that_does_not_fit_is_refused(
    here: Path, weights: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert preflight.main([*QUIET, *weights, "adapter=lora", "adapter.target_modules=[q_projj]"]) == 2
    assert "did you mean q_proj?" in capsys.readouterr().err
