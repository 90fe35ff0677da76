"""The model, the rows and their order, made once for all ways of a workload."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from tokenizers import processors
from transformers import BartConfig, BartForConditionalGeneration, LlamaConfig, LlamaForCausalLM

from assets.make_bpe_model import EOS, train_tokenizer
from benchmarks.speed import texts
from benchmarks.speed.machine import RowLength, training_flops
from benchmarks.speed.workloads import Settings, Workload
from src.config.gate import admit
from src.config.schema import RunConfig
from src.data.batching import Window, windows
from src.data.dataset import build_data
from src.data.sets import EncodedSet
from src.data.tokenizer import load_tokenizer
from src.model.adapters import add_adapter
from src.model.build import empty_model
from src.training.state import build_batch_sampler

TOKENIZER_ROWS, TOKENIZER_SIZE = 4000, 8192
HEAD_WIDTH = 64
TAGS = ["<ToW>", "</ToW>"]
ORDERS = ("padded", "length_grouped")


@dataclass(frozen=True)
class Facts:
    """What is known of a workload's rows before they are trained on."""

    num_parameters: int
    num_rows: int
    num_tokens: int
    num_supervised: int
    flops_per_token: float
    packs_per_step: int  # of max_length tokens, which are as many as the rows of a padded step have

    @classmethod
    def read(cls, folder: Path) -> Self:
        return cls(**json.loads((folder / "facts.json").read_text(encoding="utf-8")))


def prepare(workload: Workload, settings: Settings, folder: Path) -> None:
    """Write the model, the rows as text and as ids in Towline's orders, and the facts, into a folder."""
    source = texts.pairs(settings.rows_file, settings.seed)
    if workload.architecture is not None:
        _make_model(workload, list(islice(source, TOKENIZER_ROWS)), settings, folder / "model")
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for row in islice(texts.rows(workload.texts, source), settings.num_rows(workload)):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    for batching in ORDERS:
        config = configure(workload, settings, folder, batching, workload.batch_size)
        rows = encoded(config)
        with ids_file(folder, batching).open("w", encoding="utf-8") as file:
            for window in epoch(rows, config):
                for [index] in window.micro_batches[0][1]:
                    file.write(json.dumps(_ids(rows, index)) + "\n")
    facts = _facts(workload, config, rows)
    (folder / "facts.json").write_text(json.dumps(dataclasses.asdict(facts)), encoding="utf-8")


def ids_file(folder: Path, batching: str) -> Path:
    """Return the file of a workload's rows for the peers, in the order of Towline's padded or grouped batches."""
    return folder / f"ids-{batching if batching in ORDERS else ORDERS[0]}.jsonl"


