"""What each process holds under every `deepspeed` option, by preflight's forecast, as the table of docs/processes.md.

Run with `python -m benchmarks.zero_memory`; nothing is measured or loaded: micro-batches are computed on fake tensors,
by the kernels of a CPU, which keep about what a GPU's keep.
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from src.config.gate import admit
from src.errors import TowlineError
from src.forecast.counting import MicroBatchShape, TrainingCount, counted
from src.forecast.memory import memory_forecast
from src.forecast.parameters import parameters_of
from src.inspection.run_forecast import sharding_of

SIZES = {  # as Llama 3.2 1B and 3B, Llama 2 7B and 70B
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128_256, "tie_word_embeddings": True},
    "3B": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
           "num_key_value_heads": 8, "vocab_size": 128_256, "tie_word_embeddings": True},
    "7B": {"hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 32, "vocab_size": 32_000},
    "70B": {"hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80, "num_attention_heads": 64,
            "num_key_value_heads": 8, "vocab_size": 32_000},
}  # fmt: skip
CPU = torch.device("cpu")
OPTIONS = ("none", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")


def gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.0f}" if num_bytes >= 1e10 else f"{num_bytes / 1e9:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--seq", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--batch", type=int, default=1, help="rows of a micro-batch")
    given = parser.parse_args()
    shape = MicroBatchShape(given.batch, given.seq, num_supervised=given.batch * (given.seq - 1))
    steps: dict[tuple[str, bool], TrainingCount] = {}
    print(f"GB (10^9 bytes) of each of {given.processes} processes: GPU, and + what lies in the CPU's memory")
    print("| `deepspeed=` | " + " | ".join(SIZES) + " |")
    print("|---|" + "---:|" * len(SIZES))
    for option in OPTIONS:
        overrides = [f"deepspeed={option}", f"runtime.num_processes={given.processes}"]
        overrides += ["training.mixed_precision=bf16", "model.gradient_checkpointing=true"]
        try:
            admitted = admit(overrides).run
        except TowlineError as error:  # offload needs a compiler
            raise SystemExit(str(error)) from error
        assert admitted is not None
        config = admitted.config
        sharding = sharding_of(config)
        cells = []
        for name, shapes in SIZES.items():
            settings = LlamaConfig(max_position_embeddings=given.seq, attn_implementation="sdpa", **shapes)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
            parameters = parameters_of(model)
            is_bf16 = sharding is not None and sharding.is_bf16
            if (name, is_bf16) not in steps:
                model.activation_checkpointing_enable({"use_reentrant": False})
                autocast = None if is_bf16 else torch.bfloat16
                with counted(model.bfloat16() if is_bf16 else model, config.loss, CPU, autocast) as counter:
                    steps[name, is_bf16] = counter.count_training(shape, 1 if sharding is None else 2)
            found = memory_forecast(
                parameters, config.optimizer, shape, steps[name, is_bf16], device_type="cuda", sharding=sharding
            )
            beside = sum(part.bytes or 0 for part in found.on_cpu)
            cells.append(gigabytes(found.total.bytes or 0) + (f" + {gigabytes(beside)}" if beside else ""))
        print(f"| `{option}` | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
