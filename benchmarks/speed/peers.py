"""transformers' Trainer and TRL's SFTTrainer, on the same weights and rows, and in the same batches unless packed.

Their own grouping by length sorts 50 batches at a time only where an epoch has 200 and more; with fewer it pads more
than on real data. So they are given the batches of Towline's.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from benchmarks.speed.measuring import StepSize, Stopwatch, draw_adapter
from benchmarks.speed.preparing import checkpoint_of, ids_file
from benchmarks.speed.workloads import Settings, Way, Workload

IGNORED = -100  # the label of what is not supervised
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "bias": "none", "target_modules": "all-linear"}
"""As conf/adapter/lora.yaml."""


def train(
    workload: Workload, way: Way, settings: Settings, folder: Path, batch_size: int, watch: Stopwatch
) -> list[StepSize]:
    """Train one epoch; return what each step has fed."""
    import datasets

    datasets.disable_progress_bars()
    checkpoint = checkpoint_of(workload, settings, folder)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = _model(workload, way, settings, checkpoint)
    with ids_file(folder, way.batching).open(encoding="utf-8") as lines:
        rows = datasets.Dataset.from_list([json.loads(line) for line in lines])
    with tempfile.TemporaryDirectory() as output:
        arguments = _arguments(workload, way, settings, batch_size, output)
        if way.trainer == "trl":
            from trl import SFTConfig, SFTTrainer

            config = SFTConfig(**arguments, max_length=workload.max_length, packing=way.batching == "packed")
            trainer = SFTTrainer(model, config, train_dataset=rows, processing_class=tokenizer)
        else:
            collator = DataCollatorForSeq2Seq(tokenizer, model=model if workload.is_encoder_decoder else None)
            classes: Any = (Trainer, TrainingArguments)
            if workload.is_encoder_decoder:
                classes = (Seq2SeqTrainer, Seq2SeqTrainingArguments)
            trainer = classes[0](model, classes[1](**arguments), data_collator=collator, train_dataset=rows)
        sizes, losses = _record(trainer)
        trainer.add_callback(_Watch(watch, losses))
        trainer.train()
    return sizes


def _record(trainer: Any) -> tuple[list[StepSize], list[torch.Tensor]]:
    """Have a trainer note the size of each batch that it collates, and the loss of each step, as they come."""
    sizes: list[StepSize] = []
    losses: list[torch.Tensor] = []
    collate, training_step = trainer.data_collator, trainer.training_step

    def noted_collate(rows: Any) -> Any:
        batch = collate(rows)
        is_pair = "decoder_input_ids" in batch
        num_tokens = sum(len(row["input_ids"]) + (len(row["labels"]) if is_pair else 0) for row in rows)
        num_supervised = int((batch["labels"] != IGNORED).sum())
        sizes.append(
            StepSize(num_tokens, num_supervised, batch["input_ids"].numel() + is_pair * batch["labels"].numel())
        )
        return batch

    def noted_step(*given: Any, **more: Any) -> torch.Tensor:
        losses.append(training_step(*given, **more))
        return losses[-1]

    trainer.data_collator, trainer.training_step = noted_collate, noted_step
    return sizes, losses


class _Watch(TrainerCallback):
    """Tells a stopwatch when a step is done."""

    def __init__(self, watch: Stopwatch, losses: list[torch.Tensor]) -> None:
        self._watch, self._losses = watch, losses

    def on_train_begin(self, *_given: Any, **_more: Any) -> None:
        self._watch.start()

    def on_step_end(self, _arguments: Any, state: Any, _control: Any, **_more: Any) -> None:
        self._watch.step(self._losses[-1], is_last=state.global_step >= state.max_steps)


def _model(workload: Workload, way: Way, settings: Settings, checkpoint: str) -> Any:
    auto: Any = AutoModelForSeq2SeqLM if workload.is_encoder_decoder else AutoModelForCausalLM
    kernels = {"attn_implementation": "flash_attention_2", "use_kernels": True} if way.has_kernels else {}
    model = auto.from_pretrained(checkpoint, dtype=getattr(torch, workload.dtype), **kernels)
    if workload.has_adapter:
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(**LORA, task_type="CAUSAL_LM"))
        draw_adapter(model, settings.seed)
    return model


def _arguments(workload: Workload, way: Way, settings: Settings, batch_size: int, output: str) -> dict[str, Any]:
    """Return the arguments of training that all peers share: those of conf/, as Towline's."""
    return {
        "output_dir": output,
        "num_train_epochs": 1,
        "per_device_train_batch_size": batch_size,
        "train_sampling_strategy": "sequential",
        "learning_rate": workload.lr,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "weight_decay": 0.01,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-8,
        "max_grad_norm": 1.0,
        "seed": settings.seed,
        "bf16": settings.mixed_precision == "bf16",
        "use_cpu": settings.device == "cpu",
        "activation_checkpointing": way.computes_twice,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