def _make_model(workload: Workload, pairs: Sequence[texts.Pair], settings: Settings, folder: Path) -> None:
    """Write a model with random weights and a tokenizer of the rows' language, which has the tags already."""
    tokenizer = train_tokenizer([text for pair in pairs for text in pair], TOKENIZER_SIZE)
    if workload.is_encoder_decoder:
        ends = [(EOS, tokenizer.eos_token_id)]
        tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
            single=f"$A {EOS}", pair=f"$A {EOS} $B:1 {EOS}:1", special_tokens=ends
        )
    if workload.has_thoughts:
        tokenizer.add_special_tokens({"additional_special_tokens": TAGS})
    torch.manual_seed(settings.seed)
    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id}
    ids["eos_token_id"] = tokenizer.eos_token_id
    heads = max(1, workload.width // HEAD_WIDTH)
    common: dict[str, Any] = {"vocab_size": workload.num_vocabulary, "max_position_embeddings": 2048, **ids}
    model: Any
    if workload.is_encoder_decoder:
        layers, wide = workload.num_layers // 2, 4 * workload.width
        model = BartForConditionalGeneration(
            BartConfig(
                **common,
                d_model=workload.width,
                encoder_layers=layers,
                decoder_layers=layers,
                encoder_attention_heads=heads,
                decoder_attention_heads=heads,
                encoder_ffn_dim=wide,
                decoder_ffn_dim=wide,
                dropout=0.0,
                decoder_start_token_id=tokenizer.eos_token_id,
                forced_eos_token_id=None,
            )
        )
    else:
        model = LlamaForCausalLM(
            LlamaConfig(
                **common,
                hidden_size=workload.width,
                intermediate_size=3 * workload.width,
                num_hidden_layers=workload.num_layers,
                num_attention_heads=heads,
                num_key_value_heads=heads,
                tie_word_embeddings=True,
            )
        )
    tokenizer.save_pretrained(folder)
    model.to(getattr(torch, workload.dtype)).save_pretrained(folder)


def checkpoint_of(workload: Workload, settings: Settings, folder: Path) -> str:
    return str(settings.checkpoint) if workload.architecture is None else str(folder / "model")


def configure(
    workload: Workload, settings: Settings, folder: Path, batching: str, batch_size: int, *, has_kernels: bool = False
) -> RunConfig:
    """Return Towline's configuration of a workload: one epoch of its rows."""
    overrides = [
        f"model={'encoder_decoder' if workload.is_encoder_decoder else 'causal_lm'}",
        f"model.checkpoint='{checkpoint_of(workload, settings, folder)}'",
        f"model.dtype={workload.dtype}",
        f"adapter={'lora' if workload.has_adapter else 'none'}",
        *(["tokens=tow", "data.thought_pattern='<<(.*?)>>'"] if workload.has_thoughts else ["tokens=none"]),
        "data=prompt_completion",
        f"data.train_files=['{folder / 'rows.jsonl'}']",
        f"data.cache_dir='{folder / 'cache'}'",
        f"data.max_seq_length={workload.max_length}",
        f"data.max_target_length={workload.max_length}",
        f"data.batching={batching}",
        f"optimizer.lr={workload.lr}",
        "scheduler=constant",
        "tracking=none",
        "evaluation.eval_steps=null",
        f"seed={settings.seed}",
        f"runtime.device={settings.device}",
        f"training.mixed_precision='{settings.mixed_precision}'",
        f"training.per_device_train_batch_size={batch_size}",
        "training.num_train_epochs=1",
        *(["model.kernels=true", "model.attn_implementation=flash_attention_2"] if has_kernels else []),
        *settings.overrides,
    ]
    request = admit(overrides)
    assert request.run is not None
    return request.run.config


def encoded(config: RunConfig) -> EncodedSet:
    """Return the rows to train on, encoded, from the cache where they are there."""
    tokenizer, _ = load_tokenizer(config.model, config.tokens)
    rows = build_data(config, tokenizer).train
    assert isinstance(rows, EncodedSet)
    return rows


def epoch(rows: EncodedSet, config: RunConfig) -> Iterator[Window]:
    """Yield the steps of the first epoch."""
    for window in windows(rows, build_batch_sampler(config, rows), config.seed):
        yield window
        if window.ends_epoch:
            return


def _ids(rows: EncodedSet, index: int) -> dict[str, list[int]]:
    """Return what the peers are given of a row: input_ids and labels, none of which are shifted."""
    row = rows[index]
    return {"input_ids": row.input_ids.tolist(), "labels": row.labels.tolist()}


def _facts(workload: Workload, config: RunConfig, rows: EncodedSet) -> Facts:
    columns = (rows.lengths, rows.target_lengths, rows.supervised_lengths())
    each = [RowLength(*row) for row in np.stack(columns, axis=1).tolist()]
    model = empty_model(config.model)
    add_adapter(model, config)
    packs = workload.batch_size * float(np.mean(rows.lengths)) / workload.max_length
    return Facts(
        num_parameters=sum(p.numel() for p in model.parameters()),
        num_rows=len(rows),
        num_tokens=rows.num_tokens,
        num_supervised=sum(row.supervised for row in each),
        flops_per_token=training_flops(model, each) / rows.num_tokens,
        packs_per_step=max(1, round(packs)),
    )
