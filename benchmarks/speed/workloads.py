"""What is measured: workloads, and ways to train them. No torch here: the peak memory of the process that starts others
is where theirs begins."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Texts = Literal["thoughts", "plain", "prompt_heavy", "long"]
"""Rows, made of questions and answers: see texts.py."""
Trainer = Literal["towline", "bare", "transformers", "trl"]
Batching = Literal["padded", "length_grouped", "packed"]


@dataclass(frozen=True)
class Workload:
    """A model, its rows and how many of them are a step. Without `architecture` the model is --checkpoint's."""

    name: str
    about: str
    architecture: Literal["llama", "bart"] | None
    texts: Texts
    batch_size: int
    max_length: int
    steps: int  # by default
    width: int = 256
    num_layers: int = 4  # of an encoder-decoder half of them in each
    num_vocabulary: int = 32_768  # rows of the embedding matrix, which is tied
    has_adapter: bool = False
    lr: float = 1e-3
    dtype: str = "float32"
    needs_gpu: bool = False

    @property
    def is_encoder_decoder(self) -> bool:
        return self.architecture == "bart"

    @property
    def has_thoughts(self) -> bool:
        return self.texts == "thoughts"


WORKLOADS = {
    one.name: one
    for one in (
        Workload("small", "Llama 256 x 4, thoughts", "llama", "thoughts", 8, 1024, 24),
        Workload("medium", "Llama 512 x 8, thoughts", "llama", "thoughts", 8, 1024, 12, width=512, num_layers=8),
        Workload("prompt_heavy", "Llama 256 x 4, prompts are 85 % of the tokens", "llama", "prompt_heavy", 4, 2048, 12),
        Workload("long", "Llama 256 x 4, rows of 2,048 tokens", "llama", "long", 2, 2048, 12),
        Workload("seq2seq", "BART 256 x 4", "bart", "plain", 8, 1024, 24),
        Workload("lora", "Llama 512 x 8, LoRA", "llama", "thoughts", 8, 1024, 12, 512, 8, has_adapter=True),
        Workload("real", "the checkpoint, all weights", None, "plain", 4, 1024, 8, lr=2e-5),
        Workload("real_lora", "the checkpoint, LoRA", None, "plain", 4, 1024, 8, has_adapter=True, lr=2e-4),
        Workload(
            "llama_1b",
            "Llama 3.2 1B's shape, random weights in bfloat16",
            "llama",
            "thoughts",
            16,
            1024,
            24,
            width=2048,
            num_layers=16,
            num_vocabulary=128_256,
            lr=2e-5,
            dtype="bfloat16",
            needs_gpu=True,
        ),
    )
}


@dataclass(frozen=True)
class Way:
    """A trainer and how it makes batches."""

    name: str
    about: str
    trainer: Trainer
    batching: Batching = "padded"
    has_kernels: bool = False  # the hub's kernels and FlashAttention
    computes_twice: bool = False  # blocks are computed again in backward: activation checkpointing, TRL's default

    @property
    def is_peer(self) -> bool:
        return self.trainer in ("transformers", "trl")

    @property
    def follows_order(self) -> bool:
        """Whether it feeds the batches in the order of the others that batch so: then their losses agree."""
        return self.batching != "packed"

    @property
    def packages(self) -> tuple[str, ...]:
        trl = ("trl",) if self.trainer == "trl" else ()
        return (*trl, "kernels", "flash_attn") if self.has_kernels else trl

    def goes_with(self, workload: Workload, device: str) -> bool:
        """Return whether it can train a workload on a device: "cpu" or "cuda"."""
        if workload.is_encoder_decoder and (self.trainer == "trl" or self.batching == "packed"):
            return False
        return device == "cuda" or not self.has_kernels


WAYS = {
    one.name: one
    for one in (
        Way("towline", "Towline, padded", "towline"),
        Way("towline_grouped", "Towline, length_grouped", "towline", "length_grouped"),
        Way("towline_packed", "Towline, packed", "towline", "packed"),
        Way("towline_kernels", "Towline, packed, with kernels", "towline", "packed", has_kernels=True),
        Way("bare", "bare loop, Towline's batches and head", "bare"),
        Way("trainer", "transformers Trainer", "transformers"),
        Way("trainer_grouped", "transformers Trainer, by length", "transformers", "length_grouped"),
        Way("trl_default", "TRL SFTTrainer, its defaults", "trl", computes_twice=True),
        Way("trl", "TRL SFTTrainer", "trl"),
        Way("trl_grouped", "TRL SFTTrainer, by length", "trl", "length_grouped"),
        Way("trl_packed", "TRL SFTTrainer, packed", "trl", "packed"),
        Way("trl_kernels", "TRL SFTTrainer, packed, with kernels", "trl", "packed", has_kernels=True),
    )
}


@dataclass(frozen=True)
class Settings:
    """What holds for all measurements of a command."""

    device: str  # cpu or cuda
    mixed_precision: str  # no or bf16
    warm_up: int  # steps that are not measured
    steps: int | None  # measured ones of padded batches; None: the workload's own number
    rows_file: str | None  # JSONL with question and answer; None: they are made up
    checkpoint: str | None  # of the workloads that have no architecture
    overrides: Sequence[str] = ()  # of Towline's configuration
    seed: int = 42

    def num_rows(self, workload: Workload) -> int:
        """Return how many rows every way trains, once each."""
        return workload.batch_size * (self.warm_up + (self.steps or workload.steps))


def missing_packages(way: Way) -> list[str]:
    """Return the packages that a way needs and this environment lacks."""
    return [name for name in way.packages if importlib.util.find_spec(name) is None]
