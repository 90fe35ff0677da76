"""Towline's loop beside transformers' Trainer: the same model, rows, batch and optimizer, in turn, in one process.

    python -m benchmarks.throughput [--steps 40] [--rounds 3] [--vocabulary 264] [KEY=VALUE …]

Prints seconds a step of both, round by round, and their ratio. `--vocabulary 32000` shows what logits for supervised
positions only are worth on a vocabulary of the usual size. Not a test: times differ from machine to machine.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

from src.config.gate import admit
from src.config.schema import RunConfig
from src.data.batching import collate
from src.data.dataset import Data, build_data
from src.data.sets import EncodedSet
from src.data.tokenizer import load_tokenizer
from src.runtime.session import start_runtime
from src.runtime.signals import StopRequest
from src.tokens import num_token_ids
from src.training.loop import train
from src.training.state import build_train_state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="other settings, KEY=VALUE as for src.run")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vocabulary", type=int, help="rows of the embedding matrices; else as many as tokens need")
    given = parser.parse_args()
    fixed = ["tracking=none", f"training.max_train_steps={given.steps}", "runtime.device=cpu"]
    request = admit([*fixed, *given.overrides])
    assert request.run is not None
    config = request.run.config
    tokenizer, _ = load_tokenizer(config.model, config.tokens)
    data = build_data(config, tokenizer)
    vocabulary = given.vocabulary or 8 * math.ceil(num_token_ids(tokenizer) / 8)
    ratios = []
    for number in range(given.rounds):
        ours = towline(config, data, vocabulary) / given.steps
        theirs = trainer(config, data, vocabulary, given.steps) / given.steps
        ratios.append(theirs / ours)
        print(f"round {number + 1}: Towline {ours:.4f} s/step, Trainer {theirs:.4f} s/step, ratio {ratios[-1]:.2f}")
    print(f"Trainer / Towline, median of {given.rounds}: {statistics.median(ratios):.2f}")


def model_of(config: RunConfig, vocabulary: int) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config.model.checkpoint, vocab_size=vocabulary))


def towline(config: RunConfig, data: Data, vocabulary: int) -> float:
    """Give the seconds that Towline's loop spends in its steps."""
    with start_runtime(config.runtime, config.training.mixed_precision, config.seed, StopRequest()) as runtime:
        state = build_train_state(model_of(config, vocabulary), data.train, config, runtime)
        for _ in train(state, data.train, config, runtime, pad_token_id=0):
            pass
        return state.train_seconds


def trainer(config: RunConfig, data: Data, vocabulary: int, steps: int) -> float:
    """Give the seconds that Trainer spends from its first step to its last."""

    def together(rows: list[int]) -> dict[str, torch.Tensor]:
        assert isinstance(data.train, EncodedSet)
        batch = collate(data.train, [[row] for row in rows], pad_token_id=0)
        return {"input_ids": batch.input_ids, "labels": batch.labels}

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=config.training.per_device_train_batch_size,
            learning_rate=config.optimizer.lr,
            optim="adamw_torch_fused",
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=config.training.logging_steps,
            dataloader_pin_memory=False,
        )
        assert isinstance(data.train, EncodedSet)
        rows: Any = list(range(len(data.train)))
        run = Trainer(model_of(config, vocabulary), arguments, train_dataset=rows, data_collator=together)
        started = time.perf_counter()
        run.train()
        return time.perf_counter() - started


if __name__ == "__main__":
    main()
