"""What a run's training, evaluation and generation hold and compute, counted on fake tensors."""

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from src.config.schema import MixedPrecision, RunConfig, ZeroConfig
from src.forecast.counting import ForwardCount, ModelCounter, TrainingCount, UncountableError, counted
from src.inspection.workload import Workload, mean_shape, widest_of

AUTOCAST = {MixedPrecision.bf16: torch.bfloat16, MixedPrecision.fp16: torch.float16}


@dataclass
class Counts:
    """What was counted of a run's work; `reason` says why not, where the model can't be."""

    step: TrainingCount | None = None
    reason: str = ""
    instead: list[tuple[str, ForwardCount]] = field(default_factory=list)  # peaks of moments that are not training
    flops: dict[str, float] = field(default_factory=dict)  # operations of all that one process does, by part of the run


def count_work(config: RunConfig, model: Any, work: Workload, device: torch.device) -> Counts:
    """Count training, evaluation and generation.

    Args:
        model: on the meta device, with quantised layers and the adapter.
    """
    counts = Counts()
    if starts_from_values(config):
        counts.reason = "DoRA on weights in 4 bits starts from their values"
        return counts
    autocast = AUTOCAST.get(config.training.mixed_precision)
    if config.model.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    is_sharded = isinstance(config.deepspeed, ZeroConfig)
    if is_sharded and autocast is torch.bfloat16:
        model, autocast = model.to(torch.bfloat16), None
    try:
        with counted(model, config.loss, device, autocast) as counter:
            _count_training(counter, counts, work, 2 if is_sharded else config.training.gradient_accumulation_steps)
            _count_evaluation(counter, counts, work)
            _count_generation(counter, counts, work, config)
    except UncountableError as error:
        counts.reason = str(error)
    counts.flops = {part: flops / config.runtime.world_size for part, flops in counts.flops.items()}
    return counts


def starts_from_values(config: RunConfig) -> bool:
    """Return whether PEFT needs the values of quantised weights to put the adapter in."""
    return config.quantization.load_in_4bit and config.lora is not None and config.lora.use_dora


def _count_training(counter: ModelCounter, counts: Counts, work: Workload, accumulation: int) -> None:
    counts.step = usual = counter.count_training(work.widest, accumulation)
    if (mean := mean_shape(work.shapes)) != work.widest:
        usual = counter.count_training(mean)
    counts.flops["training"] = work.num_micro_batches * usual.flops


def _count_evaluation(counter: ModelCounter, counts: Counts, work: Workload) -> None:
    """Count the losses of all evaluations, and the most that one of their batches holds."""
    count = cache(counter.count_evaluation)
    most, flops = ForwardCount(0, 0), 0.0
    if work.evaluations:
        most = count(widest_of(shape for one in work.evaluations for shape in one.shapes))
    for one in work.evaluations:
        flops += one.times * len(one.shapes) * count(mean_shape(one.shapes)).flops
    counts.instead.append(("evaluation", most))
    counts.flops["evaluation"] = flops


def _count_generation(counter: ModelCounter, counts: Counts, work: Workload, config: RunConfig) -> None:
    """Count all texts as of a mean prompt, and what a batch of the longest prompts holds."""
    if (texts := work.generation) is None:
        return
    new, batch = config.generation.max_new_tokens, texts.batch * (config.generation.num_beams or 1)
    most = counter.count_generation(batch, texts.longest_prompt, new)
    each = most.flops / batch
    if texts.mean_prompt != texts.longest_prompt:
        each = counter.count_generation(1, texts.mean_prompt, new).flops
    counts.instead.append(("generation", most))
    counts.flops["generation"] = each * texts.num_texts
