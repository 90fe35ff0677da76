"""What training.mixed_precision=auto is: bf16 where the device is fast at it, by what it is, not by a clock."""

from dataclasses import replace

import torch

from src.config.schema import Device, MixedPrecision, RunConfig

BF16_UNITS = ("amx_bf16", "bf16")
"""Capabilities of a processor that multiplies matrices in bf16, as torch names them; "bf16" is ARM's. avx512_bf16
multiplies vectors, which took 1.8 times as long as float32 on an Intel Xeon (docs/decisions/0046)."""
FIRST_WITH_BF16 = (8, 0)
"""Compute capability of the first NVIDIA GPUs that compute in bf16; torch emulates it on older ones."""


def device_of(config: RunConfig) -> torch.device:
    """Return the device that a run computes on here."""
    on_gpu = config.runtime.device is not Device.cpu and torch.cuda.is_available()
    return torch.device("cuda" if on_gpu else "cpu")


def computes_bf16(device: torch.device) -> bool:
    """Return whether a device has units for products of matrices in bf16."""
    if device.type != "cuda":
        found = torch.cpu.get_capabilities()
        return any(found.get(unit) for unit in BF16_UNITS)
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= FIRST_WITH_BF16


def choose_precision(device: torch.device) -> MixedPrecision:
    """Return what training.mixed_precision=auto is on a device."""
    return MixedPrecision.bf16 if computes_bf16(device) else MixedPrecision.no


def with_precision(config: RunConfig, chosen: str | None = None) -> RunConfig:
    """Return a configuration whose precision is not auto: `chosen`, what it was before, else what fits the device."""
    if config.training.mixed_precision is not MixedPrecision.auto:
        return config
    precision = choose_precision(device_of(config)) if chosen is None else MixedPrecision(chosen)
    return replace(config, training=replace(config.training, mixed_precision=precision))


def about_frozen_weights(config: RunConfig, weights: torch.dtype) -> list[str]:
    """Return a hint where frozen weights are cast in every forward, of which autocast keeps the trained ones only."""
    is_mixed = config.training.mixed_precision is MixedPrecision.bf16
    if not (is_mixed and config.adapter.is_on and weights is torch.float32) or config.quantization.is_on:
        return []
    text = "the frozen weights are float32, and cast to bf16 in every forward: model.dtype=bfloat16 saves that"
    return [f"{text}, and half of their memory"]
