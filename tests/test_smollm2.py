"""On a real pretrained chat model: templates, ids, rows that were never learned, adapters that are merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from src.data.dataset import build_data
from src.data.sets import EncodedSet
from src.data.tokenizer import load_tokenizer
from src.inspection.findings import answer_scorer, prove
from tests.chat_templates import FAMILIES
from tests.conftest import admitted, read_lines, towline, write_lines
from tests.test_families import ANSWER, NO_SYSTEM, assert_full_marks, marks, row

pytestmark = pytest.mark.slow


def with_template(smollm2: Path, folder: Path, template: str) -> Path:
    """Make a folder with the model's files and another chat template."""
    folder.mkdir()
    for file in smollm2.iterdir():
        if file.name != "chat_template.jinja":
            (folder / file.name).symlink_to(file)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_right_answers_get_full_marks(smollm2: Path, tmp_path: Path, family: str) -> None:
    """Most marks of these templates are ordinary text for this tokenizer."""
    template, _ = FAMILIES[family]
    model = with_template(smollm2, tmp_path / "model", template)
    systems = (False,) if family in NO_SYSTEM else (False, True)
    rows = [row(turns=n, system=system, thought="none") for n in (1, 2) for system in systems]
    file = write_lines(tmp_path / "rows.jsonl", rows)
    config = admitted(
        "model=causal_lm", f"model.checkpoint={model}", "tokens=none", "data=messages",
        f"data.train_files=['{file}']", "data.cache_dir=null", "evaluation.metrics=[exact_match,rouge2,chrf,bleu]",
    ).config  # fmt: skip
    tokenizer, _ = load_tokenizer(config.model, config.tokens)
    data = build_data(config, tokenizer)
    found, references = marks(data)
    assert_full_marks(found)
    assert set(references) == {ANSWER}
    assert isinstance(data.train, EncodedSet)
    proof = prove(data.train, answer_scorer(config, data))
    assert (proof.low_scoring, proof.altered, proof.wrong_mask) == ([], [], [])


def test_a_trained_model_of_a_thinking_template_scores_its_right_answers(smollm2: Path, tmp_path: Path) -> None:
    """Four rows learned by heart: what is generated has the empty thought block, and still is right."""
    model = with_template(smollm2, tmp_path / "model", FAMILIES["Qwen 3"][0])
    rivers = {"Vienna": "Danube", "Cairo": "Nile", "Rome": "Tiber", "Bonn": "Rhine"}
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Name the river of {city}."},
                {"role": "assistant", "content": river},
            ]
        }
        for city, river in rivers.items()
    ]
    file = write_lines(tmp_path / "rows.jsonl", rows)
    done = towline(
        "tracking=none", "model=causal_lm", f"model.checkpoint={model}", "tokens=none", "data=messages",
        f"data.train_files=['{file}']", f"data.validation_files=['{file}']", "data.cache_dir=null", "adapter=lora",
        "optimizer.lr=2e-3", "scheduler=constant", "training.max_train_steps=12", "generation.max_new_tokens=24",
        "training.per_device_train_batch_size=4", "evaluation.metrics=[exact_match,rouge1]", "export.merge=true",
        f"hydra.run.dir={tmp_path}/run",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["eval/validation/exact_match"] == summary["eval/validation/rouge1"] == 1
    sample = read_lines(tmp_path / "run" / "samples.jsonl")[-1]
    assert sample["text"].startswith("<think>")
    assert sample["answer"] == sample["reference"]
    assert "merging changes" not in done.stderr
    assert not (tmp_path / "run" / "model" / "adapter_config.json").exists()


def test_new_tokens_get_ids_of_their_own_where_the_vocabulary_has_holes(smollm2: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in smollm2.iterdir():
        if file.name != "tokenizer.json":
            (model / file.name).symlink_to(file)
    spec: dict[str, Any] = json.loads((smollm2 / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary, merges = spec["model"]["vocab"], spec["model"]["merges"]
    pairs = [merge if isinstance(merge, list) else merge.split(" ") for merge in merges]
    parts = {part for pair in pairs for part in pair}
    gone = [token for token, _ in sorted(vocabulary.items(), key=lambda item: -item[1]) if token not in parts][5:10]
    spec["model"]["vocab"] = {token: i for token, i in vocabulary.items() if token not in gone}
    spec["model"]["merges"] = [m for m, pair in zip(merges, pairs, strict=True) if "".join(pair) not in gone]
    Tokenizer.from_str(json.dumps(spec)).save(str(model / "tokenizer.json"))
    config = admitted("model=causal_lm", f"model.checkpoint={model}", "tokens=tow").config
    tokenizer, new = load_tokenizer(config.model, config.tokens)
    assert new.added == {"<ToW>": 49_152, "</ToW>": 49_153}
    ids = list(tokenizer.get_vocab().values())
    assert len(ids) == len(set(ids)) == len(tokenizer) == 49_149
    assert not {vocabulary[token] for token in gone} & set(ids)
    assert tokenizer("a<ToW>b", add_special_tokens=False)["input_ids"][1] == 49_152
